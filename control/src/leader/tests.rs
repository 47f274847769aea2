//! Elections over a real etcd; each replica has a connection, a cache and a registry of its own.

use std::sync::Mutex;

use orlop_proto::{
    Resource as _,
    core::v1::{Container, Pod, PodSpec},
    meta::v1::ObjectMeta,
};

use super::*;
use crate::{
    cache::{Cache, ObjectKey},
    registry::{DeleteOptions, RegistryConfig},
    store::{Revision, contract::etcd},
};

/// For a machine that is ten times slower than it should be.
const LONG: Duration = Duration::from_secs(120);

struct Replica {
    registry: Registry,
    standing: Standing,
    shutdown: CancellationToken,
    election: JoinHandle<()>,
    writers: Arc<Mutex<Vec<JoinHandle<Revision>>>>,
}

fn times() -> LeaderConfig {
    LeaderConfig {
        lease_duration: Duration::from_secs(3),
        renew_deadline: Duration::from_secs(2),
        retry_period: Duration::from_millis(200),
    }
}

async fn replica(etcd: &etcd::Etcd, name: &'static str) -> Replica {
    replica_with(etcd, name, times()).await
}

async fn replica_with(etcd: &etcd::Etcd, name: &'static str, times: LeaderConfig) -> Replica {
    let store = etcd.connect().await;
    let cache = Cache::start(store.clone()).await;
    let registry = Registry::new(store, cache, RegistryConfig::default());
    registry.ensure_bootstrap().await.unwrap();
    let shutdown = CancellationToken::new();
    let election = Election::new(registry.clone(), name.to_owned(), times, shutdown.clone());
    let standing = election.standing();
    let writers: Arc<Mutex<Vec<JoinHandle<Revision>>>> = Arc::default();
    let kept = writers.clone();
    let election = tokio::spawn(election.run(move |registry, over| {
        kept.lock()
            .unwrap()
            .push(tokio::spawn(write_until_fenced(registry.clone(), name)));
        let over = over.clone();
        vec![tokio::spawn(async move { over.cancelled().await })]
    }));
    Replica {
        registry,
        standing,
        shutdown,
        election,
        writers,
    }
}

