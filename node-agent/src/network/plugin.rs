//! Running one plugin once.

use std::{
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
};

use super::{NetworkError, conflist::is_plugin_name};

/// More than this on stdout is no CNI result.
const MAX_OUTPUT: u64 = 4 << 20;
/// Of what a plugin writes to stderr, this much is kept for the log.
const MAX_STDERR: u64 = 16 << 10;

/// One call of one plugin.
#[derive(Debug)]
pub struct Call<'a> {
    /// Where plugins are looked for, in order.
    pub bin_dirs: &'a [PathBuf],
    /// Its `type`.
    pub plugin: &'a str,
    /// `ADD`, `DEL`, `CHECK`, `STATUS`, `GC`.
    pub command: &'static str,
    /// `CNI_CONTAINERID`, `CNI_IFNAME`, ...
    pub env: &'a [(&'static str, String)],
    /// What is written to its stdin.
    pub config: &'a Value,
    /// It is killed, with all its children, when it takes longer.
    pub timeout: Duration,
}

/// Finds a plugin's program.
pub fn find(bin_dirs: &[PathBuf], plugin: &str) -> Result<PathBuf, String> {
    if !is_plugin_name(plugin) {
        return Err(format!("{plugin:?} is not a plugin's name"));
    }
    let runs = |path: &PathBuf| {
        path.metadata()
            .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    bin_dirs.iter().map(|dir| dir.join(plugin)).find(runs).ok_or_else(|| {
        let dirs: Vec<_> = bin_dirs.iter().map(|dir| dir.display().to_string()).collect();
        format!("no such program in {}", dirs.join(", "))
    })
}

impl Call<'_> {
    /// Runs it; what it printed, if it was JSON, or `None` where it printed nothing.
    pub async fn run(&self) -> Result<Option<Value>, NetworkError> {
        let path = find(self.bin_dirs, self.plugin).map_err(|reason| self.failed(reason))?;
        let child = self
            .spawn(&path)
            .await
            .map_err(|e| self.failed(format!("{}: {e}", path.display())))?;
        let mut group = Group::of(child).map_err(|e| self.failed(e.to_string()))?;
        let input = self.config.to_string();
        let finished = tokio::time::timeout(self.timeout, talk(&mut group.child, input.as_bytes())).await;
        // Whatever it left running goes too: a child that holds on to stdout is how plugins hang.
        drop(group);
        let output = match finished {
            Err(_) => return Err(self.failed(format!("did not end within {} s, killed", self.timeout.as_secs_f32()))),
            Ok(Err(e)) => return Err(self.failed(e.to_string())),
            Ok(Ok(output)) => output,
        };
        self.read(&output)
    }

    async fn spawn(&self, path: &Path) -> io::Result<Child> {
        let cni_path = std::env::join_paths(self.bin_dirs).map_err(io::Error::other)?;
        let mut command = Command::new(path);
        command
            .env("CNI_COMMAND", self.command)
            .env("CNI_PATH", cni_path)
            .envs(self.env.iter().map(|(key, value)| (*key, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let agent = rustix::process::getpid();
        // SAFETY: between fork and exec two system calls are made, which are async-signal-safe and touch no memory of the parent's.
        unsafe {
            command.pre_exec(move || {
                // An agent that is killed takes the call along: the next one's DEL must not come before the end of this ADD. (It
                // goes by the thread that spawned: a worker's, which lives as long as the runtime.)
                rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
                if rustix::process::getppid() != Some(agent) {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                Ok(())
            });
        }
        for key in [
            "CNI_CONTAINERID",
            "CNI_IFNAME",
            "CNI_NETNS",
            "CNI_ARGS",
            "CNI_NETNS_OVERRIDE",
        ] {
            if !self.env.iter().any(|(given, _)| *given == key) {
                command.env_remove(key);
            }
        }
        let mut tries = 0;
        loop {
            match command.spawn() {
                // Its file is being replaced this very moment.
                Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy && tries < 5 => {
                    tries += 1;
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                other => return other,
            }
        }
    }

    fn read(&self, output: &Output) -> Result<Option<Value>, NetworkError> {
        if !output.stderr.is_empty() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            tracing::debug!(
                plugin = self.plugin,
                command = self.command,
                stderr = stderr.trim(),
                "plugin wrote to stderr"
            );
        }
        let blank = output.stdout.iter().all(u8::is_ascii_whitespace);
        let parsed = serde_json::from_slice::<Value>(&output.stdout);
        match (output.success, blank, parsed) {
            (true, true, _) => Ok(None),
            (true, false, Ok(value)) => Ok(Some(value)),
            (true, false, Err(e)) => {
                Err(self.failed(format!("printed what is not JSON ({e}): {}", quote(&output.stdout))))
            }
            (false, _, Ok(value)) if value["code"].is_u64() => Err(NetworkError::Plugin {
                plugin: self.plugin.to_owned(),
                command: self.command,
                code: value["code"]
                    .as_u64()
                    .and_then(|code| u32::try_from(code).ok())
                    .unwrap_or(u32::MAX),
                msg: value["msg"].as_str().unwrap_or_default().to_owned(),
                details: value["details"].as_str().unwrap_or_default().to_owned(),
            }),
            (false, _, _) => {
                let said = if blank {
                    quote(&output.stderr)
                } else {
                    quote(&output.stdout)
                };
                Err(self.failed(format!("{}, saying {said}", output.status)))
            }
        }
    }

    fn failed(&self, reason: impl Into<String>) -> NetworkError {
        NetworkError::Exec {
            plugin: self.plugin.to_owned(),
            command: self.command,
            reason: reason.into(),
        }
    }
}

struct Output {
    success: bool,
    status: String,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

/// A child and its children; dropping it kills what is left of them.
struct Group {
    child: Child,
    id: Pid,
}

impl Group {
    fn of(child: Child) -> io::Result<Self> {
        let id = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .ok_or_else(|| io::Error::other("it has no pid"))?;
        Ok(Self {
            child,
            id: Pid::from_raw(id),
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Our own group, made at spawn. While a member is left, its number is nobody else's; when none is, this is ESRCH.
        killpg(self.id, Signal::SIGKILL).ok();
    }
}

/// Writes the input while it reads the output, so that neither side waits for the other with a full pipe.
async fn talk(child: &mut Child, input: &[u8]) -> io::Result<Output> {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let write = async {
        if let Some(mut stdin) = stdin {
            // A plugin that ends without reading says why by its exit.
            stdin.write_all(input).await.ok();
        }
    };
    let read = async { tokio::try_join!(whole(stdout, MAX_OUTPUT), beginning(stderr, MAX_STDERR)) };
    let ((), read) = tokio::join!(write, read);
    let (stdout, stderr) = read?;
    let status = child.wait().await?;
    Ok(Output {
        success: status.success(),
        status: status.to_string(),
        stdout,
        stderr,
    })
}

/// All of it; more than `limit` is an error at once, for it may have no end.
async fn whole(source: Option<impl AsyncRead + Unpin>, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(source) = source {
        source.take(limit + 1).read_to_end(&mut bytes).await?;
    }
    if bytes.len() as u64 > limit {
        return Err(io::Error::other(format!("printed more than {limit} bytes")));
    }
    Ok(bytes)
}

/// At most `limit`; the rest is read and dropped, so that the writer does not block.
async fn beginning(source: Option<impl AsyncRead + Unpin>, limit: u64) -> io::Result<Vec<u8>> {
    let Some(mut source) = source else {
        return Ok(Vec::new());
    };
    let mut bytes = Vec::new();
    (&mut source).take(limit).read_to_end(&mut bytes).await?;
    tokio::io::copy(&mut source, &mut tokio::io::sink()).await?;
    Ok(bytes)
}

fn quote(bytes: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(bytes).chars().take(200).collect();
    format!("{:?}", text.trim())
}
