//! One word to the C library's allocator, which otherwise costs receiving more than checksums do.
//!
//! HTTP/2 receives into blocks of some hundred kilobytes that live for a fraction of a millisecond. glibc gives the end
//! of a heap back to the system as soon as 128 KiB are free there, so that every few blocks are made of fresh, zeroed
//! pages: measured, a third of a client's processor time. It raises that limit to twice the size of the largest block
//! that it ever mapped on its own and that was freed (mallopt(3), `M_MMAP_THRESHOLD` and `M_TRIM_THRESHOLD`).

use std::hint::black_box;
use std::sync::Once;

/// The largest block of that kind; up to twice as much may stay with the process when it is free.
const BLOCK: usize = 16 << 20;

/// Has glibc keep heaps that come and go. Costs no memory now, and nothing at all with another allocator.
pub(crate) fn keep() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| drop(black_box(Vec::<u8>::with_capacity(BLOCK))));
}
