//! The local side of a cached region in one file, which survives its process: a new one that opens the file neither
//! pulls again what was there, nor loses what was written.
//!
//! # Layout
//! ```text
//!   header | valid | dirty | promised | data
//! ```
//! A page of [header]; three bitmaps with one bit per block, each a whole number of pages; the region's bytes, from a
//! multiple of 1 MiB on. All of it is sparse.
//!
//! - *valid*: the block's bytes are in place.
//! - *dirty*: the remote may not have them. Means nothing without *valid*.
//! - *promised*: blocks that were dirty at the last checkpoint.
//!
//! # What a killed process leaves
//! The page cache survives, so the file is exactly what the process had done to it, up to some call. The order of calls
//! makes every such state a good one: bytes are in place before *valid* is set; *dirty* is set before bytes of a valid
//! block change, and before *valid* is set for bytes that the application wrote; *dirty* is cleared after the remote has
//! flushed them; *valid* is cleared before a forgotten block's bytes change. All bits are trusted. One block's bits lie in single bytes, so that none is half written.
//!
//! # What a loss of power leaves
//! Any page of the file may have reached the disk in any state since the last checkpoint. A *valid* bit may be there
//! without its bytes; bytes may be there that were written after the *dirty* bit that went with them, which is not. So
//! nothing that is said to be clean can be trusted, neither what was pulled since nor what was clean before: it could
//! have been written to in the meantime, and be half of that now. It costs nothing but another pull to forget it, and
//! the remote has it. (Counting it as dirty instead would push the whole cache, and could put old bytes over new ones.)
//!
//! What must not be forgotten is what was dirty at the last checkpoint, for it may be nowhere else. A checkpoint makes
//! the bytes durable first, and only then marks as *promised* those of its dirty blocks that still are. So a *promised*
//! block's bytes on the disk are those of the checkpoint or later ones that nobody was told are durable. It is kept, as
//! dirty. It may have been pushed since, then it is pushed again: harmless, because whoever acknowledges a flush makes a
//! checkpoint first, so what the remote has got beyond what is here was never acknowledged.
//!
//! A loss of power is known by the machine's boot id, which is in the header of a file that was not closed. A file that
//! was closed holds nothing that is not durable, and is trusted on any machine.
//!
//! It does not help against a disk that is pulled out while the machine runs, nor against copying the file while it is
//! in use.

mod header;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use r3map_core::{
    Backend, Capabilities, Error, ErrorKind, Extent, Extents, Geometry, Operation, Result, Trim, WriteZeroes,
    check_range, is_zero,
};
use r3map_pipeline::{Local, Recorded, StateRecord};

use crate::bitmap::{Bitmap, PIECE, Piece, Runs};
use crate::boot::{BootId, is_same_boot};
use crate::durability::{Undurable, sync_data};
use crate::opened::{Opened, Purpose, refusal};
use crate::window::{Window, Zeroing, zero};
use header::{Header, Left, MAX_IDENTITY};

/// What the region's bytes are aligned to in the file.
const DATA_ALIGN: u64 = 1 << 20;

/// The local side of a cached region, in a file. Both its [`Local`] and its [`StateRecord`]. Must be used within a tokio
/// runtime.
///
/// Dropping it marks the file as closed if nothing has changed since the last checkpoint.
#[derive(Debug)]
pub struct CacheFile {
    table: Arc<Table>,
    window: Window,
}

/// The header and the bitmaps. The file itself is the window's.
#[derive(Debug)]
struct Table {
    header: Header,
    valid: Bitmap,
    dirty: Bitmap,
    promised: Bitmap,
    bits: Mutex<Bits>,
}

/// What is held while bits change.
#[derive(Debug, Default)]
struct Bits {
    /// Pieces of *dirty* that may have bits set. The others have none.
    in_use: BTreeSet<u64>,
    /// Pieces of *dirty* that may differ from those of *promised*.
    unpromised: BTreeSet<u64>,
}

