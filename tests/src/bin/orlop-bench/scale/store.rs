//! Durable writes a second and how late a watcher learns of them: ours through its whole gRPC API (TLS, defaults, validation, the
//! check of the namespace), the real etcd through its own gRPC Put, on the same disk, with values and keys of the same size.

use std::{
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use etcd_client::WatchOptions;
use orlop_proto::{
    Resource,
    api::v1::{CreateRequest, WatchRequest},
    coordination::v1::{Lease, LeaseSpec},
    meta::v1::ObjectMeta,
};
use prost::Message;
use tokio::task::JoinHandle;

use super::{
    super::report::{Figure, Report},
    etcd::Server,
    isolation::Place,
    limit,
    load::{self, Load, Until, quantile},
    ours::Control,
    process::own_cpu_seconds,
};

#[derive(Debug, Parser)]
#[command(name = "store")]
pub struct Options {
    /// Numbers of writers, each with one write under way.
    #[arg(long, value_delimiter = ',', default_value = "64,256")]
    writers: Vec<usize>,
    /// Seconds of each run.
    #[arg(long, default_value_t = 6)]
    seconds: u64,
    /// Bytes of a value.
    #[arg(long, default_value_t = 512)]
    bytes: usize,
    /// Connections that the writers share.
    #[arg(long, default_value_t = 4)]
    connections: usize,
    /// Without etcd.
    #[arg(long)]
    no_peers: bool,
    /// Without what bounds the figures from above.
    #[arg(long)]
    no_limits: bool,
}

const RATE: &str = "durable writes a second";
const LATENCY: &str = "a write, p99";
const WATCH: &str = "from the write's call to the watcher, p99";
/// Of the server's and the clients' processes, which share the machine: what 20 000 a second would have is all its cores / 20 000.
const CPU: &str = "CPU time a write";
const LIMIT: &str = "limit: calls a second";
/// Writes of a run at most: their times are kept.
const MOST: usize = 4_000_000;
/// The watcher has to be told of the last write after this.
const PATIENCE: Duration = Duration::from_secs(30);

pub async fn run(place: Place, options: Options) -> Result<()> {
    let mut report = Report::new("store");
    let mut rates: Vec<(usize, f64)> = Vec::new();
    for writers in &options.writers {
        let outcome = ours(&place, &options, *writers).await;
        let outcome = outcome.map(|measured| {
            rates.push((*writers, measured.load.rate()));
            add(&mut report, None, *writers, &measured);
        });
        report.part(&format!("Orlop, {writers} writers"), outcome);
    }
    if !options.no_limits {
        limits(&place, &options, &mut report).await;
    }
    if !options.no_peers {
        let peers = [
            ("etcd 3.6", place.peers.join("etcd-server")),
            ("Debian's etcd", Path::new("/usr/bin/etcd").to_owned()),
        ];
        for (name, program) in &peers {
            for writers in &options.writers {
                let outcome = peer(&place, &options, program, *writers).await;
                let outcome = outcome.map(|measured| {
                    add(&mut report, Some(name), *writers, &measured);
                    if let Some((_, own)) = rates.iter().find(|(of, _)| of == writers) {
                        let times = own / measured.load.rate();
                        let chart = "durable writes a second, times the peer's";
                        let figure = Figure::new(chart, format!("{writers} writers, against {name}"), times, "x");
                        // The bar is this or 20 000 a second, whichever is reached.
                        report.add(if *own >= 20_000.0 { figure } else { figure.at_least(5.0) });
                    }
                });
                report.part(&format!("{name}, {writers} writers"), outcome);
            }
        }
    }
    report.finish()
}

/// What the same clients reach when nothing is written, and the same writes when nobody calls.
async fn limits(place: &Place, options: &Options, report: &mut Report) {
    let lease = lease(options.bytes);
    for writers in &options.writers {
        let outcome = limit::calls(place, until(options), *writers, options.connections, &lease).await;
        let outcome = outcome.map(|load| {
            let name = format!("{writers} writers, an RPC that does nothing");
            report.add(Figure::new(LIMIT, name, load.rate(), "/s"));
        });
        report.part(&format!("the RPC alone, {writers} writers"), outcome);
        let outcome = limit::store_alone(place, until(options), *writers, &lease).await;
        let outcome = outcome.map(|load| {
            let name = format!("{writers} writers, the store without RPCs");
            report.add(Figure::new(LIMIT, name, load.rate(), "/s"));
        });
        report.part(&format!("the store alone, {writers} writers"), outcome);
    }
}

fn add(report: &mut Report, whose: Option<&str>, writers: usize, measured: &Measured) {
    let (load, late) = (&measured.load, &measured.late);
    let name = format!("{writers} writers");
    let own = whose.is_none();
    let of = |figure: Figure| match whose {
        Some(whose) => figure.of(whose),
        None => figure,
    };
    let figure = of(Figure::new(RATE, &name, load.rate(), "/s"));
    report.add(if own { figure.at_least(20_000.0) } else { figure });
    report.add(of(Figure::new(LATENCY, &name, load.permille(990), "ms")));
    report.add(of(Figure::new(WATCH, &name, quantile(late, 990), "ms")));
    for (side, seconds) in [("server", measured.server_cpu), ("clients", measured.clients_cpu)] {
        let microseconds = seconds * 1e6 / load::rate(load.milliseconds.len(), 1.0);
        report.add(of(Figure::new(CPU, format!("{name}, {side}"), microseconds, "us")));
    }
}

/// When each write was called, and how late the watcher was told.
struct Times {
    begin: Instant,
    called: Vec<AtomicU64>,
    /// Milliseconds, in the order in which the watcher was told.
    late: Mutex<Vec<f64>>,
}

impl Times {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            begin: Instant::now(),
            called: std::iter::repeat_with(AtomicU64::default).take(MOST).collect(),
            late: Mutex::default(),
        })
    }

    fn call(&self, index: usize) -> Result<()> {
        let slot = self.called.get(index).context("more writes than are counted")?;
        let now = u64::try_from(self.begin.elapsed().as_nanos())?;
        slot.store(now, Ordering::Relaxed);
        Ok(())
    }

    /// The watcher was told of the write whose key ends in this number.
    fn told(&self, key: &str) {
        let index = key.rsplit('-').next().and_then(|number| number.parse().ok());
        let slot = index.and_then(|index: usize| self.called.get(index));
        if let Some(slot) = slot {
            let called = Duration::from_nanos(slot.load(Ordering::Relaxed));
            let late = self.begin.elapsed().saturating_sub(called);
            self.late().push(late.as_secs_f64() * 1e3);
        }
    }

    fn late(&self) -> MutexGuard<'_, Vec<f64>> {
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a run gave.
struct Measured {
    load: Load,
    /// How late the watcher was, in ascending milliseconds.
    late: Vec<f64>,
    /// Seconds.
    server_cpu: f64,
    clients_cpu: f64,
}

