//! Many simulated nodes in one process: each is the real agent, with an identity of its own and a TLS connection of its own, over
//! fakes of runtime, network and dataplane.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    sync::Arc,
};

use anyhow::{Context, Result};
use clap::Parser;
use futures::{StreamExt, stream};
use orlop_node::{
    agent::{self, Parts},
    config::Config,
    identity::Identity,
    link::TlsDialer,
    simulated,
};
use tokio_util::sync::CancellationToken;

use super::shapes;

/// How one process of them is called.
#[derive(Debug, Parser)]
#[command(name = "simulated-nodes")]
pub struct Options {
    /// `https://ADDRESS:PORT` of control.
    #[arg(long)]
    pub control: String,
    /// A join token.
    #[arg(long)]
    pub token: String,
    /// The first node's number.
    #[arg(long)]
    pub first: usize,
    /// How many.
    #[arg(long)]
    pub count: usize,
    /// Where their ledgers are.
    #[arg(long)]
    pub folder: PathBuf,
}

/// Nodes that join at once.
const JOINING: usize = 32;

/// Runs until it is killed.
pub fn run(options: &[String]) -> Result<()> {
    let words = std::iter::once(&"simulated-nodes".to_owned())
        .chain(options)
        .cloned()
        .collect::<Vec<_>>();
    let options = Options::try_parse_from(words)?;
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        anyhow::bail!("another TLS provider is installed");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("starting a runtime")?;
    runtime.block_on(async {
        let begin = std::time::Instant::now();
        let range = options.first..options.first + options.count;
        let mut joining = stream::iter(range)
            .map(|index| join(&options, index))
            .buffer_unordered(JOINING);
        while let Some(joined) = joining.next().await {
            if let Err(error) = joined {
                println!("a node did not join: {error:#}");
            }
        }
        println!("{} nodes after {:.1} s", options.count, begin.elapsed().as_secs_f64());
        std::future::pending::<()>().await;
        Ok(())
    })
}

async fn join(options: &Options, index: usize) -> Result<()> {
    let name = shapes::node_name(index);
    let folder = options.folder.join(&name);
    let config = Config {
        node_name: name.clone(),
        data_dir: folder.clone(),
        control: vec![options.control.clone()],
        join_token: Some(options.token.clone()),
        ..Config::default()
    };
    let identity = Arc::new(Identity::open(&config)?);
    let mut attempt = 0;
    while let Err(error) = identity.join_once(attempt).await {
        attempt += 1;
        if attempt == 10 {
            return Err(error).with_context(|| name.clone());
        }
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    let low = u32::try_from(index)?;
    let address = IpAddr::V4(Ipv4Addr::from(u32::from(Ipv4Addr::new(192, 168, 0, 1)) + low));
    let tls = TlsDialer::new(config.control.clone(), Arc::new(move || identity.tls()));
    let parts = simulated::parts(&name, address, &folder, Arc::new(tls));
    let parts = Parts {
        config: Config {
            // As the default of an agent; its own page is not asked for here, and needs a short path.
            metrics_socket: folder.join("m"),
            ..parts.config
        },
        ..parts
    };
    tokio::spawn(async move {
        if let Err(error) = agent::run_parts(parts, async {}, CancellationToken::new()).await {
            println!("{name}: {error}");
        }
    });
    Ok(())
}
