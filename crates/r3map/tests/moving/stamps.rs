//! An application that stamps blocks: each stamp is higher than all before.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use r3map::SliceMount;
use r3map::migration::Arrived;
use r3map_testkit::random::Random;
use rustix::fs::OFlags;

use super::{Application, open};

pub(crate) const BLOCK: usize = 4096;

/// What the application works on.
pub(crate) enum Front {
    Slice(SliceMount),
    File(File),
    /// A device, past the kernel's cache and through it.
    Device {
        direct: File,
        cached: File,
    },
}

impl Front {
    pub(crate) fn file(path: &Path) -> Self {
        Self::File(OpenOptions::new().read(true).write(true).open(path).unwrap())
    }

    pub(crate) fn device(path: &Path) -> Self {
        let flags = OFlags::DIRECT.bits().cast_signed();
        let direct = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).unwrap();
        Self::Device { direct, cached: OpenOptions::new().read(true).write(true).open(path).unwrap() }
    }

    /// Reads a block; of a device every other one past the kernel's cache.
    fn read(&self, block: usize, buf: &mut [u8]) {
        let at = block * BLOCK;
        match self {
            Self::Slice(slice) => buf.copy_from_slice(&slice.as_slice()[at..at + buf.len()]),
            Self::Device { direct, .. } if block.is_multiple_of(2) => {
                let (mut aligned, place) = aligned(buf.len());
                direct.read_exact_at(&mut aligned[place..place + buf.len()], at as u64).unwrap();
                buf.copy_from_slice(&aligned[place..place + buf.len()]);
            }
            Self::File(file) | Self::Device { cached: file, .. } => file.read_exact_at(buf, at as u64).unwrap(),
        }
    }

    /// Writes a block; of a device every other time past the kernel's cache.
    fn write(&mut self, block: usize, stamp: u64, bytes: &[u8]) {
        let at = block * BLOCK;
        match self {
            Self::Slice(slice) => slice.as_mut_slice().unwrap()[at..at + bytes.len()].copy_from_slice(bytes),
            Self::Device { direct, .. } if stamp.is_multiple_of(2) => {
                let (mut aligned, place) = aligned(bytes.len());
                aligned[place..place + bytes.len()].copy_from_slice(bytes);
                direct.write_all_at(&aligned[place..place + bytes.len()], at as u64).unwrap();
            }
            Self::File(file) | Self::Device { cached: file, .. } => file.write_all_at(bytes, at as u64).unwrap(),
        }
    }
}

/// A buffer whose part from the returned place on is aligned for `O_DIRECT`.
fn aligned(len: usize) -> (Vec<u8>, usize) {
    let buffer = vec![0; len + BLOCK];
    let place = buffer.as_ptr().align_offset(BLOCK);
    (buffer, place)
}

/// What the application knows: the last stamp of each block.
pub(crate) struct Stamps {
    front: Front,
    size: usize,
    stamps: Vec<u64>,
    next: u64,
    random: Random,
}

impl Stamps {
    /// Of an empty region of `size` bytes.
    pub(crate) fn new(front: Front, size: usize, seed: u64) -> Self {
        Self { front, size, stamps: vec![0; size.div_ceil(BLOCK)], next: 1, random: Random::new(seed) }
    }

    fn block_of(&self, block: usize, stamp: u64) -> Vec<u8> {
        let len = (self.size - block * BLOCK).min(BLOCK);
        match stamp {
            0 => vec![0; len],
            _ => stamp.to_le_bytes().into_iter().cycle().take(len).collect(),
        }
    }

    fn check_block(&self, block: usize) {
        let expected = self.block_of(block, self.stamps[block]);
        let mut found = vec![0; expected.len()];
        self.front.read(block, &mut found);
        let stamp = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert!(found == expected, "block {block} has {} and not {}", stamp(&found), stamp(&expected));
    }
}

impl Application for Stamps {
    type Left = Front;

    /// Stamps some block, whose last stamp it must still have.
    fn step(&mut self) {
        let block = usize::try_from(self.random.below(self.stamps.len() as u64)).unwrap();
        self.check_block(block);
        let stamp = self.next;
        self.next += 1;
        let bytes = self.block_of(block, stamp);
        self.front.write(block, stamp, &bytes);
        self.stamps[block] = stamp;
    }

    fn resume(&mut self, here: &Arrived) -> Front {
        std::mem::replace(&mut self.front, open(here))
    }

    fn check(&self) {
        (0..self.stamps.len()).for_each(|block| self.check_block(block));
    }
}
