//! The endpoints of the service `default/kubernetes`: the control planes themselves.
//!
//! Each replica keeps a Lease in kube-system that holds its address. Who sees a Lease that was not renewed for a while removes it;
//! the slices are what the Leases say. So replicas never differ about the slices, whatever each has seen of the others. This runs
//! in every replica, whoever leads.

mod plan;

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddrV4,
    sync::Arc,
    time::Duration,
};

use orlop_proto::{
    Resource as _,
    coordination::v1::{Lease, LeaseSpec},
    discovery::v1::EndpointSlice,
    meta::v1::ObjectMeta,
    time,
};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::endpoint_slices::plan::SliceWrite;
use crate::{
    cache::{ObjectKey, Reader},
    model::endpoint_address,
    registry::{DeleteOptions, Preconditions, Registry, RegistryError},
};

/// Where the Leases are.
const NAMESPACE: &str = "kube-system";
/// Tells them from others: Kubernetes' label for who serves the API.
const LABEL: &str = "apiserver.kubernetes.io/identity";
/// Its value.
const IDENTITY: &str = "orlop-control";

/// How often what happens. The last two are Kubernetes' figures, or quicker.
#[derive(Debug, Clone)]
pub struct ApiEndpointTimes {
    /// How often is looked.
    pub look: Duration,
    /// How often the own Lease is renewed.
    pub renew: Duration,
    /// Other Leases that were not renewed for so long are removed.
    pub expire: Duration,
}

impl Default for ApiEndpointTimes {
    fn default() -> Self {
        Self {
            look: Duration::from_secs(1),
            renew: Duration::from_secs(5),
            expire: Duration::from_secs(15),
        }
    }
}

/// Runs until `cancel` says so; then, if there are other replicas, leaves the service to them.
pub async fn run(registry: Registry, own: Option<SocketAddrV4>, times: ApiEndpointTimes, cancel: CancellationToken) {
    match own {
        Some(address) => tracing::info!(%address, "pods reach control here, behind default/kubernetes"),
        None => tracing::info!("only this machine reaches control: default/kubernetes has no endpoint of ours"),
    }
    let mut ticks = tokio::time::interval(times.look);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut endpoints = ApiEndpoints {
        leases: registry.cache().reader(),
        slices: registry.cache().reader(),
        registry,
        own,
        times,
        renewed: None,
        looked: None,
        seen: HashMap::new(),
    };
    let looks = async {
        loop {
            ticks.tick().await;
            endpoints.look(Instant::now()).await;
        }
    };
    tokio::select! {
        () = cancel.cancelled() => {}
        () = looks => {}
    }
    endpoints.leave().await;
}

struct ApiEndpoints {
    registry: Registry,
    leases: Reader<Lease>,
    slices: Reader<EndpointSlice>,
    own: Option<SocketAddrV4>,
    times: ApiEndpointTimes,
    renewed: Option<Instant>,
    looked: Option<Instant>,
    /// The version of every Lease, and since when we see it.
    seen: HashMap<String, (String, Instant)>,
}

impl ApiEndpoints {
    async fn look(&mut self, now: Instant) {
        let leases = self.leases();
        if let Some(own) = self.own {
            let name = lease_name(own);
            let due = self
                .renewed
                .is_none_or(|renewed| now.duration_since(renewed) >= self.times.renew);
            if due || !leases.iter().any(|lease| lease.name() == name) {
                match self.renew(own).await {
                    Ok(()) => self.renewed = Some(now),
                    Err(error) => tracing::warn!(%error, "our endpoint of default/kubernetes could not be renewed"),
                }
            }
        }
        self.expire(&leases, now).await;
        // What was just written is seen at the next look.
        for write in plan::plan(&endpoints(&leases), &self.slices()) {
            match self.write(write).await {
                Ok(()) => {}
                Err(error) if error.is_conflict() || error.is_already_exists() || error.is_not_found() => {}
                Err(RegistryError::Precondition(_)) => {}
                Err(error) => tracing::warn!(%error, "the endpoints of default/kubernetes could not be written"),
            }
        }
    }

    fn leases(&self) -> Vec<Arc<Lease>> {
        identities(&self.leases)
    }

    /// The slices whose names begin as ours do.
    fn slices(&self) -> Vec<Arc<EndpointSlice>> {
        let snapshot = self.slices.snapshot();
        snapshot
            .objects
            .range(ObjectKey::new(plan::NAMESPACE, plan::SERVICE)..)
            .take_while(|(key, _)| &*key.namespace == plan::NAMESPACE && key.name.starts_with(plan::SERVICE))
            .map(|(_, slice)| slice)
            .collect()
    }

