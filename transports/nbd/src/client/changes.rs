//! What changes an export: writing, and making zeros.
//!
//! Each change holds its range from before it is sent until its fate is known, so that a later one to the same bytes is
//! never overtaken by it, whatever became of its caller.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use futures_util::stream::{self, TryStreamExt};
use r3map_core::{Backend, Error, ErrorKind, Operation, RangeGuard, Result, Trim, WriteZeroes};

use crate::client::calls::{Asked, Failure};
use crate::client::{ATTEMPTS, Client, PARTS_IN_FLIGHT, index};
use crate::wire::{Command, CommandFlags, TransmissionFlags};

impl Client {
    /// As [`Backend::write_at`].
    pub(super) async fn write(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let len = buf.len() as u64;
        self.check_change(Operation::Write, offset, len)?;
        let guard = Arc::new(self.changes.lock(offset..offset + len).await);
        self.write_locked(offset, buf, &guard).await.map_err(|error| error.at(offset, len))
    }

    async fn write_locked(&self, offset: u64, buf: &[u8], guard: &Arc<RangeGuard>) -> Result<()> {
        let range = offset..offset + buf.len() as u64;
        let parts = stream::iter(self.parts(range, self.links.facts().longest()).map(Ok));
        let writes = parts.try_for_each_concurrent(PARTS_IN_FLIGHT, |part| {
            let bytes = &buf[index(part.start - offset)..index(part.end - offset)];
            let asked = Asked { command: Command::Write, offset: part.start, length: part.end - part.start };
            self.change(Operation::Write, asked, bytes, guard)
        });
        writes.await
    }

    /// Makes one request that changes something. If its connection was closed before it was answered it is made again:
    /// the server's end is closed, so that the first one cannot land later.
    async fn change(&self, operation: Operation, asked: Asked, payload: &[u8], guard: &Arc<RangeGuard>) -> Result<()> {
        let mut attempt = 1;
        loop {
            let link = self.links.any(operation).await?;
            match link.request(asked, CommandFlags::empty(), payload, Some(guard.clone())).await {
                Err(Failure::Closed(_)) if attempt < ATTEMPTS => attempt += 1,
                result => return result.map(|_| ()).map_err(|failure| self.failed(operation, failure)),
            }
        }
    }

    /// Makes a range read as zeros.
    async fn zero(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        self.check_change(operation, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let range = offset..offset + len;
        let unit = self.unit();
        let outer = offset / unit * unit..range.end.next_multiple_of(unit).min(self.size());
        let guard = Arc::new(self.changes.lock(outer).await);
        let zeroing = self.zero_locked(operation, range, unit, &guard);
        zeroing.await.map_err(|error| error.at(offset, len))
    }

    /// Whole chunks by one request or a few, and what is cut off at either end by writing its chunk anew.
    async fn zero_locked(
        &self,
        operation: Operation,
        range: Range<u64>,
        unit: u64,
        guard: &Arc<RangeGuard>,
    ) -> Result<()> {
        let last = if range.end == self.size() { range.end } else { range.end / unit * unit };
        let inner = range.start.next_multiple_of(unit).min(self.size())..last;
        if inner.start > inner.end || inner.is_empty() {
            // No whole chunk: one or two parts of chunks.
            let border = inner.start.clamp(range.start, range.end);
            self.zero_within(range.start..border, unit, guard).await?;
            return self.zero_within(border..range.end, unit, guard).await;
        }
        self.zero_within(range.start..inner.start, unit, guard).await?;
        for part in self.parts(inner.clone(), self.links.facts().longest_range()) {
            let asked = Asked { command: Command::WriteZeroes, offset: part.start, length: part.end - part.start };
            self.change(operation, asked, &[], guard).await?;
        }
        self.zero_within(inner.end..range.end, unit, guard).await
    }

    /// Zeros in one chunk.
    async fn zero_within(&self, range: Range<u64>, unit: u64, guard: &Arc<RangeGuard>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let start = range.start / unit * unit;
        let mut chunk = vec![0; index((start + unit).min(self.size()) - start)];
        self.read_at(start, &mut chunk).await?;
        chunk[index(range.start - start)..index(range.end - start)].fill(0);
        self.write_locked(start, &chunk, guard).await
    }

    /// As [`Client::check`], for what changes something.
    fn check_change(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        self.check(operation, offset, len)?;
        match self.links.facts().has(TransmissionFlags::READ_ONLY) {
            true => {
                let message = format!("{}: the export is read-only", self.links.peer());
                Err(Error::new(ErrorKind::Denied, operation, message).at(offset, len))
            }
            false => Ok(()),
        }
    }
}

#[async_trait]
impl Trim for Client {
    async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        self.zero(Operation::Trim, offset, len).await
    }
}

#[async_trait]
impl WriteZeroes for Client {
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.zero(Operation::WriteZeroes, offset, len).await
    }
}