impl CacheFile {
    /// Opens the cache file at `path`, or makes one, for the region that `identity` names: the same string must be given
    /// each time, and another one for another region. Blocks for as long as the file system takes.
    ///
    /// # Errors
    /// `Conflict` if it is in use, or holds another region; `InvalidInput` if it is not a cache file, or is one of another
    /// format, size or chunk size; `Corrupt` if it is damaged or was truncated; `Denied`, `NotFound` and `Exhausted` as
    /// the file system has them. A file that is refused is left as it is.
    pub fn open(path: impl AsRef<Path>, identity: &str, geometry: Geometry) -> Result<Self> {
        let path = path.as_ref();
        if identity.len() > MAX_IDENTITY {
            let what = format!("cannot hold an identity of more than {MAX_IDENTITY} bytes");
            return Err(refusal(ErrorKind::InvalidInput, path, what));
        }
        let opened = match Opened::new(path, 0o600)? {
            Some(new) => new,
            None => Opened::existing(path, Purpose::Write)?,
        };
        let header = Header { geometry, identity: identity.to_owned(), left: Left::Open, boot: BootId::current() };
        let table = Table::new(header);
        let in_use = table.take_over(&opened)?;
        *table.lock() = Bits { unpromised: in_use.clone(), in_use };
        let window = Window::new(opened, table.data_start(), geometry.size());
        Ok(Self { table: Arc::new(table), window })
    }

    /// What the region in an existing cache file is called, and how it is cut. Does not take the file into use.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn describe(path: impl AsRef<Path>) -> Result<(String, Geometry)> {
        let path = path.as_ref();
        let mut page = [0; header::LEN];
        let read = fs::File::open(path).and_then(|file| file.read_exact_at(&mut page, 0));
        read.map_err(|error| Error::from_io(Operation::Open, format!("{} is no cache file", path.display()), error))?;
        let header = Header::from_page(&page).map_err(|error| error.context(path.display()))?;
        Ok((header.identity, header.geometry))
    }

    fn check(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        check_range(operation, self.window.len(), offset, len)
    }

    fn file(&self) -> &fs::File {
        &self.window.opened().file
    }

    /// Changes bits of `blocks`.
    fn note(&self, blocks: &Range<u64>, change: impl FnOnce(&Table, &fs::File) -> io::Result<()>) -> Result<()> {
        if blocks.end > self.table.header.geometry.block_count() {
            return Err(Error::new(ErrorKind::InvalidInput, Operation::Write, "no such block"));
        }
        if blocks.is_empty() {
            return Ok(());
        }
        self.window.durability().changed();
        let changed = change(&self.table, self.file());
        self.window.durability().changed();
        changed
            .map_err(|error| self.window.opened().fault(Operation::Write, "cannot record the state of blocks", error))
    }
}

impl Table {
    fn new(header: Header) -> Self {
        let blocks = header.geometry.block_count();
        let valid = Bitmap::new(header::LEN as u64, blocks);
        let dirty = Bitmap::new(valid.end(), blocks);
        let promised = Bitmap::new(dirty.end(), blocks);
        Self { header, valid, dirty, promised, bits: Mutex::default() }
    }

    fn data_start(&self) -> u64 {
        self.promised.end().next_multiple_of(DATA_ALIGN)
    }

    fn file_size(&self) -> u64 {
        self.data_start() + self.header.geometry.size()
    }

    /// Makes an opened file this table's, or refuses it and leaves it alone. Answers the pieces of *dirty* and *promised*
    /// that have bits set.
    fn take_over(&self, opened: &Opened) -> Result<BTreeSet<u64>> {
        let fault = |error| opened.fault(Operation::Open, "cannot use this cache file", error);
        let size = opened.size().map_err(fault)?;
        if opened.is_device {
            return Err(refusal(ErrorKind::InvalidInput, &opened.path, "is a device, not a cache file"));
        }
        match self.read_header(opened, size)? {
            Some(found) if found.left != Left::Creating => self.take_over_used(opened, size, &found)?,
            _ => self.create(opened)?,
        }
        self.pieces_in_use(&opened.file).map_err(fault)
    }

