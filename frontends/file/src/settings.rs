//! What a caller can choose about a mount: plain data, checked in one place. It opens nothing.

use std::ffi::{OsStr, OsString};
use std::num::{NonZeroU16, NonZeroUsize};
use std::os::unix::ffi::OsStrExt;
use std::thread::available_parallelism;
use std::time::Duration;

use r3map_core::{Access, Backend, Error, ErrorKind, Operation, Result};

/// The longest request that the kernel's FUSE buffers take, in bytes.
const MAX_REQUEST: u32 = 16 << 20;
/// The shortest useful request: one page.
const MIN_REQUEST: u32 = 4096;
/// The longest file name on Linux (`NAME_MAX`).
const MAX_NAME: usize = 255;
/// The longest source text: `mount(2)` cuts its strings at one page.
const MAX_SOURCE: usize = 4095;

/// What appears on the path.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Show {
    /// The path itself is the region: a regular file. It may exist if it is an empty file.
    #[default]
    File,
    /// The path is a directory with one file of this name in it. It may exist if it is an empty directory.
    Entry(OsString),
}

/// How long the kernel may answer from its page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Caching {
    /// For as long as the file is mounted: right where only this mount changes the region, and the fastest. Whoever
    /// changes it underneath must call [`FileMount::invalidate`](crate::FileMount::invalidate).
    #[default]
    Keep,
    /// Until the file is opened again: each `open` sees what others have written to the backend before it.
    UntilOpened,
    /// Not at all (FUSE's `direct_io`): each read and write reaches the backend as the application makes it, without
    /// read-ahead. Shared mappings work from Linux 6.6 on; they are cached while they exist.
    Never,
}

/// Settings of a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSettings {
    /// What appears on the path. Default: the path itself is the file.
    pub show: Show,
    /// What `mount` and `/proc/self/mountinfo` name as the source, for people: the URI of the region. Default: `r3map`.
    pub source: String,
    /// Refuse every change with `EROFS`, and show the file with mode 0444 instead of 0644. A backend that is read-only
    /// is always mounted so. Default: no.
    pub read_only: bool,
    /// Let users other than the one who mounts reach the file, as its mode says; `chmod` and `chown` on the mounted
    /// file work. An ordinary user needs `user_allow_other` in `/etc/fuse.conf`. Default: no.
    pub allow_other: bool,
    /// How long the kernel may answer from its page cache. Default: while mounted.
    pub caching: Caching,
    /// How many threads take requests from the kernel. Requests that must wait do not hold one. Default: one per
    /// processor, at least two, at most eight.
    pub threads: Option<NonZeroUsize>,
    /// The longest read or write in bytes that the kernel hands over at once, from 4 KiB to 16 MiB; it is cut at
    /// `fs.fuse.max_pages_limit` pages and at what the backend takes. A request that waits holds a buffer of its size.
    /// Default: 1 MiB.
    pub max_request: u32,
    /// The longest read in bytes that the kernel hands over at once, from 4 KiB on, where that is less than
    /// `max_request`. It makes several of a longer one, also of what it reads ahead, which are answered at the same time: by
    /// several processors, each of which gets only so much out of memory. Not with [`Caching::Never`], where the kernel would wait for
    /// each before it makes the next. Default: 512 KiB.
    pub max_read: u32,
    /// How far ahead of a sequential reader the kernel reads, in bytes. More than 128 KiB works only for root, who may
    /// raise the kernel's limit for this mount; for others it stays at that. Default: 1 MiB.
    pub read_ahead: u32,
    /// How many read-ahead, asynchronous and write-back requests the kernel keeps in flight; together with
    /// `max_request` the bound on the memory for requests that wait. Default: 64.
    pub max_background: NonZeroU16,
    /// How long unmounting waits for the backend to take and flush what the kernel still holds. Default: one minute.
    pub unmount_limit: Duration,
}

impl Default for FileSettings {
    fn default() -> Self {
        Self {
            show: Show::File,
            source: "r3map".to_owned(),
            read_only: false,
            allow_other: false,
            caching: Caching::Keep,
            threads: None,
            max_request: 1 << 20,
            max_read: 512 << 10,
            read_ahead: 1 << 20,
            max_background: NonZeroU16::new(64).unwrap_or(NonZeroU16::MIN),
            unmount_limit: Duration::from_secs(60),
        }
    }
}

