//! Numbers and shapes of ublk, from `include/uapi/linux/ublk_cmd.h`. Nothing here calls the kernel.

use std::ops::{BitAnd, BitOr};

use rustix::ioctl::{Opcode, opcode};

const UBLK: u8 = b'u';

pub(super) const GET_DEV_INFO: Opcode = opcode::read::<ControlCommand>(UBLK, 0x02);
pub(super) const ADD_DEV: Opcode = opcode::read_write::<ControlCommand>(UBLK, 0x04);
pub(super) const DEL_DEV: Opcode = opcode::read_write::<ControlCommand>(UBLK, 0x05);
pub(super) const START_DEV: Opcode = opcode::read_write::<ControlCommand>(UBLK, 0x06);
pub(super) const STOP_DEV: Opcode = opcode::read_write::<ControlCommand>(UBLK, 0x07);
pub(super) const SET_PARAMS: Opcode = opcode::read_write::<ControlCommand>(UBLK, 0x08);
pub(super) const GET_PARAMS: Opcode = opcode::read::<ControlCommand>(UBLK, 0x09);
pub(super) const START_USER_RECOVERY: Opcode = opcode::read_write::<ControlCommand>(UBLK, 0x10);
pub(super) const END_USER_RECOVERY: Opcode = opcode::read_write::<ControlCommand>(UBLK, 0x11);
pub(super) const GET_FEATURES: Opcode = opcode::read::<ControlCommand>(UBLK, 0x13);

pub(super) const FETCH_REQ: Opcode = opcode::read_write::<[u64; 2]>(UBLK, 0x20);
pub(super) const COMMIT_AND_FETCH_REQ: Opcode = opcode::read_write::<[u64; 2]>(UBLK, 0x21);

/// The most requests that one queue may have under way.
pub(super) const MAX_QUEUE_DEPTH: u16 = 4096;
/// Where in the channel the bytes of requests begin; below are the descriptors.
const IO_BUF_OFFSET: u64 = 0x8000_0000;
/// One request's bytes take at most 32 MiB.
const TAG_SHIFT: u32 = 25;
const QUEUE_SHIFT: u32 = TAG_SHIFT + 16;

/// Where in the channel the bytes of a request are.
pub(super) fn data_position(queue: u16, tag: u16) -> u64 {
    IO_BUF_OFFSET + (u64::from(queue) << QUEUE_SHIFT) + (u64::from(tag) << TAG_SHIFT)
}

/// Where in the channel the descriptors of a queue are, to be mapped.
pub(super) fn descriptors_position(queue: u16) -> u64 {
    u64::from(queue) * descriptors_size(MAX_QUEUE_DEPTH) as u64
}

/// How long the descriptors of a queue are: whole pages.
pub(super) fn descriptors_size(depth: u16) -> usize {
    const PAGE: usize = 4096;
    (usize::from(depth) * size_of::<Descriptor>()).next_multiple_of(PAGE)
}

/// `struct ublksrv_ctrl_cmd`, as bytes of an io_uring entry.
#[repr(C)]
pub(super) struct ControlCommand {
    pub(super) dev_id: u32,
    pub(super) queue_id: u16,
    pub(super) len: u16,
    pub(super) addr: u64,
    pub(super) data: u64,
    pub(super) dev_path_len: u16,
    pub(super) pad: u16,
    pub(super) reserved: u32,
}

impl ControlCommand {
    /// What goes into the 80 bytes that an entry has for a command.
    pub(super) fn to_bytes(&self) -> [u8; 80] {
        let Self { dev_id, queue_id, len, addr, data, dev_path_len, pad, reserved } = self;
        let mut bytes = [0; 80];
        bytes[0..4].copy_from_slice(&dev_id.to_ne_bytes());
        bytes[4..6].copy_from_slice(&queue_id.to_ne_bytes());
        bytes[6..8].copy_from_slice(&len.to_ne_bytes());
        bytes[8..16].copy_from_slice(&addr.to_ne_bytes());
        bytes[16..24].copy_from_slice(&data.to_ne_bytes());
        bytes[24..26].copy_from_slice(&dev_path_len.to_ne_bytes());
        bytes[26..28].copy_from_slice(&pad.to_ne_bytes());
        bytes[28..32].copy_from_slice(&reserved.to_ne_bytes());
        bytes
    }
}

/// `struct ublksrv_io_cmd` as the 16 bytes of an entry; no address, because bytes are copied by calls.
pub(super) fn io_command(queue: u16, tag: u16, result: i32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..2].copy_from_slice(&queue.to_ne_bytes());
    bytes[2..4].copy_from_slice(&tag.to_ne_bytes());
    bytes[4..8].copy_from_slice(&result.to_ne_bytes());
    bytes
}

/// `struct ublksrv_io_desc`: what a request asks for. Written by the kernel into mapped memory.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptor {
    /// The operation in the low byte, flags above.
    pub(super) op_flags: u32,
    pub(super) nr_sectors: u32,
    pub(super) start_sector: u64,
    pub(super) addr: u64,
}

