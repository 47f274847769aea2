//! What users do and what happens to nodes, each story so that a controller has much to do. Every step can be repeated, since control may
//! die at any of them.

use std::collections::BTreeMap;

use futures::{FutureExt as _, future::LocalBoxFuture};
use orlop_control::{
    cache::ObjectKey,
    registry::{DeleteOptions, Preconditions, Propagation},
};
use orlop_proto::{
    Resource,
    apps::v1::{ReplicaSet, ReplicaSetSpec},
    core::v1::{
        Container, Namespace, Node, Pod, PodSpec, PodTemplateSpec, ReplicationController, ReplicationControllerSpec,
        ResourceRequirements, Service, ServicePort, ServiceSpec, Taint,
    },
    meta::v1::{LabelSelector, ObjectMeta},
};

use crate::{
    cluster::Cluster,
    state::{State, condition, node_name, phase},
};

/// A story.
#[derive(Clone, Copy)]
pub struct Scenario {
    /// What it is about.
    pub name: &'static str,
    /// Tells it to its end.
    pub run: fn(&Cluster) -> LocalBoxFuture<'_, ()>,
}

macro_rules! scenarios {
    ($($name:ident),* $(,)?) => {
        /// All of them.
        pub const ALL: &[Scenario] = &[$(Scenario { name: stringify!($name), run: |cluster| $name(cluster).boxed_local() }),*];
    };
}

scenarios!(
    replica_sets_scale,
    a_replica_set_takes_over,
    replication_controllers_scale,
    services_follow_their_pods,
    a_namespace_goes,
    foreground_deletion,
    orphans_stay,
    nodes_come_and_go,
    a_node_dies_and_returns,
    a_node_is_drained_by_a_taint,
    pods_are_collected,
    the_unschedulable_wait,
);

async fn replica_sets_scale(cluster: &Cluster) {
    nodes(cluster, &["n1", "n2"]).await;
    cluster.create(replica_set("web", 3)).await;
    cluster.until("three are ready", |state| ready(state, "web", 3)).await;
    scale(cluster, "web", 5).await;
    let state = cluster.until("five are ready", |state| ready(state, "web", 5)).await;
    scale(cluster, "web", 2).await;
    cluster.until("two are left", |state| ready(state, "web", 2)).await;
    let victim = cluster.state().await.ready("web").swap_remove(0);
    drop(state);
    delete_this(cluster, &victim).await;
    cluster
        .until("the deleted one is replaced", |state| {
            let pods = state.ready("web");
            pods.len() == 2 && pods.iter().all(|pod| pod.uid() != victim.uid())
        })
        .await;
    cluster
        .delete::<ReplicaSet>(&key("web"), &DeleteOptions::default())
        .await;
    cluster
        .until("none is left", |state| state.all::<Pod>().is_empty())
        .await;
    cluster.create(replica_set("after", 1)).await;
    cluster.until("another runs", |state| ready(state, "after", 1)).await;
}

async fn a_replica_set_takes_over(cluster: &Cluster) {
    nodes(cluster, &["n1"]).await;
    cluster.create(pod("stray", "web")).await;
    cluster.create(replica_set("web", 3)).await;
    cluster.until("three are ready", |state| ready(state, "web", 3)).await;
    cluster
        .modify(&key("stray"), |pod: &mut Pod| {
            pod.meta_mut().labels = labels("released");
        })
        .await;
    cluster.until("it is replaced", |state| ready(state, "web", 3)).await;
    let options = DeleteOptions {
        propagation: Propagation::Orphan,
        ..DeleteOptions::default()
    };
    cluster.delete::<ReplicaSet>(&key("web"), &options).await;
    cluster
        .until("the set is gone", |state| state.get::<ReplicaSet>("web").is_none())
        .await;
    let mut next = replica_set("web", 4);
    next.meta_mut().name = "next".to_owned();
    cluster.create(next).await;
    cluster
        .until("another has its pods", |state| ready(state, "web", 4))
        .await;
}

