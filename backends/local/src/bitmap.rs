//! Bitmaps in a stretch of a file: as large as the file system allows, and costing what is set in them.
//!
//! They are read and written in pieces of one page, so that a piece in the page cache is never half written by a
//! process that is killed. Nothing is kept in memory and nothing is locked here; callers see to it that a piece is
//! changed by one at a time. Bit `n` is bit `n % 8`, counted from the lowest, of byte `n / 8`.

use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Bytes in a piece.
pub(crate) const PIECE: usize = 4096;
const PIECE_BITS: u64 = PIECE as u64 * 8;
/// Pieces that are read at once where many are.
const STEP: usize = 64;

pub(crate) type Piece = [u8; PIECE];

/// Where in a file a bitmap lies, and how many bits it has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bitmap {
    base: u64,
    bits: u64,
}

impl Bitmap {
    /// `bits` bits from byte `base` on, a multiple of [`PIECE`].
    pub(crate) fn new(base: u64, bits: u64) -> Self {
        Self { base, bits }
    }

    /// The first byte behind it.
    pub(crate) fn end(&self) -> u64 {
        self.base + self.pieces() * PIECE as u64
    }

    /// Bytes of the file.
    pub(crate) fn range(&self) -> Range<u64> {
        self.base..self.end()
    }

    pub(crate) fn pieces(&self) -> u64 {
        self.bits.div_ceil(PIECE_BITS)
    }

    /// The piece that holds a bit.
    pub(crate) fn piece_of(bit: u64) -> u64 {
        bit / PIECE_BITS
    }

    /// The first bit of a piece.
    pub(crate) fn first_bit(piece: u64) -> u64 {
        piece * PIECE_BITS
    }

    /// Reads a run of pieces, as many as fit into `buf`.
    pub(crate) fn read_run(&self, file: &fs::File, first: u64, buf: &mut [u8]) -> io::Result<()> {
        file.read_exact_at(buf, self.base + first * PIECE as u64)
    }

    pub(crate) fn read(&self, file: &fs::File, piece: u64) -> io::Result<Piece> {
        let mut bytes = [0; PIECE];
        file.read_exact_at(&mut bytes, self.base + piece * PIECE as u64)?;
        Ok(bytes)
    }

    pub(crate) fn write(&self, file: &fs::File, piece: u64, bytes: &Piece) -> io::Result<()> {
        file.write_all_at(bytes, self.base + piece * PIECE as u64)
    }

    /// Whether a bit is set.
    pub(crate) fn get(&self, file: &fs::File, bit: u64) -> io::Result<bool> {
        let mut byte = [0];
        file.read_exact_at(&mut byte, self.base + bit / 8)?;
        Ok(byte[0] >> (bit % 8) & 1 == 1)
    }

    /// Sets or clears a run of bits; calls `changed` with each piece in which one changed, after it was written.
    pub(crate) fn fill(
        &self,
        file: &fs::File,
        bits: Range<u64>,
        value: bool,
        mut changed: impl FnMut(u64),
    ) -> io::Result<()> {
        debug_assert!(bits.end <= self.bits, "bits past the end of the bitmap");
        let mut at = bits.start;
        while at < bits.end {
            let piece = Self::piece_of(at);
            let first = Self::first_bit(piece);
            let end = bits.end.min(first + PIECE_BITS);
            if self.fill_bytes(file, at..end, value)? {
                changed(piece);
            }
            at = end;
        }
        Ok(())
    }

    /// The same within one piece: reads and writes no more bytes than it must.
    fn fill_bytes(&self, file: &fs::File, bits: Range<u64>, value: bool) -> io::Result<bool> {
        let (first, last) = (bits.start / 8, (bits.end - 1) / 8);
        let mut buf = [0; PIECE];
        let bytes = &mut buf[..=usize::try_from(last - first).unwrap_or(PIECE)];
        file.read_exact_at(bytes, self.base + first)?;
        let mut changed = false;
        for (index, byte) in (first..).zip(bytes.iter_mut()) {
            let mask = mask(index, &bits);
            let new = if value { *byte | mask } else { *byte & !mask };
            changed |= new != *byte;
            *byte = new;
        }
        if changed {
            file.write_all_at(bytes, self.base + first)?;
        }
        Ok(changed)
    }

