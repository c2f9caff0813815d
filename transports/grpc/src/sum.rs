//! Checksums: each vouches for bytes, and for the place that they belong to.

use crc_fast::{CrcAlgorithm, Digest};

use crate::proto::region;

/// What stands for the checksum of zeros, which have none.
const NONE: u64 = 1 << 32;

/// Of the numbers one after another, in eight bytes each, the least significant one first.
fn numbers(numbers: impl IntoIterator<Item = u64>) -> Digest {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    numbers.into_iter().for_each(|number| digest.update(&number.to_le_bytes()));
    digest
}

fn finish(digest: &Digest) -> u32 {
    u32::try_from(digest.finalize()).expect("a CRC-32 has 32 bits")
}

/// Of a write.
pub(crate) fn write(offset: u64, bytes: &[u8]) -> u32 {
    let mut digest = numbers([offset]);
    digest.update(bytes);
    finish(&digest)
}

/// Of a range that is asked for.
pub(crate) fn range(offset: u64, length: u64) -> u32 {
    finish(&numbers([offset, length]))
}

/// Of a record of what was written.
pub(crate) fn record(runs: &[u64]) -> u32 {
    finish(&numbers(runs.iter().copied()))
}

/// Of what a read answers to these ranges (offset and length).
pub(crate) fn runs(ranges: impl IntoIterator<Item = (u64, u64)>, runs: &[region::Run]) -> u32 {
    let asked = ranges.into_iter().flat_map(|(offset, length)| [offset, length]);
    let found = runs.iter().flat_map(|run| [run.length, run.crc32c.map_or(NONE, u64::from)]);
    finish(&numbers(asked.chain(found)))
}

/// Of the extents that are the answer to a range.
pub(crate) fn extents(offset: u64, length: u64, extents: &[region::Extent]) -> u32 {
    let found = extents.iter().flat_map(|extent| [extent.length, u64::from(extent.hole)]);
    finish(&numbers([offset, length].into_iter().chain(found)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_what_the_protocol_says() {
        let sum = |parts: &[&[u8]]| crc_fast::crc32_iscsi(&parts.concat());
        let number = |number: u64| number.to_le_bytes();
        assert_eq!(write(0x0102, b"bytes"), sum(&[&[2, 1, 0, 0, 0, 0, 0, 0], b"bytes"]));
        assert_eq!(range(5, 6), sum(&[&number(5), &number(6)]));
        assert_eq!(record(&[5, 6, 7]), sum(&[&[5, 6, 7].map(number).concat()]));
        let [data, zeros] = [Some(7), None].map(|crc32c| region::Run { length: 9, crc32c });
        let found = [number(9), number(7), number(9), [0, 0, 0, 0, 1, 0, 0, 0]].concat();
        assert_eq!(runs([(5, 6), (1, 2)], &[data, zeros]), sum(&[&[5, 6, 1, 2].map(number).concat(), &found]));
        let hole = region::Extent { length: 3, hole: true };
        assert_eq!(extents(5, 6, &[hole]), sum(&[&[5, 6, 3, 1].map(number).concat()]));
    }
}
