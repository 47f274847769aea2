//! Resource metrics: the programs' counters joined with what cgroup files, `/proc` and the file system say.
//!
//! Read every few seconds, streamed to control over the link, and served as Prometheus text on a unix socket.

mod join;
#[doc(hidden)]
pub mod readings;
mod serve;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, RwLock},
    time::{Duration, SystemTime},
};

use orlop_proto::metrics::v1::NodeReport;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

pub use join::{ContainerReading, Joiner, NodeReading, PodReading, Readings};
pub use readings::Reader;
pub use serve::serve;

use crate::{dataplane::Dataplane, link::Reports, runtime::Runtime};

/// What the writable layers hold is asked for this often: containerd walks them.
const DISK_USAGE: Duration = Duration::from_secs(30);

/// The latest report, shared with the page.
#[derive(Debug, Clone, Default)]
pub struct Latest(Arc<RwLock<Option<Arc<NodeReport>>>>);

impl Latest {
    /// As Prometheus text; empty before the first reading.
    pub fn prometheus(&self) -> String {
        let report = self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        orlop_proto::prometheus_text(report.as_slice())
    }

    fn set(&self, report: NodeReport) {
        *self.0.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(Arc::new(report));
    }
}

/// What is measured, and where.
pub struct Sources {
    /// The node's name.
    pub node_name: String,
    /// Knows the containers.
    pub runtime: Arc<dyn Runtime>,
    /// Has the programs' counters.
    pub dataplane: Arc<dyn Dataplane>,
    /// Reads cgroup files.
    pub reader: Reader,
    /// Between two readings.
    pub interval: Duration,
}

/// Where files are.
#[derive(Debug, Clone)]
pub struct Paths {
    /// Containers' logs.
    pub log_dir: PathBuf,
    /// The file system that counts as the node's.
    pub data_dir: PathBuf,
    /// Below the roots of the cgroup hierarchies: `/orlop/INSTANCE`.
    pub cgroup_parent: String,
}

/// Measures and reports until `stop`.
pub async fn run(sources: Sources, latest: Latest, reports: Reports, stop: CancellationToken) {
    let mut joiner = Joiner::new(&sources.node_name);
    let mut ticks = interval(sources.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut disks = BTreeMap::new();
    let mut disks_read: Option<Instant> = None;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        if disks_read.is_none_or(|at| at.elapsed() >= DISK_USAGE) {
            disks_read = Some(Instant::now());
            match sources.runtime.disk_usage().await {
                Ok(usage) => disks = usage,
                Err(error) => tracing::debug!(%error, "writable layers not measured"),
            }
        }
        match read(&sources, &disks).await {
            Ok(readings) => {
                let report = joiner.join(&readings, SystemTime::now());
                latest.set(report.clone());
                reports.metrics(report);
            }
            Err(error) => tracing::warn!(error, "no metrics this time"),
        }
    }
}

async fn read(sources: &Sources, disks: &BTreeMap<String, u64>) -> Result<Readings, String> {
    let observed = sources.runtime.observe().await.map_err(|error| error.to_string())?;
    let counters = sources
        .dataplane
        .read_counters()
        .await
        .map_err(|error| error.to_string())?;
    let (reader, disks) = (sources.reader.clone(), disks.clone());
    // Small files, but many of them, and a log folder may be large.
    tokio::task::spawn_blocking(move || reader.read(&observed, counters, &disks))
        .await
        .map_err(|error| error.to_string())?
        .map_err(|error| error.to_string())
}
