//! Which chunks exist: a file beside them that remembers it, so that a chunk which is gone is never taken for one that
//! was never written.
//!
//! # Layout
//! A page of header, then three bitmaps with one bit per chunk, sparse:
//!
//! ```text
//!    0  magic "r3mchunk"
//!    8  format version, u32, little-endian
//!   12  boot id of the machine that opened it last, 36 bytes
//! ```
//! - *written*: the chunk is in its file. If this is not set there is no chunk, whatever file is there.
//! - *unflushed*: it was written, and no flush since then has ended.
//! - *durable*: the file is known to be on the disk under its name.
//!
//! # What a killed process leaves
//! A chunk's file is complete before *written* is set, and *written* is cleared before the file is removed. So a chunk
//! that is *written* has a complete file; a write that was killed in between was not acknowledged, and its chunk is what
//! it was: absent. (A chunk that exists is written in place; a write to it that was killed may have changed some of its
//! pages, as on a disk.) A file without its bit takes room until the chunk is written again. *unflushed* is cleared only
//! when the file is on the disk, so that a flush which was killed is made up for by the next, whoever makes it.
//!
//! # What a loss of power leaves
//! The bits may be on the disk before or after the files. A flush makes the files durable first, then their names, then
//! marks them as *durable*, and only then returns. A *durable* chunk without a complete file was removed or cut by
//! somebody: that is an error. One that is *written* but not *durable*, and has none, was lost with the power before any
//! flush had returned for it: it is absent again. Before a *durable* chunk's file is removed, its cleared bits are made
//! durable.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use r3map_core::{ErrorKind, Operation, Result};
use r3map_pipeline::BlockSet;

use crate::bitmap::{Bitmap, PIECE, Runs};
use crate::boot::{BootId, is_same_boot};
use crate::durability::{Undurable, sync_data};
use crate::opened::{Opened, Purpose, refusal};
use crate::window::{Zeroing, zero};

const NAME: &str = ".r3map-chunks";
const MAGIC: &[u8; 8] = b"r3mchunk";
const VERSION: u32 = 1;

#[derive(Debug)]
pub(super) struct Table {
    opened: Opened,
    written: Bitmap,
    unflushed: Bitmap,
    durable: Bitmap,
    /// Held while bits change: the chunks that were written since the last flush began.
    rewritten: Mutex<BlockSet>,
}

impl Table {
    fn new(opened: Opened, chunks: u64) -> Self {
        let written = Bitmap::new(PIECE as u64, chunks);
        let unflushed = Bitmap::new(written.end(), chunks);
        let durable = Bitmap::new(unflushed.end(), chunks);
        Self { opened, written, unflushed, durable, rewritten: Mutex::default() }
    }

    /// A new table in a directory that has no manifest, in which `existing` chunks are written already. What an earlier
    /// attempt has left is replaced.
    pub(super) fn create(directory: &Path, chunks: u64, existing: &[u64]) -> Result<Self> {
        let path = directory.join(NAME);
        let opened = match Opened::new(&path, 0o666)? {
            Some(new) => new,
            None => Opened::existing(&path, Purpose::Write)?,
        };
        let table = Self::new(opened, chunks);
        let file = &table.opened.file;
        let make = || {
            file.set_len(0)?;
            file.set_len(table.durable.end())?;
            for chunk in existing {
                table.written.fill(file, *chunk..*chunk + 1, true, |_| ())?;
            }
            table.write_header(BootId::current())
        };
        make().map_err(|error| table.opened.fault(Operation::Open, "cannot create the table of chunks", error))?;
        table.opened.sync_name()?;
        Ok(table)
    }

    /// The table of a directory that has a manifest. `is_whole` says whether a chunk's file is there and complete.
    pub(super) fn open(
        directory: &Path,
        chunks: u64,
        purpose: Purpose,
        is_whole: impl Fn(u64) -> io::Result<bool>,
    ) -> Result<Self> {
        let table = Self::new(Opened::existing(&directory.join(NAME), purpose)?, chunks);
        let fault = |error| table.opened.fault(Operation::Open, "cannot use the table of chunks", error);
        let boot = table.read_header()?;
        if is_same_boot(boot, BootId::current()) || purpose == Purpose::Look {
            return Ok(table);
        }
        let lost = table.lost(is_whole).map_err(fault)?;
        match purpose {
            Purpose::Write => table.forget(&lost).map_err(fault)?,
            _ if lost.is_empty() => {}
            _ => {
                let what = "has chunks that were lost with the power; open it once to write, to let go of them";
                return Err(refusal(ErrorKind::Conflict, directory, what));
            }
        }
        Ok(table)
    }