pub(super) const OP_READ: u8 = 0;
pub(super) const OP_WRITE: u8 = 1;
pub(super) const OP_FLUSH: u8 = 2;
pub(super) const OP_DISCARD: u8 = 3;
pub(super) const OP_WRITE_ZEROES: u8 = 5;
pub(super) const IO_F_FUA: u32 = 1 << 13;
pub(super) const IO_F_NOUNMAP: u32 = 1 << 15;

/// What a kernel can do, and what a device is made with: `UBLK_F_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(pub u64);

impl Features {
    /// A device outlives its server: another one may take it over. What the old one was asked fails, what comes
    /// meanwhile waits (`UBLK_F_USER_RECOVERY`).
    pub const RECOVERY: Self = Self(1 << 3);
    /// What the old server was asked is asked again of the new one, instead of failing; with [`Self::RECOVERY`].
    pub const RECOVERY_REISSUE: Self = Self(1 << 4);
    /// Commands are numbered as ioctls are; every kernel since 6.4.
    pub const IOCTL_ENCODE: Self = Self(1 << 6);
    /// The server copies the bytes of requests by `pread` and `pwrite` (Linux 6.5).
    pub const USER_COPY: Self = Self(1 << 7);
    /// What comes while there is no server fails, instead of waiting; with [`Self::RECOVERY`] (Linux 6.13).
    pub const RECOVERY_FAIL_IO: Self = Self(1 << 9);

    /// Whether all of `other` are among these.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self & other == other
    }
}

impl BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for Features {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// What a device does at the moment: `UBLK_S_DEV_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceState {
    /// Not started, or stopped.
    Dead,
    /// It is served.
    Live,
    /// Its server is gone; requests wait for another one.
    Quiesced,
    /// Its server is gone; requests fail until there is another one.
    FailIo,
    /// What this program does not know.
    Unknown(u16),
}

/// `struct ublksrv_ctrl_dev_info`: a device as the kernel knows it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceInfo {
    /// How many queues it has: at most as many as there are processors.
    pub queues: u16,
    /// How many requests each queue may have under way.
    pub depth: u16,
    state: u16,
    pad0: u16,
    /// The longest request in bytes.
    pub max_request: u32,
    /// The number in `/dev/ublkbN`.
    pub id: u32,
    /// The process that makes or serves it; -1 once it is stopped.
    pub server: i32,
    pad1: u32,
    flags: u64,
    /// A number that the server may choose, and that stays with the device.
    pub mark: u64,
    owner_uid: u32,
    owner_gid: u32,
    reserved: [u64; 2],
}

impl DeviceInfo {
    /// What it does at the moment.
    #[must_use]
    pub fn state(&self) -> DeviceState {
        match self.state {
            0 => DeviceState::Dead,
            1 => DeviceState::Live,
            2 => DeviceState::Quiesced,
            3 => DeviceState::FailIo,
            other => DeviceState::Unknown(other),
        }
    }

    /// What it was made with.
    #[must_use]
    pub fn features(&self) -> Features {
        Features(self.flags)
    }

    /// What a new device is asked to be.
    pub(super) fn wanted(id: u32, queues: u16, depth: u16, max_request: u32, features: Features, mark: u64) -> Self {
        // Until the device is started the kernel keeps here what it is given.
        let server = std::process::id().cast_signed();
        Self { queues, depth, max_request, id, server, flags: features.0, mark, ..Self::default() }
    }
}

/// What the kernel tells programs about a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The size in sectors of 512 bytes.
    pub sectors: u64,
    /// The logical block size as a power of two: 9 is 512 bytes, 12 is 4096.
    pub logical_shift: u8,
    /// The physical block size, in the same way.
    pub physical_shift: u8,
    /// The longest request in sectors.
    pub max_sectors: u32,
    /// Refuse writes.
    pub read_only: bool,
    /// The longest discard in sectors; 0 if it cannot.
    pub max_discard_sectors: u32,
    /// The longest write of zeros in sectors; 0 if it cannot.
    pub max_write_zeroes_sectors: u32,
    /// What discards come in multiples of, in bytes; not 0.
    pub discard_granularity: u32,
}

const ATTR_READ_ONLY: u32 = 1 << 0;
const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
const ATTR_FUA: u32 = 1 << 3;
const TYPE_BASIC: u32 = 1 << 0;
const TYPE_DISCARD: u32 = 1 << 1;

/// `struct ublk_params`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Parameters {
    len: u32,
    types: u32,
    basic: Basic,
    discard: Discard,
    devt: [u32; 4],
    zoned: [u32; 8],
}

/// `struct ublk_param_basic`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Basic {
    attrs: u32,
    logical_bs_shift: u8,
    physical_bs_shift: u8,
    io_opt_shift: u8,
    io_min_shift: u8,
    max_sectors: u32,
    chunk_sectors: u32,
    dev_sectors: u64,
    virt_boundary_mask: u64,
}

/// `struct ublk_param_discard`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Discard {
    alignment: u32,
    granularity: u32,
    max_discard_sectors: u32,
    max_write_zeroes_sectors: u32,
    max_discard_segments: u16,
    reserved: u16,
}

