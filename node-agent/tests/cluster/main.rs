//! The node link with both its ends: the whole control plane in this process, over TLS on 127.0.0.1, and agents that are real
//! down to the traits for containers, networks and maps.

mod harness;

use std::{sync::Arc, time::Duration};

use harness::{Cluster, SimulatedNode, eventually};
use orlop_node::{
    identity::IdentityError,
    link::{Dial, DialError},
};
use orlop_proto::{
    Resource,
    core::v1::{Event, Node, NodeStatus, ObjectReference, Pod, PodStatus},
    node::v1::{
        self as link, ControlMessage, NodeMessage, control_message::Message as FromControl,
        node_link_client::NodeLinkClient, node_message::Message as ToControl,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Streaming};

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
    assert_eq!(one.network.routes().keys().collect::<Vec<_>>(), ["n2"]);
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn joining() {
    let cluster = Cluster::start().await;
    let token = cluster.token().await;
    let dir = tempfile::tempdir().unwrap();

    // Another CA's hash: this control is not the one that the token names, and it never sees the token.
    let (rest, hash) = token.rsplit_once('.').unwrap();
    let other = if hash.starts_with('0') { "1" } else { "0" };
    let forged = format!("{rest}.{other}{}", &hash[1..]);
    let error = cluster
        .identity("n1", dir.path(), &forged)
        .join_once(0)
        .await
        .unwrap_err();
    assert!(matches!(error, IdentityError::Dial(_)), "{error}");
    // A wrong secret.
    let guessed = token.replacen(rest.rsplit_once('.').unwrap().1, &"A".repeat(43), 1);
    let error = cluster
        .identity("n1", dir.path(), &guessed)
        .join_once(0)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, IdentityError::Refused(status) if status.code() == Code::Unauthenticated),
        "{error}"
    );

    let identity = cluster.identity("n1", dir.path(), &token);
    assert!(identity.tls().is_err());
    identity.join_once(0).await.unwrap();
    assert!(identity.is_joined());
    // A join that was cut off before the certificate was stored is repeated with the same key.
    std::fs::remove_file(dir.path().join("pki/node.crt")).unwrap();
    let again = cluster.identity("n1", dir.path(), &token);
    assert!(!again.is_joined());
    again.join_once(0).await.unwrap();
    // Who has joined needs no token.
    assert!(cluster.identity("n1", dir.path(), "").is_joined());
    // Another control plane at control's address: same name of its CA, another key. The agent says nothing to it.
    let impostor = Cluster::start().await;
    let error = impostor.joined("n1", dir.path()).await.dial().await.err().unwrap();
    assert!(matches!(error, DialError::Connect { .. }), "{error}");
    assert!(format!("{error:?}").contains("InvalidCertificate"), "{error:?}");
    impostor.stop().await;
    // Another machine does not get the name.
    let thief = tempfile::tempdir().unwrap();
    let error = cluster
        .identity("n1", thief.path(), &token)
        .join_once(0)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, IdentityError::Refused(status) if status.code() == Code::AlreadyExists),
        "{error}"
    );
    cluster.stop().await;
}

