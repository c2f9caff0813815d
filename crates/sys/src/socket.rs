//! What the kernel knows of a connected socket and does not tell through `setsockopt`. It sends and receives nothing.

use std::ffi::c_int;
use std::io;
use std::os::fd::AsFd;

use crate::abi;

/// How many bytes of what was written to a stream socket are still with this kernel: over TCP those that the peer's
/// kernel has not acknowledged (`SIOCOUTQ`, tcp(7)), over a Unix socket those that the peer has not read, and some more
/// for the kernel's own bookkeeping (`SIOCOUTQ`, unix(7)).
///
/// # Errors
/// If it is no socket.
pub fn unacknowledged(socket: impl AsFd) -> io::Result<u64> {
    let mut count: c_int = 0;
    // SAFETY: SIOCOUTQ stores one int in what it is given. (On a terminal the same number is TIOCOUTQ, which does too.)
    unsafe { abi::call::<{ abi::SIOCOUTQ }, _>(socket, &mut count) }?;
    Ok(u64::try_from(count).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use super::*;

    /// Until what was sent is acknowledged, which takes a moment.
    fn settles(socket: &impl AsFd, holds: impl Fn(u64) -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !holds(unacknowledged(socket).unwrap()) {
            assert!(Instant::now() < end, "{} bytes are left", unacknowledged(socket).unwrap());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn over_tcp_what_the_peer_has_no_room_for_is_counted_and_the_rest_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        sender.write_all(&[1; 1000]).unwrap();
        settles(&sender, |left| left == 0);
        sender.set_nonblocking(true).unwrap();
        let mut sent = 1000;
        while let Ok(count) = sender.write(&[1; 65536]) {
            sent += count;
        }
        settles(&sender, |left| left > 0 && left < sent as u64);
        receiver.read_exact(&mut vec![0; sent]).unwrap();
        settles(&sender, |left| left == 0);
    }

    #[test]
    fn over_a_unix_socket_what_is_not_read_is_counted() {
        let (mut sender, mut receiver) = UnixStream::pair().unwrap();
        assert_eq!(unacknowledged(&sender).unwrap(), 0);
        sender.write_all(&[1; 1000]).unwrap();
        assert!(unacknowledged(&sender).unwrap() >= 1000);
        receiver.read_exact(&mut [0; 1000]).unwrap();
        assert_eq!(unacknowledged(&sender).unwrap(), 0);
    }

    #[test]
    fn what_is_no_socket_is_an_error() {
        assert!(unacknowledged(tempfile::tempfile().unwrap()).is_err());
    }
}