async fn replication_controllers_scale(cluster: &Cluster) {
    nodes(cluster, &["n1", "n2"]).await;
    let controller = ReplicationController {
        metadata: Some(meta("old")),
        spec: Some(ReplicationControllerSpec {
            replicas: Some(3),
            selector: labels("old"),
            template: Some(template("old")),
            ..ReplicationControllerSpec::default()
        }),
        ..ReplicationController::default()
    };
    cluster.create(controller).await;
    cluster.until("three are ready", |state| ready(state, "old", 3)).await;
    let replicas = |count: i32| {
        move |controller: &mut ReplicationController| controller.spec.get_or_insert_default().replicas = Some(count)
    };
    cluster.modify(&key("old"), replicas(1)).await;
    cluster.until("one is left", |state| ready(state, "old", 1)).await;
    cluster.modify(&key("old"), replicas(2)).await;
    cluster.until("two are ready", |state| ready(state, "old", 2)).await;
}

async fn services_follow_their_pods(cluster: &Cluster) {
    nodes(cluster, &["n1", "n2"]).await;
    cluster.create(service("web")).await;
    cluster.create(service("lonely")).await;
    cluster.create(replica_set("web", 2)).await;
    cluster.until("two are ready", |state| ready(state, "web", 2)).await;
    cluster
        .modify(&key("web"), |service: &mut Service| {
            service.spec.get_or_insert_default().ports[0].port = 8080;
        })
        .await;
    scale(cluster, "web", 3).await;
    cluster.until("three are ready", |state| ready(state, "web", 3)).await;
    scale(cluster, "web", 1).await;
    cluster
        .delete::<Service>(&key("lonely"), &DeleteOptions::default())
        .await;
    cluster
        .until("its slices go too", |state| {
            state.describe().matches("lonely").count() == 0
        })
        .await;
    cluster.create(service("next")).await;
    cluster.until("one is left", |state| ready(state, "web", 1)).await;
}

async fn a_namespace_goes(cluster: &Cluster) {
    nodes(cluster, &["n1"]).await;
    let mut namespace = Namespace::default();
    namespace.meta_mut().name = "shop".to_owned();
    cluster.create(namespace).await;
    let mut set = replica_set("web", 2);
    set.meta_mut().namespace = "shop".to_owned();
    cluster.create(set).await;
    let mut served = service("web");
    served.meta_mut().namespace = "shop".to_owned();
    cluster.create(served).await;
    cluster.until("two are ready", |state| ready(state, "web", 2)).await;
    cluster
        .delete::<Namespace>(&ObjectKey::new("", "shop"), &DeleteOptions::default())
        .await;
    cluster
        .until("all of it is gone", |state| state.get::<Namespace>("shop").is_none())
        .await;
}

async fn foreground_deletion(cluster: &Cluster) {
    nodes(cluster, &["n1"]).await;
    cluster.create(service("web")).await;
    cluster.create(replica_set("web", 3)).await;
    cluster.until("three are ready", |state| ready(state, "web", 3)).await;
    let options = DeleteOptions {
        propagation: Propagation::Foreground,
        ..DeleteOptions::default()
    };
    cluster.delete::<ReplicaSet>(&key("web"), &options).await;
    cluster
        .until("the set goes last", |state| {
            assert!(
                state.get::<ReplicaSet>("web").is_some() || state.all::<Pod>().is_empty(),
                "the owner went before its pods"
            );
            state.get::<ReplicaSet>("web").is_none()
        })
        .await;
}

async fn orphans_stay(cluster: &Cluster) {
    nodes(cluster, &["n1"]).await;
    cluster.create(replica_set("web", 3)).await;
    let state = cluster.until("three are ready", |state| ready(state, "web", 3)).await;
    let mut before: Vec<String> = state.ready("web").iter().map(|pod| pod.uid().to_owned()).collect();
    let options = DeleteOptions {
        propagation: Propagation::Orphan,
        ..DeleteOptions::default()
    };
    cluster.delete::<ReplicaSet>(&key("web"), &options).await;
    let state = cluster
        .until("the set is gone", |state| state.get::<ReplicaSet>("web").is_none())
        .await;
    let mut after: Vec<String> = state.ready("web").iter().map(|pod| pod.uid().to_owned()).collect();
    before.sort();
    after.sort();
    assert_eq!(before, after, "the pods stay");
}

