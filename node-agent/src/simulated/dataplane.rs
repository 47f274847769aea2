//! A dataplane without a kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use orlop_proto::node::v1 as link;

use super::{lock, take_one};
use crate::dataplane::{Counters, Dataplane, DataplaneError, PodInterface, ServiceChanges, ServiceId};

/// Services in a map of this process.
#[derive(Debug, Default)]
pub struct SimulatedDataplane {
    services: Mutex<BTreeMap<ServiceId, Arc<link::Service>>>,
    upserts: AtomicU64,
    failures: AtomicU64,
    hooks: Mutex<Hooks>,
}

#[derive(Debug, Default)]
struct Hooks {
    attached: u64,
    /// Pods whose hooks somebody has detached.
    lost: BTreeSet<String>,
}

impl SimulatedDataplane {
    /// What is in force.
    pub fn services(&self) -> BTreeMap<ServiceId, Arc<link::Service>> {
        lock(&self.services).clone()
    }

    /// Services that differed when they were applied: map writes, on a real node.
    pub fn written(&self) -> u64 {
        self.upserts.load(Ordering::Relaxed)
    }

    /// Lets the next calls of `apply` fail.
    pub fn fail_next(&self, count: u64) {
        self.failures.store(count, Ordering::Relaxed);
    }

    /// Detaches a pod's hooks behind the agent's back.
    pub fn lose_hooks(&self, pod_uid: &str) {
        lock(&self.hooks).lost.insert(pod_uid.to_owned());
    }

    /// How often pods' hooks were attached.
    pub fn attached(&self) -> u64 {
        lock(&self.hooks).attached
    }
}

#[async_trait]
impl Dataplane for SimulatedDataplane {
    async fn apply(&self, changes: ServiceChanges) -> Result<(), DataplaneError> {
        if take_one(&self.failures) {
            return Err(DataplaneError::Full {
                map: "simulated".to_owned(),
            });
        }
        let mut services = lock(&self.services);
        let mut named = BTreeSet::new();
        for service in changes.upserts {
            let id = (service.namespace.clone(), service.name.clone());
            named.insert(id.clone());
            if services.get(&id) != Some(&service) {
                self.upserts.fetch_add(1, Ordering::Relaxed);
                services.insert(id, service);
            }
        }
        for id in changes.removals {
            services.remove(&id);
        }
        if changes.complete {
            services.retain(|id, _| named.contains(id));
        }
        Ok(())
    }

    async fn attach_pod(&self, interface: PodInterface) -> Result<(), DataplaneError> {
        let mut hooks = lock(&self.hooks);
        hooks.attached += 1;
        hooks.lost.remove(&interface.pod_uid);
        Ok(())
    }

    async fn repair(&self) -> Result<Vec<String>, DataplaneError> {
        Ok(lock(&self.hooks).lost.iter().cloned().collect())
    }

    async fn detach_pod(&self, _pod_uid: &str) -> Result<(), DataplaneError> {
        Ok(())
    }

    async fn read_counters(&self) -> Result<Counters, DataplaneError> {
        Ok(Counters::default())
    }

    fn serves(&self) -> bool {
        !lock(&self.services).is_empty()
    }

    fn health(&self) -> Result<(), String> {
        Ok(())
    }
}
