//! Memory that is given out in pieces, inside a region.
//!
//! A piece is named by where it is in the region, never by an address: so that it means the same wherever the region is
//! mapped, on this host or on the next. Numbers are little-endian and nothing needs an alignment: so that it means the same
//! to every processor. What is read is checked: a region that holds something else gives an error, not a panic.

use std::marker::PhantomData;

use anyhow::{Context, Result, ensure};
use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What can be put into a region as it is.
pub(crate) trait Value: FromBytes + IntoBytes + KnownLayout + Immutable + Unaligned {}

impl<T: FromBytes + IntoBytes + KnownLayout + Immutable + Unaligned> Value for T {}

/// Where a `T` is, or nothing.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(transparent)]
pub(crate) struct At<T> {
    /// From the region's start, where no `T` is.
    offset: U64,
    of: PhantomData<T>,
}

impl<T> Clone for At<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for At<T> {}

impl<T> At<T> {
    pub(crate) const NOTHING: Self = Self::new(0);

    const fn new(offset: u64) -> Self {
        Self { offset: U64::new(offset), of: PhantomData }
    }

    /// None if it is nothing.
    pub(crate) fn some(self) -> Option<Self> {
        (self.offset.get() != 0).then_some(self)
    }

    fn range(self, len: u64) -> Option<std::ops::Range<usize>> {
        let start = self.offset.get();
        Some(usize::try_from(start).ok()?..usize::try_from(start.checked_add(len)?).ok()?)
    }
}

/// What is at the region's start.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    /// How much of the region was ever given out.
    used: U64,
    /// The first piece that was given back.
    free: At<Free>,
}

/// A piece that was given back.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Free {
    len: U64,
    next: At<Free>,
}

const MAGIC: [u8; 8] = *b"r3mtodo1";
const HEADER: At<Header> = At::new(0);
const START: u64 = size_of::<Header>() as u64;

/// A region, as memory that is given out.
pub(crate) struct Arena<'a> {
    bytes: &'a mut [u8],
}

impl<'a> Arena<'a> {
    /// Takes a region, and makes it ready if it holds nothing but zeros where its header would be. The first piece that is
    /// given out, the root, is a `Root`.
    pub(crate) fn open<Root: Value>(bytes: &'a mut [u8]) -> Result<(Self, At<Root>)> {
        let mut arena = Self { bytes };
        let header = arena.get_mut(HEADER).context("the region is too small")?;
        if header.as_bytes().iter().all(|byte| *byte == 0) {
            (header.magic, header.used) = (MAGIC, START.into());
            arena.put(Root::new_zeroed())?;
        }
        let magic = arena.get(HEADER)?.magic;
        ensure!(magic == MAGIC, "the region holds something else");
        Ok((arena, At::new(START)))
    }

    pub(crate) fn get<T: Value>(&self, at: At<T>) -> Result<&T> {
        let bytes = at.range(size_of::<T>() as u64).and_then(|range| self.bytes.get(range));
        bytes.and_then(|bytes| T::ref_from_bytes(bytes).ok()).context("the region is damaged")
    }

    pub(crate) fn get_mut<T: Value>(&mut self, at: At<T>) -> Result<&mut T> {
        let bytes = at.range(size_of::<T>() as u64).and_then(|range| self.bytes.get_mut(range));
        bytes.and_then(|bytes| T::mut_from_bytes(bytes).ok()).context("the region is damaged")
    }

    /// The bytes of a text.
    pub(crate) fn text(&self, at: At<u8>, len: u64) -> Result<&[u8]> {
        at.range(len).and_then(|range| self.bytes.get(range)).context("the region is damaged")
    }

    /// Puts a value somewhere.
    pub(crate) fn put<T: Value>(&mut self, value: T) -> Result<At<T>> {
        let at = At::new(self.take(size_of::<T>() as u64)?);
        *self.get_mut(at)? = value;
        Ok(at)
    }

    /// Puts a text somewhere.
    pub(crate) fn put_text(&mut self, text: &str) -> Result<At<u8>> {
        let at = At::<u8>::new(self.take(text.len() as u64)?);
        let place = at.range(text.len() as u64).and_then(|range| self.bytes.get_mut(range));
        place.context("the region is damaged")?.copy_from_slice(text.as_bytes());
        Ok(at)
    }

