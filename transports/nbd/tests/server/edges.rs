//! Requests in transmission that no well-behaved client sends, backends that fail, and the order of answers.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use r3map_core::{Backend, ErrorKind, Operation, Result};
use r3map_nbd::wire::{Command, CommandFlags, Errno, Framing, Request, StatusPayload};
use r3map_nbd::{ServerExport, ServerSettings};
use r3map_testkit::faults::{Faults, Pause, Rule};
use r3map_testkit::store::Store;
use tokio::io::AsyncWriteExt;

use crate::support::{FRAMINGS, LONG, Raw, Running, contents, filled, memory, request, write};

const SIZE: u64 = 100_000;

/// The connection works, and the bytes are as they were.
async fn still_works(raw: &mut Raw) {
    let read = raw.ask(request(Command::Read, 99, 1000, 5000), &[]).await.unwrap();
    assert!(read == filled(SIZE, 1)[1000..6000]);
}

#[tokio::test]
async fn requests_that_cannot_be_are_answered_and_the_next_one_is_served() {
    let running = Running::one(memory(SIZE, 1)).await;
    for framing in FRAMINGS {
        let mut raw = running.transmit(framing).await;
        for (asked, payload, error) in [
            (request(Command::Unknown(8), 1, 0, 0), vec![], Errno::Inval),
            (request(Command::Unknown(0xffff), 2, u64::MAX, 0xffff_ffff), vec![], Errno::Inval),
            (request(Command::Read, 3, SIZE, 1), vec![], Errno::Inval),
            (request(Command::Read, 4, u64::MAX, 0xffff_ffff), vec![], Errno::Inval),
            (write(framing, 5, SIZE - 1, 2), vec![1; 2], Errno::NoSpc),
            (write(framing, 6, u64::MAX, 70_000), vec![1; 70_000], Errno::NoSpc),
            (request(Command::Flush, 7, 1, 0), vec![], Errno::Inval),
            (request(Command::Trim, 8, SIZE, 1), vec![], Errno::Inval),
        ] {
            assert_eq!(raw.ask(asked, &payload).await.unwrap_err(), error, "{framing:?} {asked:?}");
            still_works(&mut raw).await;
        }
        if framing < Framing::Extended {
            let refused = raw.ask(write(framing, 9, 0, 33 << 20), &vec![1; 33 << 20]).await;
            assert_eq!(refused.unwrap_err(), Errno::NoSpc);
            still_works(&mut raw).await;
        }
        let flagged = Request { flags: CommandFlags::from_bits_retain(1 << 12), ..request(Command::Read, 10, 0, 1) };
        assert_eq!(raw.ask(flagged, &[]).await.unwrap_err(), Errno::Inval);
        still_works(&mut raw).await;
    }
}

#[tokio::test]
async fn payloads_where_there_are_none_are_skipped() {
    let running = Running::one(memory(SIZE, 1)).await;
    let mut raw = running.transmit(Framing::Extended).await;
    for command in [Command::Read, Command::Flush, Command::Trim, Command::Unknown(50)] {
        let asked = Request { flags: CommandFlags::PAYLOAD_LEN, ..request(command, 1, 0, 50_000) };
        assert_eq!(raw.ask(asked, &[7; 50_000]).await.unwrap_err(), Errno::Inval, "{command:?}");
        still_works(&mut raw).await;
    }
    // One that is longer than anything that may be sent is not waited for.
    let endless = Request { flags: CommandFlags::PAYLOAD_LEN, ..request(Command::Write, 3, 0, 1 << 40) };
    raw.send(endless, &[]).await;
    assert!(raw.is_closed().await);
    running.is_left().await;
}

/// As qemu makes it: the flag belongs to it, and what is meant is clear without.
#[tokio::test]
async fn a_write_with_extended_headers_has_its_payload_also_where_it_does_not_say_so() {
    let region = memory(SIZE, 1);
    let running = Running::one(region.clone()).await;
    let mut raw = running.transmit(Framing::Extended).await;
    let length = 50_000;
    assert_eq!(raw.ask(request(Command::Write, 1, 20_000, length as u64), &vec![9; length]).await, Ok(vec![]));
    still_works(&mut raw).await;
    assert!(contents(&region)[20_000..20_000 + length] == vec![9; length]);
}

