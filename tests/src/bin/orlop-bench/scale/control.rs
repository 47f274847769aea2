//! Memory and answers of the control plane: idle; with thousands of agents (each with its own TLS connection and heartbeats) and
//! their pods; while objects are changed; with a thousand watchers. Beside the real control plane with as many objects. Its nodes
//! are objects without kubelets: it carries no connections and no heartbeats here, which is in its favour.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use clap::Parser;
use orlop_proto::{
    Resource,
    api::v1::{CreateRequest, ListRequest, Object, PatchRequest, WatchRequest, patch_request::Patch},
    cluster::v1::{CreateTokenRequest, join_client::JoinClient},
    core::v1::{Node, Pod},
};
use tonic::transport::Endpoint;

use super::{
    super::report::{Figure, Report},
    KUBERNETES,
    isolation::Place,
    kubernetes::{Api, Kubernetes},
    load::{self, Load, Until, quantile, rate},
    ours::{self, Control, Objects, all},
    process::{Memory, Process},
    schedule::PODS,
    shapes::{self, Shape},
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
const PATIENCE: Duration = Duration::from_secs(180);
/// Events of the burst of starts are held for 30 s.
const SETTLE: Duration = Duration::from_secs(35);

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

fn megabytes(bytes: u64) -> f64 {
    f64::from(u32::try_from(bytes / 1024).unwrap_or(u32::MAX)) * 1024.0 / 1e6
}

fn kilobytes(bytes: u64) -> f64 {
    megabytes(bytes) * 1e3
}

async fn own(place: &Place, options: &Options, report: &mut Report) -> Result<()> {
    let control = Control::start(place, "[node]\nmonitor_grace = \"60s\"\nlease_duration = \"90s\"\n").await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let idle = control.memory()?;
    report.add(Figure::new(MEMORY, "idle", megabytes(idle.resident), "MB").below(40.0));
    report.add(Figure::new(MEMORY, "idle, peak", megabytes(idle.peak), "MB"));
    let connection = connection_bytes(&control).await?;
    report.add(Figure::new(
        "memory of a connection",
        "TLS and HTTP/2, idle",
        kilobytes(connection),
        "kB",
    ));

    let before = control.cpu_seconds()?;
    let begin = Instant::now();
    let _nodes = start_nodes(place, options, &control).await?;
    let client = control.connect().await?;
    wait_for(&client, "nodes", options.nodes, node_is_ready).await?;
    println!(
        "   ({} nodes ready after {:.0} s, {:.0} s of control's CPU; {:.0} MB)",
        options.nodes,
        begin.elapsed().as_secs_f64(),
        control.cpu_seconds()? - before,
        megabytes(control.memory()?.resident)
    );
    let begin = Instant::now();
    create_pods(&client, options.pods).await?;
    wait_for(&client, "pods", options.pods, pod_runs).await?;
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
    memory(report, options, control.memory()?, connection);

    let load = change_pods(&control, options).await?;
    calls(report, &load, None);
    let late = watchers(&control, &client, options).await?;
    report.add(Figure::new(
        WATCHES,
        format!("{} watchers, p50", options.watchers),
        quantile(&late, 500),
        "ms",
    ));
    report.add(Figure::new(
        WATCHES,
        format!("{} watchers, p99", options.watchers),
        quantile(&late, 990),
        "ms",
    ));
    let after = control.memory()?;
    report.add(Figure::new(
        MEMORY,
        format!("after changes and {} watchers", options.watchers),
        megabytes(after.resident),
        "MB",
    ));
    Ok(())
}

fn sizes(options: &Options) -> String {
    format!("{} nodes, {} pods", options.nodes, options.pods)
}

/// The figure with the bar is without the connections, which have one of their own.
fn memory(report: &mut Report, options: &Options, loaded: Memory, connection: u64) {
    let connections = connection * u64::try_from(options.nodes).unwrap_or_default();
    let name = sizes(options);
    let without = megabytes(loaded.resident.saturating_sub(connections));
    report.add(Figure::new(MEMORY, &name, megabytes(loaded.resident), "MB"));
    report.add(Figure::new(MEMORY, format!("{name}, without connections"), without, "MB").below(150.0));
    report.add(Figure::new(
        MEMORY,
        format!("{name}, peak"),
        megabytes(loaded.peak),
        "MB",
    ));
}

fn calls(report: &mut Report, load: &Load, whose: Option<&str>) {
    let of = |figure: Figure| match whose {
        Some(whose) => figure.of(whose),
        None => figure,
    };
    report.add(of(Figure::new(
        CALLS,
        format!("{WRITERS} writers, p50"),
        load.permille(500),
        "ms",
    )));
    let figure = of(Figure::new(
        CALLS,
        format!("{WRITERS} writers, p99"),
        load.permille(990),
        "ms",
    ));
    report.add(if whose.is_none() { figure.below(50.0) } else { figure });
    report.add(of(Figure::new(
        "changes of pods a second",
        format!("{WRITERS} writers"),
        load.rate(),
        "/s",
    )));
}

/// What an idle connection with its TLS and HTTP/2 state takes.
async fn connection_bytes(control: &Control) -> Result<u64> {
    // The first ones make room that later ones find.
    let _warm = control.connections(PROBES).await?;
    let before = control.memory()?.resident;
    let _connections = control.connections(PROBES).await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let after = control.memory()?.resident;
    Ok(after.saturating_sub(before) / u64::try_from(PROBES)?)
}

async fn start_nodes(place: &Place, options: &Options, control: &Control) -> Result<Vec<Process>> {
    let socket = format!("unix://{}", control.socket.display());
    let channel = Endpoint::from_shared(socket)?.connect().await?;
    let request = CreateTokenRequest {
        ttl_seconds: 3600,
        uses: 0,
    };
    let token = JoinClient::new(channel).create_token(request).await?.into_inner().token;
    let program = std::env::current_exe()?;
    let mut processes = Vec::new();
    let mut first = 0;
    while first < options.nodes {
        let count = options.nodes_a_process.min(options.nodes - first);
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
        first += count;
    }
    Ok(processes)
}

/// Waits until so many objects are as they should be.
async fn wait_for(client: &Objects, resource: &str, wanted: usize, good: fn(Object) -> bool) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let count = all(client, resource)
            .await?
            .into_iter()
            .filter(|object| good(object.clone()))
            .count();
        if count >= wanted {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "{count} of {wanted} {resource} are ready after {} s",
            PATIENCE.as_secs()
        );
        // Seldom: such a list costs control as much as many heartbeats.
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

fn node_is_ready(object: Object) -> bool {
    let status = Node::from_object(object).and_then(|node| node.status);
    let conditions = status.into_iter().flat_map(|status| status.conditions);
    conditions
        .into_iter()
        .any(|condition| condition.r#type == "Ready" && condition.status == "True")
}

fn pod_runs(object: Object) -> bool {
    let status = Pod::from_object(object).and_then(|pod| pod.status);
    status.is_some_and(|status| status.phase == "Running")
}

async fn create_pods(client: &Objects, count: usize) -> Result<()> {
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
fn small_pod(index: usize) -> serde_json::Value {
    let mut pod = shapes::pod("pod", index, Shape::Plain);
    pod["spec"]["containers"][0]["resources"]["requests"] = serde_json::json!({"cpu": "10m", "memory": "10Mi"});
    pod
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

/// Milliseconds from each change's call to the moment when every watcher has been told, ascending.
async fn watchers(control: &Control, client: &Objects, options: &Options) -> Result<Vec<f64>> {
    let told = Arc::new(AtomicUsize::default());
    let request = ListRequest {
        resource: "pods".into(),
        limit: 1,
        ..ListRequest::default()
    };
    let since = client.clone().list(request).await?.into_inner().resource_version;
    let clients = control.connections(WATCH_CONNECTIONS).await?;
    let mut tasks = tokio::task::JoinSet::new();
    for watcher in 0..options.watchers {
        let watch = WatchRequest {
            resource: "pods".into(),
            // One pod is watched by all, so that what is counted is what is changed.
            field_selector: "metadata.name=pod-0".into(),
            resource_version: since.clone(),
            ..WatchRequest::default()
        };
        let mut events = clients[watcher % clients.len()]
            .clone()
            .watch(watch)
            .await?
            .into_inner();
        let told = Arc::clone(&told);
        tasks.spawn(async move {
            while let Ok(Some(_)) = events.message().await {
                told.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let mut late = Vec::new();
    for change in 0..options.changes {
        told.store(0, Ordering::Relaxed);
        let begin = Instant::now();
        change_pod(client.clone(), 0, 1_000_000 + change).await?;
        while told.load(Ordering::Relaxed) < options.watchers {
            ensure!(begin.elapsed() < PATIENCE, "not all watchers were told");
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        late.push(begin.elapsed().as_secs_f64() * 1e3);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    late.sort_by(f64::total_cmp);
    Ok(late)
}

async fn peer(place: &Place, options: &Options, report: &mut Report) -> Result<()> {
    let mut peer = Kubernetes::start(place).await?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let idle = peer.memory()?;
    report.add(Figure::new(MEMORY, "idle", megabytes(idle.resident), "MB").of(KUBERNETES));
    report.add(Figure::new(MEMORY, "idle, peak", megabytes(idle.peak), "MB").of(KUBERNETES));
    let api = peer.api.clone();
    let begin = Instant::now();
    load::run(Until::Calls(options.nodes), 32, move |index| {
        let api = api.clone();
        async move { api.create("/api/v1/nodes", &shapes::node(index)).await }
    })
    .await?;
    let api = peer.api.clone();
    load::run(Until::Calls(options.pods), 32, move |index| {
        let api = api.clone();
        async move { api.create(PODS, &small_pod(index)).await }
    })
    .await?;
    while !peer.api.is_empty(PODS, "spec.nodeName=").await? {
        peer.check()?;
        ensure!(begin.elapsed() < PATIENCE, "not all pods are bound");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    println!(
        "   ({}: {:.0} a second created and bound)",
        sizes(options),
        rate(options.pods, begin.elapsed().as_secs_f64())
    );
    tokio::time::sleep(SETTLE).await;
    let loaded = peer.memory()?;
    report.add(Figure::new(MEMORY, sizes(options), megabytes(loaded.resident), "MB").of(KUBERNETES));
    report.add(
        Figure::new(
            MEMORY,
            format!("{}, peak", sizes(options)),
            megabytes(loaded.peak),
            "MB",
        )
        .of(KUBERNETES),
    );
    let (api, pods) = (peer.api.clone(), options.pods);
    let until = Until::Time(Duration::from_secs(options.seconds));
    let load = load::run(until, WRITERS, move |index| {
        let api = api.clone();
        async move { change_peer_pod(&api, index * 7919 % pods, index).await }
    })
    .await?;
    calls(report, &load, Some(KUBERNETES));
    let late = peer_watchers(&peer.api, options).await?;
    report.add(
        Figure::new(
            WATCHES,
            format!("{} watchers, p50", options.watchers),
            quantile(&late, 500),
            "ms",
        )
        .of(KUBERNETES),
    );
    report.add(
        Figure::new(
            WATCHES,
            format!("{} watchers, p99", options.watchers),
            quantile(&late, 990),
            "ms",
        )
        .of(KUBERNETES),
    );
    let after = peer.memory()?;
    let name = format!("after changes and {} watchers", options.watchers);
    report.add(Figure::new(MEMORY, name, megabytes(after.resident), "MB").of(KUBERNETES));
    peer.check()
}

async fn change_peer_pod(api: &Api, pod: usize, value: usize) -> Result<()> {
    api.patch(&format!("{PODS}/pod-{pod}"), &patch(value)).await
}

async fn peer_watchers(api: &Api, options: &Options) -> Result<Vec<f64>> {
    let told = Arc::new(AtomicUsize::default());
    let opened = Arc::new(AtomicUsize::default());
    let mut tasks = tokio::task::JoinSet::new();
    let api_of_watchers = api.another(WATCH_CONNECTIONS).await?;
    for _ in 0..options.watchers {
        let (api, told, opened) = (api_of_watchers.clone(), Arc::clone(&told), Arc::clone(&opened));
        tasks.spawn(async move {
            let count = |_: &[u8]| {
                told.fetch_add(1, Ordering::Relaxed);
            };
            // A watch that ends is missed below.
            let _ended = api
                .watch(
                    &format!("{PODS}?watch=1&fieldSelector=metadata.name%3Dpod-0"),
                    &opened,
                    count,
                )
                .await;
        });
    }
    let begin = Instant::now();
    // Each begins with the pod as it is.
    while opened.load(Ordering::Relaxed) < options.watchers || told.load(Ordering::Relaxed) < options.watchers {
        ensure!(begin.elapsed() < PATIENCE, "not all watches were opened");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut late = Vec::new();
    for change in 0..options.changes {
        told.store(0, Ordering::Relaxed);
        let begin = Instant::now();
        change_peer_pod(api, 0, 1_000_000 + change).await?;
        while told.load(Ordering::Relaxed) < options.watchers {
            ensure!(begin.elapsed() < PATIENCE, "not all watchers were told");
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        late.push(begin.elapsed().as_secs_f64() * 1e3);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    late.sort_by(f64::total_cmp);
    Ok(late)
}