async fn nodes_come_and_go(cluster: &Cluster) {
    nodes(cluster, &["n1", "n2", "n3"]).await;
    cluster.create(replica_set("web", 3)).await;
    cluster.until("three are ready", |state| ready(state, "web", 3)).await;
    cluster.cut("n2", true);
    cluster
        .delete::<Node>(&ObjectKey::new("", "n2"), &DeleteOptions::default())
        .await;
    cluster
        .until("its pods run elsewhere", |state| {
            ready(state, "web", 3) && state.ready("web").iter().all(|pod| node_name(pod) != "n2")
        })
        .await;
    nodes(cluster, &["n4", "n5"]).await;
}

async fn a_node_dies_and_returns(cluster: &Cluster) {
    nodes(cluster, &["n1", "n2", "n3"]).await;
    cluster.create(service("web")).await;
    cluster.create(replica_set("web", 3)).await;
    cluster.until("three are ready", |state| ready(state, "web", 3)).await;
    cluster.cut("n2", true);
    cluster
        .until("three run elsewhere", |state| {
            let elsewhere = state.ready("web");
            let node = state.get::<Node>("n2").unwrap_or_default();
            condition(&node, "Ready") != Some("True")
                && elsewhere.iter().filter(|pod| node_name(pod) != "n2").count() == 3
        })
        .await;
    cluster.cut("n2", false);
    cluster
        .until("it is back and clean", |state| {
            let node = state.get::<Node>("n2").unwrap_or_default();
            condition(&node, "Ready") == Some("True") && state.all::<Pod>().len() == 3
        })
        .await;
}

async fn a_node_is_drained_by_a_taint(cluster: &Cluster) {
    nodes(cluster, &["n1"]).await;
    cluster.create(replica_set("web", 2)).await;
    cluster.until("two are ready", |state| ready(state, "web", 2)).await;
    nodes(cluster, &["n2"]).await;
    cluster
        .modify(&ObjectKey::new("", "n1"), |node: &mut Node| {
            let taints = &mut node.spec.get_or_insert_default().taints;
            if taints.is_empty() {
                taints.push(Taint {
                    key: "maintenance".to_owned(),
                    effect: "NoExecute".to_owned(),
                    ..Taint::default()
                });
            }
        })
        .await;
    cluster
        .until("they moved", |state| {
            ready(state, "web", 2) && state.ready("web").iter().all(|pod| node_name(pod) == "n2")
        })
        .await;
}

async fn pods_are_collected(cluster: &Cluster) {
    nodes(cluster, &["n1", "n2"]).await;
    for name in ["a", "b", "c", "d"] {
        let mut ends = pod(name, "job");
        ends.meta_mut().labels.insert("ends".to_owned(), "yes".to_owned());
        ends.spec.get_or_insert_default().node_selector = hostname("n1");
        cluster.create(ends).await;
        cluster
            .until("it has ended", |state| {
                state.get::<Pod>(name).is_none_or(|pod| phase(&pod) == "Succeeded")
            })
            .await;
        // Who ended first is known to the second.
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    }
    cluster
        .until("two of the ended stay", |state| state.all::<Pod>().len() == 2)
        .await;
    let mut bound = pod("bound", "lost");
    bound.spec.get_or_insert_default().node_selector = hostname("n2");
    cluster.create(bound).await;
    cluster.until("it runs", |state| ready(state, "lost", 1)).await;
    cluster.cut("n2", true);
    cluster
        .delete::<Node>(&ObjectKey::new("", "n2"), &DeleteOptions::default())
        .await;
    cluster
        .until("the pod of the lost node is gone", |state| {
            state.get::<Pod>("bound").is_none()
        })
        .await;
}

