//! Maps an object that lives on another machine into memory, and reads the few bytes it needs of it. The "object store"
//! is a thread behind a socket, so that the example runs anywhere:
//! `cargo run -p r3map-slice --example map_remote`.

use std::error::Error;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use r3map_core::{Backend, ErrorKind, Operation, Result};
use r3map_slice::map;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Bytes of the object: 1 GiB, that nobody has to hold.
const SIZE: u64 = 1 << 30;

/// An object store's "get these bytes of that object", one connection per request.
struct Object {
    address: SocketAddr,
}

impl Object {
    async fn get(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let mut connection = tokio::net::TcpStream::connect(self.address).await?;
        connection.write_u64(offset).await?;
        connection.write_u64(buf.len() as u64).await?;
        connection.read_exact(buf).await.map(drop)
    }
}

#[async_trait::async_trait]
impl Backend for Object {
    fn size(&self) -> u64 {
        SIZE
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let got = self.get(offset, buf).await;
        got.map_err(|error| r3map_core::Error::from_io(Operation::Read, "the object store does not answer", error))
    }

    async fn write_at(&self, _offset: u64, _buf: &[u8]) -> Result<()> {
        Err(r3map_core::Error::new(ErrorKind::Denied, Operation::Write, "objects never change"))
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || listener.incoming().flatten().for_each(|connection| drop(answer(connection))));

    let map = map(Arc::new(Object { address }))?;
    let middle = map.len() / 2;
    let found = [map[0], map[middle], map[map.len() - 1]];
    assert_eq!(found, [byte(0), byte(SIZE / 2), byte(SIZE - 1)]);
    #[expect(clippy::print_stdout, reason = "an example talks to whoever runs it")]
    {
        println!("of {} bytes, the first, middle and last are {found:?}; three chunks were fetched", map.len());
    }
    Ok(())
}

fn byte(offset: u64) -> u8 {
    (offset % 251) as u8
}

/// The other side: offset and length in, bytes out.
fn answer(mut connection: TcpStream) -> std::io::Result<()> {
    let mut request = [0; 16];
    connection.read_exact(&mut request)?;
    let [offset, len] = [0, 8].map(|at| request[at..at + 8].iter().fold(0, |word, byte| word << 8 | u64::from(*byte)));
    connection.write_all(&(offset..offset + len).map(byte).collect::<Vec<u8>>())
}