    fn read_header(&self) -> Result<Option<BootId>> {
        let fault = |error| self.opened.fault(Operation::Open, "cannot read the table of chunks", error);
        let corrupt = |what: &str| Err(refusal(ErrorKind::Corrupt, &self.opened.path, what));
        let size = self.opened.size().map_err(fault)?;
        if size != self.durable.end() {
            return corrupt("was truncated or extended: it is no longer known which chunks exist");
        }
        let mut page = [0; PIECE];
        self.opened.file.read_exact_at(&mut page, 0).map_err(fault)?;
        if &page[..8] != MAGIC {
            return corrupt("is not a table of chunks");
        }
        if page[8..12] != VERSION.to_le_bytes() {
            let what = format!("is of another format; this version knows format {VERSION} only");
            return Err(refusal(ErrorKind::InvalidInput, &self.opened.path, what));
        }
        let mut boot = [0; BootId::LEN];
        boot.copy_from_slice(&page[12..12 + BootId::LEN]);
        Ok(BootId::from_bytes(boot))
    }

    fn write_header(&self, boot: Option<BootId>) -> io::Result<()> {
        let mut page = [0; PIECE];
        page[..8].copy_from_slice(MAGIC);
        page[8..12].copy_from_slice(&VERSION.to_le_bytes());
        page[12..12 + BootId::LEN].copy_from_slice(&BootId::to_bytes(boot));
        self.opened.file.write_all_at(&page, 0)
    }

    /// Chunks that were written, but never flushed, and whose files did not survive.
    fn lost(&self, is_whole: impl Fn(u64) -> io::Result<bool>) -> io::Result<Vec<u64>> {
        let mut lost = Vec::new();
        for run in self.runs(&self.written, |written, _, durable| written & !durable)? {
            for chunk in run {
                if !is_whole(chunk)? {
                    lost.push(chunk);
                }
            }
        }
        Ok(lost)
    }

    /// Starts afresh after a loss of power. One in the midst of this changes nothing: the boot id is still the old one.
    fn forget(&self, lost: &[u64]) -> io::Result<()> {
        let file = &self.opened.file;
        for chunk in lost {
            self.written.fill(file, *chunk..*chunk + 1, false, |_| ())?;
        }
        for run in self.runs(&self.durable, |written, _, durable| durable & !written)? {
            self.durable.fill(file, run, false, |_| ())?;
        }
        let range = self.unflushed.range();
        zero(file, range.start, range.end - range.start, Zeroing::Release)?;
        file.sync_data()?;
        self.write_header(BootId::current())?;
        file.sync_data()
    }

    /// The runs of chunks for which `select` leaves a bit of the words of *written*, *unflushed* and *durable*. Only
    /// where `stored` takes room is looked at.
    fn runs(&self, stored: &Bitmap, select: impl Fn(u8, u8, u8) -> u8) -> io::Result<Vec<Range<u64>>> {
        let file = &self.opened.file;
        let mut found = Vec::new();
        let mut runs = Runs::new(|run, _| found.push(run));
        let (mut written, mut unflushed, mut durable) = (Vec::new(), Vec::new(), Vec::new());
        stored.each_stored(file, 0..stored.pieces(), |pieces, bytes| {
            for (bitmap, into) in
                [(&self.written, &mut written), (&self.unflushed, &mut unflushed), (&self.durable, &mut durable)]
            {
                into.resize(bytes.len(), 0);
                bitmap.read_run(file, pieces.start, into)?;
            }
            let others = unflushed.iter().zip(&durable);
            written.iter_mut().zip(others).for_each(|(bits, others)| *bits = select(*bits, *others.0, *others.1));
            runs.pieces(pieces.start, &written, &[]);
            Ok(())
        })?;
        runs.finish();
        Ok(found)
    }

    /// Whether this process may write it.
    pub(super) fn may_be_written(&self) -> bool {
        self.opened.may_be_written()
    }

