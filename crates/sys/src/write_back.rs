//! Has the kernel write what it has cached of a file or device, without making it durable.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Starts to write every dirty page of `file` and waits until all are written. No flush follows: what is below may still
/// have them in a volatile cache.
///
/// # Errors
/// What writing answered, also earlier if nobody was told of it yet.
pub fn write_back(file: &File) -> io::Result<()> {
    let how = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: it takes numbers only; the descriptor is open as long as `file` is borrowed.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, how) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn takes_files_and_says_what_it_cannot_write_back() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 10_000], 5).unwrap();
        write_back(&file).unwrap();
        let device = File::open("/dev/null").unwrap();
        assert_eq!(write_back(&device).unwrap_err().raw_os_error(), Some(libc::ESPIPE));
    }
}
