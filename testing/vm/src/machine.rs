//! A QEMU process, and the connection that its guest reports over.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::image::FIRST_PROCESS;
use crate::kernel::Kernel;
use crate::protocol::Message;
use crate::{console, vm::Settings};

/// How the guest's processors are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Acceleration {
    /// Hardware virtualisation. `/dev/kvm` may open and yet not work for a stock kernel.
    Kvm,
    /// QEMU's own emulation: slow, and works everywhere.
    Emulation,
}

impl Acceleration {
    fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Emulation => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }

    /// How long until the guest's first process must have reported.
    fn patience(self) -> Duration {
        match self {
            Self::Kvm => Duration::from_secs(15),
            Self::Emulation => Duration::from_secs(180),
        }
    }
}

/// How long after the guest has died its last messages are waited for.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How often a process is looked at.
const POLL: Duration = Duration::from_millis(50);

/// What QEMU prints when the hardware cannot run this guest; it then stands still instead of ending.
const KVM_GIVES_UP: &str = "KVM internal error";

/// A running machine. Dropping it ends it.
pub(crate) struct Machine {
    child: Child,
    messages: Receiver<Message>,
    folder: PathBuf,
    /// The guest's kernel.
    pub(crate) kernel: String,
}

impl Machine {
    /// Starts the machine with `image`, and waits until its first process has reported. `folder` is for its files.
    pub(crate) fn start(
        settings: &Settings,
        how: Acceleration,
        kernel: &Kernel,
        image: &Path,
        folder: &Path,
    ) -> Result<Self> {
        // A socket's path must be short, and that of the folder may be long.
        let place = tempfile::tempdir()?;
        let socket = place.path().join("port");
        let listener = UnixListener::bind(&socket).with_context(|| socket.display().to_string())?;
        let log = File::create(folder.join("qemu.log"))?;
        let mut command = Command::new("qemu-system-x86_64");
        command.args(how.arguments()).args(["-nodefaults", "-display", "none", "-no-reboot"]);
        command.args(["-smp", &settings.cpus.to_string(), "-m", &settings.memory_mib.to_string()]);
        command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(image);
        let append = format!("console=ttyS0 panic=-1 oops=panic loglevel=5 mitigations=off rdinit={FIRST_PROCESS}");
        command.args(["-append", &append]).arg("-serial").arg(with_path("file:", &folder.join("console.log")));
        command.args(["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port"]);
        command.arg("-chardev").arg(with_path("socket,id=port,path=", &socket));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().context("cannot start qemu-system-x86_64; run cargo xtask setup")?;
        let (_, messages) = channel();
        let mut machine = Self { child, messages, folder: folder.to_owned(), kernel: String::new() };
        machine.meet(&listener, Instant::now() + how.patience())?;
        // Both ends are open: the name has served its purpose.
        drop(place);
        Ok(machine)
    }

    /// The next message, if one comes in time. An error says that none can come any more.
    pub(crate) fn next(&mut self, limit: Duration) -> Result<Option<Message>> {
        match self.messages.recv_timeout(limit) {
            Ok(message) => Ok(Some(message)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the virtual machine ended before its work was done"),
        }
    }

    /// What the kernel printed last, and QEMU.
    pub(crate) fn last_words(&self) -> Vec<String> {
        let mut lines = console::tail(&self.folder.join("console.log"));
        lines.extend(console::tail(&self.folder.join("qemu.log")).into_iter().map(|line| format!("qemu: {line}")));
        lines
    }

    /// Waits until the machine has powered off, or not for long.
    pub(crate) fn wait(&mut self) {
        let end = Instant::now() + LAST_WORDS;
        while Instant::now() < end && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(POLL);
        }
    }

    fn meet(&mut self, listener: &UnixListener, end: Instant) -> Result<()> {
        listener.set_nonblocking(true)?;
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(_) => self.still_hope(end)?,
            }
        };
        stream.set_nonblocking(false)?;
        self.messages = listen(stream);
        loop {
            // The end of the connection says less than how QEMU ended.
            if let Ok(Some(Message::Ready { kernel })) = self.next(POLL) {
                self.kernel = kernel;
                return Ok(());
            }
            self.still_hope(end)?;
        }
    }

    fn still_hope(&mut self, end: Instant) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("QEMU ended: {status}");
        }
        let log = std::fs::read(self.folder.join("qemu.log")).unwrap_or_default();
        if String::from_utf8_lossy(&log).contains(KVM_GIVES_UP) {
            bail!("the hardware does not run this kernel");
        }
        if Instant::now() > end {
            bail!("its first process did not report in time");
        }
        std::thread::sleep(POLL);
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn with_path(option: &str, path: &Path) -> std::ffi::OsString {
    let mut text = std::ffi::OsString::from(option);
    text.push(path);
    text
}

/// Reads messages in a thread of its own until the connection ends.
fn listen(stream: UnixStream) -> Receiver<Message> {
    let (sender, messages) = channel();
    std::thread::spawn(move || {
        let lines = BufReader::new(stream).split(b'\n').map_while(Result::ok);
        for line in lines {
            if let Some(message) = Message::from_line(&String::from_utf8_lossy(&line))
                && sender.send(message).is_err()
            {
                return;
            }
        }
    });
    messages
}