#[tokio::test]
async fn block_status_of_chosen_contexts() {
    let running = Running::one(memory(SIZE, 1)).await;
    let mut raw = running.transmit(Framing::Extended).await;
    for (length, contexts, found) in [
        (SIZE, vec![1], Ok(SIZE.to_be_bytes().to_vec())),
        (5, vec![1], Ok(5_u64.to_be_bytes().to_vec())),
        (SIZE, vec![], Ok(vec![])),
        (SIZE, vec![2], Err(Errno::Inval)),
        (SIZE, vec![1, 1], Err(Errno::Inval)),
        (SIZE + 1, vec![1], Err(Errno::Inval)),
        (0, vec![1], Err(Errno::Inval)),
    ] {
        let mut payload = Vec::new();
        StatusPayload { length, contexts }.encode(&mut payload);
        let length = payload.len() as u64;
        let asked = Request { flags: CommandFlags::PAYLOAD_LEN, ..request(Command::BlockStatus, 1, 0, length) };
        assert_eq!(raw.ask(asked, &payload).await, found, "{payload:?}");
    }
    let asked = Request { flags: CommandFlags::PAYLOAD_LEN, ..request(Command::BlockStatus, 1, 0, 7) };
    assert_eq!(raw.ask(asked, &[0; 7]).await, Err(Errno::Inval));
    still_works(&mut raw).await;
}

#[tokio::test]
async fn every_command_in_every_framing() {
    for framing in FRAMINGS {
        let memory = memory(SIZE, 1);
        let running = Running::one(memory.clone()).await;
        let mut raw = running.transmit(framing).await;
        let mut expected = filled(SIZE, 1);
        for (asked, payload) in [
            (write(framing, 1, 100, 3), &b"abc"[..]),
            (write(framing, 2, 0, 0), b""),
            (request(Command::WriteZeroes, 3, 30_000, 20_001), b""),
            (request(Command::Trim, 4, 70_001, 20_000), b""),
            (request(Command::Cache, 5, 0, SIZE), b""),
            (request(Command::Flush, 6, 0, 0), b""),
        ] {
            assert_eq!(raw.ask(asked, payload).await, Ok(vec![]), "{framing:?} {asked:?}");
        }
        expected[100..103].copy_from_slice(b"abc");
        expected[30_000..50_001].fill(0);
        expected[70_001..90_001].fill(0);
        assert!(contents(&memory) == expected);
        assert!(raw.ask(request(Command::Read, 7, 1, SIZE - 1), &[]).await.unwrap() == expected[1..]);
        assert_eq!(raw.ask(request(Command::Read, 8, 0, 0), &[]).await, Ok(vec![]));
        let fragmentless = Request { flags: CommandFlags::DF, ..request(Command::Read, 9, 0, SIZE) };
        if framing > Framing::Simple {
            assert!(raw.ask(fragmentless, &[]).await.unwrap() == expected);
            let status = raw.ask(request(Command::BlockStatus, 10, 0, SIZE), &[]).await.unwrap();
            let sum: u64 = status.chunks(8).map(|bytes| u64::from_be_bytes(bytes.try_into().unwrap())).sum();
            assert_eq!(sum, SIZE);
        }
        raw.send(request(Command::Disconnect, 11, 0, 0), &[]).await;
        assert!(raw.is_closed().await);
        running.is_left().await;
    }
}

#[tokio::test]
async fn an_error_of_the_backend_is_that_request_s_alone() {
    let faults = Faults::new(Arc::new(Store::new(SIZE).filled(1)));
    faults.add(Rule::on(Operation::Read).touching(50_000..50_001).fail(ErrorKind::Unavailable));
    faults.add(Rule::on(Operation::Write).touching(50_000..50_001).fail(ErrorKind::Exhausted));
    faults.add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Denied));
    let running = Running::one(faults).await;
    for framing in FRAMINGS {
        let mut raw = running.transmit(framing).await;
        assert_eq!(raw.ask(request(Command::Read, 1, 49_000, 2000), &[]).await, Err(Errno::Io), "{framing:?}");
        assert_eq!(raw.ask(write(framing, 2, 49_999, 2), b"xx").await, Err(Errno::NoSpc), "{framing:?}");
        still_works(&mut raw).await;
    }
    let mut raw = running.transmit(Framing::Simple).await;
    let flushed = raw.ask(request(Command::Flush, 3, 0, 0), &[]).await;
    assert_eq!((flushed, raw.ask(request(Command::Flush, 4, 0, 0), &[]).await), (Err(Errno::Perm), Ok(vec![])));
}