impl FileSettings {
    /// Checks everything that can be checked without looking at the system.
    ///
    /// # Errors
    /// `InvalidInput`, naming the setting.
    pub fn validate(&self) -> Result<()> {
        if let Show::Entry(name) = &self.show {
            check_name(name)?;
        }
        if !(MIN_REQUEST..=MAX_REQUEST).contains(&self.max_request) {
            return Err(invalid(format!("max_request is {}, it must be from 4 KiB to 16 MiB", self.max_request)));
        }
        if self.max_read < MIN_REQUEST {
            return Err(invalid(format!("max_read is {}, it must be 4 KiB or more", self.max_read)));
        }
        if self.source.is_empty() || self.source.len() > MAX_SOURCE || self.source.contains('\0') {
            return Err(invalid("the source must have from 1 to 4095 bytes, none of them zero"));
        }
        Ok(())
    }

    /// The same for a backend: checked, read-only if it is, and with requests that are no longer than it takes.
    ///
    /// # Errors
    /// As [`Self::validate`], and if the backend does not take requests as programs make them.
    pub(crate) fn fit(self, backend: &dyn Backend) -> Result<Self> {
        self.validate()?;
        let able = backend.capabilities();
        if let Access::WholeChunks(chunk) = able.access {
            let message =
                format!("the backend takes only whole chunks of {} bytes: put `Aligned` around it", chunk.bytes());
            return Err(invalid(message));
        }
        let longest = able.max_request.map_or(u32::MAX, |bytes| u32::try_from(bytes).unwrap_or(u32::MAX));
        if longest < MIN_REQUEST {
            return Err(invalid(format!(
                "the backend takes at most {longest} bytes at once, a page has {MIN_REQUEST}"
            )));
        }
        // The kernel works in pages.
        let max_request = self.max_request.min(longest) / MIN_REQUEST * MIN_REQUEST;
        Ok(Self { max_request, read_only: self.read_only || able.read_only, ..self })
    }

    /// The longest read that the kernel is asked for, in bytes: whole pages, which it works in.
    pub(crate) fn longest_read(&self) -> u32 {
        match self.caching {
            Caching::Never => self.max_request,
            Caching::Keep | Caching::UntilOpened => self.max_read / MIN_REQUEST * MIN_REQUEST,
        }
    }

    pub(crate) fn thread_count(&self) -> usize {
        self.threads.map_or_else(|| available_parallelism().map_or(2, NonZeroUsize::get).clamp(2, 8), NonZeroUsize::get)
    }
}

fn check_name(name: &OsStr) -> Result<()> {
    let bytes = name.as_bytes();
    let bad = bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.len() > MAX_NAME;
    if bad || bytes.contains(&b'/') || bytes.contains(&0) {
        return Err(invalid(format!("{name:?} is not a file name")));
    }
    Ok(())
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, Operation::Mount, message)
}

#[cfg(test)]
mod tests {
    use r3map_core::ChunkSize;
    use r3map_testkit::store::Store;

    use super::*;

    fn refused(change: impl FnOnce(&mut FileSettings)) -> bool {
        let mut settings = FileSettings::default();
        change(&mut settings);
        settings.validate().is_err_and(|error| error.kind() == ErrorKind::InvalidInput)
    }

    #[test]
    fn takes_the_defaults_and_refuses_nonsense() {
        FileSettings::default().validate().unwrap();
        for name in ["", ".", "..", "a/b", "a\0b", &"n".repeat(256)] {
            assert!(refused(|settings| settings.show = Show::Entry(name.into())), "{name:?}");
        }
        for bytes in [0, 4095, MAX_REQUEST + 1] {
            assert!(refused(|settings| settings.max_request = bytes), "{bytes}");
        }
        assert!(refused(|settings| settings.max_read = 4095));
        for source in ["", "a\0b", &"s".repeat(4096)] {
            assert!(refused(|settings| source.clone_into(&mut settings.source)), "{source:?}");
        }
    }

    #[test]
    fn fits_what_the_backend_takes() {
        let fit = |store: Store| FileSettings::default().fit(&store);
        assert_eq!(fit(Store::new(1)).unwrap(), FileSettings::default());
        assert!(fit(Store::new(1).read_only()).unwrap().read_only);
        assert_eq!(fit(Store::new(1 << 20).max_request(70_000)).unwrap().max_request, 69_632);
        for store in [Store::new(1 << 20).whole_chunks(ChunkSize::DEFAULT), Store::new(1 << 20).max_request(4095)] {
            assert_eq!(fit(store).unwrap_err().kind(), ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn serves_with_at_least_two_threads_unless_told() {
        let mut settings = FileSettings::default();
        assert!((2..=8).contains(&settings.thread_count()));
        settings.threads = NonZeroUsize::new(1);
        assert_eq!(settings.thread_count(), 1);
    }
}
