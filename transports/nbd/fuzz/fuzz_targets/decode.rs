//! Feeds every decoder of the codec. How to run it is in CONTRIBUTING.md; the corpus of the tests is where it begins.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/wire/decoders.rs"]
mod decoders;

fuzz_target!(|bytes: &[u8]| {
    decoders::decode_all(bytes);
});