    /// The first run of pieces from `piece` on that the file has room for, and so may have bits set.
    pub(crate) fn next_stored(&self, file: &fs::File, piece: u64) -> io::Result<Option<Range<u64>>> {
        if piece >= self.pieces() {
            return Ok(None);
        }
        let Some(start) = self.seek(file, SeekFrom::Data, piece)?.filter(|start| *start < self.pieces()) else {
            return Ok(None);
        };
        let end = self.seek(file, SeekFrom::Hole, start)?.unwrap_or(self.pieces());
        Ok(Some(start..end.clamp(start + 1, self.pieces())))
    }

    fn seek(&self, file: &fs::File, kind: fn(u64) -> SeekFrom, piece: u64) -> io::Result<Option<u64>> {
        match seek(file, kind(self.base + piece * PIECE as u64)) {
            Ok(at) => Ok(Some((at - self.base) / PIECE as u64)),
            Err(Errno::NXIO) => Ok(None),
            // A file system that does not know its holes: all of it is data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(matches!(kind(0), SeekFrom::Data(_)).then_some(piece)),
            Err(error) => Err(error.into()),
        }
    }

    /// Calls `visit` with every stored run of pieces among those from `piece` to `end`, and with their bytes; cut into
    /// steps that fit into memory.
    pub(crate) fn each_stored(
        &self,
        file: &fs::File,
        pieces: Range<u64>,
        mut visit: impl FnMut(Range<u64>, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut buf = Vec::new();
        let mut at = pieces.start;
        while let Some(run) = self.next_stored(file, at)?.filter(|run| run.start < pieces.end) {
            at = run.end;
            for start in run.clone().step_by(STEP) {
                let step = start..run.end.min(start + STEP as u64).min(pieces.end);
                if step.is_empty() {
                    break;
                }
                buf.resize(bytes(&step), 0);
                self.read_run(file, start, &mut buf)?;
                visit(step, &buf)?;
            }
        }
        Ok(())
    }

    /// Whether a bit behind the last one is set in the bytes of some pieces.
    pub(crate) fn has_surplus(&self, pieces: &Range<u64>, bytes: &[u8]) -> bool {
        let surplus = self.bits..Self::first_bit(self.pieces());
        let first = Self::first_bit(pieces.start) / 8;
        let skip = usize::try_from((self.bits / 8).saturating_sub(first)).unwrap_or(usize::MAX);
        (first..).zip(bytes).skip(skip).any(|(index, byte)| byte & mask(index, &surplus) != 0)
    }
}

/// The bytes of a run of pieces.
pub(crate) fn bytes(pieces: &Range<u64>) -> usize {
    usize::try_from(pieces.end - pieces.start).unwrap_or(usize::MAX).saturating_mul(PIECE)
}

/// Those bits of byte `index` that lie in `bits`.
fn mask(index: u64, bits: &Range<u64>) -> u8 {
    let first = index * 8;
    let (start, end) = (bits.start.clamp(first, first + 8) - first, bits.end.clamp(first, first + 8) - first);
    let below = |count: u64| u8::try_from((1u16 << count) - 1).unwrap_or(u8::MAX);
    below(end) & !below(start)
}

/// Runs of set bits, joined where one piece ends and the next begins, each with the value that a second bitmap has for
/// it.
pub(crate) struct Runs<F: FnMut(Range<u64>, bool)> {
    visit: F,
    run: Range<u64>,
    second: bool,
}

impl<F: FnMut(Range<u64>, bool)> Runs<F> {
    pub(crate) fn new(visit: F) -> Self {
        Self { visit, run: 0..0, second: false }
    }

    /// Takes the bytes of some pieces of the first bitmap, from `piece` on, and the same of the second; what is missing
    /// of that counts as clear. Pieces come in ascending order.
    pub(crate) fn pieces(&mut self, piece: u64, first: &[u8], second: &[u8]) {
        let mut second = second.chunks_exact(8);
        for (at, first) in (Bitmap::first_bit(piece)..).step_by(64).zip(first.chunks_exact(8)) {
            self.word(at, word(first), second.next().map_or(0, word));
        }
    }

    fn word(&mut self, at: u64, first: u64, second: u64) {
        let mut bit = 0;
        while bit < 64 && first >> bit != 0 {
            bit += (first >> bit).trailing_zeros();
            let value = second >> bit & 1 == 1;
            let alike = first & if value { second } else { !second };
            let len = (alike >> bit).trailing_ones();
            self.add(at + u64::from(bit)..at + u64::from(bit + len), value);
            bit += len;
        }
    }