    /// The header, or `None` if the file is empty: then its creation went no further.
    fn read_header(&self, opened: &Opened, size: u64) -> Result<Option<Header>> {
        if size == 0 {
            return Ok(None);
        }
        let mut page = [0; header::LEN];
        match opened.file.read_exact_at(&mut page, 0) {
            Ok(()) => {}
            // Too short to be one: it has no magic that could be found.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => page.fill(0),
            Err(error) => return Err(opened.fault(Operation::Open, "cannot read it", error)),
        }
        Header::from_page(&page).map(Some).map_err(|error| error.context(opened.path.display()))
    }

    fn take_over_used(&self, opened: &Opened, size: u64, found: &Header) -> Result<()> {
        self.check_same(opened, found)?;
        if size != self.file_size() {
            let what = format!("was truncated or extended: it has {size} bytes, not {}", self.file_size());
            return Err(refusal(ErrorKind::Corrupt, &opened.path, what));
        }
        let fault = |error| opened.fault(Operation::Open, "cannot use this cache file", error);
        if found.left == Left::Open && !is_same_boot(found.boot, self.header.boot) {
            self.forget_what_is_not_promised(&opened.file).map_err(fault)?;
        }
        // From here on the file is not closed any more; that must be on the disk before anything else can be.
        self.write_header(&opened.file, Left::Open).and_then(|()| opened.file.sync_data()).map_err(fault)
    }

    fn check_same(&self, opened: &Opened, found: &Header) -> Result<()> {
        let (here, there) = (&self.header, found);
        let refuse = |kind, what: String| Err(refusal(kind, &opened.path, what));
        if here.identity != there.identity {
            let (there, here) = (name(&there.identity), name(&here.identity));
            let whose = match there == here {
                true => format!("is the cache of another region that was at {there:?}"),
                false => format!("is the cache of {there:?}, not of {here:?}"),
            };
            let what = format!("{whose}; give another file, or remove this one if what it holds is not needed");
            return refuse(ErrorKind::Conflict, what);
        }
        let (here, there) = (here.geometry, there.geometry);
        if here.size() != there.size() {
            let what =
                format!("is the cache of a region of {} bytes, not {}; give another file", there.size(), here.size());
            return refuse(ErrorKind::InvalidInput, what);
        }
        if here.chunk_size() != there.chunk_size() {
            let (there, here) = (there.chunk_size(), here.chunk_size());
            let what = format!("was made for chunks of {there}, not {here}; ask for that size, or give another file");
            return refuse(ErrorKind::InvalidInput, what);
        }
        Ok(())
    }

    /// Makes a file that is empty or half created ours. The header comes first, and durably: without it, what a loss of
    /// power leaves could not be told from somebody else's file.
    fn create(&self, opened: &Opened) -> Result<()> {
        let file = &opened.file;
        let make = || {
            file.set_len(0)?;
            self.write_header(file, Left::Creating)?;
            file.sync_data()?;
            file.set_len(self.file_size())
        };
        let what = format!("cannot hold a cache of {} bytes", self.header.geometry.size());
        make().map_err(|error| opened.fault(Operation::Open, &what, error))?;
        opened.sync_name()?;
        self.write_header(file, Left::Open)
            .and_then(|()| file.sync_data())
            .map_err(|error| opened.fault(Operation::Open, "cannot create the cache file", error))
    }

    fn write_header(&self, file: &fs::File, left: Left) -> io::Result<()> {
        file.write_all_at(&Header { left, ..self.header.clone() }.to_page(), 0)
    }

    /// After a loss of power: only what is promised is valid, and it is dirty. A loss of power in the midst of this
    /// changes nothing, because *promised* stays and the header still has the old boot id.
    fn forget_what_is_not_promised(&self, file: &fs::File) -> io::Result<()> {
        for bitmap in [&self.valid, &self.dirty] {
            let range = bitmap.range();
            zero(file, range.start, range.end - range.start, Zeroing::Release)?;
        }
        self.promised.each_stored(file, 0..self.promised.pieces(), |pieces, bytes| {
            for (piece, bits) in pieces.zip(bytes.as_chunks().0).filter(|(_, bits)| !is_zero(&bits[..])) {
                self.dirty.write(file, piece, bits)?;
                self.valid.write(file, piece, bits)?;
            }
            Ok(())
        })?;
        file.sync_data()
    }