/// The backend tells of what it has lost once, as a remote does that was restarted.
fn lose(faults: &Faults) {
    faults.add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Conflict));
}

#[tokio::test]
async fn what_the_backend_has_lost_is_told_on_every_connection() {
    let faults = Faults::new(memory(SIZE, 1));
    let running = Running::one(faults.clone()).await;
    let mut connections = Vec::new();
    for framing in FRAMINGS {
        connections.push(running.transmit(framing).await);
    }
    lose(&faults);
    for (index, raw) in connections.iter_mut().enumerate() {
        let mut durable = write(raw.framing, 1, 0, 1);
        durable.flags |= CommandFlags::FUA;
        let flush = request(Command::Flush, 2, 0, 0);
        let lost = if index == 0 { Err(Errno::Io) } else { Ok(vec![]) };
        assert_eq!(raw.ask(durable, b"x").await, lost, "only the write that may be lost: {:?}", raw.framing);
        assert_eq!(raw.ask(durable, b"x").await, Ok(vec![]));
        assert_eq!(raw.ask(flush, &[]).await, Err(Errno::Io), "it was told of one write only");
        assert_eq!(raw.ask(flush, &[]).await, Ok(vec![]));
        assert_eq!(raw.ask(durable, b"x").await, Ok(vec![]));
    }
    let mut later = running.transmit(Framing::Simple).await;
    assert_eq!(later.ask(request(Command::Flush, 1, 0, 0), &[]).await, Ok(vec![]));
}

#[tokio::test]
async fn the_connections_of_a_kernel_are_told_of_it_once() {
    let faults = Faults::new(memory(SIZE, 1));
    let running = Running::one(faults.clone()).await;
    let mut connections = Vec::new();
    for _ in 0..2 {
        let (stream, theirs) = tokio::net::UnixStream::pair().unwrap();
        running.server.serve_export(theirs, "").unwrap();
        connections.push(Raw { stream, framing: Framing::Simple });
    }
    lose(&faults);
    let flush = request(Command::Flush, 1, 0, 0);
    assert_eq!(connections[0].ask(flush, &[]).await, Err(Errno::Io));
    for raw in &mut connections {
        assert_eq!(raw.ask(flush, &[]).await, Ok(vec![]));
    }
}

/// A backend that has a bug.
struct Buggy(Store);

#[async_trait]
impl Backend for Buggy {
    fn size(&self) -> u64 {
        self.0.size()
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        assert_ne!(offset, 0, "the bug");
        self.0.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.0.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        self.0.flush().await
    }
}

#[tokio::test]
async fn a_backend_that_panics_fails_its_request_only() {
    let running = Running::one(Arc::new(Buggy(Store::new(SIZE).filled(1)))).await;
    let mut raw = running.transmit(Framing::Structured).await;
    assert_eq!(raw.ask(request(Command::Read, 1, 0, 10), &[]).await, Err(Errno::Io));
    still_works(&mut raw).await;
}

