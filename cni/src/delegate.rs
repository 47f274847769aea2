//! Address management by another plugin.
//!
//! What is exchanged are the cni-plugin crate's types: its `NetworkConfig` goes out, its `IpamSuccessReply` comes back, so what
//! they do not accept is refused before a plugin sees it, or before an address is used. The crate's own
//! `delegation::delegate` is not used: with tokio it panics in every call (0.2.1 asserts the length of a slice that it has
//! just consumed), it takes a silent plugin for a failed one, though plugins are silent after a good DEL or CHECK, and it
//! knows neither STATUS nor GC.

use std::{os::unix::fs::PermissionsExt, path::PathBuf, process::Stdio};

use cni_plugin::{config::NetworkConfig, reply::IpamSuccessReply};
use serde_json::{Map, Value};
use tokio::io::AsyncWriteExt;

use crate::{
    error::{Failure, code},
    request::Env,
    result::CniResult,
};

/// ADD: the plugin's addresses and routes. When it fails, or answers with what is no result, its DEL follows.
pub async fn add(plugin: &str, raw: &Map<String, Value>, env: &Env) -> Result<CniResult, Failure> {
    match exec(plugin, "ADD", raw, env)
        .await
        .and_then(|stdout| read_result(plugin, &stdout))
    {
        Ok(result) => Ok(result),
        Err(failure) => {
            // It failed already; what its DEL says too would only hide why.
            silent(plugin, "DEL", raw, env).await.ok();
            Err(failure)
        }
    }
}

/// DEL, CHECK, STATUS, GC: success is silent.
pub async fn silent(plugin: &str, verb: &str, raw: &Map<String, Value>, env: &Env) -> Result<(), Failure> {
    exec(plugin, verb, raw, env).await.map(|_| ())
}

async fn exec(plugin: &str, verb: &str, raw: &Map<String, Value>, env: &Env) -> Result<String, Failure> {
    let undecodable = |e: serde_json::Error| Failure::new(code::DECODE, "configuration for delegation").with(e);
    let config: NetworkConfig = serde_json::from_value(Value::Object(raw.clone())).map_err(undecodable)?;
    let input = serde_json::to_vec(&config).map_err(undecodable)?;
    let path = find(plugin, env)?;
    let failed = |e: std::io::Error| Failure::io(format!("running {}", path.display()), &e);
    let mut child = tokio::process::Command::new(&path)
        .env("CNI_COMMAND", verb)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A plugin that does not read its input will say why with its exit.
        stdin.write_all(&input).await.ok();
    }
    let output = child.wait_with_output().await.map_err(failed)?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        Ok(stdout)
    } else {
        Err(read_error(plugin, &stdout))
    }
}

fn read_result(plugin: &str, stdout: &str) -> Result<CniResult, Failure> {
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
fn read_error(plugin: &str, text: &str) -> Failure {
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
