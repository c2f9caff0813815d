//! How a device of ours is known again: the kernel keeps a number with each device for its server.

use r3map_sys::ublk::DeviceInfo;

/// In the upper sixteen bits of the number: the device was made by r3map.
const OURS: u64 = 0x7233;
const REGION_BITS: u32 = 48;
/// In the rest: the device is kept, and the region's name follows; without it, it ends with the process whose number follows.
const KEPT: u64 = 1 << (REGION_BITS - 1);

/// Whose device it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark(u64);

impl Mark {
    /// That of a device of this process, which is not kept.
    pub(super) fn of_this_process() -> Self {
        Self(std::process::id().into())
    }

    /// The process that made a device which is not kept.
    pub(super) fn process(self) -> Option<i32> {
        i32::try_from(self.0).ok()
    }

    /// That of a region, by its name: the device is kept.
    pub(super) fn new(region: &str) -> Self {
        // FNV-1a, which is the same in every build: two regions of one host get one number once in 2^47 pairs.
        let hash = region
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        Self(hash >> (u64::BITS - REGION_BITS) | KEPT)
    }

    /// That of a device, if it is ours.
    pub(super) fn of(info: &DeviceInfo) -> Option<Self> {
        Self::read(info.mark)
    }

    fn read(number: u64) -> Option<Self> {
        (number >> REGION_BITS == OURS).then_some(Self(number & ((1 << REGION_BITS) - 1)))
    }

    /// What the kernel is to keep.
    pub(super) fn number(self) -> u64 {
        OURS << REGION_BITS | self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_knows_its_device() {
        let mark = Mark::new("grpc://host:1337");
        assert_eq!(Mark::read(mark.number()), Some(mark));
        assert_ne!(mark, Mark::new("grpc://host:1338"));
        assert_eq!(mark.process(), None);
        let own = Mark::of_this_process();
        assert_eq!(Mark::read(own.number()), Some(own));
        assert_eq!(own.process().map(i32::unsigned_abs), Some(std::process::id()));
        assert_eq!((Mark::read(0), Mark::read(u64::MAX)), (None, None));
    }
}
