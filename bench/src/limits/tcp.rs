//! Raw TCP: a server that answers "these bytes, please" with these bytes, and a client that keeps a number of requests
//! in flight on one connection. Two threads in two processes; no framing, no checksum, no copy but the kernel's.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, ensure};

/// Offset and length, each eight bytes, little-endian.
const REQUEST: usize = 16;

/// Serves `region` to everybody who connects, on threads that end with the process.
pub(crate) fn serve(listener: TcpListener, region: Arc<Vec<u8>>) -> io::Result<()> {
    let accept = move || {
        for stream in listener.incoming().map_while(io::Result::ok) {
            let region = region.clone();
            // A client that goes away ends its thread.
            thread::spawn(move || answer(&stream, &region));
        }
    };
    thread::Builder::new().name("raw-tcp".into()).spawn(accept)?;
    Ok(())
}

fn answer(mut stream: &TcpStream, region: &[u8]) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut request = [0; REQUEST];
    loop {
        stream.read_exact(&mut request)?;
        let (offset, len) = request.split_at(8);
        let number = |bytes: &[u8]| usize::from_le_bytes(bytes.try_into().unwrap_or_default());
        let (offset, len) = (number(offset), number(len));
        let end = offset.checked_add(len).filter(|end| *end <= region.len());
        let bytes = end.and_then(|end| region.get(offset..end)).ok_or(io::ErrorKind::InvalidInput)?;
        stream.write_all(bytes)?;
    }
}

/// One connection to a raw server.
pub(crate) struct Client {
    stream: TcpStream,
    buffers: Vec<Vec<u8>>,
}

impl Client {
    /// Connects, for requests of `len` bytes, `in_flight` at once.
    pub(crate) fn connect(address: impl ToSocketAddrs, len: usize, in_flight: usize) -> Result<Self> {
        ensure!(in_flight > 0, "nothing would be asked for");
        let stream = TcpStream::connect(address).context("raw TCP")?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffers: vec![vec![0; len]; in_flight] })
    }

    /// Reads at each of these offsets.
    pub(crate) fn read(&mut self, offsets: &[u64]) -> Result<()> {
        let (first, rest) = offsets.split_at(self.buffers.len().min(offsets.len()));
        first.iter().try_for_each(|offset| self.ask(*offset))?;
        for index in 0..offsets.len() {
            let slots = self.buffers.len();
            self.stream.read_exact(&mut self.buffers[index % slots])?;
            if let Some(offset) = rest.get(index) {
                self.ask(*offset)?;
            }
        }
        Ok(())
    }

    /// What the last request brought.
    #[cfg(test)]
    fn last(&self, asked: usize) -> &[u8] {
        &self.buffers[(asked - 1) % self.buffers.len()]
    }

    fn ask(&mut self, offset: u64) -> io::Result<()> {
        let mut request = [0; REQUEST];
        request[..8].copy_from_slice(&offset.to_le_bytes());
        request[8..].copy_from_slice(&self.buffers[0].len().to_le_bytes());
        self.stream.write_all(&request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_arrive_in_order() {
        let region = Arc::new(r3map_testkit::fill::bytes(0, 100_000, 3));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        serve(listener, region).unwrap();
        for in_flight in [1, 3, 50] {
            let mut client = Client::connect(address, 4096, in_flight).unwrap();
            let offsets: Vec<u64> = (0..20).map(|at| at * 4000).collect();
            client.read(&offsets).unwrap();
            r3map_testkit::fill::check(client.last(20), 19 * 4000, 3).unwrap();
        }
        let mut client = Client::connect(address, 4096, 1).unwrap();
        assert!(client.read(&[99_999]).is_err(), "past the end");
    }
}