    /// Every piece in which something is dirty or promised.
    fn pieces_in_use(&self, file: &fs::File) -> io::Result<BTreeSet<u64>> {
        let mut found = BTreeSet::new();
        for bitmap in [&self.dirty, &self.promised] {
            bitmap.each_stored(file, 0..bitmap.pieces(), |pieces, bytes| {
                let used = pieces.zip(bytes.chunks_exact(PIECE)).filter(|(_, bits)| !is_zero(bits));
                found.extend(used.map(|(piece, _)| piece));
                Ok(())
            })?;
        }
        Ok(found)
    }

    fn load(&self, file: &fs::File, visit: &mut dyn FnMut(Range<u64>, Recorded)) -> io::Result<()> {
        let bits = self.lock();
        let mut runs = Runs::new(|blocks, dirty| visit(blocks, if dirty { Recorded::Dirty } else { Recorded::Clean }));
        let mut dirty = Vec::new();
        self.valid.each_stored(file, 0..self.valid.pieces(), |pieces, valid| {
            if self.valid.has_surplus(&pieces, valid) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a block past the end counts as present"));
            }
            dirty.clear();
            if bits.in_use.range(pieces.clone()).next().is_some() {
                dirty.resize(valid.len(), 0);
                self.dirty.read_run(file, pieces.start, &mut dirty)?;
            }
            runs.pieces(pieces.start, valid, &dirty);
            Ok(())
        })?;
        runs.finish();
        Ok(())
    }

    fn record(&self, file: &fs::File, blocks: &Range<u64>, state: Recorded) -> io::Result<()> {
        let mut bits = self.lock();
        let Bits { in_use, unpromised } = &mut *bits;
        let pieces = Bitmap::piece_of(blocks.start)..=Bitmap::piece_of(blocks.end.saturating_sub(1));
        if state == Recorded::Dirty {
            in_use.extend(pieces.clone());
        }
        // Most of what is recorded is clean, where nothing ever was anything else.
        if in_use.range(pieces).next().is_some() {
            let differ = |piece| {
                unpromised.insert(piece);
            };
            self.dirty.fill(file, blocks.clone(), state == Recorded::Dirty, differ)?;
        }
        self.valid.fill(file, blocks.clone(), true, |_| ())
    }

    /// Nothing is half forgotten that matters: *dirty* means nothing without *valid*.
    fn forget(&self, file: &fs::File, blocks: &Range<u64>) -> io::Result<()> {
        let mut bits = self.lock();
        let Bits { in_use, unpromised } = &mut *bits;
        self.valid.fill(file, blocks.clone(), false, |_| ())?;
        let pieces = Bitmap::piece_of(blocks.start)..=Bitmap::piece_of(blocks.end.saturating_sub(1));
        if in_use.range(pieces).next().is_none() {
            return Ok(());
        }
        self.dirty.fill(file, blocks.clone(), false, |piece| {
            unpromised.insert(piece);
        })
    }

    /// Makes the bytes durable, then the promise of those that are dirty. One at a time.
    fn checkpoint(&self, file: &fs::File) -> std::result::Result<(), Undurable> {
        let pieces = std::mem::take(&mut self.lock().unpromised);
        let made = self.promise_durably(file, &pieces);
        if made.is_err() {
            self.lock().unpromised.extend(pieces);
        }
        if let Err(Undurable::Lost(_)) = &made {
            self.distrust(file);
        }
        made
    }

    /// What the page cache says is no longer what the disk will have: whoever opens the file next must treat it as after
    /// a loss of power.
    fn distrust(&self, file: &fs::File) {
        let header = Header { boot: None, ..self.header.clone() };
        if let Err(error) = file.write_all_at(&header.to_page(), 0) {
            tracing::warn!(%error, "a cache file could not be marked as damaged; delete it");
        }
    }

    fn promise_durably(&self, file: &fs::File, pieces: &BTreeSet<u64>) -> std::result::Result<(), Undurable> {
        let was_dirty = self.dirty_pieces(file, pieces)?;
        sync_data(file)?;
        for (piece, dirty) in &was_dirty {
            self.promise(file, *piece, dirty)?;
        }
        sync_data(file)
    }

    fn dirty_pieces(&self, file: &fs::File, pieces: &BTreeSet<u64>) -> io::Result<Vec<(u64, Box<Piece>)>> {
        let _bits = self.lock();
        pieces.iter().map(|piece| Ok((*piece, Box::new(self.dirty.read(file, *piece)?)))).collect()
    }

    /// Promises those of the blocks that were dirty which still are. Those that have become dirty meanwhile are left to
    /// the next checkpoint: recording them has put their piece on its list.
    fn promise(&self, file: &fs::File, piece: u64, was_dirty: &Piece) -> io::Result<()> {
        let _bits = self.lock();
        let mut promised = self.dirty.read(file, piece)?;
        promised.iter_mut().zip(was_dirty).for_each(|(now, then)| *now &= then);
        match promised == self.promised.read(file, piece)? {
            true => Ok(()),
            false => self.promised.write(file, piece, &promised),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Bits> {
        self.bits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for CacheFile {
    fn drop(&mut self) {
        if self.window.durability().is_durable() {
            // Whenever this reaches the disk, everything before it has. If it does not, the next to open the file is
            // more careful than it need be.
            let _ = self.table.write_header(self.file(), Left::Closed);
        }
    }
}

#[async_trait]
impl Backend for CacheFile {
    fn size(&self) -> u64 {
        self.window.len()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { trim: Some(self), write_zeroes: Some(self), extents: Some(self), ..Capabilities::default() }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check(Operation::Read, offset, buf.len() as u64)?;
        self.window.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.check(Operation::Write, offset, buf.len() as u64)?;
        self.window.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        self.checkpoint().await
    }
}

#[async_trait]
impl Trim for CacheFile {
    async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        self.check(Operation::Trim, offset, len)?;
        self.window.zero(Operation::Trim, offset, len, Zeroing::Release).await
    }
}

#[async_trait]
impl WriteZeroes for CacheFile {
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.check(Operation::WriteZeroes, offset, len)?;
        self.window.zero(Operation::WriteZeroes, offset, len, Zeroing::Keep).await
    }
}

#[async_trait]
impl Extents for CacheFile {
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        self.check(Operation::Extents, offset, len)?;
        match len {
            0 => Ok(Vec::new()),
            _ => self.window.extents(offset, len).await,
        }
    }
}

