//! `cargo xtask bench NAME`: benchmarks in a lab of their own. The last line is one JSON object.

mod connect;
mod plot;
mod report;
mod scale;
mod statistics;

use std::process::ExitCode;

use anyhow::{Result, bail};

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let name = words.next().unwrap_or_default();
    let options: Vec<String> = words.collect();
    match run(&name, &options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(name: &str, options: &[String]) -> Result<()> {
    match name {
        "connect" => connect::run(options),
        "schedule" | "control" | "store" => scale::run(name, options),
        "simulated-nodes" => scale::run_nodes(options),
        other => bail!("no benchmark {other:?}: connect, schedule, control, store"),
    }
}