async fn the_unschedulable_wait(cluster: &Cluster) {
    nodes(cluster, &["n1"]).await;
    for name in ["a", "b", "c", "d", "e"] {
        let mut large = pod(name, "large");
        large.spec.get_or_insert_default().containers[0].resources = Some(ResourceRequirements {
            requests: [("cpu".to_owned(), "2".to_owned())].into(),
            ..ResourceRequirements::default()
        });
        cluster.create(large).await;
    }
    cluster.until("two find room", |state| ready(state, "large", 2)).await;
    cluster
        .create({
            let mut picky = pod("picky", "picky");
            picky.spec.get_or_insert_default().node_selector = [("disk".to_owned(), "ssd".to_owned())].into();
            picky
        })
        .await;
    nodes(cluster, &["n2"]).await;
    cluster.until("four have room", |state| ready(state, "large", 4)).await;
    cluster
        .modify(&ObjectKey::new("", "n1"), |node: &mut Node| {
            node.meta_mut().labels.insert("disk".to_owned(), "ssd".to_owned());
        })
        .await;
    cluster
        .until("the picky one runs", |state| ready(state, "picky", 1))
        .await;
    nodes(cluster, &["n3"]).await;
    cluster.until("all run", |state| ready(state, "large", 5)).await;
}

/// Lets machines join and waits until they can be used.
async fn nodes(cluster: &Cluster, names: &[&str]) {
    names.iter().for_each(|name| cluster.node(name));
    cluster
        .until("the nodes are ready", |state| {
            names.iter().all(|name| {
                let node = state.get::<Node>(name).unwrap_or_default();
                let usable = node
                    .spec
                    .as_ref()
                    .is_some_and(|spec| spec.taints.is_empty() && !spec.pod_cidr.is_empty());
                usable && condition(&node, "Ready") == Some("True")
            })
        })
        .await;
}

fn ready(state: &State, app: &str, count: usize) -> bool {
    state.ready(app).len() == count
}

async fn scale(cluster: &Cluster, name: &str, replicas: i32) {
    cluster
        .modify(&key(name), |set: &mut ReplicaSet| {
            set.spec.get_or_insert_default().replicas = Some(replicas);
        })
        .await;
}

async fn delete_this(cluster: &Cluster, pod: &Pod) {
    let options = DeleteOptions {
        preconditions: Preconditions {
            uid: Some(pod.uid().to_owned()),
            resource_version: None,
        },
        ..DeleteOptions::default()
    };
    cluster.delete::<Pod>(&ObjectKey::of(pod), &options).await;
}

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("default", name)
}

fn hostname(node: &str) -> BTreeMap<String, String> {
    [("kubernetes.io/hostname".to_owned(), node.to_owned())].into()
}

fn labels(app: &str) -> BTreeMap<String, String> {
    [("app".to_owned(), app.to_owned())].into()
}

fn meta(name: &str) -> ObjectMeta {
    ObjectMeta {
        name: name.to_owned(),
        namespace: "default".to_owned(),
        ..ObjectMeta::default()
    }
}

fn template(app: &str) -> PodTemplateSpec {
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: labels(app),
            ..ObjectMeta::default()
        }),
        spec: pod("", app).spec,
    }
}

fn pod(name: &str, app: &str) -> Pod {
    let container = Container {
        name: "c".to_owned(),
        image: "orlop/fixture:1".to_owned(),
        ..Container::default()
    };
    Pod {
        metadata: Some(ObjectMeta {
            labels: labels(app),
            ..meta(name)
        }),
        spec: Some(PodSpec {
            containers: vec![container],
            ..PodSpec::default()
        }),
        ..Pod::default()
    }
}

/// A set of pods with label `app` of its name.
pub fn replica_set(name: &str, replicas: i32) -> ReplicaSet {
    ReplicaSet {
        metadata: Some(meta(name)),
        spec: Some(ReplicaSetSpec {
            replicas: Some(replicas),
            selector: Some(LabelSelector {
                match_labels: labels(name),
                match_expressions: Vec::new(),
            }),
            template: Some(template(name)),
            ..ReplicaSetSpec::default()
        }),
        ..ReplicaSet::default()
    }
}

/// A service of the pods with label `app` of its name.
pub fn service(name: &str) -> Service {
    Service {
        metadata: Some(meta(name)),
        spec: Some(ServiceSpec {
            selector: labels(name),
            ports: vec![ServicePort {
                port: 80,
                ..ServicePort::default()
            }],
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}
