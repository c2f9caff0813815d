//! Loop devices on a mounted file, and file systems on them, with limits on everything: they must not hang when what is
//! below them dies.

use std::path::PathBuf;
use std::process::Command;

use rustix::mount::{UnmountFlags, unmount};

use super::{SOON, Scene};

/// A loop device. Dropping it detaches it.
pub(crate) struct LoopDevice {
    /// Its node.
    pub(crate) name: String,
}

impl LoopDevice {
    /// Puts one on a file.
    pub(crate) fn attach(scene: &Scene, file: &str) -> Self {
        let name = scene.run(SOON, "losetup", &["--find", "--show", file]);
        Self { name }
    }

    /// Detaches it now, and sees that it worked.
    pub(crate) fn detach(self, scene: &Scene) {
        scene.run(SOON, "losetup", &["--detach", &self.name]);
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // Detached already, or detached by the kernel when its last user goes.
        let _ = Command::new("losetup").args(["--detach", &self.name]).output();
    }
}

/// An ext4 file system that is mounted. Dropping it unmounts it lazily.
pub(crate) struct FileSystem {
    /// Where.
    pub(crate) path: PathBuf,
}

impl FileSystem {
    /// Makes one on a device: with checksums, and with what `e2fsck` can check.
    pub(crate) fn make(scene: &Scene, device: &LoopDevice) {
        scene.run(SOON, "mkfs.ext4", &["-q", "-F", &device.name]);
    }

    /// Mounts the one on a device on a folder of that name.
    pub(crate) fn mount(scene: &Scene, device: &LoopDevice, name: &str) -> Self {
        let path = scene.path(name);
        std::fs::create_dir_all(&path).expect("the folder can be made");
        scene.run(SOON, "mount", &["-t", "ext4", &device.name, &scene.name(name)]);
        Self { path }
    }

    /// Unmounts it now, which writes everything, and sees that it worked.
    pub(crate) fn unmount(self, scene: &Scene) {
        let path = self.path.to_str().expect("temporary folders have plain names");
        scene.run(SOON, "umount", &[path]);
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        let _ = unmount(self.path.as_path(), UnmountFlags::DETACH);
    }
}