#[tokio::test]
async fn answers_come_as_they_are_done_and_not_more_than_so_many_at_once() {
    let pause = Pause::new();
    let faults = Faults::new(Arc::new(Store::new(SIZE).filled(1)));
    faults.add(Rule::on(Operation::Read).touching(0..1).hold(&pause));
    let running = Running::one(faults.clone()).await;
    let mut raw = running.transmit(Framing::Structured).await;
    raw.send(request(Command::Read, 1, 0, 4096), &[]).await;
    pause.wait_held(1).await;
    let second = request(Command::Read, 2, 4096, 4096);
    assert!(raw.ask(second, &[]).await.unwrap() == filled(SIZE, 1)[4096..8192], "the second overtakes the first");
    // 256 are begun; the rest wait in the socket.
    for cookie in 3..400 {
        raw.send(request(Command::Read, cookie, 0, 4096), &[]).await;
    }
    pause.wait_held(256).await;
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    assert_eq!((pause.held(), faults.most_in_flight()), (256, 256));
    pause.release();
    let mut cookies = Vec::new();
    for _ in 0..398 {
        let (cookie, read) = raw.any_reply(&request(Command::Read, 0, 0, 4096)).await;
        assert!(read.unwrap() == filled(SIZE, 1)[..4096]);
        cookies.push(cookie);
    }
    cookies.sort_unstable();
    assert_eq!(cookies, std::iter::once(1).chain(3..400).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_disconnect_answers_what_is_in_flight_and_forgets_what_follows() {
    let pause = Pause::new();
    let faults = Faults::new(Arc::new(Store::new(SIZE).filled(1)));
    faults.add(Rule::on(Operation::Read).hold(&pause));
    let running = Running::one(faults.clone()).await;
    let mut raw = running.transmit(Framing::Simple).await;
    let read = request(Command::Read, 1, 1000, 100);
    raw.send(read, &[]).await;
    raw.send(request(Command::Disconnect, 2, 0, 0), &[]).await;
    raw.send(request(Command::Read, 3, 0, 100), &[]).await;
    pause.wait_held(1).await;
    pause.release();
    assert!(raw.reply(&read).await.unwrap() == filled(SIZE, 1)[1000..1100]);
    assert!(raw.is_closed().await);
    assert_eq!(faults.count(Operation::Read), 1);
    running.is_left().await;
}

#[tokio::test]
async fn a_client_that_only_stops_sending_gets_its_answers() {
    let pause = Pause::new();
    let faults = Faults::new(Arc::new(Store::new(SIZE).filled(1)));
    faults.add(Rule::on(Operation::Read).hold(&pause));
    let running = Running::one(faults).await;
    let mut raw = running.transmit(Framing::Extended).await;
    let read = request(Command::Read, 1, 1000, 100);
    raw.send(read, &[]).await;
    raw.stream.shutdown().await.unwrap();
    pause.wait_held(1).await;
    pause.release();
    assert!(raw.reply(&read).await.unwrap() == filled(SIZE, 1)[1000..1100]);
    assert!(raw.is_closed().await);
}

#[tokio::test]
async fn what_a_vanished_client_asked_for_is_given_up() {
    let faults = Faults::new(Arc::new(Store::new(SIZE)));
    faults.add(Rule::on(Operation::Write).touching(0..1).hang());
    let running = Running::one(faults.clone()).await;
    let mut raw = running.transmit(Framing::Simple).await;
    raw.send(write(Framing::Simple, 1, 0, 4096), &[1; 4096]).await;
    faults.wait_in_flight(1).await;
    // Reading what nobody sends shows that the stream is broken, once there is something to say.
    raw.send(request(Command::Unknown(99), 2, 0, 0), &[]).await;
    drop(raw);
    let left = async {
        faults.wait_idle().await;
        running.is_left().await;
    };
    r3map_testkit::deadline(LONG, "a client that is gone", left).await;
}

/// Nothing tells it from a client that still waits for its answers; so it has its time, and no more.
#[tokio::test]
async fn a_client_that_left_without_a_word_does_not_keep_its_place() {
    let faults = Faults::new(Arc::new(Store::new(SIZE)));
    faults.add(Rule::on(Operation::Read).hang());
    let settings = ServerSettings { stall_limit: Duration::from_millis(300), ..ServerSettings::default() };
    let running = Running::start(vec![ServerExport::new("disk", faults.clone())], settings).await;
    let mut raw = running.transmit(Framing::Simple).await;
    raw.send(request(Command::Read, 1, 0, 4096), &[]).await;
    faults.wait_in_flight(1).await;
    drop(raw);
    let left = async {
        faults.wait_idle().await;
        running.is_left().await;
    };
    r3map_testkit::deadline(LONG, "a client that is gone", left).await;
}
