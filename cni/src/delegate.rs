//! Address management by another plugin.
//!
//! What is exchanged are the cni-plugin crate's types: its `NetworkConfig` goes out, its `IpamSuccessReply` comes back, so what
//! they do not accept is refused before a plugin sees it, or before an address is used. The crate's own
//! `delegation::delegate` is not used: with tokio it panics in every call (0.2.1 asserts the length of a slice that it has
//! just consumed), it takes a silent plugin for a failed one, though plugins are silent after a good DEL or CHECK, and it
//! knows neither STATUS nor GC.

use std::{
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
};

use cni_plugin::{config::NetworkConfig, reply::IpamSuccessReply};
use nix::{
    sys::{
        prctl,
        signal::{Signal, killpg},
    },
    unistd::Pid,
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
};

use crate::{
    config::Config,
    error::{Failure, code},
    request::Env,
    result::CniResult,
};

/// More than this on stdout is no result.
const MAX_OUTPUT: u64 = 4 << 20;

/// ADD: the plugin's addresses and routes. When it fails, or answers with what is no result, its DEL follows.
pub async fn add(plugin: &str, config: &Config, env: &Env) -> Result<CniResult, Failure> {
    match exec(plugin, "ADD", config, env)
        .await
        .and_then(|stdout| read_result(plugin, &stdout))
    {
        Ok(result) => Ok(result),
        Err(failure) => {
            // It failed already; what its DEL says too would only hide why.
            silent(plugin, "DEL", config, env).await.ok();
            Err(failure)
        }
    }
}

/// DEL, CHECK, STATUS, GC: success is silent.
pub async fn silent(plugin: &str, verb: &str, config: &Config, env: &Env) -> Result<(), Failure> {
    exec(plugin, verb, config, env).await.map(|_| ())
}

async fn exec(plugin: &str, verb: &str, config: &Config, env: &Env) -> Result<String, Failure> {
    let undecodable = |e: serde_json::Error| Failure::new(code::DECODE, "configuration for delegation").with(e);
    let given: NetworkConfig = serde_json::from_value(Value::Object(config.raw.clone())).map_err(undecodable)?;
    let input = serde_json::to_vec(&given).map_err(undecodable)?;
    let path = find(plugin, env)?;
    let failed = |e: io::Error| Failure::io(format!("running {}", path.display()), &e);
    let mut group = Group::spawn(&path, verb).map_err(failed)?;
    let answered = tokio::time::timeout(config.ipam_timeout, talk(&mut group.child, &input)).await;
    // Whatever it left running goes too, before anybody is told that it failed.
    drop(group);
    let bad = |why: String| {
        let msg = format!("address management plugin {plugin:?} {why} and was killed");
        Failure::new(code::DELEGATED, msg).with(format!("in {verb}"))
    };
    let Ok(answered) = answered else {
        let seconds = config.ipam_timeout.as_secs();
        return Err(bad(format!("did not end within {seconds} s (ipamTimeoutSeconds)")));
    };
    let (status, stdout) = answered.map_err(failed)?;
    match status {
        None => Err(bad(format!("printed more than {MAX_OUTPUT} bytes"))),
        Some(status) if status.success() => Ok(String::from_utf8_lossy(&stdout).into_owned()),
        Some(_) => Err(read_error(plugin, &String::from_utf8_lossy(&stdout))),
    }
}

/// A child and its children; dropping it kills what is left of them.
struct Group {
    child: Child,
    id: Option<Pid>,
}

impl Group {
    fn spawn(path: &Path, verb: &str) -> io::Result<Self> {
        let mut command = Command::new(path);
        command
            .env("CNI_COMMAND", verb)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0);
        // SAFETY: between fork and exec only prctl runs, a system call that touches no memory of ours.
        unsafe {
            // A group of its own is not killed with ours, when a runtime loses patience with us: so it ends with us.
            command.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        let child = command.spawn()?;
        let id = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
        Ok(Self { child, id })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            // While a member is left, its number is nobody else's; when none is, this is ESRCH.
            killpg(id, Signal::SIGKILL).ok();
        }
    }
}

/// Writes the input while it reads the output, so that neither side waits for the other with a full pipe. No status where the
/// plugin printed more than a result can be.
async fn talk(child: &mut Child, input: &[u8]) -> io::Result<(Option<ExitStatus>, Vec<u8>)> {
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let write = async {
        if let Some(mut stdin) = stdin {
            // A plugin that does not read its input will say why with its exit.
            stdin.write_all(input).await.ok();
        }
    };
    let read = async {
        let mut bytes = Vec::new();
        if let Some(stdout) = stdout {
            stdout.take(MAX_OUTPUT + 1).read_to_end(&mut bytes).await?;
        }
        Ok::<_, io::Error>(bytes)
    };
    let both = async { tokio::join!(write, read).1 };
    let bytes = both.await?;
    if bytes.len() as u64 > MAX_OUTPUT {
        return Ok((None, Vec::new()));
    }
    Ok((Some(child.wait().await?), bytes))
}

/// What an ADD of address management printed.
pub fn read_result(plugin: &str, stdout: &str) -> Result<CniResult, Failure> {
    let bad = |e: serde_json::Error| {
        Failure::new(
            code::DELEGATED,
            format!("address management plugin {plugin:?} answered with no result"),
        )
        .with(e)
    };
    let reply: IpamSuccessReply = serde_json::from_str(stdout).map_err(bad)?;
    if reply.ips.is_empty() {
        return Err(Failure::new(
            code::DELEGATED,
            format!("address management plugin {plugin:?} gave no address"),
        ));
    }
    CniResult::parse(&serde_json::to_value(reply).map_err(bad)?)
}

fn find(plugin: &str, env: &Env) -> Result<PathBuf, Failure> {
    let path = env.get("CNI_PATH").map_or("", String::as_str);
    let runs = |p: &PathBuf| {
        p.metadata()
            .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    std::env::split_paths(path)
        .map(|dir| dir.join(plugin))
        .find(runs)
        .ok_or_else(|| {
            Failure::new(
                code::IO,
                format!("address management plugin {plugin:?} is not in CNI_PATH"),
            )
            .with(path)
        })
}

/// The plugin's own error, if what it printed is one: its code is ours then.
pub fn read_error(plugin: &str, text: &str) -> Failure {
    let value: Option<Value> = serde_json::from_str(text).ok();
    let field = |key: &str| value.as_ref().and_then(|v| v.get(key));
    let msg = field("msg").and_then(Value::as_str);
    let code = field("code")
        .and_then(Value::as_u64)
        .and_then(|c| u32::try_from(c).ok());
    match (code, msg) {
        (Some(code), Some(msg)) if code != 0 => Failure::new(code, format!("{plugin}: {msg}"))
            .with(field("details").and_then(Value::as_str).unwrap_or_default()),
        _ => Failure::new(code::DELEGATED, format!("address management plugin {plugin:?} failed")).with(text.trim()),
    }
}
