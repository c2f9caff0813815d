//! What a region must hold: a base of position-dependent bytes, and the writes since then in their order. Writes that
//! nothing has acknowledged may be there or not, byte by byte.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use r3map_testkit::fill;
use r3map_testkit::random::Random;

use super::MIB;

/// Regions are compared in pieces of this many bytes.
pub(crate) const PIECE: u64 = MIB;

/// The longest random write in bytes.
const LONGEST: u64 = 300 << 10;

/// A region's bytes.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    size: u64,
    seed: u64,
    writes: Vec<Write>,
    /// How many of the writes are settled: nothing that comes will acknowledge them.
    settled: usize,
}

/// One write: the fill of a seed in a range.
#[derive(Debug, Clone)]
struct Write {
    range: Range<u64>,
    seed: u64,
    /// Whether it must be there.
    kept: bool,
}

impl Write {
    /// Changes what `must` be at `offset`, where `found` is.
    fn lay_over(&self, offset: u64, found: &[u8], must: &mut [u8]) {
        let Some((range, must)) = overlap(&self.range, offset, must) else { return };
        if self.kept {
            return fill::write(must, range.start, self.seed);
        }
        let start = usize::try_from(range.start - offset).expect("it lies in the buffer");
        let may = fill::bytes(range.start, must.len(), self.seed);
        for ((must, may), found) in must.iter_mut().zip(may).zip(&found[start..]) {
            if may == *found {
                *must = may;
            }
        }
    }
}

fn overlap<'a>(range: &Range<u64>, offset: u64, buf: &'a mut [u8]) -> Option<(Range<u64>, &'a mut [u8])> {
    let (start, end) = (range.start.max(offset), range.end.min(offset + buf.len() as u64));
    let at = |position: u64| usize::try_from(position - offset).expect("it lies in the buffer");
    (start < end).then(|| (start..end, &mut buf[at(start)..at(end)]))
}

/// Makes a file of `size` bytes that holds the fill of `seed`.
pub(crate) fn make_file(path: &Path, size: u64, seed: u64) -> Expected {
    let file = File::create(path).expect("a file can be made");
    let mut piece = Vec::new();
    for offset in (0..size).step_by(usize::try_from(PIECE).expect("a piece fits")) {
        piece.resize(usize::try_from(PIECE.min(size - offset)).expect("a piece fits"), 0);
        fill::write(&mut piece, offset, seed);
        file.write_all_at(&piece, offset).expect("there is room for the file");
    }
    Expected { size, seed, writes: Vec::new(), settled: 0 }
}

impl Expected {
    /// In bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Notes a write of the fill of `seed`, which nothing has acknowledged yet, and gives its bytes.
    pub(crate) fn write(&mut self, range: Range<u64>, seed: u64) -> Vec<u8> {
        let len = usize::try_from(range.end - range.start).expect("writes fit");
        let bytes = fill::bytes(range.start, len, seed);
        self.writes.push(Write { range, seed, kept: false });
        bytes
    }

    /// Everything that was written so far was acknowledged: it must be there from now on.
    pub(crate) fn keep(&mut self) {
        self.writes[self.settled..].iter_mut().for_each(|write| write.kept = true);
        self.settled = self.writes.len();
    }

    /// Whoever wrote died: what was not acknowledged may be there or not for ever.
    pub(crate) fn crash(&mut self) {
        self.settled = self.writes.len();
    }

    /// Writes of every magnitude at any place through `write`: the first and the last bytes are among them.
    pub(crate) fn write_randomly(
        &mut self,
        count: usize,
        random: &mut Random,
        mut write: impl FnMut(u64, &[u8]) -> std::io::Result<()>,
    ) {
        for number in 0..count {
            let longest = (random.next_u64() >> (45 + random.below(18))).clamp(1, LONGEST.min(self.size));
            let offset = match number {
                0 => 0,
                1 => self.size - longest,
                _ => random.below(self.size - longest + 1),
            };
            let bytes = self.write(offset..offset + longest, 2 + random.below(1 << 30));
            write(offset, &bytes).unwrap_or_else(|error| panic!("writing {longest} bytes at {offset}: {error}"));
        }
    }

    /// The ranges of the writes so far, for whoever wants to read around them.
    pub(crate) fn written(&self) -> Vec<Range<u64>> {
        self.writes.iter().map(|write| write.range.clone()).collect()
    }

    /// Checks bytes that were read at `offset`.
    ///
    /// # Errors
    /// One line that names the first wrong byte.
    pub(crate) fn check(&self, offset: u64, found: &[u8]) -> Result<(), String> {
        let mut must = fill::bytes(offset, found.len(), self.seed);
        self.writes.iter().for_each(|write| write.lay_over(offset, found, &mut must));
        if must == found {
            return Ok(());
        }
        let first = must.iter().zip(found).position(|(must, found)| must != found).expect("they differ");
        let wrong = must.iter().zip(found).filter(|(must, found)| must != found).count();
        let zeros = found[first..].iter().take_while(|byte| **byte == 0).count();
        let at = offset + first as u64;
        Err(format!(
            "byte {at} is {:#04x}, not {:#04x}; {wrong} of {} are wrong, {zeros} zeros from there",
            found[first],
            must[first],
            found.len()
        ))
    }

    /// Reads a region piece by piece through `read`, and checks every byte.
    ///
    /// # Panics
    /// If a byte is wrong or cannot be read.
    pub(crate) fn check_all(&self, mut read: impl FnMut(u64, &mut [u8]) -> std::io::Result<()>) {
        let mut piece = vec![0; usize::try_from(PIECE).expect("a piece fits")];
        for offset in (0..self.size).step_by(piece.len()) {
            let len = usize::try_from(PIECE.min(self.size - offset)).expect("a piece fits");
            read(offset, &mut piece[..len]).unwrap_or_else(|error| panic!("reading {len} bytes at {offset}: {error}"));
            self.check(offset, &piece[..len]).unwrap_or_else(|wrong| panic!("{wrong}"));
        }
    }

    /// Checks every byte of a file, and its size.
    ///
    /// # Panics
    /// If one is wrong or cannot be read.
    pub(crate) fn check_file(&self, path: &Path) {
        let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(file.metadata().expect("it is open").len(), self.size, "size of {}", path.display());
        self.check_all(|offset, buf| file.read_exact_at(buf, offset));
    }
}

#[test]
fn the_model_tells_kept_open_and_wrong_bytes_apart() {
    let dir = tempfile::tempdir().expect("a temporary folder can be made");
    let path = dir.path().join("file");
    let mut expected = make_file(&path, 10_000, 1);
    expected.check_file(&path);
    let old = std::fs::read(&path).expect("it was just made");
    let bytes = expected.write(5_000..6_000, 7);
    expected.check(0, &old).expect("an open write may be missing");
    let mut new = old.clone();
    new[5_000..6_000].copy_from_slice(&bytes);
    expected.check(0, &new).expect("and may be there");
    let mut lost = expected.clone();
    lost.crash();
    lost.keep();
    lost.check(0, &old).expect("one that was lost needs not come back");
    expected.keep();
    expected.check(0, &new).expect("a kept one is there");
    assert!(expected.check(0, &old).is_err(), "a kept one must be there");
    new[9_999] = 0;
    assert!(expected.check(0, &new).unwrap_err().starts_with("byte 9999 is 0x00"));
}
