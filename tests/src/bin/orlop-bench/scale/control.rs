//! Memory and answers of the control plane: idle; with thousands of agents (each with its own TLS connection and heartbeats) and
//! their pods; while objects are changed; with a thousand watchers. Beside the real control plane with as many objects. Its nodes
//! are objects without kubelets: it carries no connections and no heartbeats here, which is in its favour.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Parser;
use orlop_proto::api::v1::{ListRequest, PatchRequest, WatchRequest, patch_request::Patch};

use super::{
    super::report::{Figure, OURS, Report},
    KUBERNETES, fleet,
    isolation::Place,
    kubernetes::{Api, Kubernetes},
    load::{self, Load, Until, quantile, rate},
    ours::{Control, Objects},
    process::Memory,
    schedule::PODS,
    shapes,
    told::Told,
};

#[derive(Debug, Parser)]
#[command(name = "control")]
pub struct Options {
    /// Simulated nodes.
    #[arg(long, default_value_t = 5000)]
    nodes: usize,
    /// Pods on them.
    #[arg(long, default_value_t = 10_000)]
    pods: usize,
    /// Watchers of all pods.
    #[arg(long, default_value_t = 1000)]
    watchers: usize,
    /// Changes that all watchers are told of, one after the other.
    #[arg(long, default_value_t = 20)]
    changes: usize,
    /// Seconds of changing pods, from 16 writers.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Nodes in one process, at most.
    #[arg(long, default_value_t = 2500)]
    nodes_a_process: usize,
    /// Seconds until all nodes are ready, at most; and then all pods.
    #[arg(long, default_value_t = 600)]
    patience: u64,
    /// Without the peer.
    #[arg(long)]
    no_peers: bool,
}

const MEMORY: &str = "memory of the control plane";
const CALLS: &str = "a change of a pod under load";
const WATCHES: &str = "from the call to the last of the watchers";
const WRITERS: usize = 16;
/// Connections that the watchers share.
const WATCH_CONNECTIONS: usize = 20;
/// Connections that are opened to see what one takes.
const PROBES: usize = 500;
/// Events of the burst of starts are held for 30 s.
const SETTLE: Duration = Duration::from_secs(35);
/// After the agents' connections were cut: free pages are given back meanwhile, and no node is declared lost yet.
const CUT: Duration = Duration::from_secs(20);

pub async fn run(place: Place, options: Options) -> Result<()> {
    let mut report = Report::new("control");
    let outcome = own(&place, &options, &mut report).await;
    report.part("Orlop", outcome);
    if !options.no_peers {
        let outcome = peer(&place, &options, &mut report).await;
        report.part(KUBERNETES, outcome);
    }
    report.finish()
}

async fn own(place: &Place, options: &Options, report: &mut Report) -> Result<()> {
    let control = Control::start(place, "[node]\nmonitor_grace = \"60s\"\nlease_duration = \"90s\"\n").await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    idle(report, OURS, control.memory()?);
    let idle_connection = idle_connection(&control).await?;
    of_a_connection(report, "TLS and HTTP/2, idle", idle_connection);

    let before = control.cpu_seconds()?;
    let begin = Instant::now();
    let patience = Duration::from_secs(options.patience);
    let nodes = fleet::start(place, &control, options.nodes, options.nodes_a_process).await?;
    let client = control.connect().await?;
    fleet::wait_for_nodes(&client, options.nodes, patience).await?;
    println!(
        "   ({} nodes ready after {:.0} s, {:.0} s of control's CPU; {:.0} MB)",
        options.nodes,
        begin.elapsed().as_secs_f64(),
        control.cpu_seconds()? - before,
        megabytes(control.memory()?.resident)
    );
    let begin = Instant::now();
    fleet::create_pods(&client, options.pods).await?;
    fleet::wait_for_pods(&client, patience).await?;
    println!(
        "   ({} pods run after {:.0} s)",
        options.pods,
        begin.elapsed().as_secs_f64()
    );
    tokio::time::sleep(SETTLE).await;
    let (cpu, begin) = (control.cpu_seconds()?, Instant::now());
    tokio::time::sleep(Duration::from_secs(10)).await;
    let busy = (control.cpu_seconds()? - cpu) / begin.elapsed().as_secs_f64();
    report.add(Figure::new(
        "control's CPU with heartbeats alone",
        sizes(options),
        busy * 100.0,
        "% of a core",
    ));
    let memory = control.memory()?;
    loaded(report, OURS, options, memory);

    calls(report, OURS, &change_pods(&control, options).await?);
    watched(report, OURS, options, &watchers(&control, &client, options).await?);
    after(report, OURS, options, control.memory()?);

    tokio::time::sleep(SETTLE).await;
    let with = control.memory()?.resident;
    drop(nodes);
    tokio::time::sleep(CUT).await;
    let connections = with.saturating_sub(control.memory()?.resident);
    let nodes = u64::try_from(options.nodes.max(1))?;
    of_a_connection(report, "of an agent, with its session", connections / nodes);
    without_connections(report, options, memory, connections, idle_connection * nodes);
    Ok(())
}

