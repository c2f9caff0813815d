//! The program, ready to run on a region.

use anyhow::{Result, ensure};
use r3map::SliceMount;
use wasmtime::{Config, Engine, Instance, Module, Store, TypedFunc};

use crate::memory::Slot;

/// The program, as text.
const PROGRAM: &str = include_str!("primes.wat");
/// Bytes of its memory.
pub(crate) const SIZE: u64 = 154 << 16;
/// What it does in one call: some milliseconds.
const BUDGET: i32 = 1 << 18;

/// The program, compiled.
pub(crate) struct Program {
    module: Module,
    slot: Slot,
}

impl Program {
    pub(crate) fn new() -> Result<Self> {
        let (mut config, slot) = (Config::new(), Slot::default());
        slot.configure(&mut config, SIZE);
        Ok(Self { module: Module::new(&Engine::new(&config)?, PROGRAM)?, slot })
    }

    /// Goes on with what is in the region; zeros are the beginning.
    pub(crate) fn start(&self, mount: SliceMount) -> Result<Machine> {
        self.slot.put(mount);
        let mut store = Store::new(self.module.engine(), ());
        // There is nothing in the program that begins by itself or fills the memory: that would start it anew.
        let instance = Instance::new(&mut store, &self.module, &[])?;
        let step = instance.get_typed_func(&mut store, "step")?;
        Ok(Machine { store, instance, step })
    }
}

/// An instance of the program, whose memory is a region.
pub(crate) struct Machine {
    store: Store<()>,
    instance: Instance,
    step: TypedFunc<i32, i32>,
}

impl Machine {
    /// Works for a while. The result, once it is there.
    pub(crate) fn step(&mut self) -> Result<Option<u32>> {
        match self.step.call(&mut self.store, BUDGET)? {
            0 => Ok(None),
            _ => Ok(Some(self.number::<i32>("count")?.cast_unsigned())),
        }
    }

    /// How many small pieces of work were done so far, here and before.
    pub(crate) fn work(&mut self) -> Result<i64> {
        self.number("work")
    }

    fn number<T: wasmtime::WasmResults>(&mut self, name: &str) -> Result<T> {
        let function = self.instance.get_typed_func::<(), T>(&mut self.store, name)?;
        function.call(&mut self.store, ())
    }
}

/// Whether the program and the region agree, as they must.
pub(crate) fn check(size: u64) -> Result<()> {
    ensure!(size == SIZE, "what comes has {size} bytes, and this program needs {SIZE}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use r3map::{Mount, OpenOptions, Registry};

    use super::*;

    fn mount(size: u64) -> SliceMount {
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let uri = format!("null:?size={size}").parse().unwrap();
            let zeros = Registry::standard().open(&uri, &OpenOptions::default()).await.unwrap();
            Mount::direct(zeros).slice().await.unwrap()
        })
    }

    #[test]
    fn the_memory_neither_grows_nor_ends_later() {
        let mut machine = Program::new().unwrap().start(mount(SIZE)).unwrap();
        let mut call = |name: &str, argument: i64| {
            let argument = u32::try_from(argument).unwrap().cast_signed();
            machine
                .instance
                .get_typed_func::<i32, i32>(&mut machine.store, name)
                .unwrap()
                .call(&mut machine.store, argument)
        };
        assert_eq!((call("grow", 0).unwrap(), call("grow", 1).unwrap()), (154, -1));
        let size = i64::try_from(SIZE).unwrap();
        assert_eq!(call("peek", size - 1).unwrap(), 0);
        for outside in [size, size + 1, i64::from(u32::MAX)] {
            let error = call("peek", outside).unwrap_err();
            assert_eq!(error.downcast_ref(), Some(&wasmtime::Trap::MemoryOutOfBounds), "{outside}: {error:?}");
        }
        assert_eq!(call("peek", 0).unwrap(), 0, "it goes on");
    }

    #[test]
    fn another_size_or_a_second_instance_is_refused() {
        let refused = |program: &Program, size| {
            let refused = program.start(mount(size)).err().expect("it must be refused");
            format!("{refused:#}")
        };
        let program = Program::new().unwrap();
        for size in [SIZE - 1, SIZE + (1 << 16)] {
            assert!(refused(&program, size).contains("the program wants"), "{size}");
        }
        let _machine = program.start(mount(SIZE)).unwrap();
        let mut store = Store::new(program.module.engine(), ());
        assert!(Instance::new(&mut store, &program.module, &[]).is_err(), "there is no other memory");
    }
}
