//! `orlop-node`: the agent of a node.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context;
use clap::{Parser, Subcommand};
use orlop_node::{
    agent,
    config::Config,
    dataplane::{self, PodInterface},
    identity::Identity,
    ledger, memory,
    network::{self, Attachment, CniNetwork, Network as _},
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Runs a node's pods, and keeps its service dataplane.
#[derive(Debug, Parser)]
#[command(name = "orlop-node", version)]
struct Arguments {
    /// The configuration.
    #[arg(long, default_value = "/etc/orlop/node.toml", global = true)]
    config: PathBuf,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the agent (the default).
    Run,
    /// Joins the cluster with the configured token, unless that is done, and ends.
    Join,
    /// Compares the kernel's maps, programs and links with what this node was told and the pods it has; ends with 1 when they differ.
    Verify,
}

fn main() -> ExitCode {
    memory::configure();
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    match start(&arguments) {
        Ok(code) => code,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "orlop-node ends");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        anyhow::bail!("another TLS provider is installed already");
    }
    let config = Config::load(&arguments.config)?;
    // A node has few cores to spare for its agent; what blocks runs on threads of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(16)
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let code = match arguments.command {
        None | Some(Command::Run) => runtime.block_on(run(config)),
        Some(Command::Join) => runtime.block_on(join(&config)),
        Some(Command::Verify) => runtime.block_on(verify(&config)),
    };
    // A hung call to the container runtime must not keep the agent from ending: pods do not need it.
    runtime.shutdown_timeout(Duration::from_secs(1));
    code
}

async fn run(config: Config) -> anyhow::Result<ExitCode> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("watching for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watching for SIGINT")?;
    let ending = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("the agent stops; pods go on");
        ending.cancel();
    });
    agent::run(config, stop).await?;
    Ok(ExitCode::SUCCESS)
}

async fn join(config: &Config) -> anyhow::Result<ExitCode> {
    let identity = Identity::open(config)?;
    if identity.is_joined() {
        println!("{} has joined already", config.node_name);
        return Ok(ExitCode::SUCCESS);
    }
    let mut last = None;
    for attempt in 0..config.control.len().max(1) {
        match identity.join_once(attempt).await {
            Ok(()) => {
                println!("{} has joined", config.node_name);
                return Ok(ExitCode::SUCCESS);
            }
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) => Err(error.into()),
        None => anyhow::bail!("no control address is configured"),
    }
}

/// The ledger of a running agent is a few seconds behind the maps: differences count when they last.
async fn verify(config: &Config) -> anyhow::Result<ExitCode> {
    let mut report = compare(config).await?;
    for _ in 0..6 {
        if report.is_clean() {
            break;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        report = compare(config).await?;
    }
    println!("{report}");
    Ok(if report.is_clean() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

async fn compare(config: &Config) -> anyhow::Result<dataplane::Report> {
    let services = ledger::read_services(&config.data_dir)?;
    let attached = CniNetwork::new(network::Settings::new(config)).list().await?;
    let interface = |attachment: Attachment| {
        let (pod, status) = (attachment.pod?, attachment.status?);
        Some(PodInterface {
            pod_uid: pod.uid,
            host_interface: status.host_interface,
        })
    };
    // A plugin that names no interface has its pods' traffic not counted.
    let pods = attached.into_iter().filter_map(interface);
    let pods: Vec<PodInterface> = pods.filter(|pod| !pod.host_interface.is_empty()).collect();
    Ok(dataplane::verify::verify(
        &agent::dataplane_config(config),
        &services,
        &pods,
    )?)
}
