//! The loop over a runtime in memory: pods do not wait for each other, and nothing is done twice at once.

mod fake;

use std::{path::PathBuf, sync::atomic::Ordering};

use orlop_proto::core::v1::{Container, PodSpec};

use super::*;
use crate::network::PodNetwork;
use fake::Fake;

struct Loop {
    fake: Fake,
    desired: watch::Sender<Arc<Desired>>,
    updates: mpsc::Receiver<PodUpdate>,
    events: mpsc::Receiver<Event>,
    latest: BTreeMap<String, PodUpdate>,
    stop: CancellationToken,
}

impl Loop {
    fn start(fake: Fake) -> Self {
        Self::start_with(fake, Settings::default().resync)
    }

    fn start_with(fake: Fake, resync: Duration) -> Self {
        let (desired, receive) = watch::channel(Arc::new(Desired {
            complete: true,
            ..Desired::default()
        }));
        let (sender, updates) = mpsc::channel(4);
        let (say, events) = mpsc::channel(256);
        let stop = CancellationToken::new();
        let inputs = Inputs {
            desired: receive,
            runtime: fake.runtime.clone(),
            network: fake.network.clone(),
            dataplane: fake.dataplane.clone(),
            updates: sender,
            events: say,
            settings: Settings {
                backoff_initial: Duration::from_millis(20),
                resync,
                ..Settings::default()
            },
        };
        tokio::spawn(run(inputs, stop.clone()));
        Self {
            fake,
            desired,
            updates,
            events,
            latest: BTreeMap::new(),
            stop,
        }
    }

    fn want(&self, uid: &str, image: &str, change: impl FnOnce(&mut Pod)) {
        let container = Container {
            name: "a".into(),
            image: image.into(),
            ..Default::default()
        };
        let spec = PodSpec {
            containers: vec![container],
            restart_policy: "Always".into(),
            ..Default::default()
        };
        let mut pod = Pod {
            spec: Some(spec),
            ..Default::default()
        };
        let meta = pod.meta_mut();
        (meta.namespace, meta.name, meta.uid) = ("default".into(), uid.into(), uid.into());
        change(&mut pod);
        self.desired.send_modify(|desired| {
            Arc::make_mut(desired).pods.insert(uid.to_owned(), Arc::new(pod));
        });
    }

