//! What the node was told: the input of the reconciler, the dataplane and the routes.

use std::{collections::BTreeMap, sync::Arc};

use orlop_proto::{core::v1::Pod, node::v1 as link};

/// All that concerns this node, as control last said it. Cheap to clone; handed on through a `tokio::sync::watch`.
///
/// Services do not travel here: there are many, they change often, and their changes go to the dataplane one by one
/// (see `link`); what the reconciler needs of them (environment variables) is [`Desired::services`], an index that shares
/// its records.
#[derive(Debug, Clone, Default)]
pub struct Desired {
    /// Pods bound to this node, by uid.
    pub pods: Arc<BTreeMap<String, Arc<Pod>>>,
    /// Services by (namespace, name).
    pub services: Arc<BTreeMap<(String, String), Arc<link::Service>>>,
    /// Other nodes' ranges, by node name.
    pub routes: Arc<BTreeMap<String, link::Route>>,
    /// The node's own and the cluster's ranges; `None` until control has said it for the first time.
    pub ranges: Option<link::Welcome>,
    /// A whole snapshot has arrived (now, or in an earlier life and the ledger has it). Until then nothing that is
    /// found running and is not named here may be removed.
    pub complete: bool,
}
