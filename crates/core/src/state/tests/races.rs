//! The races that must not be lost, in every order that loom finds. The region is one block; its bytes are a number.

use loom::future::block_on;
use loom::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use loom::thread;
use std::sync::Arc;

use super::super::{Begin, Need, NextPush, Table};
use super::table;

const BLOCK: u64 = 4096;

struct World {
    table: Arc<Table>,
    local: AtomicU64,
    remote: AtomicU64,
    pulls: AtomicUsize,
}

fn world() -> Arc<World> {
    let (local, remote, pulls) = (AtomicU64::new(99), AtomicU64::new(1), AtomicUsize::new(0));
    Arc::new(World { table: table(BLOCK, BLOCK), local, remote, pulls })
}

impl World {
    /// Reads the block as a region does: pulls, joins, or waits for a writer.
    fn read(&self) -> u64 {
        while !self.table.is_valid(&(0..BLOCK)) {
            match self.table.need(&(0..BLOCK), 1) {
                Need::Nothing => {}
                Need::Busy(chunk) => block_on(self.table.settled(chunk)),
                Need::Join(wait) => drop(block_on(wait)),
                Need::Pull(mut pull) => {
                    self.pulls.fetch_add(1, SeqCst);
                    let value = self.remote.load(SeqCst);
                    if let Some(install) = pull.claim(0..1) {
                        self.local.store(value, SeqCst);
                        install.commit().unwrap();
                    }
                    pull.end(1, Ok(()));
                }
            }
        }
        self.local.load(SeqCst)
    }

    fn write(&self, value: u64) {
        let Begin::Now(write) = block_on(self.table.write(&(0..BLOCK))).unwrap() else { panic!("a whole block") };
        self.local.store(value, SeqCst);
        write.commit().unwrap();
    }

    fn push(&self) -> bool {
        let Some(NextPush::Push(push)) = self.table.push(0, BLOCK, BLOCK) else { return false };
        let value = self.local.load(SeqCst);
        self.remote.store(value, SeqCst);
        push.done();
        true
    }
}

#[test]
fn loom_a_pull_never_undoes_a_write() {
    loom::model(|| {
        let world = world();
        let reader = thread::spawn({
            let world = world.clone();
            move || world.read()
        });
        world.write(2);
        let read = reader.join().unwrap();
        assert!(read == 1 || read == 2);
        assert_eq!(world.local.load(SeqCst), 2);
        assert_eq!(world.table.unpushed_bytes(), BLOCK);
    });
}

#[test]
fn loom_a_failed_write_and_a_pull() {
    loom::model(|| {
        let world = world();
        let reader = thread::spawn({
            let world = world.clone();
            move || world.read()
        });
        if let Begin::Now(write) = block_on(world.table.write(&(0..BLOCK))).unwrap() {
            drop(write);
        }
        assert_eq!(reader.join().unwrap(), 1);
        assert!(world.table.is_complete());
    });
}

#[test]
fn loom_two_readers_make_one_pull() {
    loom::model(|| {
        let world = world();
        let other = thread::spawn({
            let world = world.clone();
            move || world.read()
        });
        assert_eq!(world.read(), 1);
        assert_eq!(other.join().unwrap(), 1);
        assert_eq!(world.pulls.load(SeqCst), 1);
    });
}

#[test]
fn loom_an_abandoned_pull_is_taken_over() {
    loom::model(|| {
        let world = world();
        let given_up = world.table.pull(0..1, 1).unwrap();
        let reader = thread::spawn({
            let world = world.clone();
            move || world.read()
        });
        drop(given_up);
        assert_eq!(reader.join().unwrap(), 1);
    });
}

#[test]
fn loom_a_write_during_a_push_is_pushed_again() {
    loom::model(|| {
        let world = world();
        world.write(2);
        let writer = thread::spawn({
            let world = world.clone();
            move || world.write(3)
        });
        world.push();
        if world.table.unpushed_bytes() == 0 {
            // What counts as pushed is what the remote has, unless a write has begun since.
            assert!([2, 3].contains(&world.remote.load(SeqCst)));
        }
        writer.join().unwrap();
        while world.push() {}
        assert_eq!(world.remote.load(SeqCst), 3);
        assert_eq!(world.table.unpushed_bytes(), 0);
    });
}

#[test]
fn loom_two_pushers_never_push_one_block_at_once() {
    loom::model(|| {
        let world = world();
        world.write(2);
        let inside = Arc::new(AtomicUsize::new(0));
        let push = |world: &World, inside: &AtomicUsize| {
            if let Some(NextPush::Push(push)) = world.table.push(0, BLOCK, BLOCK) {
                assert_eq!(inside.fetch_add(1, SeqCst), 0);
                inside.fetch_sub(1, SeqCst);
                push.done();
            }
        };
        let other = thread::spawn({
            let (world, inside) = (world.clone(), inside.clone());
            move || push(&world, &inside)
        });
        push(&world, &inside);
        other.join().unwrap();
        assert_eq!(world.table.unpushed_bytes(), 0);
    });
}

#[test]
fn loom_a_flush_calls_nothing_clean_that_is_written_meanwhile() {
    loom::model(|| {
        let world = world();
        world.write(2);
        world.push();
        let writer = thread::spawn({
            let world = world.clone();
            move || world.write(3)
        });
        world.table.flushed().unwrap();
        writer.join().unwrap();
        assert_eq!(world.table.unpushed_bytes(), BLOCK, "the second write is still to be pushed");
    });
}
