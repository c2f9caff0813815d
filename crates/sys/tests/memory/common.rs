//! What the tests share: position-dependent bytes, a fault server that answers from them, and children that crash.

use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use r3map_sys::{Event, Install, Mapping, PAGE_SIZE, Pager, Protection, ScopeWanted, Woken};

pub(crate) const PAGE: usize = PAGE_SIZE as usize;

/// The byte at an offset, with a prime period so that a misplaced page shows.
pub(crate) fn byte(offset: usize) -> u8 {
    (offset % 251) as u8 + 1
}

pub(crate) fn bytes(start: usize, len: usize) -> Vec<u8> {
    (start..start + len).map(byte).collect()
}

pub(crate) fn tracked(pages: usize) -> Mapping {
    Mapping::new((pages * PAGE) as u64, Protection::Tracked, ScopeWanted::Widest).unwrap()
}

pub(crate) fn install(pager: &Pager, page: usize, pages: usize) {
    pager.install((page * PAGE) as u64, &bytes(page * PAGE, pages * PAGE), Install::Clean).unwrap();
}

/// What is written, as page indices; protects again.
pub(crate) fn written(pager: &Pager) -> Vec<usize> {
    written_in(pager, 0, pager.len() as usize / PAGE)
}

pub(crate) fn written_in(pager: &Pager, from: usize, to: usize) -> Vec<usize> {
    let mut pages = Vec::new();
    let range = (from * PAGE) as u64..(to * PAGE) as u64;
    pager.collect(range, &mut |run| pages.extend(run.start as usize / PAGE..run.end as usize / PAGE)).unwrap();
    pages
}

pub(crate) fn present(pager: &Pager) -> Vec<usize> {
    let mut pages = Vec::new();
    let all = 0..pager.len();
    pager.present(all, &mut |run| pages.extend(run.start as usize / PAGE..(run.end as usize).div_ceil(PAGE))).unwrap();
    pages
}

/// Serves faults with [`byte`]s until it is stopped.
pub(crate) struct Server {
    stop: Arc<Event>,
    thread: Option<JoinHandle<usize>>,
}

impl Server {
    pub(crate) fn start(pager: &Arc<Pager>) -> Self {
        let (pager, stop) = (pager.clone(), Arc::new(Event::new().unwrap()));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let (mut faults, mut served) = (Vec::new(), 0);
            while pager.wait(&stopped, &mut faults).unwrap() == Woken::Faults {
                for fault in &faults {
                    let len = PAGE_SIZE.min(pager.len() - fault.offset) as usize;
                    pager.install(fault.offset, &bytes(fault.offset as usize, len), Install::Clean).unwrap();
                    served += 1;
                }
            }
            served
        });
        Self { stop, thread: Some(thread) }
    }

    /// Stops it; how many faults it served.
    pub(crate) fn stop(mut self) -> usize {
        self.stop.raise();
        self.thread.take().unwrap().join().unwrap()
    }
}

const CHILD: &str = "R3MAP_SYS_TEST_CHILD";

/// Runs this test again in a process of its own, through `prefix` if there is one; how it ended. `None` in that
/// process, where the test goes on with what is to be tried.
pub(crate) fn in_child(test: &str, prefix: &[&str]) -> Option<ExitStatus> {
    if std::env::var_os(CHILD).is_some() {
        return None;
    }
    let exe = std::env::current_exe().unwrap();
    let mut words = prefix.iter().map(std::ffi::OsStr::new).chain([exe.as_os_str()]);
    let mut command = Command::new(words.next().unwrap());
    command.args(words).args(["--exact", test, "--nocapture"]).env(CHILD, "1");
    command.stdout(Stdio::null());
    Some(command.status().unwrap())
}
