//! The agent as a whole: all its parts, wired. The real node and the simulated one differ only in the three traits below it.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    panic::AssertUnwindSafe,
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures::FutureExt as _;
use orlop_proto::{
    core::v1::{Event, ObjectReference},
    time,
};
use tokio::{sync::mpsc, time::sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::{Config, ConfigError},
    dataplane::{self, Dataplane, DataplaneError, EbpfDataplane},
    identity::{Identity, IdentityError},
    ledger::{Ledger, LedgerError},
    link::{self, Applier, Dial, Hello, Reports, TlsDialer},
    metrics::{self, Latest},
    network::{CniNetwork, Network, Settings as NetworkSettings},
    node_status,
    reconciler::{self, Inputs},
    runtime::{
        Runtime, RuntimeError,
        cgroup::Cgroups,
        containerd::{Containerd, Options},
        garbage,
    },
};

/// How long the parts may take to end; pods do not depend on it.
const DRAIN: Duration = Duration::from_secs(5);

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Its configuration.
    #[error("configuration")]
    Config(#[from] ConfigError),
    /// Its identity's files.
    #[error("identity")]
    Identity(#[from] IdentityError),
    /// The ledger's folder.
    #[error("ledger")]
    Ledger(#[from] LedgerError),
    /// The container runtime.
    #[error("container runtime")]
    Runtime(#[from] RuntimeError),
    /// The kernel's programs.
    #[error("dataplane")]
    Dataplane(#[from] DataplaneError),
    /// No address by which other nodes reach this one.
    #[error("no node_address is configured, and none is found")]
    NoAddress,
    /// A part ended in a panic.
    #[error("the agent's {0} ended in a panic")]
    Part(&'static str),
    /// The dataplane's start ended in a panic.
    #[error("a part of the agent failed: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// What an agent is made of.
pub struct Parts {
    /// Its configuration.
    pub config: Config,
    /// The node's address.
    pub address: IpAddr,
    /// How control is reached.
    pub dial: Arc<dyn Dial>,
    /// The containers.
    pub runtime: Arc<dyn Runtime>,
    /// The pods' network.
    pub network: Arc<dyn Network>,
    /// The kernel's programs and maps.
    pub dataplane: Arc<dyn Dataplane>,
    /// Reads cgroups and `/proc`.
    pub reader: metrics::Reader,
    /// Times of the reconciler.
    pub reconciler: reconciler::Settings,
}

/// Runs the real agent until `stop`. Pods, their traffic and their logs go on afterwards.
pub async fn run(mut config: Config, stop: CancellationToken) -> Result<(), AgentError> {
    node_status::check_reserved(&config)?;
    let identity = Arc::new(Identity::open(&config)?);
    let tasks = TaskTracker::new();
    let keeper = Arc::clone(&identity);
    let ending = stop.clone();
    tasks.spawn(async move { keeper.keep(ending).await });

    let address = node_address(&config, &stop).await.ok_or(AgentError::NoAddress)?;
    config.node_address = Some(address);
    let dataplane_config = dataplane_config(&config);
    let dataplane = tokio::task::spawn_blocking(move || EbpfDataplane::start(dataplane_config)).await??;
    let cgroups = Cgroups::detect()?;
    let source = Arc::clone(&identity);
    let parts = Parts {
        address,
        dial: Arc::new(TlsDialer::new(config.control.clone(), Arc::new(move || source.tls()))),
        runtime: Arc::new(Containerd::new(Options::from_config(&config))?),
        network: Arc::new(CniNetwork::new(NetworkSettings::new(&config))),
        dataplane: Arc::new(dataplane),
        reader: metrics::Reader::new(cgroups, metric_paths(&config)),
        reconciler: reconciler::Settings::from_config(&config, vec![address]),
        config,
    };
    let joined = async move { identity.joined().await };
    let result = run_parts(parts, joined, stop.clone()).await;
    stop.cancel();
    tasks.close();
    let _late = tokio::time::timeout(DRAIN, tasks.wait()).await;
    result
}

/// Runs an agent of these parts until `stop`; control is dialled when `joined` is done.
pub async fn run_parts(
    parts: Parts,
    joined: impl Future<Output = ()> + Send + 'static,
    stop: CancellationToken,
) -> Result<(), AgentError> {
    let Parts {
        config,
        address,
        dial,
        runtime,
        network,
        dataplane,
        reader,
        reconciler,
    } = parts;
    let (ledger, desired, damage) = Ledger::open(&config.data_dir)?;
    tracing::info!(
        node = config.node_name, %address, pods = desired.pods.len(), services = desired.services.len(),
        complete = desired.complete, damaged = damage.len(), "agent starts"
    );
    let reports = Reports::default();
    let latest = Latest::default();
    let tasks = Tasks::new(&stop);
    let stop = tasks.stop.clone();
    let (applier, handle, desired) = Applier::new(ledger, desired, Arc::clone(&dataplane), Arc::clone(&network));
    tasks.spawn("applier", applier.run(stop.clone()));

    let (updates, pods) = mpsc::channel(256);
    let (events, mut told) = mpsc::channel(256);
    let (used, gc) = (Arc::clone(&runtime), config.images.gc.clone());
    tasks.spawn(
        "image garbage collection",
        garbage::run(used, desired.clone(), gc, stop.clone()),
    );
    // Ends with the reconciler, which holds the other side.
    tasks.spawn("pod updates", link::carry(pods, desired.clone(), reports.clone()));
    let inputs = Inputs {
        desired,
        runtime: Arc::clone(&runtime),
        network: Arc::clone(&network),
        dataplane: Arc::clone(&dataplane),
        updates,
        events,
        settings: reconciler,
    };
    tasks.spawn("reconciler", reconciler::run(inputs, stop.clone()));
    let queue = reports.clone();
    queue.event(starting(&config.node_name));
    tasks.spawn("events", async move {
        // Ends with the reconciler, too.
        while let Some(event) = told.recv().await {
            queue.event(event);
        }
    });

    let sources = node_status::Sources {
        ledger: handle.ledger(),
        runtime: Arc::clone(&runtime),
        network: Arc::clone(&network),
        dataplane: Arc::clone(&dataplane),
    };
    let status = node_status::run(config.clone(), address, sources, reports.clone(), stop.clone());
    tasks.spawn("node status", status);
    let sources = metrics::Sources {
        node_name: config.node_name.clone(),
        runtime,
        dataplane,
        reader,
        interval: Duration::from_secs(config.metrics_interval_seconds),
    };
    tasks.spawn(
        "metrics",
        metrics::run(sources, latest.clone(), reports.clone(), stop.clone()),
    );
    let (socket, ending) = (config.metrics_socket.clone(), stop.clone());
    tasks.spawn("metrics page", async move {
        if let Err(error) = metrics::serve(&socket, latest, ending).await {
            tracing::error!(%error, socket = %socket.display(), "metrics are not served");
        }
    });

    let hello = hello(&config);
    let ending = stop.clone();
    tasks.spawn("link", async move {
        tokio::select! {
            () = joined => link::run(dial, hello, handle, reports, ending).await,
            () = ending.cancelled() => {}
        }
    });
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::debug!(%error, "no service manager was told");
    }
    tasks.end().await
}

/// The parts of a running agent. One that panics ends them all: half an agent would look alive, and the service manager
/// starts a whole one.
struct Tasks {
    tracker: TaskTracker,
    stop: CancellationToken,
    failed: Arc<OnceLock<&'static str>>,
}

impl Tasks {
    fn new(stop: &CancellationToken) -> Self {
        Self {
            tracker: TaskTracker::new(),
            stop: stop.child_token(),
            failed: Arc::default(),
        }
    }

    fn spawn(&self, part: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        let (stop, failed) = (self.stop.clone(), Arc::clone(&self.failed));
        self.tracker.spawn(async move {
            if AssertUnwindSafe(work).catch_unwind().await.is_err() {
                failed.get_or_init(|| part);
                stop.cancel();
            }
        });
    }

    /// Waits until they are to stop, and until they have.
    async fn end(self) -> Result<(), AgentError> {
        self.stop.cancelled().await;
        self.tracker.close();
        if tokio::time::timeout(DRAIN, self.tracker.wait()).await.is_err() {
            tracing::warn!(tasks = self.tracker.len(), "parts cut off at the end");
        }
        self.failed.get().map_or(Ok(()), |part| Err(AgentError::Part(part)))
    }
}

/// The dataplane's part of the configuration.
pub fn dataplane_config(config: &Config) -> dataplane::Config {
    dataplane::Config {
        bpffs: config.bpffs.clone(),
        instance: config.instance(),
        cgroup_root: None,
        sizes: config.dataplane,
    }
}

/// Where the metrics' files are.
pub fn metric_paths(config: &Config) -> metrics::Paths {
    metrics::Paths {
        log_dir: config.log_dir.clone(),
        data_dir: config.data_dir.clone(),
        cgroup_parent: format!("/orlop/{}", config.instance()),
    }
}

/// The event of an agent's start.
fn starting(node_name: &str) -> Event {
    let now = time::now_seconds();
    Event {
        involved_object: Some(ObjectReference {
            kind: "Node".to_owned(),
            name: node_name.to_owned(),
            ..ObjectReference::default()
        }),
        r#type: "Normal".to_owned(),
        reason: "Starting".to_owned(),
        message: "Starting orlop-node.".to_owned(),
        count: 1,
        first_timestamp: Some(now),
        last_timestamp: Some(now),
        ..Event::default()
    }
}

fn hello(config: &Config) -> Hello {
    let labels = [
        ("kubernetes.io/hostname", config.node_name.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", node_status::architecture()),
    ];
    Hello {
        node_name: config.node_name.clone(),
        boot_id: node_status::boot_id(),
        labels: labels
            .into_iter()
            .map(|(label, value)| (label.to_owned(), value.to_owned()))
            .collect(),
    }
}

/// The configured address, or the one that packets to control, or to anywhere, would leave from. Waits for the network to
/// come up; `None` when it was stopped before that.
async fn node_address(config: &Config, stop: &CancellationToken) -> Option<IpAddr> {
    if let Some(address) = config.node_address {
        return Some(address);
    }
    let mut told = false;
    loop {
        for address in &config.control {
            if let Some(found) = source_address(&authority(address)).await {
                return Some(found);
            }
        }
        // A documentation address: the default route's interface answers for it, and nothing is sent.
        if let Some(found) = source_address("192.0.2.1:9").await {
            return Some(found);
        }
        if !told {
            told = true;
            tracing::warn!("no node_address is configured and no route is there yet; waiting for one");
        }
        tokio::select! {
            () = sleep(Duration::from_secs(1)) => {}
            () = stop.cancelled() => return None,
        }
    }
}

fn authority(address: &str) -> String {
    let rest = address.trim_start_matches("https://").trim_end_matches('/');
    let has_port = rest
        .rsplit_once(':')
        .is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    if has_port {
        rest.to_owned()
    } else {
        format!("{rest}:6443")
    }
}

/// What the kernel would send from: connecting a UDP socket sends nothing.
async fn source_address(to: &str) -> Option<IpAddr> {
    let targets: Vec<SocketAddr> = tokio::net::lookup_host(to).await.ok()?.collect();
    targets.into_iter().find_map(|target| {
        let any: SocketAddr = if target.is_ipv4() {
            ([0, 0, 0, 0], 0).into()
        } else {
            ([0u16; 8], 0).into()
        };
        let socket = UdpSocket::bind(any).ok()?;
        socket.connect(target).ok()?;
        let address = socket.local_addr().ok()?.ip();
        (!address.is_loopback() && !address.is_unspecified()).then_some(address)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities() {
        assert_eq!(authority("https://control.example:7000/"), "control.example:7000");
        assert_eq!(authority("https://control.example"), "control.example:6443");
        assert_eq!(authority("https://[2001:db8::1]:7000"), "[2001:db8::1]:7000");
    }

    #[tokio::test]
    async fn a_part_that_panics_ends_the_agent_with_an_error() {
        let outer = CancellationToken::new();
        let tasks = Tasks::new(&outer);
        let stop = tasks.stop.clone();
        tasks.spawn("other", async move { stop.cancelled().await });
        tasks.spawn("bad", async { panic!("as a bug would") });
        assert!(matches!(tasks.end().await, Err(AgentError::Part("bad"))));
        let tasks = Tasks::new(&outer);
        outer.cancel();
        assert!(tasks.end().await.is_ok());
    }
}
