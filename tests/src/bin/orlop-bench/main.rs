//! `cargo xtask bench NAME`: benchmarks in a lab of their own. The last line is one JSON object.

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
        "program" => program::run(options),
        "cni" => cni::run(options),
        "start" => start::run(options),
        inside::NAME => inside::main(options),
        kube_proxy::NAME => kube_proxy::main(options),
        "schedule" | "control" | "store" => scale::run(name, options),
        "simulated-nodes" => scale::run_nodes(options),
        scale::limit::NAME => scale::run_rpc_alone(options),
        other => bail!("no benchmark {other:?}: connect, program, cni, start, schedule, control, store"),
    }
}