    fn add(&mut self, run: Range<u64>, second: bool) {
        if self.run.end == run.start && self.second == second && !self.run.is_empty() {
            self.run.end = run.end;
            return;
        }
        self.give();
        (self.run, self.second) = (run, second);
    }

    fn give(&mut self) {
        if !self.run.is_empty() {
            (self.visit)(self.run.clone(), self.second);
        }
    }

    /// Gives the last run.
    pub(crate) fn finish(mut self) {
        self.give();
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BITS: u64 = PIECE_BITS * 2 + 777;

    fn two() -> (fs::File, Bitmap, Bitmap) {
        let file = tempfile::tempfile().unwrap();
        let first = Bitmap::new(4096, BITS);
        let second = Bitmap::new(first.end(), BITS);
        file.set_len(second.end()).unwrap();
        (file, first, second)
    }

    fn runs(file: &fs::File, first: &Bitmap, second: &Bitmap) -> Vec<(Range<u64>, bool)> {
        let mut found = Vec::new();
        let mut runs = Runs::new(|run, value| found.push((run, value)));
        first
            .each_stored(file, 0..first.pieces(), |pieces, bytes| {
                let mut others = vec![0; bytes.len()];
                second.read_run(file, pieces.start, &mut others)?;
                runs.pieces(pieces.start, bytes, &others);
                Ok(())
            })
            .unwrap();
        runs.finish();
        found
    }

    #[test]
    fn only_what_changes_is_written_and_told() {
        let (file, bitmap, _) = two();
        let mut told = Vec::new();
        let mut fill = |bits: Range<u64>, value| {
            bitmap.fill(&file, bits, value, |piece| told.push(piece)).unwrap();
            std::mem::take(&mut told)
        };
        assert_eq!(fill(0..BITS, false), []);
        assert_eq!(fill(PIECE_BITS - 1..PIECE_BITS + 1, true), [0, 1]);
        assert_eq!(fill(PIECE_BITS - 1..PIECE_BITS, true), []);
        assert_eq!(fill(BITS - 1..BITS, true), [2]);
        assert!(bitmap.get(&file, BITS - 1).unwrap() && !bitmap.get(&file, BITS - 2).unwrap());
        assert!(!bitmap.has_surplus(&(2..3), &bitmap.read(&file, 2).unwrap()));
        let mut last = bitmap.read(&file, 2).unwrap();
        last[PIECE - 1] = 0x80;
        assert!(bitmap.has_surplus(&(2..3), &last));
    }

    #[test]
    fn a_large_empty_bitmap_is_crossed_at_once() {
        let file = tempfile::tempfile().unwrap();
        let bitmap = Bitmap::new(4096, 1 << 40);
        file.set_len(bitmap.end()).unwrap();
        assert_eq!(bitmap.next_stored(&file, 0).unwrap(), None);
        bitmap.fill(&file, (1 << 39)..(1 << 39) + 1, true, |_| ()).unwrap();
        let piece = Bitmap::piece_of(1 << 39);
        assert_eq!(bitmap.next_stored(&file, 0).unwrap(), Some(piece..piece + 1));
        assert_eq!(bitmap.next_stored(&file, piece + 1).unwrap(), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn runs_are_what_was_filled(fills in proptest::collection::vec((any::<bool>(), any::<bool>(), 0..BITS, 0..3000u64), 1..30)) {
            let (file, first, second) = two();
            let mut model = vec![(false, false); usize::try_from(BITS).unwrap()];
            for (into_second, value, start, len) in fills {
                let range = start..(start + len).min(BITS);
                let bitmap = if into_second { &second } else { &first };
                bitmap.fill(&file, range.clone(), value, |_| ()).unwrap();
                for bit in range {
                    let bits = &mut model[usize::try_from(bit).unwrap()];
                    *(if into_second { &mut bits.1 } else { &mut bits.0 }) = value;
                }
            }
            let mut expected: Vec<(Range<u64>, bool)> = Vec::new();
            for (at, (set, second)) in (0..).zip(model) {
                match expected.last_mut() {
                    _ if !set => {}
                    Some((run, value)) if run.end == at && *value == second => run.end = at + 1,
                    _ => expected.push((at..at + 1, second)),
                }
            }
            prop_assert_eq!(runs(&file, &first, &second), expected);
        }
    }
}
