//! The benchmarks of the control plane: `schedule`, `control` and `store`, each in namespaces of its own that have only loopback.

mod channel;
mod control;
mod etcd;
mod fleet;
pub mod isolation;
pub mod kubernetes;
pub mod limit;
pub mod load;
mod nodes;
mod ours;
pub mod process;
mod schedule;
mod shapes;
mod store;
mod told;

use anyhow::{Context, Result};
use clap::Parser;

/// What figures call the peers.
const KUBERNETES: &str = "Kubernetes 1.36";

/// Runs `schedule`, `control` or `store`.
pub fn run(name: &str, options: &[String]) -> Result<()> {
    let words = std::iter::once(&name.to_owned())
        .chain(options)
        .cloned()
        .collect::<Vec<_>>();
    let place = || isolation::enter(name);
    match name {
        "schedule" => {
            let options = schedule::Options::try_parse_from(words)?;
            in_runtime(place()?, |place| schedule::run(place, options))
        }
        "control" => {
            let options = control::Options::try_parse_from(words)?;
            in_runtime(place()?, |place| control::run(place, options))
        }
        _ => {
            let options = store::Options::try_parse_from(words)?;
            in_runtime(place()?, |place| store::run(place, options))
        }
    }
}

/// The part of `control` that is simulated machines: a process of its own, so that its memory is not control's.
pub fn run_nodes(options: &[String]) -> Result<()> {
    nodes::run(options)
}

/// The server of `store` that does nothing: a process of its own, as control is.
pub fn run_rpc_alone(options: &[String]) -> Result<()> {
    let words = std::iter::once(&limit::NAME.to_owned())
        .chain(options)
        .cloned()
        .collect();
    in_runtime((), |()| limit::serve(words))
}

/// Threads begin only here: namespaces are entered before.
fn in_runtime<Where, Run, Done>(place: Where, run: Run) -> Result<()>
where
    Run: FnOnce(Where) -> Done,
    Done: Future<Output = Result<()>>,
{
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        anyhow::bail!("another TLS provider is installed");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting a runtime")?;
    runtime.block_on(run(place))
}
