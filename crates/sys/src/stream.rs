//! Copies past the processor's caches.

/// Copies bytes that will not be read again soon, without taking up cache for where they go. To regions of more than the
/// cache this is twice as fast: an ordinary store first fetches what it overwrites. (The C library's `memcpy` does the same
/// from a length on that follows from the size of the shared cache: on a server with hundreds of MiB of it, that is longer than any
/// request.)
///
/// On processors other than x86-64 it is an ordinary copy.
///
/// # Panics
/// If the lengths differ.
pub fn stream_copy(to: &mut [u8], from: &[u8]) {
    assert_eq!(to.len(), from.len(), "a copy is as long as what is copied");
    copy(to, from);
}

/// A line of the cache.
#[cfg(target_arch = "x86_64")]
#[repr(align(64))]
struct Line([std::arch::x86_64::__m128i; 4]);

#[cfg(target_arch = "x86_64")]
fn copy(to: &mut [u8], from: &[u8]) {
    use std::arch::x86_64::{_mm_loadu_si128, _mm_sfence, _mm_stream_si128};

    // SAFETY: any bytes are a line, and any line is bytes.
    let (head, lines, tail) = unsafe { to.align_to_mut::<Line>() };
    let (first, rest) = from.split_at(head.len());
    let (sources, last) = rest.split_at(size_of_val(lines));
    head.copy_from_slice(first);
    for (line, source) in lines.iter_mut().zip(sources.chunks_exact(size_of::<Line>())) {
        // All are loaded before the first is stored, so that the stores fill the line one right after the other.
        let loaded = [0, 16, 32, 48].map(|at| {
            let bytes: &[u8; 16] = source[at..].first_chunk().expect("a source is as long as a line");
            // SAFETY: these bytes are borrowed, and may lie at any address. SSE2 is part of x86-64.
            unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
        });
        for (to, loaded) in line.0.iter_mut().zip(loaded) {
            // SAFETY: it is borrowed exclusively, and aligned; nobody looks at it before the fence below. SSE2 as above.
            unsafe { _mm_stream_si128(to, loaded) };
        }
    }
    tail.copy_from_slice(last);
    // Such stores are not ordered with others: nobody may learn that the copy is done before they are.
    // SAFETY: it takes nothing; SSE as above.
    unsafe { _mm_sfence() };
}

#[cfg(not(target_arch = "x86_64"))]
fn copy(to: &mut [u8], from: &[u8]) {
    to.copy_from_slice(from);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_every_byte_and_no_other() {
        let from: Vec<u8> = (0..700_usize).map(|at| u8::try_from(at % 251).unwrap() + 1).collect();
        for start in 0..70 {
            for len in [0, 1, 15, 16, 63, 64, 65, 127, 128, 200, 500] {
                let mut to = vec![0; 700];
                stream_copy(&mut to[start..start + len], &from[start / 3..start / 3 + len]);
                assert_eq!(to[start..start + len], from[start / 3..start / 3 + len], "{start} + {len}");
                assert!(to[..start].iter().chain(&to[start + len..]).all(|byte| *byte == 0), "{start} + {len}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "as long as")]
    fn lengths_must_agree() {
        stream_copy(&mut [0; 2], &[0; 3]);
    }
}
