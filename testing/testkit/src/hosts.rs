//! Two hosts with a wire between them that can be cut: network namespaces, which root can make.
//!
//! What is sent over a wire that is cut is lost without a word, as when the other host loses its power: neither side is
//! told, no link goes down, nothing is refused.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::geteuid;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::skip;

/// Two hosts and what is between them. Dropping it removes them.
#[derive(Debug)]
pub struct Hosts {
    hosts: [Namespace; 2],
    between: Namespace,
}

/// A network namespace with a name.
#[derive(Debug)]
struct Namespace(String);

impl Hosts {
    /// Two hosts that reach each other. Says that the calling test is skipped where they cannot be made.
    ///
    /// # Panics
    /// If they cannot be made all the same.
    #[must_use]
    pub fn new() -> Option<Self> {
        if !geteuid().is_root() {
            skip("network namespaces are made by root");
            return None;
        }
        if Command::new("ip").arg("-V").output().is_err() {
            skip("ip is not installed");
            return None;
        }
        let this = Self { hosts: [Namespace::new(), Namespace::new()], between: Namespace::new() };
        for (number, host) in this.hosts.iter().enumerate() {
            let (here, there) = (Self::address(number), format!("10.0.{number}.1"));
            let end = format!("end{number}");
            this.between.ip(&["link", "add", &end, "type", "veth", "peer", "name", "cable", "netns", &host.0]);
            this.between.ip(&["address", "add", &format!("{there}/24"), "dev", &end]);
            this.between.ip(&["link", "set", &end, "up"]);
            host.ip(&["address", "add", &format!("{here}/24"), "dev", "cable"]);
            host.ip(&["link", "set", "lo", "up"]);
            host.ip(&["link", "set", "cable", "up"]);
            host.ip(&["route", "add", "default", "via", &there]);
        }
        this.mend();
        Some(this)
    }

    /// The address of a host: 0 or 1.
    #[must_use]
    pub fn address(host: usize) -> String {
        format!("10.0.{host}.2")
    }

    /// The words that start a command on a host when they are put before it.
    #[must_use]
    pub fn wrapper(&self, host: usize) -> [&str; 4] {
        ["ip", "netns", "exec", &self.hosts[host].0]
    }

    /// Runs `work` on a host, in a thread of its own. What it makes there stays there: sockets, and other threads.
    ///
    /// # Panics
    /// If `work` does.
    pub fn on<T: Send>(&self, host: usize, work: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(Path::new("/run/netns").join(&self.hosts[host].0)).expect("it was made");
        let inside = || {
            move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), Some(LinkNameSpaceType::Network))
                .expect("root may");
            work()
        };
        std::thread::scope(|scope| scope.spawn(inside).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    }

    /// Cuts the wire: from now on everything is lost.
    ///
    /// # Panics
    /// If that cannot be done.
    pub fn cut(&self) {
        self.forward(false);
    }

    /// Mends the wire.
    ///
    /// # Panics
    /// If that cannot be done.
    pub fn mend(&self) {
        self.forward(true);
    }

    fn forward(&self, on: bool) {
        let words = format!("echo {} > /proc/sys/net/ipv4/ip_forward", u8::from(on));
        run(Command::new("ip").args(["netns", "exec", &self.between.0, "sh", "-c", &words]));
    }
}

impl Namespace {
    fn new() -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let this = Self(format!("r3map-test-{}-{number}", std::process::id()));
        run(Command::new("ip").args(["netns", "add", &this.0]));
        this
    }

    fn ip(&self, arguments: &[&str]) {
        run(Command::new("ip").args(["-n", &self.0]).args(arguments));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // A test may be panicking; what is left costs nothing.
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).status();
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_is_sent_over_a_cut_wire_arrives_when_it_is_mended() {
        let Some(hosts) = Hosts::new() else { return };
        let listener = hosts.on(1, || TcpListener::bind((Hosts::address(1), 0)).unwrap());
        let address = listener.local_addr().unwrap();
        let mut near = hosts.on(0, || TcpStream::connect(address).unwrap());
        let (mut far, _) = listener.accept().unwrap();
        hosts.cut();
        near.write_all(b"now").unwrap();
        far.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        far.read(&mut [0; 3]).unwrap_err();
        hosts.mend();
        far.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut heard = [0; 3];
        far.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"now");
    }
}
