//! The file of `--pull-order`: one byte offset, or one range `FROM-TO` (TO not included), a line.

use std::path::Path;

use anyhow::{Context, Result, bail};
use r3map::{ChunkSize, size};

/// The chunks that the file names, in its order, each once.
pub(crate) fn read(file: &Path, region: u64, chunk: ChunkSize) -> Result<Vec<u64>> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read the order in {}", file.display()))?;
    parse(&text, region, chunk).with_context(|| format!("in {}", file.display()))
}

fn parse(text: &str, region: u64, chunk: ChunkSize) -> Result<Vec<u64>> {
    let geometry = r3map::Geometry::new(region, chunk)?;
    let mut seen = std::collections::HashSet::new();
    let mut chunks = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
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
        assert_eq!(parse(text, 1 << 20, ChunkSize::DEFAULT).unwrap(), [2, 0, 3]);
    }

    #[test]
    fn names_the_wrong_line() {
        for wrong in ["x", "0\n1MiB", "5-5", "9-1", "0-2MiB"] {
            let error = format!("{:#}", parse(wrong, 1 << 20, ChunkSize::DEFAULT).unwrap_err());
            assert!(error.contains("line "), "{error}");
        }
    }
}
