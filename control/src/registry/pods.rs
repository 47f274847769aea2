//! What only pods have: a binding to a node, and a node that says when they are gone.

use std::sync::Arc;

use futures::StreamExt as _;
use orlop_proto::{
    Resource as _,
    core::v1::{Pod, PodCondition},
};

use super::{
    Registry, RegistryError,
    write::{conflict, now},
};
use crate::cache::ObjectKey;

/// Kubernetes' default of `spec.terminationGracePeriodSeconds`.
const DEFAULT_GRACE: i64 = 30;
const ATTEMPTS: usize = 64;
/// Bindings under way at once: they share the store's commits.
const BINDINGS: usize = 1024;

/// A pod and the node that it is to run on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The pod.
    pub pod: ObjectKey,
    /// Its uid: a namesake is not bound.
    pub uid: String,
    /// The node's name.
    pub node: String,
}

impl Registry {
    /// Binds a pod that is not bound and not deleted; condition PodScheduled becomes True. Binding it again to the same node
    /// changes nothing.
    pub async fn bind_pod(&self, binding: &Binding) -> Result<Pod, RegistryError> {
        let key = &binding.pod;
        let cached = self.cache.reader::<Pod>().get(&key.namespace, &key.name);
        let mut old = match cached.filter(|cached| is_bindable(cached, binding)) {
            Some(cached) => cached,
            None => Arc::new(self.read(key).await?),
        };
        for _ in 0..ATTEMPTS {
            let meta = old.meta();
            if meta.uid != binding.uid {
                return Err(conflict::<Pod>(
                    key,
                    format!("its uid is {}, not {}", meta.uid, binding.uid),
                ));
            }
            let bound = old.spec.as_ref().map_or("", |spec| spec.node_name.as_str());
            if bound == binding.node {
                return Ok(Pod::clone(&old));
            }
            if !bound.is_empty() {
                return Err(conflict::<Pod>(key, format!("it is already bound to node {bound}")));
            }
            if old.is_deleting() {
                return Err(conflict::<Pod>(key, "it is being deleted"));
            }
            let mut new = Pod::clone(&old);
            new.spec.get_or_insert_default().node_name.clone_from(&binding.node);
            set_scheduled(&mut new);
            if let Some(stored) = self.put(&*old, new).await? {
                return Ok(stored);
            }
            old = Arc::new(self.read(key).await?);
        }
        Err(conflict::<Pod>(key, "others kept writing it"))
    }

    /// Binds many pods at once, each on its own: results in the order of the bindings.
    pub async fn bind_pods(&self, bindings: Vec<Binding>) -> Vec<Result<Pod, RegistryError>> {
        let work = futures::stream::iter(bindings).map(|binding| async move { self.bind_pod(&binding).await });
        work.buffered(BINDINGS).collect().await
    }

    /// The node says that nothing of this deleted pod is left: its object goes (or loses its last hold, when it has finalizers).
    /// A pod that is not there, or that is another one of the same name, is a success.
    pub async fn confirm_pod_gone(&self, namespace: &str, name: &str, uid: &str) -> Result<(), RegistryError> {
        let key = ObjectKey::new(namespace, name);
        for _ in 0..ATTEMPTS {
            let old: Pod = match self.read(&key).await {
                Err(error) if error.is_not_found() => return Ok(()),
                other => other?,
            };
            let meta = old.metadata.clone().unwrap_or_default();
            if meta.uid != uid {
                return Ok(());
            }
            if meta.deletion_timestamp.is_none() {
                return Err(RegistryError::Precondition(format!("pod {key} is not being deleted")));
            }
            let mut new = old.clone();
            new.metadata.get_or_insert_default().deletion_grace_period_seconds = Some(0);
            if self.put(&old, new).await?.is_some() {
                return Ok(());
            }
        }
        Err(conflict::<Pod>(&key, "others kept writing it"))
    }
}

/// Whether the cache's copy is good enough to try with; whatever is surprising is asked of the store.
fn is_bindable(pod: &Pod, binding: &Binding) -> bool {
    let bound = pod.spec.as_ref().is_some_and(|spec| !spec.node_name.is_empty());
    let meta = pod.metadata.as_ref();
    !bound && meta.is_some_and(|meta| meta.uid == binding.uid && meta.deletion_timestamp.is_none())
}

fn set_scheduled(pod: &mut Pod) {
    let condition = PodCondition {
        r#type: "PodScheduled".to_owned(),
        status: "True".to_owned(),
        last_transition_time: Some(now()),
        ..PodCondition::default()
    };
    let conditions = &mut pod.status.get_or_insert_default().conditions;
    match conditions.iter_mut().find(|present| present.r#type == condition.r#type) {
        Some(present) => *present = condition,
        None => conditions.push(condition),
    }
}

/// Seconds until a deleted pod's containers are killed. 0: nobody has to be waited for.
pub(super) fn grace(pod: &Pod, asked: Option<i64>) -> i64 {
    let spec = pod.spec.clone().unwrap_or_default();
    let ended = pod
        .status
        .as_ref()
        .is_some_and(|status| matches!(&*status.phase, "Succeeded" | "Failed"));
    if spec.node_name.is_empty() || ended {
        return 0;
    }
    let seconds = asked.or(spec.termination_grace_period_seconds).unwrap_or(DEFAULT_GRACE);
    // As Kubernetes: below zero means "at once, but let the node know".
    if seconds < 0 { 1 } else { seconds }
}
