//! What the node was told: the input of the reconciler, the dataplane and the routes.

pub mod services;

use std::sync::Arc;

use imbl::OrdMap;
use orlop_proto::{core::v1::Pod, node::v1 as link};

pub use services::Services;

/// Other nodes' ranges, by node name. A change copies the keys beside it, thousands of times while a large cluster comes up: they
/// are shared.
pub type Routes = OrdMap<Arc<str>, Arc<link::Route>>;

/// All that concerns this node, as control last said it. A clone costs a few pointers, and a change copies only the path
/// to what changed: the maps are persistent. Handed on through a `tokio::sync::watch`.
///
/// Services' changes go to the dataplane one by one (see `link`); what the reconciler needs of them (environment
/// variables) is [`Desired::services`], which shares its records.
#[derive(Debug, Clone, Default)]
pub struct Desired {
    /// Pods bound to this node, by uid.
    pub pods: OrdMap<String, Arc<Pod>>,
    /// Services.
    pub services: Services,
    /// Other nodes' ranges.
    pub routes: Routes,
    /// The node's own and the cluster's ranges; `None` until control has said it for the first time.
    pub ranges: Option<Arc<link::Welcome>>,
    /// A whole snapshot has arrived (now, or in an earlier life and the ledger has it). Until then nothing that is
    /// found running and is not named here may be removed.
    pub complete: bool,
}
