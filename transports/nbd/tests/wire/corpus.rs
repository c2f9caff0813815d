//! The recorded messages in `tests/corpus`: each is taken, and none of many deterministic mutations makes a decoder
//! panic. `fuzz/` begins from the same files.

use std::path::PathBuf;

use r3map_testkit::random::Random;

use crate::decoders::decode_all;

/// How many mutations of each message are tried.
const ROUNDS: usize = 2000;

fn corpus() -> Vec<(String, Vec<u8>)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    files
        .iter()
        .map(|path| (path.file_name().unwrap().to_string_lossy().into(), std::fs::read(path).unwrap()))
        .collect()
}

#[test]
fn every_recorded_message_is_taken() {
    let corpus = corpus();
    assert!(corpus.len() >= 30, "only {} messages", corpus.len());
    for (name, bytes) in corpus {
        assert!(decode_all(&bytes) > 0, "nobody takes {name}");
    }
}

#[test]
fn mutations_of_recorded_messages_never_panic() {
    let corpus = corpus();
    let mut random = Random::new(0x6e62_6421);
    for (_, bytes) in &corpus {
        for _ in 0..ROUNDS {
            let other = &corpus[pick(&mut random, corpus.len())].1;
            decode_all(&mutated(bytes.clone(), other, &mut random));
        }
    }
}

/// Changes a few things: bits, bytes, extreme numbers, a cut, a repetition, the end of another message.
fn mutated(mut bytes: Vec<u8>, other: &[u8], random: &mut Random) -> Vec<u8> {
    for _ in 0..=pick(random, 4) {
        if bytes.is_empty() {
            return other.to_vec();
        }
        let at = pick(random, bytes.len());
        match pick(random, 6) {
            0 => bytes[at] ^= 1 << pick(random, 8),
            1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][pick(random, 5)],
            2 => {
                let end = bytes.len().min(at + [2, 4, 8][pick(random, 3)]);
                bytes[at..end].fill([0, 0xff][pick(random, 2)]);
            }
            3 => bytes.truncate(at),
            4 => bytes.extend_from_within(at..),
            _ => bytes.splice(at.., other[other.len().min(at)..].iter().copied()).for_each(drop),
        }
    }
    bytes
}

fn pick(random: &mut Random, bound: usize) -> usize {
    usize::try_from(random.below(bound as u64)).unwrap()
}

proptest::proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
        decode_all(&bytes);
    }
}
