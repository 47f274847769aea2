//! Nodes that claim what is another's.

use std::time::Duration;

use orlop_proto::{
    api::v1::{CreateRequest, GetRequest, ListRequest, Object, object::Body, objects_client::ObjectsClient},
    core::v1::{Event, NodeAddress, NodeStatus, ObjectReference, PodIp, PodStatus},
    metrics::v1::{
        ListNodesRequest, ListPodsRequest, NodeMetrics, NodeReport, PodMetrics, metrics_client::MetricsClient,
    },
    node::v1::{
        ControlMessage, EventReport, Heartbeat, Hello, NodeMessage, PodReport, change::Change,
        control_message::Message as ToNode, node_link_client::NodeLinkClient, node_message::Message as FromNode,
    },
};
use rcgen::KeyPair;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::{
    harness::{Control, Pair},
    join::{join, pair, token},
    log::Log,
    requests::{Client, pod, remove},
};

/// A node's end of its session.
pub struct Session {
    outgoing: mpsc::Sender<NodeMessage>,
    incoming: Streaming<ControlMessage>,
}

impl Session {
    async fn say(&self, message: FromNode) {
        let message = NodeMessage { message: Some(message) };
        self.outgoing.send(message).await.expect("goes out");
    }

    async fn hear(&mut self) -> Result<ToNode, Status> {
        let message = tokio::time::timeout(Duration::from_secs(20), self.incoming.message());
        let message = message.await.expect("in time")?;
        message
            .and_then(|message| message.message)
            .ok_or_else(|| Status::unknown("the end"))
    }

    /// The objects of the snapshot.
    async fn snapshot(&mut self) -> Vec<Change> {
        let mut seen = Vec::new();
        loop {
            if let ToNode::Update(update) = self.hear().await.expect("goes on") {
                seen.extend(update.changes.into_iter().filter_map(|change| change.change));
                if update.snapshot_end {
                    return seen;
                }
            }
        }
    }

    async fn acknowledged(&mut self, sequence: u64) {
        loop {
            if let ToNode::ReportAck(ack) = self.hear().await.expect("goes on")
                && ack.sequence >= sequence
            {
                return;
            }
        }
    }
}

pub fn hello(name: &str) -> Hello {
    Hello {
        node_name: name.to_owned(),
        protocol: orlop_control::link::PROTOCOL,
        ..Hello::default()
    }
}

/// A session as far as Welcome.
pub async fn session(control: &Control, pair: &Pair, hello: Hello) -> Result<Session, Status> {
    let channel = control
        .channel(Some(pair))
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let (outgoing, stream) = mpsc::channel(16);
    let message = NodeMessage {
        message: Some(FromNode::Hello(hello)),
    };
    outgoing.send(message).await.expect("room");
    let mut client = NodeLinkClient::new(channel);
    let incoming = client.session(ReceiverStream::new(stream)).await?.into_inner();
    let mut session = Session { outgoing, incoming };
    match session.hear().await? {
        ToNode::Welcome(_) => Ok(session),
        other => Err(Status::unknown(format!("{other:?}"))),
    }
}

async fn get(client: &mut Client, resource: &str, name: &str) -> Object {
    let request = GetRequest {
        resource: resource.to_owned(),
        name: name.to_owned(),
        ..GetRequest::default()
    };
    client.get(request).await.expect("gets").into_inner()
}

/// A node `name` with its certificate, and a pod of it.
pub async fn node(control: &Control, admin: &mut Client, token: &str, name: &str) -> (Pair, Object) {
    let key = KeyPair::generate().expect("key");
    let pair = pair(&join(control, token, name, &key).await.expect("joins"), &key);
    session(control, &pair, hello(name)).await.expect("registers");
    let mut object = pod(&format!("pod-of-{name}"), "x");
    if let Some(Body::Pod(pod)) = &mut object.body {
        pod.spec.as_mut().expect("spec").node_name = name.to_owned();
    }
    let request = CreateRequest { object: Some(object) };
    (pair, admin.create(request).await.expect("creates").into_inner())
}