/// The certificate in a machine's folder.
fn certificate(dir: &std::path::Path) -> String {
    std::fs::read_to_string(dir.join("pki/node.crt")).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_is_renewed_and_one_that_expired_is_joined_for_again() {
    // Certificates begin five minutes in the past: with this life they are to be renewed at once, and good for 2 s.
    let cluster = Cluster::start_with(Some(Duration::from_secs(2))).await;
    let token = cluster.token().await;
    let dir = tempfile::tempdir().unwrap();
    let identity = cluster.identity("n1", dir.path(), &token);
    identity.join_once(0).await.unwrap();
    let key = std::fs::read_to_string(dir.path().join("pki/node.key")).unwrap();
    let mut last = certificate(dir.path());

    // The machine is off until its certificate has expired; control refuses it then.
    drop(identity);
    tokio::time::sleep(Duration::from_secs(4)).await;
    let cluster_only = cluster.identity("n1", dir.path(), "");
    assert!(cluster_only.is_joined(), "the certificate is there");
    let stop = CancellationToken::new();
    let without_token = tokio::time::timeout(Duration::from_secs(2), cluster_only.keep(stop.clone())).await;
    assert!(without_token.is_err(), "it goes on trying");
    assert_eq!(
        certificate(dir.path()),
        last,
        "without a token there is no other certificate"
    );

    // With its token it joins again, and its certificate is renewed from then on; the key stays.
    let identity = Arc::new(cluster.identity("n1", dir.path(), &token));
    let keeping = tokio::spawn({
        let (identity, stop) = (identity.clone(), stop.clone());
        async move { identity.keep(stop).await }
    });
    for what in ["it joins again", "it is renewed", "it is renewed again"] {
        eventually(what, async || certificate(dir.path()) != last).await;
        last = certificate(dir.path());
    }
    assert_eq!(std::fs::read_to_string(dir.path().join("pki/node.key")).unwrap(), key);
    stop.cancel();
    keeping.await.unwrap();
    cluster.stop().await;
}

/// A session by hand.
struct Session {
    outgoing: mpsc::Sender<NodeMessage>,
    incoming: Streaming<ControlMessage>,
}

impl Session {
    async fn open(dial: &dyn Dial, node_name: &str, protocol: u32) -> Self {
        let mut client = NodeLinkClient::new(dial.dial().await.unwrap());
        let (outgoing, messages) = mpsc::channel(16);
        let hello = link::Hello {
            node_name: node_name.into(),
            protocol,
            ..Default::default()
        };
        outgoing
            .send(NodeMessage {
                message: Some(ToControl::Hello(hello)),
            })
            .await
            .unwrap();
        let incoming = client
            .session(ReceiverStream::new(messages))
            .await
            .unwrap()
            .into_inner();
        Self { outgoing, incoming }
    }

    async fn send(&self, message: ToControl) {
        self.outgoing
            .send(NodeMessage { message: Some(message) })
            .await
            .unwrap();
    }

    /// The next message that `want` takes; others are skipped.
    async fn until<T>(&mut self, mut want: impl FnMut(FromControl) -> Option<T>) -> Result<T, Code> {
        let wait = async {
            loop {
                match self.incoming.message().await {
                    Ok(Some(ControlMessage { message: Some(message) })) => {
                        if let Some(found) = want(message) {
                            return Ok(found);
                        }
                    }
                    Ok(Some(ControlMessage { message: None })) => {}
                    Ok(None) => return Err(Code::Ok),
                    Err(status) => return Err(status.code()),
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), wait)
            .await
            .expect("an answer in time")
    }

    async fn acknowledged(&mut self, sequence: u64) -> Result<(), Code> {
        self.until(|message| match message {
            FromControl::ReportAck(ack) if ack.sequence >= sequence => Some(()),
            _ => None,
        })
        .await
    }

    /// The snapshot's changes.
    async fn snapshot(&mut self) -> Vec<link::Change> {
        let mut changes = Vec::new();
        self.until(|message| match message {
            FromControl::Update(update) => {
                changes.extend(update.changes);
                update.snapshot_end.then_some(())
            }
            _ => None,
        })
        .await
        .unwrap();
        changes
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_says_only_what_concerns_it() {
    let cluster = Cluster::start().await;
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let one = cluster.joined("n1", one.path()).await;
    let two = cluster.joined("n2", two.path()).await;

    let refused = Session::open(&one, "n2", 1).await.until(|_| None::<()>).await;
    assert_eq!(refused, Err(Code::PermissionDenied));
    let refused = Session::open(&one, "n1", 99).await.until(|_| None::<()>).await;
    assert_eq!(refused, Err(Code::FailedPrecondition));

    let mut session = Session::open(&one, "n1", 1).await;
    let mut other = Session::open(&two, "n2", 1).await;
    session.snapshot().await;
    other.snapshot().await;
    cluster.apply("apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {nodeName: n2, containers: [{name: c, image: c:v1}]}\n").await;
    // Only its own node is told.
    let pod = other
        .until(|message| match message {
            FromControl::Update(update) => update.changes.into_iter().find_map(|change| match change.change {
                Some(link::change::Change::Pod(pod)) => Some(pod),
                _ => None,
            }),
            _ => None,
        })
        .await
        .unwrap();
    assert_eq!(pod.name(), "p");
    let report = |sequence, phase: &str, gone| {
        let status = PodStatus {
            phase: phase.into(),
            ..Default::default()
        };
        let (namespace, name, uid) = (pod.namespace().to_owned(), pod.name().to_owned(), pod.uid().to_owned());
        ToControl::Pod(link::PodReport {
            sequence,
            namespace,
            name,
            uid,
            status: Some(status),
            gone,
        })
    };
    session.send(report(1, "Failed", false)).await;
    session.send(report(2, "Failed", true)).await;
    let status = NodeStatus {
        addresses: Vec::new(),
        ..Default::default()
    };
    session
        .send(ToControl::Node(link::NodeReport {
            sequence: 3,
            status: Some(status),
        }))
        .await;
    session.acknowledged(3).await.unwrap();
    let stored = cluster.list::<Pod>("pods").await.remove(0);
    assert_eq!(
        stored.status.unwrap_or_default().phase,
        "Pending",
        "another node's word counts nothing"
    );
    other.send(report(1, "Running", false)).await;
    other.acknowledged(1).await.unwrap();
    let stored = cluster.list::<Pod>("pods").await.remove(0);
    assert_eq!(stored.status.unwrap_or_default().phase, "Running");

    only_its_own_events(&cluster, &session, &other, &pod).await;

    // A second session of a node ends the first.
    let mut second = Session::open(&two, "n2", 1).await;
    assert_eq!(other.until(|_| None::<()>).await, Err(Code::Aborted));
    let snapshot = second.snapshot().await;
    let pods = snapshot
        .iter()
        .filter(|change| matches!(change.change, Some(link::change::Change::Pod(_))))
        .count();
    assert_eq!(pods, 1);
    cluster.stop().await;
}

/// Both nodes speak of a pod and of a node of the second: only the second's word is kept, and equal words are one object.
async fn only_its_own_events(cluster: &Cluster, stranger: &Session, owner: &Session, pod: &Pod) {
    let event = |kind: &str, name: &str, reason: &str| {
        let about = ObjectReference {
            kind: kind.into(),
            namespace: if kind == "Pod" { "default".into() } else { String::new() },
            name: name.into(),
            uid: if kind == "Pod" { pod.uid().into() } else { String::new() },
            ..Default::default()
        };
        let event = Event {
            involved_object: Some(about),
            reason: reason.into(),
            count: 1,
            ..Default::default()
        };
        ToControl::Event(link::EventReport { event: Some(event) })
    };
    for _ in 0..2 {
        stranger.send(event("Pod", "p", "Forged")).await;
        stranger.send(event("Node", "n2", "Forged")).await;
        stranger.send(event("Secret", "s", "Forged")).await;
    }
    stranger.send(event("Node", "n1", "Starting")).await;
    eventually("the stranger's events have been dealt with", async || {
        cluster.told("Node", "n1").await.contains_key("Starting")
    })
    .await;
    for _ in 0..3 {
        owner.send(event("Pod", "p", "Started")).await;
    }
    eventually("the owner's events are counted up", async || {
        cluster.told("Pod", "p").await.get("Started") == Some(&3)
    })
    .await;
    let all: Vec<Event> = cluster.list("events").await;
    assert!(all.iter().all(|event| event.reason != "Forged"), "{all:?}");
    let started = all.iter().filter(|event| event.reason == "Started").count();
    assert_eq!(started, 1, "equal events are one object: {all:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_sent_cannot_be_acknowledged() {
    let cluster = Cluster::start().await;
    let dir = tempfile::tempdir().unwrap();
    let dial = cluster.joined("n1", dir.path()).await;
    let mut session = Session::open(&dial, "n1", 1).await;
    session.snapshot().await;
    session.send(ToControl::Ack(link::Ack { version: u64::MAX })).await;
    assert_eq!(session.until(|_| None::<()>).await, Err(Code::InvalidArgument));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_node_gets_the_latest_and_no_queue() {
    let cluster = Cluster::start().await;
    let dir = tempfile::tempdir().unwrap();
    let dial = cluster.joined("n1", dir.path()).await;
    let mut session = Session::open(&dial, "n1", 1).await;
    session.snapshot().await;
    // Nothing is acknowledged: the window closes, and what changes is folded.
    for round in 0..100 {
        let manifest = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec: {{clusterIP: 10.96.0.9, ports: [{{port: {}}}]}}\n",
            1000 + round
        );
        cluster.apply(&manifest).await;
    }
    let mut versions = Vec::new();
    let mut acknowledged = false;
    loop {
        let update = tokio::time::timeout(
            Duration::from_secs(2),
            session.until(|message| match message {
                FromControl::Update(update) => Some(update),
                _ => None,
            }),
        )
        .await;
        let Ok(update) = update else {
            assert!(!acknowledged, "the last state arrives after the acknowledgement");
            acknowledged = true;
            session
                .send(ToControl::Ack(link::Ack {
                    version: *versions.last().unwrap(),
                }))
                .await;
            continue;
        };
        let update = update.unwrap();
        versions.push(update.version);
        let last = update.changes.iter().any(|change| match &change.change {
            Some(link::change::Change::Service(service)) => service.ports.iter().any(|port| port.port == 1099),
            _ => false,
        });
        if last {
            break;
        }
    }
    assert!(acknowledged, "the window was closed");
    assert!(versions.windows(2).all(|pair| pair[1] == pair[0] + 1), "{versions:?}");
    assert!(versions.len() < 60, "{} updates for 100 changes", versions.len());
    cluster.stop().await;
}
