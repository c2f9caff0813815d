//! Plain anonymous memory, and what processors do to it.

use std::hint::black_box;
use std::time::Duration;

use anyhow::{Context, Result};
use r3map_sys::{Pages, Zeroed};
use rustix::thread::{disable_transparent_huge_pages, transparent_huge_pages_are_disabled};

use crate::run::timed;

/// The size of a page in bytes.
pub(crate) const PAGE: usize = 4096;

const _: () = assert!(PAGE as u64 == r3map_sys::PAGE_SIZE);

/// Reads every byte, eight at a time in four sums, which compilers turn into vector instructions.
pub(crate) fn sum(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; 8];
    let (lines, rest) = bytes.as_chunks::<64>();
    for line in lines {
        let (words, _) = line.as_chunks::<8>();
        for (sum, word) in sums.iter_mut().zip(words) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
        }
    }
    let rest = rest.iter().fold(0, |sum, byte| sum + u64::from(*byte));
    black_box(sums.iter().fold(rest, |sum, part| sum.wrapping_add(*part)))
}

/// Writes one byte into every page.
pub(crate) fn touch_pages(bytes: &mut [u8], value: u8) -> Result<()> {
    for page in bytes.chunks_mut(PAGE) {
        page[0] = value;
    }
    black_box(bytes);
    Ok(())
}

/// What is free for so long a hypervisor may take away (free page reporting, in passes of 2 s), in the same pass also what
/// has just become free.
const PASS: Duration = Duration::from_millis(2200);
/// From so many bytes on it is worth to wait for that.
const MUCH: u64 = 256 << 20;
/// How often memory is taken at most.
const TAKES: usize = 6;

/// Takes so much memory of a kind, and gives it back: whoever takes as much of that kind at once does not wait until a
/// hypervisor has fetched it, which takes up to twenty times as long as clearing it.
pub(crate) fn fetch(len: u64, pages: Pages) -> Result<()> {
    if len >= MUCH {
        // A pass that is due would take it away again. What is given back here is safe until the next.
        std::thread::sleep(PASS);
    }
    let take = || touch_pages(Zeroed::new(usize::try_from(len)?, pages).context("memory")?.as_mut_slice(), 1);
    let mut last = timed(take)?.1;
    for _ in 1..TAKES {
        let time = timed(take)?.1;
        if time > last.mul_f64(0.7) {
            break; // it was there already
        }
        last = time;
    }
    Ok(())
}

/// A copy of `bytes` in anonymous memory that is made of small pages, as mapped regions are: with huge ones, reading
/// would need fewer entries of the processor's page cache.
pub(crate) fn small_pages(bytes: &[u8]) -> Result<Vec<u8>> {
    let before = transparent_huge_pages_are_disabled().context("PR_GET_THP_DISABLE")?;
    disable_transparent_huge_pages(true).context("PR_SET_THP_DISABLE")?;
    let copy = bytes.to_vec();
    disable_transparent_huge_pages(before).context("PR_SET_THP_DISABLE")?;
    Ok(copy)
}

/// A copy of `bytes` in huge pages, where there are any: the fastest source to copy from.
pub(crate) fn huge_pages(bytes: &[u8]) -> Result<Zeroed> {
    let mut copy = Zeroed::new(bytes.len(), Pages::Huge).context("memory in huge pages")?;
    copy.as_mut_slice().copy_from_slice(bytes);
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_read() {
        let mut bytes = vec![0; 64 * 3 + 5];
        for at in 0..bytes.len() {
            bytes[at] = 1;
            assert_ne!(sum(&bytes), 0, "{at}");
            bytes[at] = 0;
        }
        assert_eq!(sum(&[]), 0);
    }

    #[test]
    fn every_page_is_touched() {
        let mut bytes = small_pages(&[0; 3 * PAGE + 1]).unwrap();
        touch_pages(&mut bytes, 9).unwrap();
        assert_eq!(bytes.iter().filter(|byte| **byte == 9).count(), 4);
        assert_eq!(bytes.len(), 3 * PAGE + 1);
    }
}