#[tokio::test]
async fn a_node_has_nothing_of_anothers() {
    let log = Log::start();
    let control = Control::start().await;
    let mut admin = ObjectsClient::new(control.unix().await);
    let token = token(&control, 0, 600).await;
    let (a, _) = node(&control, &mut admin, &token, "node-a").await;
    let (_, theirs) = node(&control, &mut admin, &token, "node-b").await;
    let uid = theirs.meta().expect("metadata").uid.clone();

    let status = session(&control, &a, hello("node-b"))
        .await
        .err()
        .expect("another's name");
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    assert!(log.has(&["a node gave another's name", "node-a", "node-b"]));

    let mut greedy = hello("node-a");
    for (label, value) in [
        ("node-role.kubernetes.io/control-plane", "true"),
        ("trusted", "yes"),
        ("kubernetes.io/hostname", "node-b"),
    ] {
        greedy.labels.insert(label.to_owned(), value.to_owned());
    }
    let mut link = session(&control, &a, greedy).await.expect("a session");
    assert!(log.has(&["labels that a node gave itself refused", "node-a"]));
    let node = get(&mut admin, "nodes", "node-a").await;
    let labels = &node.meta().expect("metadata").labels;
    assert_eq!(
        labels.get("kubernetes.io/hostname").map(String::as_str),
        Some("node-a"),
        "{labels:?}"
    );
    assert!(!labels.contains_key("trusted") && labels.len() <= 3, "{labels:?}");

    let pods: Vec<String> = link
        .snapshot()
        .await
        .into_iter()
        .filter_map(|change| match change {
            Change::Pod(pod) => pod.metadata.map(|meta| meta.name),
            _ => None,
        })
        .collect();
    assert_eq!(pods, ["pod-of-node-a"], "a node is told of its own pods");

    let report = |sequence, gone| PodReport {
        sequence,
        namespace: "default".to_owned(),
        name: "pod-of-node-b".to_owned(),
        uid: uid.clone(),
        status: Some(PodStatus {
            phase: "Failed".to_owned(),
            pod_ip: "192.0.2.1".to_owned(),
            ..PodStatus::default()
        }),
        gone,
    };
    link.say(FromNode::Pod(report(1, false))).await;
    link.acknowledged(1).await;
    remove_gracefully(&mut admin, "pod-of-node-b").await;
    link.say(FromNode::Pod(report(2, true))).await;
    link.acknowledged(2).await;
    let Some(Body::Pod(stored)) = get(&mut admin, "pods", "pod-of-node-b").await.body else {
        panic!("a pod")
    };
    let status = stored.status.unwrap_or_default();
    assert!(status.phase != "Failed" && status.pod_ip.is_empty(), "{status:?}");
    assert!(log.has(&["report of a pod that is not this node's refused", "node-a", "node-b"]));

    let event = |kind: &str, name: &str, namespace: &str| EventReport {
        event: Some(Event {
            reason: "Forged".to_owned(),
            message: "forged".to_owned(),
            r#type: "Warning".to_owned(),
            involved_object: Some(ObjectReference {
                kind: kind.to_owned(),
                name: name.to_owned(),
                namespace: namespace.to_owned(),
                uid: uid.clone(),
                ..ObjectReference::default()
            }),
            ..Event::default()
        }),
    };
    for (kind, name, namespace) in [
        ("Pod", "pod-of-node-b", "default"),
        ("Node", "node-b", ""),
        ("Namespace", "default", ""),
    ] {
        link.say(FromNode::Event(event(kind, name, namespace))).await;
    }
    let metrics = |node: &str, pod: &str| NodeReport {
        node: Some(NodeMetrics {
            name: node.to_owned(),
            ..NodeMetrics::default()
        }),
        pods: vec![PodMetrics {
            namespace: "default".to_owned(),
            name: pod.to_owned(),
            uid: uid.clone(),
            ..PodMetrics::default()
        }],
        ..NodeReport::default()
    };
    link.say(FromNode::Metrics(metrics("node-b", "none"))).await;
    link.say(FromNode::Metrics(metrics("node-a", "pod-of-node-b"))).await;
    link.say(FromNode::Heartbeat(Heartbeat {})).await;
    link.say(FromNode::Pod(report(3, false))).await;
    link.acknowledged(3).await;
    assert!(log.has(&["event about an object that is not this node's refused", "node-a"]));
    assert!(log.has(&["metrics refused", "node-a", "node-b"]));
    let mut readings = MetricsClient::new(control.admin().await);
    let nodes = readings
        .list_nodes(ListNodesRequest::default())
        .await
        .expect("lists")
        .into_inner();
    assert!(nodes.items.is_empty(), "{nodes:?}");
    let pods = readings
        .list_pods(ListPodsRequest::default())
        .await
        .expect("lists")
        .into_inner();
    assert!(pods.items.is_empty(), "{pods:?}");
    let request = ListRequest {
        resource: "events".to_owned(),
        field_selector: "reason=Forged".to_owned(),
        ..ListRequest::default()
    };
    let events = admin.list(request).await.expect("lists").into_inner();
    assert!(events.items.is_empty(), "{events:?}");
    // The session goes on: one report too many is no reason to lose a node.
    link.say(FromNode::Pod(report(4, false))).await;
    link.acknowledged(4).await;
    remove(&mut admin, "pods", "pod-of-node-b").await;
    control.stop().await;
}

