//! Thousands of simulated nodes beside a control plane, and their pods.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use orlop_proto::{
    Resource,
    api::v1::{CreateRequest, Object},
    cluster::v1::{CreateTokenRequest, join_client::JoinClient},
    core::v1::{Node, Pod},
};
use tonic::transport::Endpoint;

use super::{
    isolation::Place,
    load::{self, Until},
    ours::{self, Control, Objects, all, first},
    process::Process,
    shapes::{self, Shape},
};

/// Starts so many nodes, in as many processes as that takes.
pub async fn start(place: &Place, control: &Control, nodes: usize, in_one: usize) -> Result<Vec<Process>> {
    let socket = format!("unix://{}", control.socket.display());
    let channel = Endpoint::from_shared(socket)?.connect().await?;
    let request = CreateTokenRequest {
        ttl_seconds: 3600,
        uses: 0,
    };
    let token = JoinClient::new(channel).create_token(request).await?.into_inner().token;
    let program = std::env::current_exe()?;
    let mut processes = Vec::new();
    for first in (0..nodes).step_by(in_one.max(1)) {
        let count = in_one.min(nodes - first);
        let folder = place.disk.join(format!("nodes-{first}"));
        fs::create_dir_all(&folder)?;
        let arguments = [
            "simulated-nodes".to_owned(),
            format!("--control={}", control.address),
            format!("--token={token}"),
            format!("--first={first}"),
            format!("--count={count}"),
            format!("--folder={}", place.memory.display()),
        ];
        processes.push(Process::start(Path::new(&program), &folder, &arguments)?);
    }
    Ok(processes)
}

/// Waits until so many nodes are ready.
pub async fn wait_for_nodes(client: &Objects, wanted: usize, patience: Duration) -> Result<()> {
    let begin = Instant::now();
    loop {
        let count = all(client, "nodes").await?.into_iter().filter(is_ready).count();
        if count >= wanted {
            return Ok(());
        }
        ensure!(
            begin.elapsed() < patience,
            "{count} of {wanted} nodes are ready after {} s",
            patience.as_secs()
        );
        // Seldom: such a list costs control as much as many heartbeats.
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
}

fn is_ready(object: &Object) -> bool {
    let status = Node::from_object(object.clone()).and_then(|node| node.status);
    let mut conditions = status.into_iter().flat_map(|status| status.conditions);
    conditions.any(|condition| condition.r#type == "Ready" && condition.status == "True")
}

/// Waits until all pods run.
pub async fn wait_for_pods(client: &Objects, patience: Duration) -> Result<()> {
    let begin = Instant::now();
    while let Some(pod) = first(client, "pods", "status.phase!=Running").await?.pop() {
        ensure!(
            begin.elapsed() < patience,
            "after {} s not all pods run: {:?}",
            patience.as_secs(),
            Pod::from_object(pod).map(|pod| (pod.name().to_owned(), pod.status))
        );
        // Seldom, for the same reason.
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    Ok(())
}

/// Creates so many pods in namespace `default`: `pod-0`, `pod-1`, ...
pub async fn create_pods(client: &Objects, count: usize) -> Result<()> {
    let client = client.clone();
    load::run(Until::Calls(count), 64, move |index| {
        let mut client = client.clone();
        async move {
            let pod: Pod = ours::parse(&small_pod(index))?;
            let object = Some(pod.into_object());
            Ok(client.create(CreateRequest { object }).await.map(drop)?)
        }
    })
    .await
    .map(drop)
}

/// A pod that fits twice on any machine.
pub fn small_pod(index: usize) -> serde_json::Value {
    let mut pod = shapes::pod("pod", index, Shape::Plain);
    pod["spec"]["containers"][0]["resources"]["requests"] = serde_json::json!({"cpu": "10m", "memory": "10Mi"});
    pod
}