#[async_trait]
impl Local for CacheFile {
    async fn install(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        match is_zero(bytes) {
            true => self.trim(offset, bytes.len() as u64).await,
            false => self.write_at(offset, bytes).await,
        }
    }
}

#[async_trait]
impl StateRecord for CacheFile {
    fn load(&self, visit: &mut dyn FnMut(Range<u64>, Recorded)) -> Result<()> {
        let loaded = self.table.load(self.file(), visit);
        loaded
            .map_err(|error| self.window.opened().fault(Operation::Open, "cannot read the state of its blocks", error))
    }

    fn record(&self, blocks: Range<u64>, state: Recorded) -> Result<()> {
        self.note(&blocks, |table, file| table.record(file, &blocks, state))
    }

    fn forget(&self, blocks: Range<u64>) -> Result<()> {
        self.note(&blocks, |table, file| table.forget(file, &blocks))
    }

    async fn checkpoint(&self) -> Result<()> {
        let table = self.table.clone();
        self.window.flush_with(move |file| table.checkpoint(file)).await
    }
}

/// What people gave a region as its name: an identity without what a server calls its bytes, which is no text for them.
fn name(identity: &str) -> &str {
    match identity.rsplit_once(' ') {
        Some((name, id)) if id.bytes().all(|byte| byte.is_ascii_hexdigit()) => name,
        _ => identity,
    }
}
