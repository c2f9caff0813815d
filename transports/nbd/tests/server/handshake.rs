//! What is said before transmission: options that are unknown, too long or make no sense, exports that are not there,
//! contexts that were selected for something else, and the two ways without a handshake or without words.

use std::sync::Arc;

use r3map_nbd::wire::{
    ClientOption, Command, Errno, Framing, Info, InfoRequest, InfoType, MetaRequest, OptionCode, OptionReply,
    ReplyError, Text, TransmissionFlags,
};
use r3map_nbd::{ServerExport, ServerSettings};
use r3map_testkit::store::Store;
use tokio::net::UnixStream;

use crate::support::{Raw, Running, filled, memory, request};

fn text(text: &str) -> Text {
    Text::new(text).unwrap()
}

fn error_of(replies: &[OptionReply]) -> ReplyError {
    match replies {
        [OptionReply::Error { error, message }] => {
            assert!(!message.is_empty(), "{error} says nothing");
            *error
        }
        other => panic!("{other:?}"),
    }
}

fn info(name: &str) -> InfoRequest {
    InfoRequest { name: text(name), wanted: vec![] }
}

fn allocation(name: &str) -> MetaRequest {
    MetaRequest { name: text(name), queries: vec![text("base:allocation")] }
}

async fn greeted(running: &Running) -> Raw {
    let mut raw = Raw { stream: running.connect().await, framing: Framing::Simple };
    raw.greet().await;
    raw
}

#[tokio::test]
async fn refused_options_are_answered_and_the_haggling_goes_on() {
    let running = Running::one(memory(5000, 1)).await;
    let mut raw = greeted(&running).await;
    for (option, error) in [
        (ClientOption::Unknown(4), ReplyError::Unsupported),
        (ClientOption::Unknown(0xffff_ffff), ReplyError::Unsupported),
        (ClientOption::StartTls, ReplyError::Policy),
        (ClientOption::Info(info("x")), ReplyError::UnknownExport),
        (ClientOption::Go(info("x")), ReplyError::UnknownExport),
        (ClientOption::SetMetaContext(allocation("disk")), ReplyError::Invalid),
        (ClientOption::ListMetaContext(allocation("disk")), ReplyError::Invalid),
    ] {
        assert_eq!(error_of(&raw.option(&option).await), error, "{option:?}");
    }
    for (code, data, error) in [
        (OptionCode::List, &b"data"[..], ReplyError::Invalid),
        (OptionCode::Go, &[0, 0, 0, 99, 0, 0], ReplyError::Invalid),
        (OptionCode::StructuredReply, &[0], ReplyError::Invalid),
        (OptionCode::Unknown(77), &[0; 70_000], ReplyError::Unsupported),
        (OptionCode::Go, &[0; 1_000_000], ReplyError::TooBig),
    ] {
        assert_eq!(error_of(&raw.option_with(code, data).await), error, "{code:?}");
    }
    raw.go().await;
    assert_eq!(raw.ask(request(Command::Read, 1, 10, 20), &[]).await.unwrap(), filled(5000, 1)[10..30]);
}

#[tokio::test]
async fn abort_is_acknowledged_and_ends_it() {
    let running = Running::one(memory(5000, 1)).await;
    let mut raw = greeted(&running).await;
    assert_eq!(raw.option(&ClientOption::Abort).await, [OptionReply::Ack]);
    assert!(raw.is_closed().await);
    running.is_left().await;
}

#[tokio::test]
async fn an_export_name_without_an_export_ends_it() {
    let running = Running::one(memory(5000, 1)).await;
    let mut raw = greeted(&running).await;
    assert!(raw.export_name("x").await.is_none());
    let mut raw = greeted(&running).await;
    let reply = raw.export_name("disk").await.unwrap();
    assert_eq!(reply.size, 5000);
    assert!(reply.flags.contains(TransmissionFlags::CAN_MULTI_CONN | TransmissionFlags::SEND_FUA));
    assert_eq!(raw.ask(request(Command::Read, 1, 10, 20), &[]).await.unwrap(), filled(5000, 1)[10..30]);
    let mut raw = greeted(&running).await;
    assert_eq!(raw.option(&ClientOption::ExtendedHeaders).await, [OptionReply::Ack]);
    assert!(raw.export_name("disk").await.is_none(), "with extended headers only GO will do");
}

#[tokio::test]
async fn info_tells_what_was_asked_for() {
    let mut export = ServerExport::new("disk", memory(5000, 1));
    export.description = "a disk".to_owned();
    let running = Running::start(vec![export], ServerSettings::default()).await;
    let mut raw = greeted(&running).await;
    let wanted = [InfoType::Name, InfoType::Description, InfoType::BlockSize, InfoType::Unknown(99)];
    let replies = raw.option(&ClientOption::Info(InfoRequest { name: text(""), wanted: wanted.into() })).await;
    let [export, name, description, sizes, OptionReply::Ack] = &replies[..] else { panic!("{replies:?}") };
    assert!(matches!(export, OptionReply::Info(Info::Export { size: 5000, .. })));
    assert_eq!(name, &OptionReply::Info(Info::Name(text("disk"))));
    assert_eq!(description, &OptionReply::Info(Info::Description(text("a disk"))));
    let OptionReply::Info(Info::BlockSize(sizes)) = sizes else { panic!("{sizes:?}") };
    assert_eq!(sizes.check().unwrap().minimum, 1);
    // With the same parameters, GO tells the same.
    let again = raw.option(&ClientOption::Go(InfoRequest { name: text(""), wanted: wanted.into() })).await;
    assert_eq!(again, replies);
}

