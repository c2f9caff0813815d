//! Long reads from backends that lend: whole, in the middle of which something happens, and to clients that take little.

use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{Backend, Capabilities, Error, ErrorKind, Operation, Piece, ReadPieces, Result};
use r3map_local::Memory;
use r3map_nbd::wire::{Command, Errno, Framing};

use crate::support::{FRAMINGS, Running, filled, memory, request};

const SIZE: u64 = 3 << 20;
/// Where something happens.
const THERE: u64 = 1 << 20;

/// What happens when a read comes to [`THERE`].
#[derive(Debug, Clone, Copy, PartialEq)]
enum Event {
    Nothing,
    Wait,
    Fail,
    Panic,
}

/// Lends a megabyte at a time, up to an event.
struct Eventful(Arc<Memory>, Event);

#[async_trait]
impl Backend for Eventful {
    fn size(&self) -> u64 {
        SIZE
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { pieces: Some(self), ..Capabilities::default() }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.0.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl ReadPieces for Eventful {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        let mut bytes = vec![0; 1 << 20];
        let mut at = offset;
        while at < offset + len {
            if at == THERE {
                match self.1 {
                    Event::Nothing => {}
                    Event::Wait => tokio::task::yield_now().await,
                    Event::Fail => return Err(Error::new(ErrorKind::Unavailable, Operation::Read, "not now")),
                    Event::Panic => panic!("the bug"),
                }
            }
            let end = ((at / THERE + 1) * THERE).min(offset + len);
            let part = &mut bytes[..usize::try_from(end - at).unwrap()];
            self.0.read_now(at, part)?;
            visit(at, Piece::Data(part))?;
            at = end;
        }
        Ok(())
    }
}

#[tokio::test]
async fn whatever_happens_in_the_middle_the_reply_is_whole_or_an_error() {
    for event in [Event::Nothing, Event::Wait, Event::Fail, Event::Panic] {
        let running = Running::one(Arc::new(Eventful(memory(SIZE, 1), event))).await;
        for framing in FRAMINGS {
            let mut raw = running.transmit(framing).await;
            // Several in flight, so that one waits behind another; but replies that wait in the middle interleave, which
            // this client does not sort.
            let in_flight = if event == Event::Wait { 1 } else { 3 };
            let asked = request(Command::Read, 1, 1000, SIZE - 1000);
            for _ in 0..in_flight {
                raw.send(asked, &[]).await;
            }
            for _ in 0..in_flight {
                let read = raw.reply(&asked).await;
                match event {
                    Event::Nothing | Event::Wait => assert!(read.unwrap() == filled(SIZE, 1)[1000..], "{framing:?}"),
                    Event::Fail | Event::Panic => assert_eq!(read, Err(Errno::Io), "{framing:?} {event:?}"),
                }
            }
            let before = raw.ask(request(Command::Read, 4, 0, THERE), &[]).await.unwrap();
            assert!(before == filled(SIZE, 1)[..before.len()], "{framing:?} {event:?}");
        }
    }
}

#[tokio::test]
async fn holes_between_and_at_the_ends_of_what_is_lent() {
    let memory = Memory::new(8 << 20).unwrap();
    for at in [1_u64 << 20, 4 << 20, (6 << 20) + 5] {
        memory.write_now(at, &filled(300_000, at)).unwrap();
    }
    let mut expected = vec![0; 8 << 20];
    memory.read_now(0, &mut expected).unwrap();
    let running = Running::one(Arc::new(memory)).await;
    for framing in [Framing::Structured, Framing::Extended] {
        let mut raw = running.transmit(framing).await;
        for (from, to) in [(0, 8 << 20), (1, 1 << 20), (1 << 20, 2 << 20), (1_100_000, 7_000_000), (0, 1_300_000)] {
            let read = raw.ask(request(Command::Read, 1, from, to - from), &[]).await.unwrap();
            let range = usize::try_from(from).unwrap()..usize::try_from(to).unwrap();
            assert!(read == expected[range], "{framing:?} {from} {to}");
        }
    }
}
