//! The peer: a real etcd, of any version, with one member.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use etcd_client::{Channel, Client};

use super::{channel, process::Process};

/// Where clients reach it.
pub const PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;
const START: Duration = Duration::from_secs(30);

/// A running etcd.
pub struct Server {
    /// Its process.
    pub process: Process,
}

impl Server {
    /// Starts it on an empty folder and waits until it answers.
    pub async fn start(program: &Path, folder: &Path) -> Result<Self> {
        let arguments = [
            format!("--data-dir={}", folder.join("etcd").display()),
            format!("--listen-client-urls=http://127.0.0.1:{PORT}"),
            format!("--advertise-client-urls=http://127.0.0.1:{PORT}"),
            format!("--listen-peer-urls=http://127.0.0.1:{PEER_PORT}"),
            format!("--initial-advertise-peer-urls=http://127.0.0.1:{PEER_PORT}"),
            format!("--initial-cluster=default=http://127.0.0.1:{PEER_PORT}"),
            "--log-level=warn".to_owned(),
            "--quota-backend-bytes=8589934592".to_owned(),
        ];
        let mut process = Process::start(program, folder, &arguments)?;
        let end = Instant::now() + START;
        loop {
            process.check()?;
            if let Ok(mut client) = connect().await
                && client.get("ready", None).await.is_ok()
            {
                return Ok(Self { process });
            }
            ensure!(
                Instant::now() < end,
                "etcd does not answer within {} s",
                START.as_secs()
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Several connections.
    pub async fn connections(&self, count: usize) -> Result<Vec<Client>> {
        let mut clients = Vec::new();
        for _ in 0..count {
            clients.push(connect().await?);
        }
        Ok(clients)
    }
}

async fn connect() -> Result<Client> {
    let channel = channel::connect(PORT, None).await?;
    Ok(Client::from_channel(Channel::Tonic(channel), None).await?)
}