#[tokio::test]
async fn contexts_are_for_the_export_that_they_were_selected_for() {
    let exports = ["a", "b"].map(|name| ServerExport::new(name, Arc::new(Store::new(8192))));
    let running = Running::start(exports.into(), ServerSettings::default()).await;
    let status = request(Command::BlockStatus, 1, 0, 8192);
    for (selects, goes, allowed) in
        [(vec!["a"], "a", true), (vec!["a"], "b", false), (vec!["b", "a"], "b", false), (vec!["a", "x"], "a", false)]
    {
        let mut raw = greeted(&running).await;
        raw.framing = Framing::Structured;
        assert_eq!(raw.option(&ClientOption::StructuredReply).await, [OptionReply::Ack]);
        for name in &selects {
            raw.option(&ClientOption::SetMetaContext(allocation(name))).await;
        }
        raw.option(&ClientOption::Go(info(goes))).await;
        let expected = if allowed { Ok(8192_u64.to_be_bytes().to_vec()) } else { Err(Errno::Inval) };
        assert_eq!(raw.ask(status, &[]).await, expected, "{selects:?} {goes}");
    }
}

/// Whatever the reason: the export is not there, the data makes no sense, or is too long.
#[tokio::test]
async fn a_selection_that_fails_leaves_none_of_before() {
    let running = Running::one(memory(8192, 1)).await;
    for data in [&b"nonsense"[..], &[0; 70_000]] {
        let mut raw = greeted(&running).await;
        raw.framing = Framing::Structured;
        assert_eq!(raw.option(&ClientOption::StructuredReply).await, [OptionReply::Ack]);
        assert_eq!(raw.option(&ClientOption::SetMetaContext(allocation("disk"))).await.len(), 2);
        let replies = raw.option_with(OptionCode::SetMetaContext, data).await;
        assert!(matches!(error_of(&replies), ReplyError::Invalid | ReplyError::TooBig));
        raw.option(&ClientOption::Go(info("disk"))).await;
        assert_eq!(raw.ask(request(Command::BlockStatus, 1, 0, 8192), &[]).await, Err(Errno::Inval));
    }
}

#[tokio::test]
async fn contexts_are_listed_by_wildcard_and_selected_by_name() {
    let running = Running::one(memory(5000, 1)).await;
    let mut raw = greeted(&running).await;
    assert_eq!(raw.option(&ClientOption::StructuredReply).await, [OptionReply::Ack]);
    let meta =
        |queries: &[&str]| MetaRequest { name: text(""), queries: queries.iter().map(|query| text(query)).collect() };
    for (queries, listed, set) in [
        (&[][..], true, false),
        (&["base:"], true, false),
        (&["base:allocation"], true, true),
        (&["x-other:thing", "base:allocation"], true, true),
        (&["base:unknown", "qemu:dirty-bitmap:b"], false, false),
    ] {
        let found = raw.option(&ClientOption::ListMetaContext(meta(queries))).await;
        assert_eq!(found.len() == 2, listed, "{queries:?}");
        let found = raw.option(&ClientOption::SetMetaContext(meta(queries))).await;
        assert_eq!(found.len() == 2, set, "{queries:?}");
    }
}

#[tokio::test]
async fn extended_headers_stay_and_structured_replies_do_not_come_back() {
    let running = Running::one(memory(5000, 1)).await;
    let mut raw = greeted(&running).await;
    assert_eq!(raw.option(&ClientOption::StructuredReply).await, [OptionReply::Ack]);
    assert_eq!(raw.option(&ClientOption::ExtendedHeaders).await, [OptionReply::Ack]);
    let refused = raw.option(&ClientOption::StructuredReply).await;
    assert_eq!(error_of(&refused), ReplyError::ExtendedHeadersRequired);
}

#[tokio::test]
async fn a_client_may_bring_its_stream_and_leave_the_handshake_out() {
    let running = Running::one(memory(5000, 1)).await;
    let (near, far) = UnixStream::pair().unwrap();
    let serving = running.server.serve(far);
    let mut raw = Raw { stream: near, framing: Framing::Extended };
    raw.greet().await;
    raw.go().await;
    assert_eq!(raw.ask(request(Command::Read, 1, 10, 20), &[]).await.unwrap(), filled(5000, 1)[10..30]);
    drop(raw);
    serving.await.unwrap();

    let (near, far) = UnixStream::pair().unwrap();
    let (facts, serving) = running.server.serve_export(far, "disk").unwrap();
    assert_eq!((facts.size, facts.flags.contains(TransmissionFlags::SEND_FLUSH)), (5000, true));
    let mut raw = Raw { stream: near, framing: Framing::Simple };
    assert_eq!(raw.ask(request(Command::Read, 1, 10, 20), &[]).await.unwrap(), filled(5000, 1)[10..30]);
    raw.send(request(Command::Disconnect, 2, 0, 0), &[]).await;
    assert!(raw.is_closed().await);
    serving.await.unwrap();
    let (_, far) = UnixStream::pair().unwrap();
    assert!(running.server.serve_export(far, "x").is_err());
}
