//! What `stat` says about the file, and what `chmod`, `chown` and `utimensat` may change of it. The size is fixed;
//! nothing here outlives the mount.

use std::sync::atomic::{AtomicI64, AtomicU32, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo, TimeOrNow};

/// The kernel counts `st_blocks` in this unit, whatever the file system.
const STAT_BLOCK: u64 = 512;
const PERMISSION_BITS: u32 = 0o7777;

/// What a `setattr` request asks for, apart from the size.
#[derive(Debug, Default)]
pub(crate) struct Change {
    pub(crate) mode: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    pub(crate) accessed: Option<TimeOrNow>,
    pub(crate) modified: Option<TimeOrNow>,
}

/// The attributes of the file or of the directory it is shown in. All parts are independent, so each is an atomic:
/// writes touch the times often.
#[derive(Debug)]
pub(crate) struct Attributes {
    ino: INodeNo,
    kind: FileType,
    size: u64,
    io_size: u32,
    mode: AtomicU32,
    uid: AtomicU32,
    gid: AtomicU32,
    accessed: Time,
    modified: Time,
    changed: Time,
}

impl Attributes {
    /// Of the user who mounts, from now on. `io_size` is what `st_blksize` suggests.
    pub(crate) fn new(ino: INodeNo, kind: FileType, size: u64, io_size: u32, mode: u32) -> Self {
        let now = SystemTime::now();
        Self {
            ino,
            kind,
            size,
            io_size,
            mode: AtomicU32::new(mode),
            uid: AtomicU32::new(rustix::process::geteuid().as_raw()),
            gid: AtomicU32::new(rustix::process::getegid().as_raw()),
            accessed: Time::new(now),
            modified: Time::new(now),
            changed: Time::new(now),
        }
    }

    /// The content has changed just now.
    pub(crate) fn touch(&self) {
        let now = SystemTime::now();
        self.modified.set(now);
        self.changed.set(now);
    }

    pub(crate) fn apply(&self, change: &Change) {
        let set =
            |place: &AtomicU32, value: Option<u32>| value.into_iter().for_each(|value| place.store(value, Relaxed));
        set(&self.mode, change.mode.map(|mode| mode & PERMISSION_BITS));
        set(&self.uid, change.uid);
        set(&self.gid, change.gid);
        let now = SystemTime::now();
        self.accessed.set_if(change.accessed, now);
        self.modified.set_if(change.modified, now);
        self.changed.set(now);
    }

    pub(crate) fn stat(&self) -> FileAttr {
        FileAttr {
            ino: self.ino,
            size: self.size,
            blocks: self.size.div_ceil(STAT_BLOCK),
            atime: self.accessed.get(),
            mtime: self.modified.get(),
            ctime: self.changed.get(),
            crtime: UNIX_EPOCH,
            kind: self.kind,
            perm: u16::try_from(self.mode.load(Relaxed) & PERMISSION_BITS).unwrap_or_default(),
            nlink: if self.kind == FileType::Directory { 2 } else { 1 },
            uid: self.uid.load(Relaxed),
            gid: self.gid.load(Relaxed),
            rdev: 0,
            blksize: self.io_size,
            flags: 0,
        }
    }
}

/// A time as nanoseconds since 1970, before or after; what does not fit (beyond the years 1677 to 2262) is cut.
#[derive(Debug)]
struct Time(AtomicI64);

impl Time {
    fn new(time: SystemTime) -> Self {
        Self(AtomicI64::new(nanoseconds(time)))
    }

    fn set(&self, time: SystemTime) {
        self.0.store(nanoseconds(time), Relaxed);
    }

    fn set_if(&self, time: Option<TimeOrNow>, now: SystemTime) {
        match time {
            Some(TimeOrNow::Now) => self.set(now),
            Some(TimeOrNow::SpecificTime(time)) => self.set(time),
            None => {}
        }
    }

    fn get(&self) -> SystemTime {
        let nanoseconds = self.0.load(Relaxed);
        let distance = Duration::from_nanos(nanoseconds.unsigned_abs());
        if nanoseconds < 0 { UNIX_EPOCH - distance } else { UNIX_EPOCH + distance }
    }
}

fn nanoseconds(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |nanoseconds| -nanoseconds),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(size: u64) -> Attributes {
        Attributes::new(INodeNo(1), FileType::RegularFile, size, 65536, 0o644)
    }

    #[test]
    fn says_the_exact_size_and_whole_blocks() {
        for (size, blocks) in [(1, 1), (512, 1), (513, 2), (1 << 40, 1 << 31)] {
            let stat = file(size).stat();
            assert_eq!((stat.size, stat.blocks), (size, blocks));
        }
    }

    #[test]
    fn changes_what_is_asked_and_nothing_else() {
        let attributes = file(1);
        let before = attributes.stat();
        let past = UNIX_EPOCH - Duration::new(86_400, 5);
        attributes.apply(&Change {
            mode: Some(0o100_600),
            modified: Some(TimeOrNow::SpecificTime(past)),
            ..Change::default()
        });
        let after = attributes.stat();
        assert_eq!((after.perm, after.mtime), (0o600, past));
        assert_eq!((after.uid, after.gid, after.atime), (before.uid, before.gid, before.atime));
        assert!(after.ctime >= before.ctime);
    }

    #[test]
    fn a_write_moves_both_times() {
        let attributes = file(1);
        attributes.apply(&Change { modified: Some(TimeOrNow::SpecificTime(UNIX_EPOCH)), ..Change::default() });
        let before = attributes.stat();
        attributes.touch();
        assert!(attributes.stat().mtime > before.mtime);
        assert!(attributes.stat().ctime >= before.ctime);
    }
}