    /// Gives back the piece of a value.
    pub(crate) fn drop_at<T: Value>(&mut self, at: At<T>) -> Result<()> {
        self.give_back(at.offset.get(), size_of::<T>() as u64)
    }

    /// Gives back the piece of a text.
    pub(crate) fn drop_text(&mut self, at: At<u8>, len: u64) -> Result<()> {
        self.give_back(at.offset.get(), len)
    }

    /// The place of a piece of `len` bytes: one that was given back and has that length, or a new one.
    fn take(&mut self, len: u64) -> Result<u64> {
        let len = rounded(len);
        let mut before: Option<At<Free>> = None;
        let mut at = self.get(HEADER)?.free;
        // Not more steps than there is room for pieces: a damaged region must not lead around in circles.
        for _ in 0..self.bytes.len() {
            let Some(piece) = at.some() else { break };
            let (found, next) = (self.get(piece)?.len.get(), self.get(piece)?.next);
            if found == len {
                match before {
                    None => self.get_mut(HEADER)?.free = next,
                    Some(before) => self.get_mut(before)?.next = next,
                }
                return Ok(piece.offset.get());
            }
            (before, at) = (Some(piece), next);
        }
        self.take_new(len)
    }

    fn take_new(&mut self, len: u64) -> Result<u64> {
        let size = self.bytes.len() as u64;
        let header = self.get_mut(HEADER)?;
        let start = header.used.get();
        let end = start.checked_add(len).filter(|end| *end <= size).context("the region is full")?;
        header.used = end.into();
        Ok(start)
    }

    fn give_back(&mut self, offset: u64, len: u64) -> Result<()> {
        let piece = At::new(offset);
        let next = self.get(HEADER)?.free;
        *self.get_mut(piece)? = Free { len: rounded(len).into(), next };
        self.get_mut(HEADER)?.free = piece;
        Ok(())
    }
}

/// Pieces are multiples of what is written into them when they are given back.
fn rounded(len: u64) -> u64 {
    len.max(1).next_multiple_of(size_of::<Free>() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_used_again() {
        let mut bytes = vec![0; 4096];
        let (mut arena, root) = Arena::open::<U64>(&mut bytes).unwrap();
        *arena.get_mut(root).unwrap() = 7.into();
        let texts: Vec<_> =
            ["one", "two", "a longer one, of two units"].map(|text| arena.put_text(text).unwrap()).into();
        assert_eq!(arena.text(texts[1], 3).unwrap(), b"two");
        let used = arena.get(HEADER).unwrap().used.get();
        [0, 1].iter().for_each(|at| arena.drop_text(texts[*at], 3).unwrap());
        arena.drop_text(texts[2], 26).unwrap();
        let again = [26, 2, 3].map(|len: usize| arena.put_text(&"x".repeat(len)).unwrap());
        assert_eq!(arena.get(HEADER).unwrap().used.get(), used);
        assert_eq!(arena.text(again[0], 26).unwrap(), [b'x'; 26]);
        assert_eq!(arena.get(root).unwrap().get(), 7);
    }

    #[test]
    fn a_full_region_says_so_and_stays_as_it_is() {
        let mut bytes = vec![0; 128];
        let (mut arena, root) = Arena::open::<U64>(&mut bytes).unwrap();
        let mut count = 0;
        while arena.put(U64::new(9)).is_ok() {
            count += 1;
        }
        assert!(count > 2 && arena.put(U64::new(9)).err().unwrap().to_string().contains("full"));
        assert_eq!(arena.get(root).unwrap().get(), 0);
    }

    #[test]
    fn something_else_is_an_error() {
        assert!(Arena::open::<U64>(&mut [0; 10]).is_err());
        assert!(Arena::open::<U64>(&mut [1; 1000]).is_err());
        let mut bytes = vec![0; 1000];
        let (mut arena, _) = Arena::open::<U64>(&mut bytes).unwrap();
        for lost in [999, 1000, u64::MAX] {
            assert!(arena.get(At::<U64>::new(lost)).is_err() && arena.text(At::new(lost), 2).is_err());
        }
        // A piece that was given back and is the next of itself.
        let piece = arena.put(U64::new(1)).unwrap();
        arena.drop_at(piece).unwrap();
        arena.drop_at(piece).unwrap();
        assert!(arena.put_text(&"x".repeat(100)).is_ok());
    }
}
