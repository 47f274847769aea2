//! The node link with both its ends: the whole control plane in this process, over TLS on 127.0.0.1, and agents that are real
//! down to the traits for containers, networks and maps.

mod harness;
mod joining;
mod sessions;

use std::time::Duration;

use harness::{Cluster, SimulatedNode, eventually};
use orlop_proto::{
    Resource,
    core::v1::{Node, Pod},
};

const WEB: &str = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIP: 10.96.0.77
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: apps/v1
kind: ReplicaSet
metadata: {name: web}
spec:
  replicas: 4
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers: [{name: web, image: web:v1, ports: [{containerPort: 8080}]}]
";

/// A service with an address and nothing behind it.
fn service(name: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 80}}]}}\n")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_services_and_statuses_travel_and_survive_restarts() {
    let mut cluster = Cluster::start().await;
    let mut one = SimulatedNode::start(&cluster, "n1", "192.0.2.11").await;
    let two = SimulatedNode::start(&cluster, "n2", "192.0.2.12").await;
    nodes_are_ready(&cluster).await;
    cluster.apply(WEB).await;
    eventually("four pods are ready and both nodes have four backends", async || {
        let pods: Vec<Pod> = cluster.list("pods").await;
        pods.iter().filter(|pod| is_ready(pod)).count() == 4
            && [&one, &two].iter().all(|node| node.backends("web") == Some(4))
    })
    .await;
    assert_eq!(
        one.network.routes().keys().map(|node| &**node).collect::<Vec<_>>(),
        ["n2"]
    );
    assert_eq!(two.network.routes()["n1"].node_address, "192.0.2.11");
    assert_eq!(one.runtime.containers() + two.runtime.containers(), 4);

    one_change_is_one_write(&cluster, &one).await;
    the_agent_restarts(&cluster, &mut one).await;
    control_restarts(&mut cluster, &one, &two).await;

    let victim = cluster.list::<Pod>("pods").await.remove(0);
    cluster.delete("pods", victim.name()).await;
    eventually("the deleted pod is replaced, and nothing of it is left", async || {
        let pods: Vec<Pod> = cluster.list("pods").await;
        pods.iter().all(|pod| pod.uid() != victim.uid())
            && pods.iter().filter(|pod| is_ready(pod)).count() == 4
            && one.runtime.containers() + two.runtime.containers() == 4
            && [&one, &two].iter().all(|node| node.backends("web") == Some(4))
    })
    .await;
    eventually("people are told what happened", async || {
        let told = cluster.told("Pod", victim.name()).await;
        ["Scheduled", "Pulled", "Created", "Started", "Killing"]
            .iter()
            .all(|reason| told.contains_key(*reason))
            && cluster.told("Node", "n1").await.contains_key("Starting")
    })
    .await;
    one.stop().await;
    two.stop().await;
    cluster.stop().await;
}

async fn nodes_are_ready(cluster: &Cluster) {
    eventually("both nodes are ready, with ranges and leases", async || {
        let nodes: Vec<Node> = cluster.list("nodes").await;
        let leases: Vec<orlop_proto::coordination::v1::Lease> = cluster.list("leases").await;
        nodes.len() == 2 && leases.len() == 2 && nodes.iter().all(node_is_ready)
    })
    .await;
    let nodes: Vec<Node> = cluster.list("nodes").await;
    let ranges: Vec<&str> = nodes
        .iter()
        .map(|node| node.spec.as_ref().unwrap().pod_cidr.as_str())
        .collect();
    assert!(!ranges[0].is_empty() && ranges[0] != ranges[1], "{ranges:?}");
    assert_eq!(nodes[0].meta().labels["kubernetes.io/hostname"], "n1");
    let status = nodes[0].status.as_ref().unwrap();
    assert_eq!(
        status.node_info.as_ref().unwrap().container_runtime_version,
        "simulated://1"
    );
}

fn node_is_ready(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| &status.conditions);
    let ready = conditions
        .into_iter()
        .any(|condition| condition.r#type == "Ready" && condition.status == "True");
    ready && node.spec.as_ref().is_some_and(|spec| !spec.pod_cidr.is_empty())
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| &status.conditions);
    let is = |kind: &str| {
        conditions
            .clone()
            .any(|condition| condition.r#type == kind && condition.status == "True")
    };
    is("Ready") && is("PodScheduled") && pod.status.as_ref().is_some_and(|status| !status.pod_ip.is_empty())
}

/// What is written is what differs, not all there is.
async fn one_change_is_one_write(cluster: &Cluster, node: &SimulatedNode) {
    let before = node.dataplane.written();
    cluster.apply(&service("extra")).await;
    eventually("the new service is there", async || node.backends("extra") == Some(0)).await;
    assert_eq!(node.dataplane.written() - before, 1);
    // A failed write is made good with everything there is.
    node.dataplane.fail_next(2);
    cluster.apply(&service("after-failure")).await;
    eventually("the service is there after two failures", async || {
        node.backends("after-failure") == Some(0)
    })
    .await;
    assert_eq!(node.backends("web"), Some(4));
}

/// Nothing that runs is touched; what control removed meanwhile goes, but only at the end of the snapshot.
async fn the_agent_restarts(cluster: &Cluster, node: &mut SimulatedNode) {
    let containers = node.container_ids().await;
    node.stop().await;
    cluster.delete("services", "extra").await;
    assert_eq!(
        node.backends("extra"),
        Some(0),
        "nobody removes it while the agent is down"
    );
    node.run(cluster).await;
    eventually("the service that was removed meanwhile is gone", async || {
        node.backends("extra").is_none()
    })
    .await;
    assert_eq!(node.backends("web"), Some(4));
    assert_eq!(node.container_ids().await, containers);
}

/// The nodes go on by their ledgers, and reports made meanwhile arrive.
async fn control_restarts(cluster: &mut Cluster, one: &SimulatedNode, two: &SimulatedNode) {
    let pods: Vec<Pod> = cluster.list("pods").await;
    let crashed = pods
        .iter()
        .find(|pod| pod.spec.as_ref().unwrap().node_name == "n1")
        .unwrap();
    cluster.stop().await;
    assert!(one.runtime.crash(crashed.uid(), 3));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(two.backends("web"), Some(4));
    cluster.run().await;
    eventually(
        "control has heard of the restart that happened without it",
        async || {
            let pods: Vec<Pod> = cluster.list("pods").await;
            let crashed = pods.iter().find(|pod| pod.uid() == crashed.uid());
            let status = crashed.and_then(|pod| pod.status.clone()).unwrap_or_default();
            status
                .container_statuses
                .first()
                .is_some_and(|container| container.restart_count == 1 && container.ready)
        },
    )
    .await;
    eventually("both starts are told of", async || {
        cluster.told("Pod", crashed.name()).await.get("Started") == Some(&2)
    })
    .await;
    cluster.apply(&service("later")).await;
    eventually("the link carries again", async || {
        one.backends("later") == Some(0) && two.backends("later") == Some(0) && one.backends("web") == Some(4)
    })
    .await;
}