async fn peer(place: &Place, options: &Options, report: &mut Report) -> Result<()> {
    let mut peer = Kubernetes::start(place).await?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    idle(report, KUBERNETES, peer.memory()?);
    let api = peer.api.clone();
    load::run(Until::Calls(options.nodes), 32, move |index| {
        let api = api.clone();
        async move { api.create("/api/v1/nodes", &shapes::node(index)).await }
    })
    .await?;
    let begin = Instant::now();
    let api = peer.api.clone();
    load::run(Until::Calls(options.pods), 32, move |index| {
        let api = api.clone();
        async move { api.create(PODS, &fleet::small_pod(index)).await }
    })
    .await?;
    while !peer.api.is_empty(PODS, "spec.nodeName=").await? {
        peer.check()?;
        ensure!(
            begin.elapsed() < Duration::from_secs(options.patience),
            "not all pods are bound"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    println!(
        "   ({}: {:.0} pods a second created and bound)",
        sizes(options),
        rate(options.pods, begin.elapsed().as_secs_f64())
    );
    tokio::time::sleep(SETTLE).await;
    loaded(report, KUBERNETES, options, peer.memory()?);

    let (api, pods) = (peer.api.clone(), options.pods);
    let until = Until::Time(Duration::from_secs(options.seconds));
    let load = load::run(until, WRITERS, move |index| {
        let api = api.clone();
        async move { change_peer_pod(&api, index * 7919 % pods, index).await }
    })
    .await?;
    calls(report, KUBERNETES, &load);
    watched(report, KUBERNETES, options, &peer_watchers(&peer.api, options).await?);
    after(report, KUBERNETES, options, peer.memory()?);
    peer.check()
}

fn megabytes(bytes: u64) -> f64 {
    f64::from(u32::try_from(bytes / 1024).unwrap_or(u32::MAX)) * 1024.0 / 1e6
}

fn kilobytes(bytes: u64) -> f64 {
    megabytes(bytes) * 1e3
}

fn sizes(options: &Options) -> String {
    format!("{} nodes, {} pods", options.nodes, options.pods)
}

/// A figure that has a bar when it is ours.
fn barred(figure: Figure, whose: &str, bar: f64) -> Figure {
    if whose == OURS {
        figure.below(bar)
    } else {
        figure.of(whose)
    }
}

fn idle(report: &mut Report, whose: &str, memory: Memory) {
    let resident = Figure::new(MEMORY, "idle", megabytes(memory.resident), "MB");
    report.add(barred(resident, whose, 40.0));
    report.add(Figure::new(MEMORY, "idle, peak", megabytes(memory.peak), "MB").of(whose));
}

fn loaded(report: &mut Report, whose: &str, options: &Options, memory: Memory) {
    for (name, bytes) in at_load(options, memory) {
        report.add(Figure::new(MEMORY, name, megabytes(bytes), "MB").of(whose));
    }
}

/// The figures with the bar are without what goes when the agents are cut off: the peer's nodes have neither connections nor
/// sessions. Without the connections alone, as they are before anything went through them, is told as well.
fn without_connections(report: &mut Report, options: &Options, memory: Memory, connections: u64, idle: u64) {
    for (name, bytes) in at_load(options, memory) {
        let without = |less: u64| megabytes(bytes.saturating_sub(less));
        let of_nodes = format!("{name}, without the agents' connections and sessions");
        report.add(Figure::new(MEMORY, of_nodes, without(connections), "MB").below(150.0));
        let of_idle = format!("{name}, without as many idle connections");
        report.add(Figure::new(MEMORY, of_idle, without(idle), "MB"));
    }
}

fn of_a_connection(report: &mut Report, name: &str, bytes: u64) {
    report.add(Figure::new("memory of a connection", name, kilobytes(bytes), "kB"));
}

fn at_load(options: &Options, memory: Memory) -> [(String, u64); 2] {
    let name = sizes(options);
    let peak = format!("{name}, peak");
    [(name, memory.resident), (peak, memory.peak)]
}

fn calls(report: &mut Report, whose: &str, load: &Load) {
    let name = |percentile: &str| format!("{WRITERS} writers, {percentile}");
    report.add(Figure::new(CALLS, name("p50"), load.permille(500), "ms").of(whose));
    let slow = Figure::new(CALLS, name("p99"), load.permille(990), "ms");
    report.add(barred(slow, whose, 50.0));
    let chart = "changes of pods a second";
    report.add(Figure::new(chart, format!("{WRITERS} writers"), load.rate(), "/s").of(whose));
}

/// How late the last of the watchers was told, in milliseconds, ascending.
fn watched(report: &mut Report, whose: &str, options: &Options, late: &[f64]) {
    for (percentile, permille) in [("p50", 500), ("p99", 990)] {
        let name = format!("{} watchers, {percentile}", options.watchers);
        report.add(Figure::new(WATCHES, name, quantile(late, permille), "ms").of(whose));
    }
}

fn after(report: &mut Report, whose: &str, options: &Options, memory: Memory) {
    let name = format!("after changes and {} watchers", options.watchers);
    report.add(Figure::new(MEMORY, name, megabytes(memory.resident), "MB").of(whose));
}

/// What a connection takes that nothing went through yet.
async fn idle_connection(control: &Control) -> Result<u64> {
    // The first ones make room that later ones find.
    let _warm = control.connections(PROBES).await?;
    let before = control.memory()?.resident;
    let _connections = control.connections(PROBES).await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let after = control.memory()?.resident;
    Ok(after.saturating_sub(before) / u64::try_from(PROBES)?)
}

async fn change_pods(control: &Control, options: &Options) -> Result<Load> {
    let clients = control.connections(4).await?;
    let pods = options.pods;
    load::run(
        Until::Time(Duration::from_secs(options.seconds)),
        WRITERS,
        move |index| {
            let client = clients[index % clients.len()].clone();
            // A prime step: neighbours in time are not neighbours in the index.
            async move { change_pod(client, index * 7919 % pods, index).await }
        },
    )
    .await
}

async fn change_pod(mut client: Objects, pod: usize, value: usize) -> Result<()> {
    let request = PatchRequest {
        resource: "pods".into(),
        namespace: "default".into(),
        name: format!("pod-{pod}"),
        patch: Some(Patch::Merge(patch(value).to_string())),
        ..PatchRequest::default()
    };
    Ok(client.patch(request).await.map(drop)?)
}

fn patch(value: usize) -> serde_json::Value {
    serde_json::json!({"metadata": {"annotations": {"bench": value.to_string()}}})
}

async fn watchers(control: &Control, client: &Objects, options: &Options) -> Result<Vec<f64>> {
    let request = ListRequest {
        resource: "pods".into(),
        limit: 1,
        ..ListRequest::default()
    };
    let since = client.clone().list(request).await?.into_inner().resource_version;
    let clients = control.connections(WATCH_CONNECTIONS).await?;
    let told = Told::default();
    let mut tasks = tokio::task::JoinSet::new();
    for watcher in 0..options.watchers {
        let watch = WatchRequest {
            resource: "pods".into(),
            // One pod is watched by all, so that what is counted is what is changed.
            field_selector: "metadata.name=pod-0".into(),
            resource_version: since.clone(),
            ..WatchRequest::default()
        };
        let mut client = clients[watcher % clients.len()].clone();
        let mut events = client.watch(watch).await?.into_inner();
        let told = told.clone();
        tasks.spawn(async move {
            while let Ok(Some(_)) = events.message().await {
                told.one();
            }
        });
    }
    let change = |value| change_pod(client.clone(), 0, value);
    told.of_changes(options.watchers, options.changes, change).await
}

async fn change_peer_pod(api: &Api, pod: usize, value: usize) -> Result<()> {
    api.patch(&format!("{PODS}/pod-{pod}"), &patch(value)).await
}

async fn peer_watchers(api: &Api, options: &Options) -> Result<Vec<f64>> {
    let told = Told::default();
    let mut tasks = tokio::task::JoinSet::new();
    let api_of_watchers = api.another(WATCH_CONNECTIONS).await?;
    for _ in 0..options.watchers {
        let (api, told) = (api_of_watchers.clone(), told.clone());
        tasks.spawn(async move {
            let path = format!("{PODS}?watch=1&fieldSelector=metadata.name%3Dpod-0");
            // A watch that ends is missed below.
            let _ended = api.watch(&path, |_| told.one()).await;
        });
    }
    // Each begins with the pod as it is.
    told.wait_for(options.watchers).await?;
    let change = |value| change_peer_pod(api, 0, value);
    told.of_changes(options.watchers, options.changes, change).await
}
