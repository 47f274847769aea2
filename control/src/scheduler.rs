//! The scheduler: gives every pod a node.
//!
//! [`schedule`] is pure: filter, score, choose, over a [`ClusterView`] that single events keep up to date. The [`driver`] is a
//! thin loop around it: what is decided is reserved in the view at once, bound in batches beside the loop, and the reservation
//! ends when the cache shows the pod on its node or the binding failed.

pub mod affinity;
mod counts;
mod decide;
mod driver;
mod likeness;
mod named;
mod node_sets;
mod queue;
pub mod resources;
mod spread;
pub mod taints;
mod tally;
#[cfg(test)]
mod tests;
mod view;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{events::Recorder, registry::Registry};

pub use decide::{Decision, Diagnosis, Misfit, Scheduled, Shortage, fits, schedule};
pub use named::Named;
pub use queue::Queue;
pub use spread::SpreadMisfit;
pub use view::{ClusterView, NodeInfo, PodInfo, is_terminal};

/// Starts the scheduler. It reads the registry's cache and ends when `cancel` says so.
pub fn spawn(registry: Registry, recorder: Recorder, cancel: CancellationToken) -> JoinHandle<()> {
    let driver = driver::Driver::new(registry, recorder.from_component("default-scheduler"));
    tokio::spawn(driver.run(cancel))
}