async fn ours(place: &Place, options: &Options, writers: usize) -> Result<Measured> {
    let control = Control::start(place, "").await?;
    let clients = control.busy_connections(options.connections).await?;
    let mut watching = control.busy_connections(1).await?.remove(0);
    let times = Times::new();
    let watch = WatchRequest {
        resource: "leases".into(),
        namespace: "default".into(),
        ..WatchRequest::default()
    };
    let mut events = watching.watch(watch).await?.into_inner();
    let watcher = tokio::spawn({
        let times = Arc::clone(&times);
        async move {
            while let Ok(Some(event)) = events.message().await {
                if let Some(lease) = event.object.and_then(Lease::from_object) {
                    times.told(lease.name());
                }
            }
        }
    });
    let cpu = (control.cpu_seconds()?, own_cpu_seconds()?);
    let template = lease(options.bytes);
    let called = Arc::clone(&times);
    let load = load::run(until(options), writers, move |index| {
        let mut client = clients[index % clients.len()].clone();
        let mut lease = template.clone();
        lease.meta_mut().name = format!("bench-{index}");
        let called = called.call(index);
        async move {
            called?;
            let object = Some(lease.into_object());
            Ok(client.create(CreateRequest { object }).await.map(drop)?)
        }
    })
    .await?;
    let late = seen(&times, load.milliseconds.len(), watcher).await?;
    let measured = Measured {
        load,
        late,
        server_cpu: control.cpu_seconds()? - cpu.0,
        clients_cpu: own_cpu_seconds()? - cpu.1,
    };
    control.stop();
    Ok(measured)
}

async fn peer(place: &Place, options: &Options, program: &Path, writers: usize) -> Result<Measured> {
    let folder = place.folder("etcd")?;
    let server = Server::start(program, &folder).await?;
    let clients = server.connections(options.connections).await?;
    let mut watching = server.connections(1).await?;
    let times = Times::new();
    let mut events = watching[0]
        .watch("bench-", Some(WatchOptions::new().with_prefix()))
        .await?;
    let watcher = tokio::spawn({
        let times = Arc::clone(&times);
        async move {
            while let Ok(Some(answer)) = events.message().await {
                let keys = answer.events().iter().filter_map(|event| event.kv()?.key_str().ok());
                keys.for_each(|key| times.told(key));
            }
        }
    });
    let cpu = (server.process.cpu_seconds()?, own_cpu_seconds()?);
    let value = vec![b'x'; options.bytes];
    let called = Arc::clone(&times);
    let load = load::run(until(options), writers, move |index| {
        let (mut client, value) = (clients[index % clients.len()].clone(), value.clone());
        let called = called.call(index);
        async move {
            called?;
            Ok(client.put(format!("bench-{index}"), value, None).await.map(drop)?)
        }
    })
    .await?;
    let late = seen(&times, load.milliseconds.len(), watcher).await?;
    Ok(Measured {
        load,
        late,
        server_cpu: server.process.cpu_seconds()? - cpu.0,
        clients_cpu: own_cpu_seconds()? - cpu.1,
    })
}

fn until(options: &Options) -> Until {
    Until::Time(Duration::from_secs(options.seconds))
}

/// Waits until the watcher has been told of as many as were written; how late it was, ascending.
async fn seen(times: &Times, written: usize, watcher: JoinHandle<()>) -> Result<Vec<f64>> {
    let end = Instant::now() + PATIENCE;
    while times.late().len() < written {
        let told = times.late().len();
        ensure!(
            !watcher.is_finished(),
            "the watch ended after {told} of {written} writes"
        );
        ensure!(
            Instant::now() < end,
            "the watcher was told of {told} of {written} writes"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    watcher.abort();
    let mut late = std::mem::take(&mut *times.late());
    late.sort_by(f64::total_cmp);
    Ok(late)
}

/// A lease whose stored form has about so many bytes.
fn lease(bytes: usize) -> Lease {
    let mut lease = Lease {
        metadata: Some(ObjectMeta {
            namespace: "default".into(),
            name: "bench-1000000".into(),
            // As the server gives them.
            uid: "00000000-0000-0000-0000-000000000000".into(),
            ..ObjectMeta::default()
        }),
        spec: Some(LeaseSpec {
            holder_identity: "bench".into(),
            lease_duration_seconds: Some(3600),
            ..LeaseSpec::default()
        }),
        ..Lease::default()
    };
    let filler = bytes.saturating_sub(lease.encoded_len() + 50);
    lease
        .meta_mut()
        .annotations
        .insert("bench".to_owned(), "x".repeat(filler));
    lease.meta_mut().uid.clear();
    lease
}
