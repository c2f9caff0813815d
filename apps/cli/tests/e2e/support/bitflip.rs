//! A TCP proxy on a line with a fault that TCP's own checksum misses: it flips one bit in chosen bytes on their way to
//! the client.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// How many bytes of a marked place are looked for: enough to occur nowhere else.
const NEEDLE: usize = 64;

/// A proxy that flips bits while it is told to. It ends with the test's process.
pub(crate) struct Bitflip {
    /// Where clients connect.
    pub(crate) address: SocketAddr,
    state: Arc<State>,
}

struct State {
    marked: HashSet<Vec<u8>>,
    on: AtomicBool,
    flips: AtomicU64,
}

impl Bitflip {
    /// Passes on to `target`, and flips a bit in every run of 64 bytes that occurs in `marked` and that arrives in one
    /// piece.
    pub(crate) fn new(target: SocketAddr, marked: Vec<u8>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("it can listen");
        let address = listener.local_addr().expect("it listens");
        let marked = marked.chunks_exact(NEEDLE).map(<[u8]>::to_vec).collect();
        let state = Arc::new(State { marked, on: AtomicBool::new(true), flips: AtomicU64::new(0) });
        let shared = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(target) else { continue };
                let (up, down) = ((clone(&client), clone(&server)), (server, client));
                let state = shared.clone();
                std::thread::spawn(move || pass(up.0, up.1, |_| {}));
                std::thread::spawn(move || pass(down.0, down.1, |bytes| state.flip(bytes)));
            }
        });
        Self { address, state }
    }

    /// From now on nothing is changed.
    pub(crate) fn heal(&self) {
        self.state.on.store(false, Ordering::SeqCst);
    }

    /// How many bits were flipped so far.
    pub(crate) fn flips(&self) -> u64 {
        self.state.flips.load(Ordering::SeqCst)
    }
}

impl State {
    fn flip(&self, bytes: &mut [u8]) {
        if !self.on.load(Ordering::SeqCst) {
            return;
        }
        // Each place is looked at once, so that the line is not a slow one.
        if let Some(at) = bytes.windows(NEEDLE).position(|window| self.marked.contains(window)) {
            bytes[at + NEEDLE / 2] ^= 0x10;
            self.flips.fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn clone(stream: &TcpStream) -> TcpStream {
    stream.set_nodelay(true).expect("a socket");
    stream.try_clone().expect("there are file descriptors")
}

fn pass(mut from: TcpStream, mut to: TcpStream, change: impl Fn(&mut [u8])) {
    let mut buf = vec![0; 256 << 10];
    while let Ok(len @ 1..) = from.read(&mut buf) {
        change(&mut buf[..len]);
        if to.write_all(&buf[..len]).is_err() {
            break;
        }
    }
    // Either side may have closed already.
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
