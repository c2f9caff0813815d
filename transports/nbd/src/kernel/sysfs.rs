//! What `/sys/block` says about NBD devices (`drivers/block/nbd.c`: `pid`, `backend`).

use std::fs;
use std::path::{Path, PathBuf};

/// The device node.
pub(super) fn node(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/nbd{index}"))
}

/// The index of a device node's name: `/dev/nbd3` is 3. Partitions and anything else have none.
pub(super) fn index_of(path: &Path) -> Option<u32> {
    parse_name(path.strip_prefix("/dev").ok()?.to_str()?)
}

fn parse_name(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("nbd")?;
    let canonical = digits.bytes().all(|byte| byte.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
    if canonical { digits.parse().ok() } else { None }
}

/// All devices that there are, in order.
pub(super) fn devices() -> Vec<u32> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let mut found: Vec<u32> = entries.filter_map(|entry| parse_name(entry.file_name().to_str()?)).collect();
    found.sort_unstable();
    found
}

/// Whether somebody has the device attached.
pub(super) fn is_attached(index: u32) -> bool {
    Path::new(&format!("/sys/block/nbd{index}/pid")).exists()
}

/// The size in bytes; nothing if there is no such device.
pub(super) fn size(index: u32) -> Option<u64> {
    let sectors: u64 = fs::read_to_string(format!("/sys/block/nbd{index}/size")).ok()?.trim().parse().ok()?;
    sectors.checked_mul(super::SECTOR)
}

/// Whether the device is known to have no time-out of requests: what is asked here is the block layer's, which is the same
/// then as for 30 s, and the NBD client's own, which takes debugfs.
pub(super) fn is_unlimited(index: u32) -> bool {
    let says = |path: String, value| fs::read_to_string(path).is_ok_and(|text| text.trim() == value);
    says(format!("/sys/kernel/debug/nbd/nbd{index}/timeout"), "0")
        && says(format!("/sys/block/nbd{index}/queue/io_timeout"), "30000")
}

/// What whoever attached the device called its backend, where that was said and the kernel keeps it (Linux 5.14).
pub(super) fn identifier(index: u32) -> Option<String> {
    let text = fs::read_to_string(format!("/sys/block/nbd{index}/backend")).ok()?;
    Some(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_strictly() {
        assert_eq!(index_of(&node(12)), Some(12));
        for wrong in [
            "/dev/nbd",
            "/dev/nbd0p1",
            "/dev/nbd+1",
            "/dev/nbd01",
            "nbd1",
            "/dev/sda",
            "/tmp/nbd1",
            "/dev/nbd99999999999",
        ] {
            assert_eq!(index_of(Path::new(wrong)), None, "{wrong}");
        }
    }
}
