//! Test bytes that betray misplacement: each byte is a function of its offset in the region and of a seed, with a large
//! prime period, and is never zero. So a chunk in the wrong place, from the wrong version or made of zeros shows at its
//! first byte.
//!
//! Filling and checking are `memcpy` and `memcmp` against a table: fast in debug builds too.

use std::sync::LazyLock;

use crate::random::Random;

/// After how many bytes the pattern starts again: a prime, so that no chunk size divides it.
pub const PERIOD: u64 = LEN as u64;

const LEN: usize = 1_048_573;

/// Two periods, so that any window of up to one period is contiguous.
static TABLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut random = Random::new(PERIOD);
    let period: Vec<u8> = (0..PERIOD).map(|_| 1 + (random.below(255)).to_le_bytes()[0]).collect();
    period.repeat(2)
});

/// Fills `buf` with the bytes that belong at `offset`, for `seed`.
pub fn write(buf: &mut [u8], offset: u64, seed: u64) {
    for (at, part) in steps(offset, seed, buf.len()) {
        buf[at..at + part.len()].copy_from_slice(part);
    }
}

/// The `len` bytes that belong at `offset`, for `seed`.
#[must_use]
pub fn bytes(offset: u64, len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    for (_, part) in steps(offset, seed, len) {
        bytes.extend_from_slice(part);
    }
    bytes
}

/// Checks that `buf` holds the bytes that belong at `offset`, for `seed`.
///
/// # Errors
/// One line that names the first wrong offset, and what is there instead as far as that can be told.
pub fn check(buf: &[u8], offset: u64, seed: u64) -> Result<(), String> {
    for (at, part) in steps(offset, seed, buf.len()) {
        if buf[at..at + part.len()] != *part {
            return Err(complaint(&buf[at..at + part.len()], part, offset + at as u64, seed));
        }
    }
    Ok(())
}

/// Cuts `len` bytes into pieces that the table holds contiguously: (position in the buffer, bytes).
fn steps(offset: u64, seed: u64, len: usize) -> impl Iterator<Item = (usize, &'static [u8])> {
    let table = TABLE.as_slice();
    (0..len).step_by(LEN).map(move |at| {
        let start = position(offset.wrapping_add(at as u64), seed);
        (at, &table[start..start + (len - at).min(LEN)])
    })
}

/// Where in the table the byte for `offset` is. A seed moves the pattern by a distance of its own.
fn position(offset: u64, seed: u64) -> usize {
    let shift = if seed == 0 { 0 } else { Random::new(seed).below(PERIOD) };
    usize::try_from((offset % PERIOD + shift) % PERIOD).expect("the period fits")
}

fn complaint(found: &[u8], expected: &[u8], offset: u64, seed: u64) -> String {
    let first = found.iter().zip(expected).position(|(a, b)| a != b).expect("they differ");
    let wrong = found.iter().zip(expected).filter(|(a, b)| a != b).count();
    let at = offset + first as u64;
    let (is, should) = (found[first], expected[first]);
    let hint = hint(&found[first..], at, seed);
    format!("byte {at} is {is:#04x}, not {should:#04x} (seed {seed}; {wrong} of {} are wrong){hint}", found.len())
}

fn hint(found: &[u8], at: u64, seed: u64) -> String {
    let sample = &found[..found.len().min(16)];
    if sample.iter().all(|byte| *byte == 0) {
        return ": zeros".into();
    }
    if sample.len() < 8 {
        return String::new();
    }
    match TABLE[..LEN + sample.len()].windows(sample.len()).position(|window| window == sample) {
        Some(there) => {
            let behind = (position(at, seed) + LEN - there) % LEN;
            format!(": the pattern from {behind} bytes before (modulo {PERIOD}), or of another seed")
        }
        None => ": not of this pattern".into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_period_is_prime() {
        assert!((2..1024).all(|divisor| !PERIOD.is_multiple_of(divisor)));
    }

    #[test]
    fn a_wrong_byte_is_named() {
        let mut buf = bytes(4096, 5000, 3);
        assert_eq!(check(&buf, 4096, 3), Ok(()));
        buf[1234] ^= 1;
        let complaint = check(&buf, 4096, 3).unwrap_err();
        assert!(complaint.starts_with("byte 5330 is "), "{complaint}");
        assert!(complaint.contains("1 of 5000"), "{complaint}");
    }

    #[test]
    fn zeros_misplacement_and_another_seed_show() {
        assert!(check(&[0; 64], 99, 1).unwrap_err().contains("zeros"));
        assert!(check(&bytes(8192, 4096, 1), 12288, 1).unwrap_err().contains("from 4096 bytes before"));
        assert!(check(&bytes(0, 4096, 1), 0, 2).unwrap_err().contains("another seed"));
        assert!(check(&[0xaa; 64], 0, 1).unwrap_err().contains("not of this pattern"));
    }

    proptest! {
        #[test]
        fn a_part_is_the_same_as_the_whole(offset in 0u64..1 << 40, skip in 0usize..3000, len in 0usize..3000, seed: u64) {
            let whole = bytes(offset, skip + len, seed);
            prop_assert_eq!(&whole[skip..], &bytes(offset + skip as u64, len, seed));
            let mut buf = vec![0; len];
            write(&mut buf, offset + skip as u64, seed);
            prop_assert_eq!(&whole[skip..], &buf);
        }
    }

    #[test]
    fn longer_than_a_period() {
        let long = bytes(17, 3 * LEN + 5, 9);
        assert_eq!(check(&long, 17, 9), Ok(()));
        assert_eq!(long[..LEN], long[LEN..2 * LEN]);
        assert!(!long.contains(&0));
    }
}
