//! The service of the Go programs. Where they look at an error's text it is the same as theirs; elsewhere errors have
//! the codes of our own service, which they do not look at.

use bytes::Bytes;
use r3map_core::{Backend, Operation, check_range};
use tonic::Status;

use crate::message;
use crate::proto::go;
use crate::rope::Rope;
use crate::server::budget::{Buffer, room};
use crate::server::region::answer;
use crate::server::session::Session;
use crate::status::{GO_END, GO_TOO_LONG};

impl Session {
    pub(crate) async fn go_read_at(&self, request: go::ReadAtArgs) -> Result<Rope, Status> {
        let (len, offset) = self.go_range(&request)?;
        check_range(Operation::Read, self.shared.geometry.size(), offset, len).map_err(|_| Status::unknown(GO_END))?;
        self.go_read(offset, len, len).await
    }

    /// Length and offset of a read, which is not too long.
    pub(crate) fn go_range(&self, request: &go::ReadAtArgs) -> Result<(u64, u64), Status> {
        let &go::ReadAtArgs { length, off } = request;
        let len = u64::try_from(length).map_err(|_| Status::invalid_argument("negative length"))?;
        if len > self.shared.max_request {
            return Err(Status::unknown(GO_TOO_LONG));
        }
        Ok((len, offset(off)?))
    }

    /// Reads `len` bytes, and answers with zeros behind them up to `asked`.
    pub(crate) async fn go_read(&self, offset: u64, len: u64, asked: u64) -> Result<Rope, Status> {
        let share = self.room.share(room(asked)).await;
        let [len, whole] = [len, asked].map(|len| usize::try_from(len).unwrap_or(usize::MAX));
        let mut buffer = share.buffer(whole);
        let bytes = buffer.first(whole);
        bytes[len..].fill(0);
        answer(self.shared.backend.read_at(offset, &mut bytes[..len]).await)?;
        let reply = go::ReadAtReply { n: i32::try_from(asked).unwrap_or(i32::MAX), p: Bytes::new() };
        Ok(message::encode_bulk(&reply, buffer.freeze().into()))
    }

    pub(crate) async fn go_write_at(&self, (head, data): (go::WriteAtArgs, Buffer)) -> Result<Rope, Status> {
        let (offset, bytes) = (offset(head.off)?, data.used());
        answer(self.shared.check_change(Operation::Write, offset, bytes.len() as u64))?;
        answer(self.shared.backend.write_at(offset, bytes).await)?;
        Ok(message::encode(&go::WriteAtReply { length: i32::try_from(bytes.len()).unwrap_or(i32::MAX) }))
    }

    pub(crate) async fn go_sync(&self, _: go::SyncArgs) -> Result<Rope, Status> {
        answer(self.user.flush().await)?;
        Ok(message::encode(&go::SyncReply {}))
    }
}

fn offset(off: i64) -> Result<u64, Status> {
    u64::try_from(off).map_err(|_| Status::invalid_argument("invalid offset"))
}
