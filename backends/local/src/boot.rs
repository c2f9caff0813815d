//! Telling whether the machine has been running since: whether the page cache that a killed process left behind is
//! still the one that files are read through.

/// Names one run of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BootId([u8; Self::LEN]);

impl BootId {
    /// Its length in bytes, in a file.
    pub(crate) const LEN: usize = 36;

    /// This one; `None` where the kernel does not tell, so that every start counts as a new one.
    pub(crate) fn current() -> Option<Self> {
        let text = std::fs::read("/proc/sys/kernel/random/boot_id").ok()?;
        Some(Self(text.get(..Self::LEN)?.try_into().ok()?))
    }

    /// For a file: zeros are no boot.
    pub(crate) fn to_bytes(id: Option<Self>) -> [u8; Self::LEN] {
        id.map_or([0; Self::LEN], |id| id.0)
    }

    /// From a file.
    pub(crate) fn from_bytes(bytes: [u8; Self::LEN]) -> Option<Self> {
        (bytes != [0; Self::LEN]).then_some(Self(bytes))
    }
}

/// Whether no loss of power can have happened between two moments.
pub(crate) fn is_same_boot(then: Option<BootId>, now: Option<BootId>) -> bool {
    then.is_some() && then == now
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_and_the_unknown_is_never_the_same() {
        let now = BootId::current();
        assert!(is_same_boot(now, BootId::from_bytes(BootId::to_bytes(now))));
        assert!(!is_same_boot(None, None) && !is_same_boot(now, None));
    }
}