    async fn until(&mut self, what: &str, wanted: impl Fn(&BTreeMap<String, PodUpdate>) -> bool) {
        let waiting = async {
            while !wanted(&self.latest) {
                let update = self.updates.recv().await.unwrap();
                self.latest.insert(update.uid.clone(), update);
            }
        };
        let ended = tokio::time::timeout(Duration::from_secs(20), waiting).await;
        assert!(ended.is_ok(), "{what}: {:#?}", self.latest);
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn runs(updates: &BTreeMap<String, PodUpdate>, uid: &str) -> bool {
    updates.get(uid).is_some_and(|update| update.status.phase == "Running")
}

#[tokio::test]
async fn one_pods_slow_action_or_panic_does_not_hold_up_the_others() {
    let mut reconciler = Loop::start(Fake::default());
    reconciler.want("slow", "hangs", |_| {});
    reconciler.want("panic", "panics", |_| {});
    for at in 0..20 {
        reconciler.want(&format!("p{at}"), "i", |_| {});
    }
    reconciler
        .until("all others run", |updates| {
            (0..20).all(|at| runs(updates, &format!("p{at}")))
        })
        .await;
    assert!(!runs(&reconciler.latest, "slow"));
    assert_eq!(
        reconciler.fake.runtime.most.load(Ordering::Relaxed),
        1,
        "never two actions for one pod at once"
    );
    let observed = reconciler.fake.observed();
    assert!(observed.pods.values().all(|pod| pod.sandboxes.len() <= 1));
}

#[tokio::test]
async fn a_failed_start_is_rolled_back_and_tried_again_and_a_deleted_pod_is_gone() {
    let fake = Fake::default();
    fake.network.fail_next_adds(2);
    let mut reconciler = Loop::start(fake);
    reconciler.want("p", "i", |_| {});
    reconciler
        .until("it runs after all", |updates| runs(updates, "p"))
        .await;
    assert_eq!(reconciler.fake.networks().len(), 1, "what failed left nothing");
    reconciler.want("p", "i", |pod| {
        pod.meta_mut().deletion_timestamp = Some(prost_types::Timestamp::default());
        pod.meta_mut().deletion_grace_period_seconds = Some(5);
    });
    reconciler.until("it is gone", |updates| updates["p"].gone).await;
    assert!(reconciler.fake.networks().is_empty());
    assert!(reconciler.fake.observed().pods.is_empty());
    let told: Vec<String> = std::iter::from_fn(|| reconciler.events.try_recv().ok())
        .map(|event| {
            assert_eq!(event.involved_object.unwrap().uid, "p");
            event.reason
        })
        .collect();
    assert_eq!(
        told,
        [
            "FailedCreatePodSandBox",
            "FailedCreatePodSandBox",
            "Pulled",
            "Created",
            "Started",
            "Killing"
        ]
    );
}

#[tokio::test]
async fn people_are_told_that_an_image_is_pulled() {
    for (image, expected) in [("absent", &["Pulling", "Pulled"][..]), ("there", &["Pulled"])] {
        let mut reconciler = Loop::start(Fake::default());
        reconciler.want("p", image, |_| {});
        reconciler.until("it runs", |updates| runs(updates, "p")).await;
        let told: Vec<String> = std::iter::from_fn(|| reconciler.events.try_recv().ok())
            .map(|event| event.reason)
            .filter(|reason| reason.starts_with("Pull"))
            .collect();
        assert_eq!(told, expected);
    }
}

#[tokio::test]
async fn a_pod_that_never_was_here_is_gone_at_once() {
    let mut reconciler = Loop::start(Fake::default());
    reconciler.want("p", "i", |pod| {
        pod.meta_mut().deletion_timestamp = Some(prost_types::Timestamp::default());
    });
    reconciler
        .until("it is gone", |updates| {
            updates.get("p").is_some_and(|update| update.gone)
        })
        .await;
}

#[tokio::test]
async fn a_deleted_pod_does_not_wait_for_its_image() {
    let mut reconciler = Loop::start(Fake::default());
    reconciler.want("p", "hangs", |_| {});
    reconciler
        .until("its sandbox is there", |updates| {
            updates.get("p").is_some_and(|update| !update.status.pod_ip.is_empty())
        })
        .await;
    reconciler.want("p", "hangs", |pod| {
        pod.meta_mut().deletion_timestamp = Some(prost_types::Timestamp::default());
    });
    reconciler.until("it is gone", |updates| updates["p"].gone).await;
    assert!(reconciler.fake.observed().pods.is_empty());
}

#[tokio::test]
async fn clearing_that_is_tried_again_spares_a_network_whose_sandbox_is_being_made() {
    let fake = Fake::new(Duration::from_millis(200));
    fake.network.fail_next_gcs(1);
    let left = PodNetwork {
        namespace: String::new(),
        name: String::new(),
        uid: "left".to_owned(),
        sandbox_id: "left".to_owned(),
        netns: PathBuf::new(),
    };
    fake.network.add(&left).await.unwrap();
    let mut reconciler = Loop::start(fake);
    reconciler.want("p", "i", |_| {});
    for _ in 0..50 {
        // As containerd's events would.
        reconciler.fake.runtime.changed().notify_one();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    reconciler.until("it runs", |updates| runs(updates, "p")).await;
    let fake = &reconciler.fake;
    let sandboxes = sandbox_ids(&fake.observed());
    let networks: BTreeSet<String> = fake.networks().into_iter().collect();
    assert!(sandboxes.is_subset(&networks), "{sandboxes:?} of {networks:?}");
    assert_eq!(sandboxes.len(), 1);
    for _ in 0..100 {
        if !fake.networks().contains(&"left".to_owned()) {
            return;
        }
        fake.runtime.changed().notify_one();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("what an earlier life left is cleared in the end");
}

#[tokio::test]
async fn programs_that_somebody_detached_are_attached_again() {
    let mut reconciler = Loop::start_with(Fake::default(), Duration::from_millis(20));
    reconciler.want("p", "i", |_| {});
    reconciler.until("it runs", |updates| runs(updates, "p")).await;
    let dataplane = &reconciler.fake.dataplane;
    assert_eq!(dataplane.attached(), 1);
    dataplane.lose_hooks("p");
    for _ in 0..1000 {
        if dataplane.repair().await.unwrap().is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(dataplane.attached(), 2);
    let told = std::iter::from_fn(|| reconciler.events.try_recv().ok());
    let lost = told.filter(|event| event.reason == "TrafficHooksLost").count();
    assert_eq!(lost, 1, "it is said once");
}
