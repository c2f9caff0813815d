//! Puts pulled bytes in place: cuts them at blocks, tells zeros from data, leaves out what must not be touched, and ends
//! chunks as they are complete.

use std::ops::Range;
use std::sync::atomic::Ordering;

use r3map_core::state::Pull;
use r3map_core::{BLOCK_SIZE, Error, ErrorKind, Geometry, Operation, Piece, Result, is_zero};

use super::{Inner, index};
use crate::InstallNow;

/// Takes pieces of any length in ascending order and installs whole blocks of them at once. Dropping it, once the remote's
/// bytes are given back, tells the hook: what is in place is so also where the rest is not waited for.
pub(super) struct Placer<'a> {
    inner: &'a Inner,
    local: &'a dyn InstallNow,
    pull: &'a mut Pull,
    /// Where the next piece belongs, and where the last one ends.
    at: u64,
    end: u64,
    /// The beginning of a block whose end has not come yet.
    begun: Vec<u8>,
    /// Chunks that have become local, for the hook: it must not run while the remote lends its bytes.
    completed: Vec<u64>,
}

impl<'a> Placer<'a> {
    /// For the first bytes of a pull, up to `end`.
    pub(super) fn new(inner: &'a Inner, local: &'a dyn InstallNow, pull: &'a mut Pull, end: u64) -> Self {
        let at = pull.bytes().start;
        Self { inner, local, pull, at, end, begun: Vec::new(), completed: Vec::new() }
    }

    /// Where the next piece belongs.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Takes the next piece.
    pub(super) fn place(&mut self, offset: u64, piece: Piece<'_>) -> Result<()> {
        if offset != self.at || piece.len() > self.end - self.at {
            let message = "the remote lent other bytes than it was asked for";
            return Err(Error::new(ErrorKind::Corrupt, Operation::Read, message).at(offset, piece.len()));
        }
        let (head, rest) = split(piece, self.missing_of_block().min(piece.len()));
        self.gather(head)?;
        let len = rest.len();
        let whole = if self.at + len == self.size() { len } else { len / BLOCK_SIZE * BLOCK_SIZE };
        let (whole, tail) = split(rest, whole);
        if !whole.is_empty() {
            self.install(self.at, whole)?;
            self.at += whole.len();
        }
        self.gather(tail)
    }

    fn size(&self) -> u64 {
        self.inner.table.geometry().size()
    }

    /// What the block that has begun still lacks.
    fn missing_of_block(&self) -> u64 {
        match self.at % BLOCK_SIZE {
            0 => 0,
            begun => (BLOCK_SIZE - begun).min(self.size() - self.at),
        }
    }

    /// Takes bytes of a block that is not complete, and installs it when it is.
    fn gather(&mut self, piece: Piece<'_>) -> Result<()> {
        if piece.is_empty() {
            return Ok(());
        }
        match piece {
            Piece::Data(bytes) => self.begun.extend_from_slice(bytes),
            Piece::Zeroes(len) => self.begun.resize(self.begun.len() + index(len), 0),
        }
        self.at += piece.len();
        if self.missing_of_block() == 0 {
            let block = std::mem::take(&mut self.begun);
            self.install(self.at - block.len() as u64, Piece::Data(&block))?;
            self.begun = block;
            self.begun.clear();
        }
        Ok(())
    }

    fn install(&mut self, offset: u64, piece: Piece<'_>) -> Result<()> {
        let Self { inner, local, pull, completed, .. } = self;
        let range = offset..offset + piece.len();
        for (range, piece) in by_zeroes(inner.table.geometry(), range.clone(), piece) {
            install_now(inner, *local, pull, range, piece, completed)?;
        }
        end_chunks(inner.table.geometry(), pull, range.end);
        Ok(())
    }
}

impl Drop for Placer<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.inner.tell_local(std::mem::take(&mut self.completed));
        }
    }
}

/// Installs those blocks of a range that are absent.
fn install_now(
    inner: &Inner,
    local: &dyn InstallNow,
    pull: &Pull,
    range: Range<u64>,
    piece: Piece<'_>,
    completed: &mut Vec<u64>,
) -> Result<()> {
    while let Some(install) = pull.claim(inner.table.geometry().blocks_touched(&range)) {
        let bytes = install.bytes();
        local.install_now(bytes.start, part(piece, range.start, &bytes))?;
        completed.extend(install.commit()?);
        note_pulled(inner, &bytes);
    }
    Ok(())
}

/// The same for a local side that has to be waited for.
pub(super) async fn install(inner: &Inner, pull: &mut Pull, offset: u64, bytes: &[u8]) -> Result<()> {
    let geometry = inner.table.geometry();
    let range = offset..offset + bytes.len() as u64;
    while let Some(install) = pull.claim(geometry.blocks_touched(&range)) {
        let span = install.bytes();
        let from = index(span.start - offset);
        inner.local.install(span.start, &bytes[from..from + index(span.end - span.start)]).await?;
        let completed = install.commit()?;
        note_pulled(inner, &span);
        inner.tell_local(completed);
    }
    end_chunks(geometry, pull, range.end);
    Ok(())
}

fn note_pulled(inner: &Inner, bytes: &Range<u64>) {
    inner.report.pulled_bytes.fetch_add(bytes.end - bytes.start, Ordering::Relaxed);
    inner.report.touch();
}

/// Ends the chunks before `end`, which are in place.
fn end_chunks(geometry: &Geometry, pull: &mut Pull, end: u64) {
    pull.end(geometry.chunks_covered(&(0..end)).end, Ok(()));
}

/// Cuts a piece at chunk borders where zeros end or begin, so that zeros stay holes.
pub(super) fn by_zeroes<'p>(
    geometry: &Geometry,
    range: Range<u64>,
    piece: Piece<'p>,
) -> impl Iterator<Item = (Range<u64>, Piece<'p>)> + use<'p> {
    let geometry = *geometry;
    let start = range.start;
    let mut rest = range;
    let kind = move |bytes: &Range<u64>| match part(piece, start, bytes) {
        Piece::Data(data) => is_zero(data),
        Piece::Zeroes(_) => true,
    };
    std::iter::from_fn(move || {
        let mut parts = geometry.split(rest.clone()).map(|(_, bytes)| bytes);
        let mut span = parts.next()?;
        let zero = kind(&span);
        for next in parts.take_while(|next| kind(next) == zero) {
            span.end = next.end;
        }
        rest.start = span.end;
        let found = if zero { Piece::Zeroes(span.end - span.start) } else { part(piece, start, &span) };
        Some((span, found))
    })
}

/// The bytes `range` of a piece that begins at `start`.
fn part<'p>(piece: Piece<'p>, start: u64, range: &Range<u64>) -> Piece<'p> {
    match piece {
        Piece::Data(bytes) => Piece::Data(&bytes[index(range.start - start)..index(range.end - start)]),
        Piece::Zeroes(_) => Piece::Zeroes(range.end - range.start),
    }
}

fn split(piece: Piece<'_>, at: u64) -> (Piece<'_>, Piece<'_>) {
    (part(piece, 0, &(0..at)), part(piece, 0, &(at..piece.len())))
}