impl Parameters {
    /// Room for the kernel's answer.
    pub(super) fn empty() -> Self {
        Self { len: Self::size(), ..Self::default() }
    }

    fn size() -> u32 {
        const SIZE: usize = size_of::<Parameters>();
        const { assert!(SIZE < 1 << 16) };
        SIZE as u32
    }
}

impl From<&Limits> for Parameters {
    fn from(limits: &Limits) -> Self {
        let attrs = match limits.read_only {
            true => ATTR_READ_ONLY,
            false => ATTR_VOLATILE_CACHE | ATTR_FUA,
        };
        let basic = Basic {
            attrs,
            logical_bs_shift: limits.logical_shift,
            physical_bs_shift: limits.physical_shift,
            io_opt_shift: limits.physical_shift,
            io_min_shift: limits.physical_shift,
            max_sectors: limits.max_sectors,
            dev_sectors: limits.sectors,
            ..Basic::default()
        };
        let discard = Discard {
            granularity: limits.discard_granularity,
            max_discard_sectors: limits.max_discard_sectors,
            max_write_zeroes_sectors: limits.max_write_zeroes_sectors,
            max_discard_segments: 1,
            ..Discard::default()
        };
        Self { types: TYPE_BASIC | TYPE_DISCARD, basic, discard, ..Self::empty() }
    }
}

impl From<&Parameters> for Limits {
    fn from(parameters: &Parameters) -> Self {
        let Parameters { basic, discard, .. } = parameters;
        Self {
            sectors: basic.dev_sectors,
            logical_shift: basic.logical_bs_shift,
            physical_shift: basic.physical_bs_shift,
            max_sectors: basic.max_sectors,
            read_only: basic.attrs & ATTR_READ_ONLY != 0,
            max_discard_sectors: discard.max_discard_sectors,
            max_write_zeroes_sectors: discard.max_write_zeroes_sectors,
            discard_granularity: discard.granularity,
        }
    }
}

const _: () = {
    assert!(size_of::<ControlCommand>() == 32);
    assert!(size_of::<DeviceInfo>() == 64);
    assert!(size_of::<Descriptor>() == 24);
    assert!(size_of::<Basic>() == 32);
    assert!(size_of::<Discard>() == 20);
    assert!(size_of::<Parameters>() == 112);
    assert!(std::mem::offset_of!(ControlCommand, addr) == 8);
    assert!(std::mem::offset_of!(ControlCommand, data) == 16);
    assert!(std::mem::offset_of!(DeviceInfo, flags) == 24);
    assert!(std::mem::offset_of!(DeviceInfo, owner_uid) == 40);
    assert!(std::mem::offset_of!(Parameters, discard) == 40);
    assert!(std::mem::offset_of!(Parameters, devt) == 60);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_numbers_of_the_header() {
        // As a C program prints them.
        assert_eq!(GET_DEV_INFO, 0x8020_7502);
        assert_eq!(ADD_DEV, 0xc020_7504);
        assert_eq!(GET_FEATURES, 0x8020_7513);
        assert_eq!(FETCH_REQ, 0xc010_7520);
        assert_eq!(COMMIT_AND_FETCH_REQ, 0xc010_7521);
    }

    #[test]
    fn a_command_is_laid_out_as_the_struct_is() {
        let command = ControlCommand {
            dev_id: 0x0403_0201,
            queue_id: 0xffff,
            len: 0x0605,
            addr: 0x0e0d_0c0b_0a09_0807,
            data: 0x1615_1413_1211_100f,
            dev_path_len: 0,
            pad: 0,
            reserved: 0,
        };
        let bytes = command.to_bytes();
        assert_eq!(bytes[..8], [1, 2, 3, 4, 0xff, 0xff, 5, 6]);
        assert_eq!(bytes[8..24], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]);
        assert!(bytes[24..].iter().all(|byte| *byte == 0));
        assert_eq!(io_command(1, 2, -5)[..8], [1, 0, 2, 0, 0xfb, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn places_in_the_channel_do_not_overlap() {
        assert_eq!(descriptors_size(1), 4096);
        assert_eq!(descriptors_size(171), 8192);
        assert_eq!(descriptors_position(2), 2 * 98304);
        assert_eq!(data_position(0, 0), 0x8000_0000);
        assert_eq!(data_position(0, 1) - data_position(0, 0), 32 << 20);
        assert_eq!(data_position(1, 0) - data_position(0, u16::MAX), 32 << 20);
    }

    #[test]
    fn limits_survive_the_way_to_the_kernel_and_back() {
        let limits = Limits {
            sectors: 4097,
            logical_shift: 9,
            physical_shift: 12,
            max_sectors: 2048,
            read_only: true,
            max_discard_sectors: 7,
            max_write_zeroes_sectors: 8,
            discard_granularity: 4096,
        };
        assert_eq!(Limits::from(&Parameters::from(&limits)), limits);
    }

    #[test]
    fn features_are_sets() {
        let both = Features::RECOVERY | Features::USER_COPY;
        assert!(both.contains(Features::RECOVERY) && !both.contains(Features::RECOVERY_FAIL_IO));
        assert!(both.contains(Features::default()));
    }
}