    async fn renew(&self, own: SocketAddrV4) -> Result<(), RegistryError> {
        let key = ObjectKey::new(NAMESPACE, &lease_name(own));
        let now = time::now();
        let seconds = i32::try_from(self.times.expire.as_secs()).unwrap_or(i32::MAX).max(1);
        let fill = |lease: &mut Lease| {
            lease.meta_mut().labels.insert(LABEL.to_owned(), IDENTITY.to_owned());
            let spec: &mut LeaseSpec = lease.spec.get_or_insert_default();
            spec.holder_identity = own.to_string();
            spec.lease_duration_seconds = Some(seconds);
            spec.renew_time = Some(now);
            true
        };
        match self.registry.modify(&key, fill).await {
            Err(error) if error.is_not_found() => {
                let mut lease = Lease {
                    metadata: Some(ObjectMeta {
                        name: key.name.to_string(),
                        namespace: NAMESPACE.to_owned(),
                        ..ObjectMeta::default()
                    }),
                    spec: Some(LeaseSpec {
                        acquire_time: Some(now),
                        ..LeaseSpec::default()
                    }),
                    ..Lease::default()
                };
                fill(&mut lease);
                self.registry.create(lease).await.map(drop)
            }
            other => other.map(drop),
        }
    }

    /// Removes Leases of replicas that are gone. With the version that we saw: one that was renewed meanwhile stays.
    async fn expire(&mut self, leases: &[Arc<Lease>], now: Instant) {
        let pause = self.looked.map_or(Duration::ZERO, |looked| now.duration_since(looked));
        self.looked = Some(now);
        let own = self.own.map(lease_name);
        let mut before = std::mem::take(&mut self.seen);
        for lease in leases.iter().filter(|lease| own.as_deref() != Some(lease.name())) {
            let version = lease.meta().resource_version.clone();
            let mut since = match before.remove(lease.name()) {
                Some((seen, since)) if seen == version => since,
                _ => now,
            };
            // Time during which we were stopped is nobody's silence.
            if pause > self.times.look * 3 && since != now {
                since += pause;
            }
            if now.saturating_duration_since(since) <= self.times.expire {
                self.seen.insert(lease.name().to_owned(), (version, since));
                continue;
            }
            match self.remove(lease, Some(version)).await {
                Ok(()) => tracing::warn!(lease = lease.name(), "a control plane is gone"),
                Err(error) => tracing::debug!(lease = lease.name(), %error, "its Lease could not be removed"),
            }
        }
    }

    async fn remove(&self, lease: &Lease, version: Option<String>) -> Result<(), RegistryError> {
        let options = DeleteOptions {
            preconditions: Preconditions {
                uid: Some(lease.uid().to_owned()),
                resource_version: version,
            },
            ..DeleteOptions::default()
        };
        self.registry
            .delete::<Lease>(&ObjectKey::of(lease), options)
            .await
            .map(drop)
    }

    async fn write(&self, write: SliceWrite) -> Result<(), RegistryError> {
        match write {
            SliceWrite::Create(slice) => self.registry.create(slice).await.map(drop),
            SliceWrite::Update(slice) => self.registry.update(slice).await.map(drop),
            SliceWrite::Delete(slice) => {
                let options = DeleteOptions {
                    preconditions: Preconditions {
                        uid: Some(slice.uid().to_owned()),
                        resource_version: None,
                    },
                    ..DeleteOptions::default()
                };
                self.registry
                    .delete::<EndpointSlice>(&ObjectKey::of(&*slice), options)
                    .await
                    .map(drop)
            }
        }
    }

    /// The last replica stays the endpoint: it comes back, or its sockets outlive it.
    async fn leave(&self) {
        let Some(name) = self.own.map(lease_name) else { return };
        let (own, others): (Vec<_>, Vec<_>) = self.leases().into_iter().partition(|lease| lease.name() == name);
        if others.is_empty() {
            return;
        }
        for lease in own {
            if let Err(error) = self.remove(&lease, None).await {
                tracing::debug!(%error, "our endpoint of default/kubernetes stays until it expires");
            }
        }
    }
}

fn lease_name(own: SocketAddrV4) -> String {
    format!("{IDENTITY}-{}-{}", own.ip(), own.port())
}

/// Where the replicas are reached, by the cache.
pub(crate) fn replicas(leases: &Reader<Lease>) -> BTreeSet<SocketAddrV4> {
    endpoints(&identities(leases))
}

fn identities(leases: &Reader<Lease>) -> Vec<Arc<Lease>> {
    let snapshot = leases.snapshot();
    snapshot
        .in_namespace(NAMESPACE)
        .map(|(_, lease)| lease)
        .filter(|lease| lease.meta().labels.get(LABEL).is_some_and(|value| value == IDENTITY))
        .collect()
}

/// What the Leases say; what is none of ours in content is passed over.
fn endpoints(leases: &[Arc<Lease>]) -> BTreeSet<SocketAddrV4> {
    let holders = leases
        .iter()
        .filter_map(|lease| Some(lease.spec.as_ref()?.holder_identity.as_str()));
    holders
        .filter_map(|holder| holder.parse::<SocketAddrV4>().ok())
        .filter(|address| address.port() != 0 && endpoint_address(&address.ip().to_string()).is_ok())
        .collect()
}

#[cfg(test)]
mod tests;
