//! `cargo xtask bench NAME`: benchmarks in a lab of their own. The last line is one JSON object. `all` runs them all, one after
//! the other.

mod affinity;
mod cni;
mod connect;
mod inside;
mod kube_proxy;
mod netns;
mod pairs;
mod plot;
mod program;
mod report;
mod scale;
mod start;
mod statistics;

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};

/// The load of both sides shares the CPUs with what is measured: the less it takes, the more is left.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const NAMES: [&str; 7] = ["store", "schedule", "control", "program", "cni", "start", "connect"];

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
        "program" => program::run(options),
        "cni" => cni::run(options),
        "start" => start::run(options),
        inside::NAME => inside::main(options),
        kube_proxy::NAME => kube_proxy::main(options),
        "schedule" | "control" | "store" => scale::run(name, options),
        "simulated-nodes" => scale::run_nodes(options),
        scale::limit::NAME => scale::run_rpc_alone(options),
        "all" => all(options),
        other => bail!("no benchmark {other:?}: {}, or all", NAMES.join(", ")),
    }
}

/// Each in a process of its own, so that none finds what another left.
fn all(options: &[String]) -> Result<()> {
    ensure!(options.is_empty(), "all takes no options: {options:?}");
    let program = std::env::current_exe().context("finding this program")?;
    let mut failed = Vec::new();
    for name in NAMES {
        println!("==== {name}");
        if !Command::new(&program).arg(name).status()?.success() {
            failed.push(name);
        }
    }
    ensure!(failed.is_empty(), "these failed: {}", failed.join(", "));
    Ok(())
}
