//! Sessions by hand, as no agent would keep them: what control refuses, and what a slow node gets.

use std::time::Duration;

use orlop_node::link::Dial;
use orlop_proto::{
    Resource,
    core::v1::{Event, NodeStatus, ObjectReference, Pod, PodStatus},
    node::v1::{
        self as link, ControlMessage, NodeMessage, control_message::Message as FromControl,
        node_link_client::NodeLinkClient, node_message::Message as ToControl,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use crate::harness::{Cluster, eventually};

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

/// As [`NodeMessage`] may be one day.
#[derive(Clone, PartialEq, prost::Message)]
struct Newer {
    #[prost(message, optional, tag = "1")]
    hello: Option<NewerHello>,
    #[prost(message, optional, tag = "2")]
    node: Option<NewerReport>,
    #[prost(string, tag = "1000")]
    later: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct NewerHello {
    #[prost(string, tag = "1")]
    node_name: String,
    #[prost(uint32, tag = "2")]
    protocol: u32,
    #[prost(string, tag = "1000")]
    later: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct NewerReport {
    #[prost(uint64, tag = "1")]
    sequence: u64,
    #[prost(string, tag = "1000")]
    later: String,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_newer_agent_says_beside_what_is_known_is_passed_over() {
    let cluster = Cluster::start().await;
    let dir = tempfile::tempdir().unwrap();
    let dial = cluster.joined("n1", dir.path()).await;
    let mut call = tonic::client::Grpc::new(dial.dial().await.unwrap());
    call.ready().await.unwrap();
    let later = || "later".to_owned();
    let hello = NewerHello {
        node_name: "n1".to_owned(),
        protocol: 1,
        later: later(),
    };
    let messages = [
        Newer {
            hello: Some(hello),
            later: later(),
            ..Newer::default()
        },
        // Of an unknown kind.
        Newer {
            later: later(),
            ..Newer::default()
        },
        Newer {
            node: Some(NewerReport {
                sequence: 1,
                later: later(),
            }),
            later: later(),
            ..Newer::default()
        },
    ];
    let messages = futures::StreamExt::chain(tokio_stream::iter(messages), tokio_stream::pending());
    let path = http::uri::PathAndQuery::from_static("/orlop.node.v1.NodeLink/Session");
    let codec = tonic_prost::ProstCodec::<Newer, ControlMessage>::default();
    let answer = call.streaming(tonic::Request::new(messages), path, codec).await;
    let mut session = Session {
        outgoing: mpsc::channel(1).0,
        incoming: answer.unwrap().into_inner(),
    };
    session.snapshot().await;
    assert_eq!(session.acknowledged(1).await, Ok(()));
}
