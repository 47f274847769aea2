//! One supervised program: started inside a member, restarted when it dies, unless it was told to stop.

use std::{
    fs::OpenOptions,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// What to run, and where.
pub struct Service {
    /// The member it runs in.
    pub member: String,
    /// Its name there: "agent", "containerd", "control", "etcd".
    pub name: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Beyond the environment of the supervisor.
    pub environment: Vec<(String, String)>,
    /// The cgroup, relative to the hierarchies' roots.
    pub cgroup: String,
    /// Listening sockets that it is given from file descriptor 3 on.
    pub listeners: Vec<OwnedFd>,
}

#[derive(Default)]
struct State {
    wanted: bool,
    pid: Option<i32>,
    starts: u32,
    last_exit: String,
    /// Started instead of the one that the service names.
    program: Option<PathBuf>,
}

/// A service and the thread that keeps it running.
pub struct Supervised {
    service: Service,
    /// The process that holds the member's namespaces.
    holder: AtomicI32,
    logs: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
}

/// Between the end of a service and its next start.
const RESTART_DELAY: Duration = Duration::from_millis(300);
/// Between SIGTERM and SIGKILL.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

impl Supervised {
    /// Starts the service, and again whenever it ends.
    pub fn start(service: Service, holder: i32, logs: PathBuf) -> Result<Arc<Self>> {
        let state = Mutex::new(State {
            wanted: true,
            ..State::default()
        });
        let supervised = Arc::new(Self {
            service,
            holder: AtomicI32::new(holder),
            logs,
            state,
            changed: Condvar::new(),
        });
        let keeper = supervised.clone();
        thread::Builder::new()
            .name(supervised.full_name())
            .spawn(move || keeper.keep())
            .context("starting a thread")?;
        Ok(supervised)
    }

    /// "node1/agent".
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.service.member, self.service.name)
    }

    /// The member it runs in.
    pub fn member(&self) -> &str {
        &self.service.member
    }

    /// Does not start it again when it ends.
    pub fn forbid(&self) {
        self.lock().wanted = false;
    }

    /// Starts it in namespaces that another process holds.
    pub fn resume_in(&self, holder: i32) {
        self.holder.store(holder, Ordering::Release);
        self.resume();
    }

    /// (process, starts so far, how it last ended)
    pub fn status(&self) -> (Option<i32>, u32, String) {
        let state = self.lock();
        (state.pid, state.starts, state.last_exit.clone())
    }

    /// Starts it again after [`Self::stop`].
    pub fn resume(&self) {
        self.lock().wanted = true;
        self.changed.notify_all();
    }

    /// Ends it, and starts another program in its place.
    pub fn replace(&self, program: PathBuf) {
        self.stop();
        self.lock().program = Some(program);
        self.resume();
    }

    /// Sends a signal to the process, if it runs; the supervisor starts it again if it dies of it.
    pub fn signal(&self, signal: i32) -> Result<()> {
        let signal = Signal::try_from(signal).context("no such signal")?;
        let state = self.lock();
        let pid = state
            .pid
            .with_context(|| format!("{} is not running", self.full_name()))?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("sending {signal} to {}", self.full_name()))
    }

    /// Ends it (SIGTERM, SIGKILL after ten seconds) and returns when it is gone.
    pub fn stop(&self) {
        self.end(Signal::SIGTERM);
    }

    /// Kills it, does not start it again, and returns when it is gone. Fails when it does not run.
    pub fn kill(&self) -> Result<()> {
        self.status()
            .0
            .with_context(|| format!("{} is not running", self.full_name()))?;
        self.end(Signal::SIGKILL);
        Ok(())
    }

    fn end(&self, signal: Signal) {
        let deadline = Instant::now() + STOP_TIMEOUT;
        let mut state = self.lock();
        state.wanted = false;
        self.changed.notify_all();
        if let Some(pid) = state.pid {
            let _ = kill(Pid::from_raw(pid), signal);
        }
        while let Some(pid) = state.pid {
            if Instant::now() > deadline {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            let wait = self.changed.wait_timeout(state, Duration::from_millis(100));
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self) {
        loop {
            let mut state = self.lock();
            while !state.wanted {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            // Under the lock, so that `stop` either sees the process or prevents it.
            let child = self.spawn(state.program.as_deref());
            state.starts += 1;
            state.pid = child.as_ref().ok().and_then(|child| i32::try_from(child.id()).ok());
            drop(state);
            let last_exit = match child.and_then(|mut child| child.wait().context("waiting for it")) {
                Ok(status) => match status.signal() {
                    Some(signal) => format!("signal {signal}"),
                    None => format!("exit {}", status.code().unwrap_or(-1)),
                },
                Err(error) => format!("{error:#}"),
            };
            let mut state = self.lock();
            state.pid = None;
            state.last_exit = last_exit;
            self.changed.notify_all();
            drop(state);
            thread::sleep(RESTART_DELAY);
        }
    }

    fn spawn(&self, program: Option<&Path>) -> Result<Child> {
        let name = format!("{}-{}.log", self.service.member, self.service.name);
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.logs.join(name))
            .context("opening its log")?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args([
            "enter",
            "--holder",
            &self.holder.load(Ordering::Acquire).to_string(),
            "--cgroup",
            &self.service.cgroup,
        ]);
        command.args(["--listen-fds", &self.service.listeners.len().to_string(), "--"]);
        match (program, self.service.command.split_first()) {
            (Some(program), Some((_, arguments))) => command.arg(program).args(arguments),
            _ => command.args(&self.service.command),
        };
        command.envs(self.service.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let listeners: Vec<i32> = self.service.listeners.iter().map(AsRawFd::as_raw_fd).collect();
        // SAFETY: between fork and exec only dup2 and fcntl run, which are async-signal-safe; the descriptors are the
        // supervisor's own and stay open, and all are far above the targets (see `duplicated`).
        unsafe {
            command.pre_exec(move || {
                for (index, listener) in listeners.iter().enumerate() {
                    let target = 3 + i32::try_from(index).unwrap_or(0);
                    if libc::dup2(*listener, target) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        command
            .spawn()
            .with_context(|| format!("starting {}", self.full_name()))
    }
}

/// A copy of a descriptor with a high number, so that it never stands where a service's own are put.
pub fn duplicated(descriptor: &OwnedFd) -> Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: the descriptor is open; the result is checked and owned by nobody else.
    let copy = unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 100) };
    if copy < 0 {
        return Err(std::io::Error::last_os_error()).context("duplicating a listening socket");
    }
    // SAFETY: see above.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
