//! Which CPU processes run on: clients and their server on one. Left to the scheduler they are sometimes on one and sometimes on two,
//! and stay so for seconds. On two, every exchange wakes a CPU that has gone to sleep, which in a virtual machine takes as long as
//! the host likes; on one there is only the work, of which what is measured is a part.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

/// The CPU for clients and servers: the last that this process may use, since the first gets most interrupts.
pub fn chosen() -> Result<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).context("reading the CPUs of this process")?;
    (0..CpuSet::count())
        .rev()
        .find(|cpu| allowed.is_set(*cpu).unwrap_or(false))
        .context("this process may use no CPU")
}

/// Does `work` on one CPU; what it starts stays there.
pub fn on<T>(cpu: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let this = Pid::from_raw(0);
    let before = sched_getaffinity(this).context("reading this thread's CPUs")?;
    sched_setaffinity(this, &only(cpu)?).with_context(|| format!("moving to CPU {cpu}"))?;
    let done = work();
    sched_setaffinity(this, &before).context("moving back to all CPUs")?;
    done
}

/// Puts a running process with all its threads on one CPU.
pub fn pin(process: i32, cpu: usize) -> Result<()> {
    let tasks = Path::new("/proc").join(process.to_string()).join("task");
    let mut pinned = 0;
    for entry in fs::read_dir(&tasks)
        .with_context(|| format!("reading {}", tasks.display()))?
        .flatten()
    {
        let task = entry.file_name().to_string_lossy().parse()?;
        sched_setaffinity(Pid::from_raw(task), &only(cpu)?)
            .with_context(|| format!("putting task {task} on CPU {cpu}"))?;
        pinned += 1;
    }
    ensure!(pinned > 0, "process {process} has no tasks");
    Ok(())
}

fn only(cpu: usize) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    set.set(cpu).with_context(|| format!("CPU {cpu}"))?;
    Ok(set)
}