#[tokio::test]
async fn a_node_gives_its_pods_no_address_that_is_anothers() {
    let log = Log::start();
    let control = Control::start_with("advertise_address = \"192.0.2.200\"\n").await;
    let mut admin = ObjectsClient::new(control.unix().await);
    let token = token(&control, 0, 600).await;
    let (a, pod) = node(&control, &mut admin, &token, "addr-a").await;
    let (b, _) = node(&control, &mut admin, &token, "addr-b").await;
    let uid = pod.meta().expect("metadata").uid.clone();
    let theirs = session(&control, &b, hello("addr-b")).await.expect("a session");
    let own = NodeAddress {
        r#type: "InternalIP".to_owned(),
        address: "192.0.2.77".to_owned(),
    };
    theirs
        .say(FromNode::Node(orlop_proto::node::v1::NodeReport {
            sequence: 1,
            status: Some(NodeStatus {
                addresses: vec![own],
                ..NodeStatus::default()
            }),
        }))
        .await;
    let mut ranges = Vec::new();
    for name in ["addr-a", "addr-b"] {
        let Some(Body::Node(node)) = get(&mut admin, "nodes", name).await.body else {
            panic!("a node")
        };
        let range = node.spec.expect("a spec").pod_cidr;
        ranges.push(range.strip_suffix("0/24").expect("a range").to_owned());
    }
    let (inside, beside) = (format!("{}7", ranges[0]), format!("{}7", ranges[1]));
    // Until the status is written.
    let mut written = false;
    while !written {
        written = match get(&mut admin, "nodes", "addr-b").await.body {
            Some(Body::Node(node)) => !node.status.unwrap_or_default().addresses.is_empty(),
            _ => false,
        };
    }

    let mut link = session(&control, &a, hello("addr-a")).await.expect("a session");
    let mut sequence = 0;
    for (addresses, kept, word) in [
        (vec![inside.as_str()], vec![inside.as_str()], ""),
        (vec![&beside], vec![], "nodes/addr-b"),
        (vec![&inside, "fd00::7"], vec![&inside, "fd00::7"], ""),
        (vec!["192.0.2.77"], vec![], "nodes/addr-b"),
        (vec!["10.96.0.1"], vec![], "service_cidr"),
        (vec!["10.244.255.7"], vec![], "pod_cidr"),
        (vec!["192.0.2.200"], vec![], "control"),
        (vec!["127.0.0.1"], vec![], "loopback"),
        (vec!["169.254.169.254"], vec![], "link-local"),
        (vec!["224.0.0.1"], vec![], "multicast"),
        (vec!["0.0.0.0"], vec![], "unspecified"),
        (vec!["::1"], vec![], "loopback"),
        (vec!["fe80::1"], vec![], "link-local"),
        (vec!["::ffff:192.0.2.77"], vec![], "IPv4"),
        (vec![&beside, &inside], vec![&inside], "nodes/addr-b"),
        // Other people's address management.
        (vec!["192.168.7.7"], vec!["192.168.7.7"], ""),
    ] {
        let before = log.length();
        sequence += 1;
        let status = PodStatus {
            phase: "Running".to_owned(),
            pod_ip: addresses[0].to_owned(),
            pod_ips: addresses.iter().map(|ip| PodIp { ip: (*ip).to_owned() }).collect(),
            ..PodStatus::default()
        };
        link.say(FromNode::Pod(PodReport {
            sequence,
            namespace: "default".to_owned(),
            name: "pod-of-addr-a".to_owned(),
            uid: uid.clone(),
            status: Some(status),
            gone: false,
        }))
        .await;
        link.acknowledged(sequence).await;
        let Some(Body::Pod(stored)) = get(&mut admin, "pods", "pod-of-addr-a").await.body else {
            panic!("a pod")
        };
        let status = stored.status.expect("a status");
        let ips: Vec<&str> = status.pod_ips.iter().map(|ip| ip.ip.as_str()).collect();
        assert_eq!(ips, kept, "{addresses:?}");
        assert_eq!(
            status.pod_ip,
            kept.first().copied().unwrap_or_default(),
            "{addresses:?}"
        );
        assert_eq!(status.phase, "Running", "the rest of the report counts");
        let logged = log.since(before, &["address of a pod refused", "addr-a", word]);
        assert_eq!(logged, usize::from(!word.is_empty()), "{addresses:?}");
    }
    control.stop().await;
}

/// Deletion that waits for the node's word.
async fn remove_gracefully(client: &mut Client, name: &str) {
    let request = orlop_proto::api::v1::DeleteRequest {
        resource: "pods".to_owned(),
        name: name.to_owned(),
        ..Default::default()
    };
    client.delete(request).await.expect("begins");
}
