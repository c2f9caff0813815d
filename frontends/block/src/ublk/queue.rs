//! The threads that serve a ublk device's queues, one each: they take requests from the kernel, have the service run
//! them, and give results back. They know nothing of the device's life.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use r3map_core::{Error, ErrorKind, Operation, Result};
use r3map_sys::ublk::{Bell, Channel, Queue};
use tokio::sync::watch;

use super::requests::{Mailbox, Reply, serve};
use crate::node::until;
use crate::service::Service;
use r3map_pipeline::blocking::spawn;

/// The running threads of a device. Dropping it ends them, and fails what is under way.
pub(super) struct Queues {
    bells: Vec<Bell>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    /// How many threads still serve.
    serving: watch::Receiver<usize>,
}

/// What a thread needs.
struct Server {
    queue: Queue,
    mailbox: Arc<Mailbox>,
    service: Arc<Service>,
    stop: Arc<AtomicBool>,
}

impl Queues {
    /// Starts to serve `count` queues; returns when all of them fetch. Blocks, at most for `limit`.
    pub(super) fn start(
        channel: &Channel,
        count: u16,
        depth: u16,
        service: &Arc<Service>,
        limit: Duration,
    ) -> Result<Self> {
        let (left, serving) = watch::channel(usize::from(count));
        let left = Arc::new(left);
        let mut queues = Self { bells: Vec::new(), stop: Arc::default(), threads: Vec::new(), serving };
        let (tell, told) = mpsc::channel();
        for id in 0..count {
            let bell = Bell::new().map_err(cannot_serve)?;
            queues.bells.push(bell.clone());
            let (channel, service, stop) = (channel.clone(), service.clone(), queues.stop.clone());
            let (tell, left) = (tell.clone(), left.clone());
            queues.threads.push(spawn(move || {
                Server::open(&channel, id, depth, bell, service, stop, &tell).into_iter().for_each(Server::run);
                drop(channel);
                left.send_modify(|left| *left -= 1);
            })?);
        }
        for _ in 0..count {
            told.recv_timeout(limit).unwrap_or_else(|_| Err(late()))?;
        }
        Ok(queues)
    }

    /// Waits until nothing is served any more.
    pub(super) fn ended(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut serving = self.serving.clone();
        async move {
            // An error says that the threads are gone.
            let _ = serving.wait_for(|serving| *serving == 0).await;
        }
    }

    /// Waits until all threads have ended, at most for `limit`; whether they have. Blocks.
    pub(super) fn wait(&self, limit: Duration) -> bool {
        until(limit, || self.threads.iter().all(JoinHandle::is_finished))
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        self.bells.iter().for_each(Bell::ring);
        // Not waited for: a thread may be in a backend that does not come back.
    }
}

fn cannot_serve(error: std::io::Error) -> Error {
    Error::from_io(Operation::Mount, "a ublk queue cannot be served", error)
}

fn late() -> Error {
    Error::new(ErrorKind::Unavailable, Operation::Mount, "the kernel does not let the ublk queues start")
}

impl Server {
    /// Opens the queue on the calling thread, which alone may use it, and tells how that went.
    fn open(
        channel: &Channel,
        id: u16,
        depth: u16,
        bell: Bell,
        service: Arc<Service>,
        stop: Arc<AtomicBool>,
        tell: &Sender<Result<()>>,
    ) -> Option<Self> {
        // Reclaiming memory must not wait for this thread when it asks for memory itself (swap, or a file system on the
        // device); needs CAP_SYS_RESOURCE, and is only a help.
        let _ = rustix::process::configure_io_flusher_behavior(true);
        match Queue::new(channel, id, depth, &bell) {
            Ok(queue) => {
                let _ = tell.send(Ok(()));
                Some(Self { queue, mailbox: Arc::new(Mailbox::new(bell)), service, stop })
            }
            Err(error) => {
                let _ = tell.send(Err(cannot_serve(error)));
                None
            }
        }
    }

    fn run(mut self) {
        let (mut requests, mut results) = (Vec::new(), Vec::new());
        loop {
            self.mailbox.take_and_sleep(&mut results);
            let given = results.drain(..).try_for_each(|(tag, result)| self.queue.commit(tag, result));
            if self.queue.has_ended() || self.stop.load(Relaxed) {
                return;
            }
            if let Err(error) = given.and_then(|()| self.queue.wait(&mut requests)) {
                // The kernel notices that the queue is gone, and fails what is under way.
                return tracing::error!(%error, "a ublk queue is not served any more");
            }
            self.mailbox.wake();
            for request in requests.drain(..) {
                let reply = Reply::new(self.mailbox.clone(), request.tag);
                self.service.run(serve(self.service.clone(), request, reply));
            }
        }
    }
}
