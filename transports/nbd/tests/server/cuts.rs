//! Garbage at every stage, and a whole conversation that ends after each of its bytes: nothing is left of it, and other
//! clients notice nothing.

use r3map_nbd::wire::{
    ClientFlags, ClientOption, Command, CommandFlags, Framing, InfoRequest, MetaRequest, Request, StatusPayload, Text,
};
use r3map_nbd::{ServerExport, ServerSettings};
use r3map_testkit::random::Random;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{FRAMINGS, LONG, Raw, Running, contents, filled, memory, request, write};

const SIZE: u64 = 70_000;

/// What a client says from its first to its last byte, in every kind of message that there is.
pub(crate) fn conversation(framing: Framing) -> Vec<u8> {
    let mut out = (ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES).encode().to_vec();
    let name = || Text::new("disk").unwrap();
    let meta = || MetaRequest { name: name(), queries: vec![Text::new("base:allocation").unwrap()] };
    let info = || InfoRequest { name: name(), wanted: vec![] };
    let mut options = vec![ClientOption::List, ClientOption::Info(info()), ClientOption::Unknown(99)];
    match framing {
        Framing::Simple => {}
        Framing::Structured => options.push(ClientOption::StructuredReply),
        Framing::Extended => options.push(ClientOption::ExtendedHeaders),
    }
    options.extend([ClientOption::ListMetaContext(meta()), ClientOption::SetMetaContext(meta())]);
    options.push(ClientOption::Go(info()));
    options.iter().for_each(|option| option.encode(&mut out));
    for asked in [
        request(Command::Read, 1, 5, 60_000),
        request(Command::Flush, 2, 0, 0),
        request(Command::Trim, 3, 0, 0),
        request(Command::Cache, 4, 0, 100),
        request(Command::WriteZeroes, 5, 0, 0),
        request(Command::BlockStatus, 6, 0, SIZE),
        request(Command::Unknown(77), 7, 0, 0),
        Request { length: 50, ..write(framing, 8, SIZE, 50) },
    ] {
        asked.encode(framing, &mut out).unwrap();
    }
    // The bytes of the last one, which is past the end; then one that writes what is there already.
    out.extend_from_slice(&[9; 50]);
    write(framing, 9, 100, 300).encode(framing, &mut out).unwrap();
    out.extend_from_slice(&filled(SIZE, 1)[100..400]);
    if framing == Framing::Extended {
        let mut payload = Vec::new();
        StatusPayload { length: SIZE, contexts: vec![1] }.encode(&mut payload);
        let length = payload.len() as u64;
        let flags = CommandFlags::PAYLOAD_LEN;
        Request { flags, ..request(Command::BlockStatus, 10, 0, length) }.encode(framing, &mut out).unwrap();
        out.extend_from_slice(&payload);
    }
    request(Command::Disconnect, 11, 0, 0).encode(framing, &mut out).unwrap();
    out
}

#[tokio::test]
async fn a_conversation_can_end_after_every_byte() {
    let memory = memory(SIZE, 1);
    // So little room that the first few who kept some of it would hold up everybody.
    let (max_payload, room) = (128 << 10, 256 << 10);
    let settings = ServerSettings { max_payload, connection_in_flight: room, in_flight: room, ..Default::default() };
    let running = Running::start(vec![ServerExport::new("disk", memory.clone())], settings).await;
    let mut other = running.transmit(Framing::Structured).await;
    for framing in FRAMINGS {
        let said = conversation(framing);
        for end in 0..=said.len() {
            for reads in [false, true] {
                let mut stream = running.connect().await;
                let _ = stream.write_all(&said[..end]).await;
                if reads {
                    let _ = stream.shutdown().await;
                    let mut heard = Vec::new();
                    let hearing = stream.read_to_end(&mut heard);
                    let _ = tokio::time::timeout(LONG, hearing).await.unwrap_or_else(|_| panic!("stuck at {end}"));
                }
            }
        }
        let reading = other.ask(request(Command::Read, 1, 0, SIZE), &[]);
        let read = tokio::time::timeout(LONG, reading).await.expect("stuck").unwrap();
        assert!(read == filled(SIZE, 1), "{framing:?}");
    }
    drop(other);
    running.is_left().await;
    assert!(contents(&memory) == filled(SIZE, 1));
}

#[tokio::test]
async fn the_conversation_is_one() {
    // The test above is worth something only if the server likes what is said to its end.
    let running = Running::one(memory(SIZE, 1)).await;
    for framing in FRAMINGS {
        let mut stream = running.connect().await;
        stream.write_all(&conversation(framing)).await.unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        assert!(heard.len() > 60_000, "{framing:?}: {} bytes", heard.len());
    }
}

#[tokio::test]
async fn garbage_ends_its_own_connection_only() {
    let memory = memory(SIZE, 1);
    let running = Running::one(memory.clone()).await;
    let mut other = running.transmit(Framing::Extended).await;
    let mut random = Random::new(1);
    for round in 0..300 {
        let mut garbage = vec![0; 300];
        garbage.fill_with(|| random.next_u64().to_le_bytes()[0]);
        let mut raw = Raw { stream: running.connect().await, framing: FRAMINGS[round % 3] };
        if round >= 100 {
            raw.greet().await;
        }
        if round >= 200 {
            raw.go().await;
        }
        let _ = raw.stream.write_all(&garbage).await;
        let _ = raw.stream.shutdown().await;
        let mut heard = Vec::new();
        let _ = tokio::time::timeout(LONG, raw.stream.read_to_end(&mut heard)).await.expect("stuck");
    }
    assert!(other.ask(request(Command::Read, 1, 0, SIZE), &[]).await.unwrap() == filled(SIZE, 1));
    drop(other);
    running.is_left().await;
    assert!(contents(&memory) == filled(SIZE, 1), "garbage was written");
}
