//! What the virtual machine contains besides the tests: the one table to add a line to.

/// The kernel that everything is tested with: a Debian package, or one that depends on the real package.
pub const KERNEL: &str = "linux-image-6.12-cloud-amd64";

/// A kernel module that is loaded before any test, with its parameters. What it depends on is loaded first.
pub const MODULES: &[(&str, &str)] =
    &[("loop", "max_loop=8"), ("nbd", "nbds_max=16"), ("sch_netem", ""), ("ublk_drv", "")];

/// Programs, with the shared libraries that they need. Each is looked for in the usual folders of the host.
pub const PROGRAMS: &[&str] = &[
    "blkdiscard",
    "blockdev",
    "busybox",
    "e2fsck",
    "fio",
    "ip",
    "losetup",
    "lsblk",
    "mkfs.ext4",
    "mount",
    "nbd-client",
    "nbdkit",
    "qemu-nbd",
    "tc",
    "umount",
];

/// Single files, and the plug-ins of programs, with the shared libraries that they need.
pub const FILES: &[&str] = &[
    "/etc/mke2fs.conf",
    "/usr/lib/x86_64-linux-gnu/nbdkit/filters/nbdkit-delay-filter.so",
    "/usr/lib/x86_64-linux-gnu/nbdkit/filters/nbdkit-error-filter.so",
    "/usr/lib/x86_64-linux-gnu/nbdkit/filters/nbdkit-log-filter.so",
    "/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-memory-plugin.so",
    "/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-pattern-plugin.so",
];

/// Where programs of the host are looked for.
pub(crate) const PATH: &[&str] = &["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Small files of the guest's own.
pub(crate) const TEXTS: &[(&str, &str)] = &[
    ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"),
    ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
    ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
];
