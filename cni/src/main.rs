//! The process: environment and stdin in, JSON on stdout, exit status 0 or 1.

use std::{
    io::{Read, Write},
    process::ExitCode,
};

use orlop_bridge::{
    config::MAX_STDIN,
    error::{Failure, code},
    request::Env,
    run,
    version::CniVersion,
};
use serde_json::Value;

fn main() -> ExitCode {
    let (text, status) = match answer() {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(value)) => (value, ExitCode::SUCCESS),
        Err(value) => (value, ExitCode::FAILURE),
    };
    // An answer that nobody reads is a failed call; the runtime will send DEL.
    match writeln!(std::io::stdout(), "{text}") {
        Ok(()) => status,
        Err(_) => ExitCode::FAILURE,
    }
}

fn answer() -> Result<Option<Value>, Value> {
    let early = |failure: Failure| failure.to_json(CniVersion::LATEST.as_str());
    let env = environment().map_err(early)?;
    let mut stdin = Vec::new();
    let limit = MAX_STDIN as u64 + 1;
    std::io::stdin()
        .take(limit)
        .read_to_end(&mut stdin)
        .map_err(|e| early(Failure::io("reading the configuration from stdin", &e)))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| early(Failure::io("starting", &e)))?;
    runtime.block_on(run(&env, &stdin))
}

fn environment() -> Result<Env, Failure> {
    let ours = std::env::vars_os().filter(|(key, _)| key.as_encoded_bytes().starts_with(b"CNI_"));
    ours.map(|(key, value)| match (key.into_string(), value.into_string()) {
        (Ok(key), Ok(value)) => Ok((key, value)),
        (key, _) => {
            let msg = format!("environment variable {key:?} is not UTF-8");
            Err(Failure::new(code::INVALID_ENVIRONMENT, msg))
        }
    })
    .collect()
}
