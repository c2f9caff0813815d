//! Which processors a thread runs on.

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Those that this thread may run on.
pub(crate) fn processors() -> Result<Vec<usize>> {
    let allowed = sched_getaffinity(None).context("sched_getaffinity")?;
    Ok((0..CpuSet::MAX_CPU).filter(|processor| allowed.is_set(*processor)).collect())
}

/// Does `work` with this thread, and those that it starts meanwhile, on one processor only.
pub(crate) fn on_processor<T>(processor: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = sched_getaffinity(None).context("sched_getaffinity")?;
    let mut only = CpuSet::new();
    only.set(processor);
    sched_setaffinity(None, &only).context("sched_setaffinity")?;
    let done = work();
    sched_setaffinity(None, &before).context("sched_setaffinity")?;
    done
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn threads_stay_where_they_were_started_and_the_starter_does_not() {
        let all = processors().unwrap();
        let last = *all.last().unwrap();
        let started = on_processor(last, || Ok(thread::spawn(|| processors().unwrap()).join().unwrap())).unwrap();
        assert_eq!((started, processors().unwrap()), (vec![last], all));
    }
}
