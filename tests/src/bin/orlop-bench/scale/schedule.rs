//! Pods created and durably bound a second, at several sizes of cluster, for several wishes of pods; beside the real API server and
//! scheduler. Both sides get the same objects from the same number of writers over the same number of connections, and both are
//! asked in the same way when all pods are bound. Nodes are objects without agents on both sides: what is measured is control alone.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use orlop_proto::{
    Resource,
    api::v1::{CreateRequest, Object, UpdateRequest},
    core::v1::{Node, Pod},
};

use super::{
    super::report::{Figure, Report},
    KUBERNETES,
    isolation::Place,
    kubernetes::Kubernetes,
    load::{self, Until, rate},
    ours::{self, Control, Objects, first},
    shapes::{self, Shape},
};

#[derive(Debug, Parser)]
#[command(name = "schedule")]
pub struct Options {
    /// Sizes of the cluster.
    #[arg(long, value_delimiter = ',', default_value = "100,1000,5000")]
    nodes: Vec<usize>,
    /// Pods of each run on our side.
    #[arg(long, default_value_t = 8000)]
    pods: usize,
    /// Pods of each run on the peer's side; 0: no peer.
    #[arg(long, default_value_t = 1000)]
    peer_pods: usize,
    /// Calls under way at once.
    #[arg(long, default_value_t = 128)]
    writers: usize,
    /// Connections that the writers share.
    #[arg(long, default_value_t = 4)]
    connections: usize,
}

/// All pods of a run must be bound after this.
const PATIENCE: Duration = Duration::from_secs(120);
/// New nodes have their ranges of pod addresses by then, or it is said.
const SETTLING: Duration = Duration::from_secs(60);
const RATE: &str = "pods created and durably bound a second";
const CREATE: &str = "pods created, p99 of a call";

pub async fn run(place: Place, options: Options) -> Result<()> {
    let mut report = Report::new("schedule");
    for nodes in &options.nodes {
        let outcome = own(&place, &options, *nodes, &mut report).await;
        report.part(&format!("Orlop, {nodes} nodes"), outcome);
    }
    if options.peer_pods > 0 {
        let outcome = peer(&place, &options, &mut report).await;
        report.part(KUBERNETES, outcome);
    }
    report.finish()
}

async fn own(place: &Place, options: &Options, nodes: usize, report: &mut Report) -> Result<()> {
    // The nodes have no agents that renew their leases.
    let control = Control::start(place, "[node]\nmonitor_grace = \"10h\"\nlease_duration = \"20h\"\n").await?;
    let clients = control.connections(options.connections).await?;
    create_nodes(&clients, nodes).await.context("creating nodes")?;
    for shape in Shape::ALL {
        if let Err(error) = ours::parse::<Pod>(&shapes::pod("probe", 0, shape)) {
            report.part(&format!("Orlop, {}, {nodes} nodes", shape.name()), Err(error));
            continue;
        }
        let run = format!("{}-{nodes}", shape.name().replace(' ', "-"));
        let (begin, cpu) = (Instant::now(), control.cpu_seconds()?);
        let pods: Vec<Pod> = (0..options.pods)
            .map(|index| ours::parse(&shapes::pod(&run, index, shape)))
            .collect::<Result<_>>()?;
        let prepared = begin.elapsed();
        let clients = clients.clone();
        let asking = clients[0].clone();
        let created = load::run(Until::Calls(options.pods), options.writers, move |index| {
            let mut client = clients[index % clients.len()].clone();
            let object = Some(pods[index].clone().into_object());
            async move { Ok(client.create(CreateRequest { object }).await.map(drop)?) }
        })
        .await?;
        loop {
            if first(&asking, "pods", "spec.nodeName=").await?.is_empty() {
                break;
            }
            ensure!(begin.elapsed() < PATIENCE, "{run}: not all pods are bound");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let seconds = (begin.elapsed() - prepared).as_secs_f64();
        let per_pod = (control.cpu_seconds()? - cpu) * 1e6 / rate(options.pods, 1.0);
        println!(
            "   ({run}: {:.0} created a second, {per_pod:.0} us of control's CPU a pod)",
            created.rate()
        );
        let bar = if shape == Shape::Plain { 4000.0 } else { 1000.0 };
        let name = format!("{}, {nodes} nodes", shape.name());
        report.add(Figure::new(RATE, &name, rate(options.pods, seconds), "/s").at_least(bar));
        report.add(Figure::new(CREATE, &name, created.permille(990), "ms"));
    }
    control.stop();
    Ok(())
}

async fn create_nodes(clients: &[Objects], count: usize) -> Result<()> {
    let (clients, asking) = (clients.to_vec(), clients[0].clone());
    load::run(Until::Calls(count), 64, move |index| {
        let mut client = clients[index % clients.len()].clone();
        async move {
            let node: Node = ours::parse(&shapes::node(index))?;
            let object = Some(node.clone().into_object());
            client.create(CreateRequest { object }).await?;
            let object = Some(node.into_object());
            Ok(client.update_status(UpdateRequest { object }).await.map(drop)?)
        }
    })
    .await?;
    let begin = Instant::now();
    loop {
        let nodes = ours::all(&asking, "nodes").await?;
        let waiting = nodes.into_iter().filter(|node| !is_settled(node)).count();
        if waiting == 0 {
            return Ok(());
        }
        if begin.elapsed() > SETTLING {
            println!("   ({waiting} of {count} nodes have no range of pod addresses yet: that goes on meanwhile)");
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Whether a new node has its range of pod addresses: what controllers still write would be measured with the first pods.
fn is_settled(object: &Object) -> bool {
    let node: Option<Node> = Resource::from_object(object.clone());
    node.and_then(|node| node.spec)
        .is_some_and(|spec| !spec.pod_cidr.is_empty())
}

async fn peer(place: &Place, options: &Options, report: &mut Report) -> Result<()> {
    let mut peer = Kubernetes::start(place).await?;
    let mut there = 0;
    for nodes in &options.nodes {
        let (api, from) = (peer.api.clone(), there);
        load::run(Until::Calls(nodes - from), 32, move |index| {
            let api = api.clone();
            async move { api.create("/api/v1/nodes", &shapes::node(from + index)).await }
        })
        .await?;
        there = *nodes;
        // The scheduler has to have seen them.
        tokio::time::sleep(Duration::from_secs(2)).await;
        for shape in Shape::ALL {
            peer.check()?;
            let run = format!("{}-{nodes}", shape.name().replace(' ', "-"));
            let begin = Instant::now();
            let (api, of) = (peer.api.clone(), run.clone());
            let created = load::run(Until::Calls(options.peer_pods), options.writers, move |index| {
                let (api, pod) = (api.clone(), shapes::pod(&of, index, shape));
                async move { api.create(PODS, &pod).await }
            })
            .await?;
            while !peer.api.is_empty(PODS, "spec.nodeName=").await? {
                ensure!(begin.elapsed() < PATIENCE, "{run}: not all pods are bound");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let seconds = begin.elapsed().as_secs_f64();
            let name = format!("{}, {nodes} nodes", shape.name());
            report.add(Figure::new(RATE, &name, rate(options.peer_pods, seconds), "/s").of(KUBERNETES));
            report.add(Figure::new(CREATE, &name, created.permille(990), "ms").of(KUBERNETES));
        }
    }
    Ok(())
}

/// Where pods are in its REST API.
pub const PODS: &str = "/api/v1/namespaces/default/pods";
