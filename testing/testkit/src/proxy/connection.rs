//! One client and the target it is connected to: two queues, four threads.

use std::io;
use std::net::Shutdown;
use std::num::NonZeroU64;
use std::sync::Arc;

use super::queue::{Item, Pace, Queue};
use super::socket::Socket;

/// Its sockets close when the last of its threads has ended.
#[derive(Debug)]
pub(super) struct Connection {
    client: Socket,
    server: Socket,
    up: Queue,
    down: Queue,
}

#[derive(Debug, Clone, Copy)]
enum Direction {
    Up,
    Down,
}

impl Connection {
    pub(super) fn new(client: Socket, server: Socket, pace: &Arc<Pace>) -> Arc<Self> {
        let (up, down) = (Queue::new(pace.clone()), Queue::new(pace.clone()));
        Arc::new(Self { client, server, up, down })
    }

    /// Starts moving bytes. When a thread cannot be had, the connection is reset.
    pub(super) fn run(this: &Arc<Self>) {
        for direction in [Direction::Up, Direction::Down] {
            for work in [Self::receive, Self::send] {
                let connection = this.clone();
                let thread =
                    std::thread::Builder::new().name("proxy".into()).spawn(move || work(&connection, direction));
                if thread.is_err() {
                    this.reset();
                }
            }
        }
    }

    pub(super) fn stall(&self, stalled: bool) {
        self.up.stall(stalled);
        self.down.stall(stalled);
    }

    /// Drops what is under way and resets both sides.
    pub(super) fn reset(&self) {
        self.up.close();
        self.down.close();
        for socket in [&self.client, &self.server] {
            socket.reset_on_close();
            // Wakes the thread that reads, and tells the peer nothing: the reset comes with the close.
            socket.shutdown(Shutdown::Read);
        }
    }

    fn ends(&self, direction: Direction) -> (&Socket, &Queue, &Socket) {
        match direction {
            Direction::Up => (&self.client, &self.up, &self.server),
            Direction::Down => (&self.server, &self.down, &self.client),
        }
    }

    fn receive(&self, direction: Direction) {
        let (from, queue, _) = self.ends(direction);
        let mut buffer = queue.buffer();
        loop {
            match from.read(&mut buffer[..queue.gulp()]) {
                Ok(0) => return queue.finish(Item::End),
                Ok(len) => match queue.push(buffer, len) {
                    Some(next) => buffer = next,
                    None => return,
                },
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return queue.finish(Item::Reset),
            }
        }
    }

    fn send(&self, direction: Direction) {
        let (_, queue, to) = self.ends(direction);
        // Kernels let a sleep take 50 µs longer, to save power; without this the delay is only less exact.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        while let Some(item) = queue.pop() {
            match item {
                Item::Bytes(buffer, len) => {
                    if write_all(to, &buffer[..len], queue).is_err() {
                        return self.reset();
                    }
                    queue.recycle(buffer);
                }
                Item::End => return to.shutdown(Shutdown::Write),
                Item::Reset => return self.reset(),
            }
        }
    }
}

/// Writes everything, and looks at times whether the connection was reset meanwhile.
fn write_all(to: &Socket, mut bytes: &[u8], queue: &Queue) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut if !queue.is_closed() => {}
                _ => return Err(error),
            },
        }
    }
    Ok(())
}
