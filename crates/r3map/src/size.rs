//! Sizes as people write them: `64KiB`, `4GiB`, `1000`.

use bytesize::ByteSize;
use r3map_core::{Error, ErrorKind, Operation, Result};

/// The number of bytes that `text` names: a whole number, or one with a unit (`KiB`, `MiB`, `GiB`, `TiB` are powers of
/// 1024; `KB`, `MB`, … are powers of 1000), with a fraction where it comes to whole bytes.
///
/// # Errors
/// `InvalidInput` if it is not a size.
pub fn parse(text: &str) -> Result<u64> {
    let wrong = || {
        let message = format!("{text:?} is not a size; write it like 65536, 64KiB or 4GiB");
        Error::new(ErrorKind::InvalidInput, Operation::Open, message)
    };
    text.trim().parse::<ByteSize>().map(|size| size.as_u64()).map_err(|_| wrong())
}

/// `bytes` for people: `64.0 KiB`.
#[must_use]
pub fn format(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, bytes) in
            [("1", 1), ("64KiB", 65536), ("4 GiB", 4 << 30), ("1.5MiB", 3 << 19), ("1TiB", 1 << 40), ("1MB", 1_000_000)]
        {
            assert_eq!(parse(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "x", "-1", "1XiB", "64 KiB and more"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert_eq!(format(65536), "64.0 KiB");
    }
}
