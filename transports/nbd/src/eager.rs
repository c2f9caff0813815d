//! A socket that is looked at once more before its owner sleeps.
//!
//! Who asks for one thing after another is answered sooner if nobody has to be woken: sleeping and waking up cost more
//! than a small request does. So a connection looks for the next input for some microseconds before it sleeps, for as
//! long as that pays: it has been there in that time lately, and no other connection of this process has anything to do.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::RecvFlags;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream, tcp, unix};
use tokio::task::coop::has_budget_remaining;

/// How long input is looked for: less than sleeping and waking up take.
const LOOK: Duration = Duration::from_micros(20);
/// After so many failures in a row it is tried once in 2¹⁰ times.
const MOST_FAILURES: u32 = 10;

/// Which connection of this process received last.
static LAST: AtomicU64 = AtomicU64::new(0);
static NUMBERS: AtomicU64 = AtomicU64::new(1);

/// A plain socket: what is received from its descriptor is what its stream would give.
pub trait Socket {
    /// The descriptor.
    fn descriptor(&self) -> BorrowedFd<'_>;
}

impl Socket for TcpStream {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }
}

impl Socket for UnixStream {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }
}

impl Socket for tcp::OwnedReadHalf {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.as_ref().as_fd()
    }
}

impl Socket for unix::OwnedReadHalf {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.as_ref().as_fd()
    }
}

/// A connection, or the half that is read, that looks for input before it sleeps.
#[derive(Debug)]
pub struct Eager<S> {
    socket: S,
    last: &'static AtomicU64,
    number: u64,
    /// In a row.
    failures: u32,
    /// How often not to look.
    skip: u32,
}

impl<S: Socket> Eager<S> {
    /// Takes a connection over.
    #[must_use]
    pub fn new(socket: S) -> Self {
        Self::among(&LAST, socket)
    }

    /// With the number of whichever connection received last in `last`.
    fn among(last: &'static AtomicU64, socket: S) -> Self {
        Self { socket, last, number: NUMBERS.fetch_add(1, Ordering::Relaxed), failures: 0, skip: 0 }
    }

    /// Looks for input: what was received, if anything came of it.
    fn look(&mut self, buf: &mut [u8]) -> Option<io::Result<usize>> {
        // A task that has had its share is told to wait although there is input; it must not get it here.
        if !has_budget_remaining() {
            return None;
        }
        if self.skip > 0 || self.last.load(Ordering::Relaxed) != self.number {
            self.skip = self.skip.saturating_sub(1);
            return None;
        }
        let begun = Instant::now();
        loop {
            match rustix::net::recv(self.socket.descriptor(), &mut *buf, RecvFlags::DONTWAIT) {
                Err(Errno::AGAIN | Errno::INTR) if begun.elapsed() < LOOK => std::hint::spin_loop(),
                Err(Errno::AGAIN | Errno::INTR) => {
                    self.failures = (self.failures + 1).min(MOST_FAILURES);
                    self.skip = 1 << self.failures;
                    return None;
                }
                // The system tells an error once; it must not be lost.
                Err(error) => return Some(Err(error.into())),
                Ok((count, _)) => {
                    self.failures = 0;
                    return Some(Ok(count));
                }
            }
        }
    }
}