    pub(super) fn is_written(&self, chunk: u64) -> io::Result<bool> {
        self.written.get(&self.opened.file, chunk).map_err(if_cut)
    }

    /// A chunk's file is complete, or was changed.
    pub(super) fn set_written(&self, chunk: u64) -> io::Result<()> {
        let mut rewritten = self.lock();
        rewritten.insert(chunk..chunk + 1);
        let file = &self.opened.file;
        self.unflushed.fill(file, chunk..chunk + 1, true, |_| ()).map_err(if_cut)?;
        self.written.fill(file, chunk..chunk + 1, true, |_| ()).map_err(if_cut)
    }

    /// Those of the chunks that are written, which are not any more: their files may be removed.
    pub(super) fn clear(&self, chunks: Range<u64>) -> std::result::Result<Vec<Range<u64>>, Undurable> {
        let cleared = self.written_runs(chunks)?;
        let file = &self.opened.file;
        let mut was_durable = false;
        for run in &cleared {
            let _bits = self.lock();
            self.written.fill(file, run.clone(), false, |_| ())?;
            self.unflushed.fill(file, run.clone(), false, |_| ())?;
            self.durable.fill(file, run.clone(), false, |_| was_durable = true)?;
        }
        if was_durable {
            sync_data(file)?;
        }
        Ok(cleared)
    }

    /// The runs of written chunks among some.
    pub(super) fn written_runs(&self, chunks: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let file = &self.opened.file;
        let mut found = Vec::new();
        let mut runs = Runs::new(|run: Range<u64>, _| {
            let run = run.start.max(chunks.start)..run.end.min(chunks.end);
            if !run.is_empty() {
                found.push(run);
            }
        });
        let pieces = Bitmap::piece_of(chunks.start)..Bitmap::piece_of(chunks.end.saturating_sub(1)) + 1;
        self.written.each_stored(file, pieces, |pieces, bytes| {
            runs.pieces(pieces.start, bytes, &[]);
            Ok(())
        })?;
        runs.finish();
        Ok(found)
    }

    /// A flush begins: the chunks whose files have to be made durable.
    pub(super) fn begin_flush(&self) -> io::Result<Vec<Range<u64>>> {
        let mut rewritten = self.lock();
        *rewritten = BlockSet::default();
        self.runs(&self.written, |written, unflushed, durable| written & (unflushed | !durable))
    }

    /// The files that a flush began with are durable, and so are their names; but those of chunks that were removed or
    /// written since then may not be.
    pub(super) fn set_durable(&self, flushed: &[Range<u64>]) -> std::result::Result<(), Undurable> {
        let file = &self.opened.file;
        for run in flushed {
            let rewritten = self.lock();
            let mut durable = BlockSet::default();
            self.written_runs(run.clone())?.into_iter().for_each(|run| durable.insert(run));
            durable.subtract(&rewritten);
            for run in durable.runs() {
                self.durable.fill(file, run.clone(), true, |_| ())?;
                self.unflushed.fill(file, run, false, |_| ())?;
            }
        }
        sync_data(file)
    }

    /// Fails with `UnexpectedEof` if the table was cut.
    pub(super) fn check_not_cut(&self) -> io::Result<()> {
        self.opened.check_not_cut(self.durable.end())
    }

    fn lock(&self) -> MutexGuard<'_, BlockSet> {
        self.rewritten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For tests: as if the machine had lost power since.
    #[cfg(test)]
    pub(super) fn forget_boot(&self) {
        self.write_header(None).unwrap();
    }

    /// For tests: how many chunks are known to be durable.
    #[cfg(test)]
    pub(super) fn durable_chunks(&self) -> u64 {
        let runs = self.runs(&self.durable, |_, _, durable| durable).unwrap();
        runs.into_iter().map(|run| run.end - run.start).sum()
    }
}

/// Tells a table that was cut from a chunk that was.
fn if_cut(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::new(io::ErrorKind::InvalidData, "the table of chunks was truncated"),
        _ => error,
    }
}

/// The file that a chunk is in, in the directory: the chunk's offset in the region, in decimal.
pub(super) fn name(offset: u64) -> String {
    offset.to_string()
}

/// The offset that a file name stands for, if it is a chunk's.
pub(super) fn offset(name: &str) -> Option<u64> {
    let offset = name.parse().ok()?;
    (self::name(offset) == name).then_some(offset)
}
