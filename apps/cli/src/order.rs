//! The file of `--pull-order`: one byte offset, or one range `FROM-TO` (TO not included), a line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, bail};
use r3map::{ChunkSize, size};

/// The longest line, in bytes: whatever is given for a file, it is not read into memory as one.
const LINE: usize = 1000;

/// The chunks that the file names, in its order, each once.
pub(crate) fn read(file: &Path, region: u64, chunk: ChunkSize) -> Result<Vec<u64>> {
    let opened = File::open(file).with_context(|| format!("cannot read the order in {}", file.display()))?;
    parse(BufReader::new(opened), region, chunk).with_context(|| format!("in {}", file.display()))
}

fn parse(mut text: impl BufRead, region: u64, chunk: ChunkSize) -> Result<Vec<u64>> {
    let geometry = r3map::Geometry::new(region, chunk)?;
    let mut seen = std::collections::HashSet::new();
    let mut chunks = Vec::new();
    let mut bytes = Vec::new();
    for number in 1.. {
        bytes.clear();
        let read = text.by_ref().take(LINE as u64).read_until(b'\n', &mut bytes);
        match read.context("cannot read the order")? {
            0 => break,
            LINE => bail!("line {number} is too long for a byte offset or a range"),
            _ => {}
        }
        let line = std::str::from_utf8(&bytes).with_context(|| format!("line {number} is no text"))?;
        let line = line.split('#').next().unwrap_or("").trim();
        if line.is_empty() {
            continue;
        }
        let range = range(line).with_context(|| format!("line {number}"))?;
        if range.start >= range.end || range.end > region {
            bail!("line {number}: {line:?} is not inside the region, which has {region} bytes");
        }
        chunks.extend(geometry.chunks_touched(&range).filter(|chunk| seen.insert(*chunk)));
    }
    Ok(chunks)
}

fn range(line: &str) -> Result<std::ops::Range<u64>> {
    let (from, to) = line.split_once('-').map_or((line, None), |(from, to)| (from, Some(to)));
    let from = size::parse(from)?;
    Ok(from..to.map_or(Ok(from.saturating_add(1)), size::parse)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_offsets_and_ranges() {
        let text = "# hot first\n128KiB\n0-64KiB\n\n 131072 # again\n200KiB-256KiB\n";
        assert_eq!(parse(text.as_bytes(), 1 << 20, ChunkSize::DEFAULT).unwrap(), [2, 0, 3]);
    }

    #[test]
    fn names_the_wrong_line() {
        let long = "1".repeat(LINE);
        for (wrong, line) in [("x", 1), ("0\n1MiB", 2), ("5-5", 1), ("9-1", 1), ("0-2MiB", 1), (&long, 1)] {
            let error = format!("{:#}", parse(wrong.as_bytes(), 1 << 20, ChunkSize::DEFAULT).unwrap_err());
            assert!(error.contains(&format!("line {line}")) && error.len() < 200, "{error}");
        }
        assert!(parse(&b"0\n\xff\n"[..], 1 << 20, ChunkSize::DEFAULT).unwrap_err().to_string().contains("line 2"));
        let endless = BufReader::new(std::io::repeat(0));
        assert!(parse(endless, 1 << 20, ChunkSize::DEFAULT).is_err());
    }
}
