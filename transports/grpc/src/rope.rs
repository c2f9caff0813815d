//! Bytes in several pieces that travel and are taken apart without being copied together.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes, BytesMut};
use crc_fast::{CrcAlgorithm, Digest};

/// A sequence of [`Bytes`], none of them empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Rope {
    segments: VecDeque<Bytes>,
    len: usize,
}

impl Rope {
    pub(crate) fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.len += bytes.len();
            self.segments.push_back(bytes);
        }
    }

    pub(crate) fn append(&mut self, mut other: Self) {
        self.len += other.len;
        self.segments.append(&mut other.segments);
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Takes the first `len` bytes out.
    ///
    /// # Panics
    /// If there are not that many.
    pub(crate) fn split_to(&mut self, len: usize) -> Self {
        assert!(len <= self.len, "{len} of {} bytes", self.len);
        let mut head = Self::default();
        while head.len < len {
            let first = &mut self.segments[0];
            let want = len - head.len;
            let part =
                if first.len() <= want { self.segments.pop_front().unwrap_or_default() } else { first.split_to(want) };
            self.len -= part.len();
            head.push(part);
        }
        head
    }

    /// The same bytes; `guard` is dropped when all of them have been taken, or are.
    pub(crate) fn guarded(mut self, guard: impl Send + 'static) -> Self {
        if let Some(last) = self.segments.back_mut() {
            *last = Bytes::from_owner(Guarded { bytes: std::mem::take(last), _guard: guard });
        }
        self
    }

    pub(crate) fn segments(&self) -> impl Iterator<Item = &Bytes> {
        self.segments.iter()
    }

    /// The CRC-32C (Castagnoli, the one of iSCSI) of all of it.
    pub(crate) fn checksum(&self) -> u32 {
        let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
        self.segments.iter().for_each(|segment| digest.update(segment));
        u32::try_from(digest.finalize()).expect("a CRC-32 has 32 bits")
    }

    /// All of it in one piece; copies only if it is in several.
    pub(crate) fn into_bytes(mut self) -> Bytes {
        let len = self.len;
        self.copy_to_bytes(len)
    }
}

struct Guarded<G> {
    bytes: Bytes,
    _guard: G,
}

impl<G> AsRef<[u8]> for Guarded<G> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl From<Bytes> for Rope {
    fn from(bytes: Bytes) -> Self {
        let mut rope = Self::default();
        rope.push(bytes);
        rope
    }
}

impl Buf for Rope {
    fn remaining(&self) -> usize {
        self.len
    }

    fn chunk(&self) -> &[u8] {
        self.segments.front().map_or(&[], |first| first)
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let pairs = slices.iter_mut().zip(&self.segments);
        pairs.map(|(slice, segment)| *slice = IoSlice::new(segment)).count()
    }

    fn advance(&mut self, count: usize) {
        self.split_to(count);
    }

    fn copy_to_bytes(&mut self, len: usize) -> Bytes {
        let mut head = self.split_to(len);
        if head.segments.len() <= 1 {
            return head.segments.pop_front().unwrap_or_default();
        }
        let mut whole = BytesMut::with_capacity(len);
        head.segments.iter().for_each(|segment| whole.extend_from_slice(segment));
        whole.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(parts: &[&'static [u8]]) -> Rope {
        let mut rope = Rope::default();
        parts.iter().for_each(|part| rope.push(Bytes::from_static(part)));
        rope
    }

    #[test]
    fn gives_back_what_was_put_in_however_it_is_cut() {
        let parts: [&[u8]; 4] = [b"ab", b"", b"cde", b"f"];
        for cut in 0..=6 {
            let mut tail = rope(&parts);
            let head = tail.split_to(cut);
            assert_eq!((head.len(), tail.len()), (cut, 6 - cut));
            assert_eq!([head.into_bytes(), tail.into_bytes()].concat(), b"abcdef");
        }
    }

    #[test]
    fn reads_across_segments() {
        let mut bytes = rope(&[b"\x01\x02", b"\x03\x04\x05"]);
        assert_eq!(bytes.get_u32(), 0x0102_0304);
        assert_eq!(bytes.chunk(), b"\x05");
        bytes.advance(1);
        assert!(!bytes.has_remaining() && bytes.chunk().is_empty());
    }

    #[test]
    fn lends_as_many_segments_as_there_is_room_for() {
        let bytes = rope(&[b"a", b"bc", b"d"]);
        let mut slices = [IoSlice::new(&[]); 2];
        assert_eq!(bytes.chunks_vectored(&mut slices), 2);
        assert_eq!(&*slices[1], b"bc");
    }

    #[test]
    fn the_checksum_is_that_of_the_whole() {
        // The check value of CRC-32C in the catalogue of parametrised CRC algorithms.
        assert_eq!(rope(&[b"1234", b"5", b"6789"]).checksum(), 0xe306_9283);
        assert_eq!(Rope::default().checksum(), 0);
    }

    #[test]
    fn one_segment_is_not_copied() {
        let segment = Bytes::from_static(b"abcdef");
        let mut whole = Rope::from(segment.clone());
        assert_eq!(whole.copy_to_bytes(3).as_ptr(), segment.as_ptr());
        assert_eq!(whole.into_bytes().as_ptr(), segment[3..].as_ptr());
    }
}
