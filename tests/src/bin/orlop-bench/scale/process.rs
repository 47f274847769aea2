//! Programs that a benchmark starts, and what they take.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// A running program; it ends with this value.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

/// Resident memory in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory {
    /// Now.
    pub resident: u64,
    /// At most, since the start.
    pub peak: u64,
}

impl Memory {
    /// The sum.
    pub fn plus(self, other: Self) -> Self {
        Self {
            resident: self.resident + other.resident,
            peak: self.peak + other.peak,
        }
    }
}

impl Process {
    /// Starts a program; what it says goes to `FOLDER/NAME.log`.
    pub fn start(program: &Path, folder: &Path, arguments: &[impl AsRef<OsStr>]) -> Result<Self> {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let log = folder.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        let mut command = Command::new(program);
        command.args(arguments).stdout(file.try_clone()?).stderr(file);
        // SAFETY: between fork and exec only prctl is called, which is async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                // Nothing outlives the benchmark, however it ends.
                nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
                Ok(())
            });
        }
        let child = command
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        Ok(Self { name, child, log })
    }

    /// Fails when it has ended, with the end of its log.
    pub fn check(&mut self) -> Result<()> {
        let Some(status) = self.child.try_wait()? else {
            return Ok(());
        };
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let last = lines[lines.len().saturating_sub(5)..].join("\n");
        bail!("{} ended: {status}\n{last}", self.name)
    }

    /// Its memory.
    pub fn memory(&self) -> Result<Memory> {
        let status = procfs::process::Process::new(i32::try_from(self.child.id())?)?.status()?;
        let bytes = |kibibytes: Option<u64>| kibibytes.unwrap_or(0) * 1024;
        Ok(Memory {
            resident: bytes(status.vmrss),
            peak: bytes(status.vmhwm),
        })
    }

    /// Seconds of CPU that it has used.
    pub fn cpu_seconds(&self) -> Result<f64> {
        cpu_seconds(&procfs::process::Process::new(i32::try_from(self.child.id())?)?)
    }

    /// Ends it as a service manager would, and at once when it does not end.
    pub fn stop(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _gone = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
        }
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Seconds of CPU that this process has used.
pub fn own_cpu_seconds() -> Result<f64> {
    cpu_seconds(&procfs::process::Process::myself()?)
}

fn cpu_seconds(process: &procfs::process::Process) -> Result<f64> {
    let stat = process.stat()?;
    #[allow(clippy::cast_precision_loss, reason = "ticks of minutes")]
    Ok((stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64)
}
