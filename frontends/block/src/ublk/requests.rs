//! What each request of a ublk device does to the backend, and what it answers. Where and when it runs is the service's
//! matter.

use std::sync::{Arc, Mutex, PoisonError};

use r3map_core::{Backend, Error, ErrorKind, Operation, Piece, ReadPieces, Result};
use r3map_sys::ublk::{self, Bell, Request};

use crate::service::Service;

/// What is answered where there is nobody to say why: `EIO`.
const BROKEN: i32 = -5;
/// What is answered to what this program does not know: `EOPNOTSUPP`.
const UNKNOWN: i32 = -95;

/// Results on their way to the thread of a queue, which alone may give them to the kernel.
#[derive(Debug)]
pub(super) struct Mailbox {
    bell: Bell,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    done: Vec<(u16, i32)>,
    asleep: bool,
}

impl Mailbox {
    pub(super) fn new(bell: Bell) -> Self {
        Self { bell, state: Mutex::default() }
    }

    fn put(&self, tag: u16, result: i32) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.done.push((tag, result));
        // Once is enough to wake it, and a thread that is awake looks by itself.
        let wake = std::mem::take(&mut state.asleep);
        drop(state);
        if wake {
            self.bell.ring();
        }
    }

    /// Takes all results; whoever puts one from now on wakes the thread.
    pub(super) fn take_and_sleep(&self, results: &mut Vec<(u16, i32)>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        results.append(&mut state.done);
        state.asleep = true;
    }

    /// The thread is awake, and will take what comes.
    pub(super) fn wake(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).asleep = false;
    }
}

/// The answer that the kernel waits for. Dropped without one it answers `EIO`: nobody waits for ever.
pub(super) struct Reply {
    mailbox: Arc<Mailbox>,
    tag: u16,
    result: i32,
}

impl Reply {
    pub(super) fn new(mailbox: Arc<Mailbox>, tag: u16) -> Self {
        Self { mailbox, tag, result: BROKEN }
    }

    fn give(mut self, done: Result<i32>) {
        self.result = done.unwrap_or_else(|error| {
            // Logged here, because the application sees only that it failed.
            tracing::warn!(%error, "request failed");
            -error.errno()
        });
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.mailbox.put(self.tag, self.result);
    }
}

/// Does what a request asks for, and answers it.
pub(super) async fn serve(service: Arc<Service>, request: Request, reply: Reply) {
    let Some(backend) = service.backend() else { return };
    let done = match request.operation {
        ublk::Operation::Read => read(&service, &*backend, &request).await,
        ublk::Operation::Write => write(&service, &*backend, &request).await,
        ublk::Operation::Flush => backend.flush().await.map(|()| 0),
        ublk::Operation::Discard | ublk::Operation::WriteZeroes => clear(&*backend, &request).await.map(|()| 0),
        ublk::Operation::Unknown(_) => Ok(UNKNOWN),
    };
    reply.give(done);
}

/// How many bytes a request moves.
fn length(request: &Request) -> usize {
    // At most 32 MiB.
    usize::try_from(request.len).unwrap_or(usize::MAX)
}

/// What a request that moved all of its bytes answers.
fn moved(request: &Request) -> i32 {
    i32::try_from(request.len).unwrap_or(i32::MAX)
}

fn kernel(operation: Operation, request: &Request) -> impl FnOnce(std::io::Error) -> Error {
    let (offset, len) = (request.offset, request.len);
    move |error| Error::from_io(operation, "the kernel does not move the request's bytes", error).at(offset, len)
}

async fn read(service: &Service, backend: &dyn Backend, request: &Request) -> Result<i32> {
    match backend.capabilities().pieces {
        Some(pieces) => read_lent(service, pieces, request).await?,
        None => {
            let mut buffer = service.buffers.take(length(request));
            backend.read_at(request.offset, &mut buffer).await?;
            request.transfer.give(0, &buffer).map_err(kernel(Operation::Read, request))?;
        }
    }
    Ok(moved(request))
}

/// Gives the bytes where they lie to the kernel, without a copy in between.
async fn read_lent(service: &Service, pieces: &dyn ReadPieces, request: &Request) -> Result<()> {
    let mut given = 0;
    let mut give = |at: u64, piece: Piece<'_>| {
        if at != request.offset + given || piece.len() > request.len - given {
            return Err(broken(request, "the backend lent a piece that is not the next one"));
        }
        let put = |at: u64, bytes: &[u8]| request.transfer.give(at, bytes);
        give_piece(&service.zeroes, given, piece, put).map_err(kernel(Operation::Read, request))?;
        given += piece.len();
        Ok(())
    };
    pieces.read_pieces(request.offset, request.len, &mut give).await?;
    if given == request.len { Ok(()) } else { Err(broken(request, "the backend lent less than it was asked for")) }
}

/// Puts a piece at a place of the request; zeros are put as often as the piece is longer than `zeroes`.
fn give_piece(
    zeroes: &[u8],
    at: u64,
    piece: Piece<'_>,
    put: impl Fn(u64, &[u8]) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let len = match piece {
        Piece::Data(bytes) => return put(at, bytes),
        Piece::Zeroes(len) => len,
    };
    let mut done = 0;
    while done < len {
        let some = usize::try_from(len - done).unwrap_or(usize::MAX).min(zeroes.len());
        put(at + done, &zeroes[..some])?;
        done += some as u64;
    }
    Ok(())
}

fn broken(request: &Request, message: &str) -> Error {
    Error::new(ErrorKind::Internal, Operation::Read, message).at(request.offset, request.len)
}

async fn write(service: &Service, backend: &dyn Backend, request: &Request) -> Result<i32> {
    let mut buffer = service.buffers.take(length(request));
    request.transfer.take(0, &mut buffer).map_err(kernel(Operation::Write, request))?;
    backend.write_at(request.offset, &buffer).await?;
    if request.fua {
        backend.flush().await?;
    }
    Ok(moved(request))
}

/// Discards, or writes zeros. What the backend can do for it was asked when the device was made.
async fn clear(backend: &dyn Backend, request: &Request) -> Result<()> {
    let (offset, len) = (request.offset, request.len);
    let can = backend.capabilities();
    match (request.operation, can.trim, can.write_zeroes) {
        (ublk::Operation::Discard, Some(trim), _) => trim.trim(offset, len).await?,
        (_, _, Some(zeroes)) => zeroes.write_zeroes(offset, len).await?,
        // Both read as zeros afterwards, so that trimming serves too, unless the room is to be kept.
        (_, Some(trim), None) if !request.no_unmap => trim.trim(offset, len).await?,
        _ => {
            let message = "the backend can neither trim nor write zeros";
            return Err(Error::new(ErrorKind::Internal, Operation::WriteZeroes, message).at(offset, len));
        }
    }
    if request.fua { backend.flush().await } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn zeros_fill_a_piece_however_long_it_is() {
        let request = RefCell::new([9; 10]);
        let put = |at: u64, bytes: &[u8]| {
            let at = usize::try_from(at).unwrap();
            request.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        give_piece(&[0; 3], 1, Piece::Zeroes(7), put).unwrap();
        give_piece(&[0; 3], 9, Piece::Data(&[5]), put).unwrap();
        assert_eq!(*request.borrow(), [9, 0, 0, 0, 0, 0, 0, 0, 9, 5]);
    }
}
