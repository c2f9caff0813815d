//! A mounted region as the linear memory of a WebAssembly program, and the only unsafe code of this example: wasmtime's two
//! traits for memory that it has not made itself are unsafe to implement. `docs/decisions/0007` says why it stands here.

use std::sync::{Arc, Mutex, PoisonError};

use r3map::SliceMount;
use wasmtime::{Config, LinearMemory, MemoryCreator, MemoryType};

/// Where an engine finds the memory of the next instance.
#[derive(Clone, Default)]
pub(crate) struct Slot {
    mount: Arc<Mutex<Option<SliceMount>>>,
}

impl Slot {
    /// Has instances find their memory here, whose size is `size` bytes.
    ///
    /// A region has no room to grow and no guard pages around it, so that each access is compared with its size. No signal
    /// handler is installed: a page that cannot be had ends the program with SIGBUS, as with every slice, and is not taken
    /// for an access outside of the memory.
    pub(crate) fn configure(&self, config: &mut Config, size: u64) {
        config
            .with_host_memory(Arc::new(self.clone()))
            .memory_reservation(size)
            .memory_reservation_for_growth(0)
            .memory_guard_size(0)
            .memory_may_move(false)
            .memory_init_cow(false)
            .signals_based_traps(false);
    }

    /// Has the next instance have this memory.
    pub(crate) fn put(&self, mount: SliceMount) {
        self.lock().replace(mount);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<SliceMount>> {
        self.mount.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, minimum: usize, maximum: Option<usize>, reserved: usize, guard: usize) -> Result<Memory, String> {
        let mount = self.lock().take().ok_or("there is no memory for this instance")?;
        let size = usize::try_from(mount.region().size()).map_err(|error| error.to_string())?;
        if minimum != size || maximum != Some(size) {
            return Err(format!("the region has {size} bytes, and the program wants {minimum} up to {maximum:?}"));
        }
        if reserved > size || guard != 0 {
            return Err("a region has no room after its end".to_owned());
        }
        Ok(Memory { mount, size })
    }
}

/// The region as a linear memory.
struct Memory {
    mount: SliceMount,
    size: usize,
}

// SAFETY: what is given is `size` bytes of memory for as long as the `Memory` lives, which owns the mount. It is no less than
// what was asked for, and no space after it was asked for. Nobody has a view of it: mounts give views only to those who
// borrow them, and nobody can borrow this one any more. That it may hold something else than zeros is what a program that
// moves is about; safety does not depend on it.
#[expect(unsafe_code, reason = "wasmtime's trait is unsafe to implement")]
unsafe impl MemoryCreator for Slot {
    fn new_memory(
        &self,
        _type: MemoryType,
        minimum: usize,
        maximum: Option<usize>,
        reserved: Option<usize>,
        guard: usize,
    ) -> Result<Box<dyn LinearMemory>, String> {
        Ok(Box::new(self.take(minimum, maximum, reserved.unwrap_or(0), guard)?))
    }
}

// SAFETY: the address and the size stay the same for as long as this lives, and everything in between can be read and
// written: what is missing comes when it is touched. While the region leaves for another host, and after, a write is a
// segmentation fault.
#[expect(unsafe_code, reason = "wasmtime's trait is unsafe to implement")]
unsafe impl LinearMemory for Memory {
    fn byte_size(&self) -> usize {
        self.size
    }

    fn byte_capacity(&self) -> usize {
        self.size
    }

    fn grow_to(&mut self, _size: usize) -> wasmtime::Result<()> {
        Err(wasmtime::Error::msg("a region does not grow"))
    }

    fn as_ptr(&self) -> *mut u8 {
        self.mount.as_ptr()
    }
}