/// A controller that has lost its reason: it hears of no end of its term, and only the store stops it. Returns its last write.
async fn write_until_fenced(registry: Registry, name: &'static str) -> Revision {
    let mut last = 0;
    loop {
        match registry.create(pod(name)).await {
            Ok(pod) => last = pod.meta().resource_version.parse().unwrap(),
            Err(RegistryError::Fenced(_)) => return last,
            Err(error) => tracing::info!(%error, "once more"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn pod(writer: &str) -> Pod {
    let container = Container {
        name: "app".to_owned(),
        image: "web:1".to_owned(),
        ..Container::default()
    };
    Pod {
        metadata: Some(ObjectMeta {
            generate_name: format!("{writer}-"),
            namespace: "default".to_owned(),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec {
            containers: vec![container],
            ..PodSpec::default()
        }),
        ..Pod::default()
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !holds() {
        assert!(begun.elapsed() < LONG, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl Replica {
    async fn leads(&self) {
        let standing = self.standing.clone();
        until("it leads", move || standing.is_leading()).await;
    }

    async fn holder(&self) -> String {
        let lease = self.registry.leadership().await.unwrap();
        lease.spec.unwrap_or_default().holder_identity
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.election.await.unwrap();
        for writer in self.writers.lock().unwrap().drain(..) {
            writer.abort();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_lost_is_replaced_and_cannot_write_any_more() {
    let etcd = etcd::bench().await;
    let first = replica(&etcd, "first").await;
    first.leads().await;
    // A term's tasks begin when the cache has its claim.
    until("it writes", || !first.writers.lock().unwrap().is_empty()).await;
    let (second, third) = (replica(&etcd, "second").await, replica(&etcd, "third").await);
    assert_eq!(second.holder().await, "first");
    assert!(!second.standing.is_leading() && !third.standing.is_leading());

    // Its election ends as in a process that was stopped; what it had begun goes on writing, as in one that goes on.
    first.election.abort();
    until("another leads", || {
        second.standing.is_leading() || third.standing.is_leading()
    })
    .await;
    let writer = first.writers.lock().unwrap().pop().unwrap();
    let last = tokio::time::timeout(LONG, writer)
        .await
        .expect("the fence ends it")
        .unwrap();
    assert!(last > 0, "it had written before");
    assert!(first.registry.fenced_writes() > 0);
    let next = if second.standing.is_leading() { &second } else { &third };
    let lease = next.registry.leadership().await.unwrap();
    assert_eq!(lease.spec.as_ref().unwrap().lease_transitions, Some(2));
    // The two terms do not overlap in the store's history.
    let mine = format!("{}-", lease.spec.unwrap().holder_identity);
    next.registry.cache().catch_up(LONG).await.unwrap();
    let pods = next.registry.cache().reader::<Pod>().snapshot();
    let begun = pods
        .objects
        .values()
        .filter(|pod| pod.name().starts_with(&mine))
        .filter_map(|pod| pod.meta().resource_version.parse::<Revision>().ok())
        .min();
    assert!(begun.is_none_or(|begun| begun > last), "{begun:?} after {last}");
    second.stop().await;
    third.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_stops_leaves_and_one_that_begins_again_takes_up_its_own() {
    let etcd = etcd::bench().await;
    let first = replica(&etcd, "first").await;
    until("it writes", || !first.writers.lock().unwrap().is_empty()).await;
    let registry = first.registry.clone();
    let stale = first.writers.lock().unwrap().pop().unwrap();
    first.stop().await;
    assert_eq!(registry.leadership().await.unwrap().spec.unwrap().holder_identity, "");
    // The fence is the term's: after the claim was left it still holds until somebody takes the next.
    let again = replica(&etcd, "first").await;
    again.leads().await;
    tokio::time::timeout(LONG, stale)
        .await
        .expect("the new term fences it")
        .unwrap();
    // As after kill -9: the Lease names it, and it need not wait for itself.
    again.election.abort();
    let third = replica(&etcd, "first").await;
    third.leads().await;
    third.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_outlives_a_deleted_lease_and_steps_down_for_an_edited_one() {
    let etcd = etcd::bench().await;
    // On a slow machine too, its claim is not lost by the time.
    let times = LeaderConfig {
        lease_duration: Duration::from_secs(120),
        renew_deadline: Duration::from_secs(100),
        ..times()
    };
    let only = replica_with(&etcd, "only", times).await;
    only.leads().await;
    let key = ObjectKey::new("kube-system", "orlop-control");
    let before = only.registry.leadership().await.unwrap();
    only.registry
        .delete::<Lease>(&key, DeleteOptions::default())
        .await
        .unwrap();
    let mut renewed = false;
    for _ in 0..1000 {
        let lease = only.registry.leadership().await.unwrap();
        if lease.uid() != before.uid() && lease.spec.unwrap_or_default().holder_identity == "only" {
            renewed = true;
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(renewed, "the Lease is written again");
    assert_eq!(only.standing.terms.load(Ordering::Relaxed), 1, "in the same term");

    let edit = |lease: &mut Lease| {
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = "nobody".to_owned();
        spec.lease_duration_seconds = Some(1);
        true
    };
    only.registry.modify::<Lease, _>(&key, edit).await.unwrap();
    let standing = only.standing.clone();
    until("it leads again, in a new term", move || {
        standing.is_leading() && standing.terms.load(Ordering::Relaxed) == 2
    })
    .await;
    only.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_store_nobody_leads_and_afterwards_somebody_does() {
    let mut etcd = etcd::bench().await;
    let only = replica(&etcd, "only").await;
    only.leads().await;
    etcd.stop();
    let standing = only.standing.clone();
    until("its term is over", move || !standing.is_leading()).await;
    etcd.run();
    only.leads().await;
    only.stop().await;
}

#[tokio::test]
async fn a_claim_expires_by_the_clock_of_who_looks() {
    let lease = |holder: &str, version: &str| {
        let mut lease = Lease::default();
        lease.meta_mut().resource_version = version.to_owned();
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = holder.to_owned();
        spec.lease_duration_seconds = Some(3);
        lease
    };
    let begun = Instant::now();
    let at = |seconds: u64| begun + Duration::from_secs(seconds);
    let mut seen = Sighting::new("me");
    let mut may = |holder: &str, version: &str, seconds: u64| {
        seen.may_take(&lease(holder, version), Duration::from_secs(8), at(seconds))
    };
    assert!(!may("other", "1", 0));
    assert!(!may("other", "1", 2));
    assert!(!may("other", "2", 4), "it was renewed");
    assert!(!may("other", "2", 6));
    assert!(may("other", "2", 7));
    assert!(may("", "3", 7), "it was left");
    assert!(!may("me", "4", 8), "a copy of ours: another process");
    assert!(Sighting::new("me").may_take(&lease("me", "4"), Duration::from_secs(8), at(8)));
}

#[test]
fn a_replica_keeps_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let name = identity(directory.path()).unwrap();
    assert_eq!(identity(directory.path()).unwrap(), name);
    let other = tempfile::tempdir().unwrap();
    assert_ne!(identity(other.path()).unwrap(), name);
}
