//! Maps a file into memory, page fault by page fault, and counts the lines in it:
//! `cargo run -p r3map-slice --example map_file -- /etc/services`.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use r3map_core::{Backend, ErrorKind, Operation, Result};
use r3map_slice::map;

/// A backend takes four methods. This one answers from a file with plain blocking reads: each fault waits for its own.
struct Source {
    file: File,
    size: u64,
}

#[async_trait::async_trait]
impl Backend for Source {
    fn size(&self) -> u64 {
        self.size
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let read = self.file.read_exact_at(buf, offset);
        read.map_err(|error| r3map_core::Error::from_io(Operation::Read, "cannot read the file", error))
    }

    async fn write_at(&self, _offset: u64, _buf: &[u8]) -> Result<()> {
        Err(r3map_core::Error::new(ErrorKind::Denied, Operation::Write, "the file is mapped read-only"))
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("usage: map_file PATH")?;
    let file = File::open(&path)?;
    let size = file.metadata()?.len();
    let map = map(Arc::new(Source { file, size }))?;
    let lines = map.iter().filter(|byte| **byte == b'\n').count();
    #[expect(clippy::print_stdout, reason = "an example talks to whoever runs it")]
    {
        println!("{path}: {} bytes, {lines} lines", map.len());
    }
    Ok(())
}