impl<S: Socket + AsyncRead + Unpin> AsyncRead for Eager<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        match Pin::new(&mut this.socket).poll_read(context, buf) {
            // Whatever comes from now on wakes this task, so that looking loses nothing.
            Poll::Pending => match this.look(buf.initialize_unfilled()) {
                Some(received) => buf.advance(received?),
                None => return Poll::Pending,
            },
            Poll::Ready(read) => {
                read?;
                if buf.filled().len() > before {
                    this.last.store(this.number, Ordering::Relaxed);
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Eager<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(context, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Alone in the process, whatever other tests do.
    fn alone() -> &'static AtomicU64 {
        Box::leak(Box::default())
    }

    fn pair(last: &'static AtomicU64) -> (Eager<UnixStream>, Eager<UnixStream>) {
        let (a, b) = UnixStream::pair().unwrap();
        (Eager::among(last, a), Eager::among(last, b))
    }

    /// Both ways at once, more than the socket holds, in pieces of any length: some are found by looking, some wake.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn bytes_arrive_in_their_order_however_they_are_found() {
        const LENGTH: usize = 3 << 20;
        // Each the last of its own process, so that both look.
        let (a, b) = UnixStream::pair().unwrap();
        let (a, b) = (Eager::among(alone(), a), Eager::among(alone(), b));
        let bytes: Vec<u8> = (0..=250).cycle().step_by(7).take(LENGTH).collect();
        let exchange = |socket: Eager<UnixStream>| {
            let (bytes, (mut from, mut to)) = (bytes.clone(), tokio::io::split(socket));
            let sending = tokio::spawn(async move {
                let mut at = 0;
                for length in (1..).step_by(997) {
                    let end = bytes.len().min(at + length % 70_000);
                    to.write_all(&bytes[at..end]).await.unwrap();
                    at = end;
                    if at == bytes.len() {
                        break;
                    }
                }
                to.shutdown().await.unwrap();
            });
            async move {
                let mut all = Vec::new();
                from.read_to_end(&mut all).await.unwrap();
                sending.await.unwrap();
                all
            }
        };
        let (left, right) = (tokio::spawn(exchange(a)), tokio::spawn(exchange(b)));
        let both = async { (left.await.unwrap(), right.await.unwrap()) };
        let (left, right) = tokio::time::timeout(Duration::from_secs(60), both).await.expect("it stands still");
        assert!(left == bytes && right == bytes);
    }

    #[tokio::test]
    async fn looking_in_vain_becomes_rare_and_what_is_found_is_received() {
        let (mut a, mut b) = pair(alone());
        let mut byte = [0];
        assert!(b.look(&mut byte).is_none(), "it has never received anything");
        assert_eq!(b.skip, 0, "and so did not look");
        a.write_all(b"x").await.unwrap();
        b.read_exact(&mut byte).await.unwrap();
        assert!(b.look(&mut byte).is_none(), "nothing is there");
        assert_eq!((b.failures, b.skip), (1, 2));
        a.write_all(b"y").await.unwrap();
        assert!(b.look(&mut byte).is_none() && b.look(&mut byte).is_none(), "it does not look");
        assert_eq!((b.look(&mut byte).unwrap().unwrap(), byte), (1, *b"y"));
        assert_eq!(b.failures, 0);
        for _ in 0..5000 {
            b.look(&mut byte);
        }
        assert_eq!(b.failures, MOST_FAILURES);
    }

    #[tokio::test]
    async fn who_was_not_the_last_does_not_look() {
        let last = alone();
        let ((mut a, mut b), (mut c, mut d)) = (pair(last), pair(last));
        let mut byte = [0];
        a.write_all(b"x").await.unwrap();
        b.read_exact(&mut byte).await.unwrap();
        c.write_all(b"x").await.unwrap();
        d.read_exact(&mut byte).await.unwrap();
        a.write_all(b"y").await.unwrap();
        assert!(b.look(&mut byte).is_none());
        b.read_exact(&mut byte).await.unwrap();
        assert_eq!(&byte, b"y");
    }

    /// Bytes that came after the runtime last asked the system are found by looking, and by nothing else.
    #[tokio::test]
    async fn a_poll_finds_what_the_runtime_does_not_know_of() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut socket = Eager::among(alone(), UnixStream::from_std(ours).unwrap());
        let (mut theirs, mut bytes) = (theirs, [0; 8]);
        std::io::Write::write_all(&mut theirs, b"first").unwrap();
        assert_eq!(socket.read(&mut bytes).await.unwrap(), 5);
        std::io::Write::write_all(&mut theirs, b"then").unwrap();
        let read = socket.read(&mut bytes);
        tokio::pin!(read);
        let polled = std::future::poll_fn(|context| Poll::Ready(read.as_mut().poll(context))).await;
        assert!(matches!(polled, Poll::Ready(Ok(4))), "{polled:?}");
    }

    #[tokio::test]
    async fn an_error_that_is_found_by_looking_is_told() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (socket, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (mut socket, mut theirs) = (Eager::among(alone(), socket.unwrap()), accepted.unwrap().0);
        let mut byte = [0];
        theirs.write_all(b"x").await.unwrap();
        socket.read_exact(&mut byte).await.unwrap();
        // It leaves with something unread: a reset.
        socket.write_all(b"unread").await.unwrap();
        theirs.readable().await.unwrap();
        drop(theirs);
        let error = loop {
            if let Some(found) = socket.look(&mut byte) {
                break found.unwrap_err();
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn the_end_is_the_end() {
        let (mut a, mut b) = pair(alone());
        a.write_all(b"x").await.unwrap();
        let mut byte = [0];
        b.read_exact(&mut byte).await.unwrap();
        drop(a);
        assert_eq!(b.look(&mut byte).unwrap().unwrap(), 0);
        assert_eq!(b.read(&mut byte).await.unwrap(), 0);
    }
}
