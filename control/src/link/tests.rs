//! Sessions whose node, or whose store, does not do its part.

use std::{collections::BTreeMap, sync::atomic::AtomicBool};

use async_trait::async_trait;
use orlop_proto::{
    Resource as _,
    core::v1::{Container, Node, NodeCondition, NodeStatus, Pod, PodSpec, PodStatus},
    meta::v1::ObjectMeta,
    node::v1::{
        ControlMessage, Heartbeat, NodeMessage, PodReport, control_message::Message as ToNode,
        node_message::Message as FromNode,
    },
};
use prost::Message as _;
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::{
    codec::{Outgoing, message},
    events::EventWriter,
    lease::LeaseWriter,
    mailbox::PodChange,
    pending::Pending,
    reports::ReportWriter,
    session::{self, Receiver},
    *,
};
use crate::{
    cache::{Cache, ObjectKey},
    registry::RegistryConfig,
    store::{Key, Listing, Record, Revision, Store, StoreError, Transaction, Watch, memory::MemoryStore},
};

const NODE: &str = "n";
/// Of simulated time.
const LONG: Duration = Duration::from_secs(600);

/// A replica's way to the store.
struct Way {
    store: MemoryStore,
    cut: Arc<AtomicBool>,
}

#[async_trait]
impl Store for Way {
    async fn get(&self, key: &Key) -> Result<Option<Record>, StoreError> {
        self.store.get(key).await
    }
    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.store.list(prefix).await
    }
    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
        if self.cut.load(Ordering::Relaxed) {
            return Err(StoreError::Unavailable("the way to the store is cut".into()));
        }
        self.store.commit(transaction).await
    }
    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        self.store.watch(prefix, after).await
    }
    async fn revision(&self) -> Result<Revision, StoreError> {
        self.store.revision().await
    }
}

struct Replica {
    link: Link,
    cut: Arc<AtomicBool>,
}

impl Replica {
    async fn start(store: &MemoryStore) -> Self {
        let cut = Arc::new(AtomicBool::new(false));
        let way: Arc<dyn Store> = Arc::new(Way {
            store: store.clone(),
            cut: Arc::clone(&cut),
        });
        let cache = Cache::start(Arc::clone(&way)).await;
        let registry = Registry::new(way, cache, RegistryConfig::default());
        registry.ensure_bootstrap().await.unwrap();
        let metrics = NodeMetricsStore::default();
        let link = Link::start(registry, metrics, LinkConfig::default(), CancellationToken::new());
        Self { link, cut }
    }

    fn registry(&self) -> &Registry {
        &self.link.inner.registry
    }

    async fn writer(&self) -> (ReportWriter, CancellationToken) {
        let closed = CancellationToken::new();
        let registry = self.registry().take_session(NODE).await.unwrap();
        let inner = Arc::clone(&self.link.inner);
        let writer = ReportWriter::new(inner, registry, NODE.into(), BTreeMap::new(), closed.clone());
        (writer, closed)
    }

    async fn add_node(&self) -> Node {
        let metadata = ObjectMeta {
            name: NODE.to_owned(),
            ..ObjectMeta::default()
        };
        let node = Node {
            metadata: Some(metadata),
            ..Node::default()
        };
        self.registry().create_node(node).await.unwrap()
    }

    async fn add_pod(&self, name: &str) -> Pod {
        let metadata = ObjectMeta {
            name: name.to_owned(),
            namespace: "default".to_owned(),
            ..ObjectMeta::default()
        };
        let container = Container {
            name: "app".to_owned(),
            image: "web:1".to_owned(),
            ..Container::default()
        };
        let spec = PodSpec {
            containers: vec![container],
            node_name: NODE.to_owned(),
            ..PodSpec::default()
        };
        let pod = Pod {
            metadata: Some(metadata),
            spec: Some(spec),
            ..Pod::default()
        };
        self.registry().create(pod).await.unwrap()
    }
}

fn says(text: &str) -> NodeStatus {
    let ready = NodeCondition {
        r#type: "Ready".to_owned(),
        status: "True".to_owned(),
        message: text.to_owned(),
        ..NodeCondition::default()
    };
    NodeStatus {
        conditions: vec![ready],
        ..NodeStatus::default()
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_replica_that_was_cut_off_still_has_to_write_is_not_written_over_newer_words() {
    let store = MemoryStore::default();
    let (here, there) = (Replica::start(&store).await, Replica::start(&store).await);
    here.add_node().await;
    let (writer, closed) = here.writer().await;
    here.cut.store(true, Ordering::Relaxed);
    let old = tokio::spawn(writer.node(says("old")));
    sleep(Duration::from_secs(2)).await;
    let (newer, _) = there.writer().await;
    newer.node(says("new")).await;
    here.cut.store(false, Ordering::Relaxed);
    sleep(LONG).await;
    let node: Node = there.registry().get(&ObjectKey::new("", NODE)).await.unwrap();
    assert_eq!(node.status.unwrap().conditions[0].message, "new");
    assert!(closed.is_cancelled(), "the old session ends");
    assert!(!old.is_finished(), "what was not written is not acknowledged");
}

#[tokio::test(start_paused = true)]
async fn a_session_ends_with_its_nodes_object() {
    let store = MemoryStore::default();
    let here = Replica::start(&store).await;
    here.add_node().await;
    let (writer, closed) = here.writer().await;
    let deleted = here
        .registry()
        .delete::<Node>(&ObjectKey::new("", NODE), Default::default())
        .await;
    deleted.unwrap();
    assert!(store.list("nodesessions/").await.unwrap().records.is_empty());
    here.add_node().await;
    assert!(timeout(LONG, writer.node(says("old"))).await.is_err());
    assert!(closed.is_cancelled());
}

/// One direction of a session, with `pods` pods reported.
struct Reporting {
    replica: Replica,
    sender: mpsc::Sender<Result<NodeMessage, Status>>,
    told: mpsc::Receiver<Result<Outgoing, Status>>,
    session: tokio::task::JoinHandle<Status>,
}

async fn reporting(pods: u64) -> Reporting {
    let replica = Replica::start(&MemoryStore::default()).await;
    let node = replica.add_node().await;
    let (reports, _) = replica.writer().await;
    let (sender, incoming) = mpsc::channel(1024);
    for sequence in 1..=pods {
        let pod = replica.add_pod(&format!("p{sequence}")).await;
        let status = PodStatus {
            phase: "Running".to_owned(),
            ..PodStatus::default()
        };
        let report = PodReport {
            sequence,
            namespace: pod.namespace().to_owned(),
            name: pod.name().to_owned(),
            uid: pod.uid().to_owned(),
            status: Some(status),
            gone: false,
        };
        send(&sender, FromNode::Pod(report)).await;
    }
    replica.registry().cache().catch_up(LONG).await.unwrap();
    let (outgoing, told) = mpsc::channel(1);
    let inner = Arc::clone(&replica.link.inner);
    replica.cut.store(true, Ordering::Relaxed);
    let session = tokio::spawn(async move {
        let receiver = Receiver {
            inner: &inner,
            node: NODE.into(),
            pending: Pending::new(reports.clone()),
            reports,
            lease: LeaseWriter::new(Arc::clone(&inner), NODE.into(), node.uid().to_owned()),
            events: EventWriter::new(Arc::clone(&inner), NODE.into()),
            status: None,
            sent: 0,
            acks: watch::Sender::new(0),
            outgoing: &outgoing,
        };
        receiver.run(ReceiverStream::new(incoming)).await
    });
    Reporting {
        replica,
        sender,
        told,
        session,
    }
}

async fn send(sender: &mpsc::Sender<Result<NodeMessage, Status>>, message: FromNode) {
    let message = NodeMessage { message: Some(message) };
    sender.send(Ok(message)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_gone_is_noticed_while_nothing_can_be_written() {
    let reporting = reporting(40).await;
    let status = timeout(LONG, reporting.session).await.unwrap().unwrap();
    assert_eq!(
        (status.code(), status.message()),
        (Code::DeadlineExceeded, "nothing heard from the node")
    );
}

#[tokio::test(start_paused = true)]
async fn a_session_outlives_a_store_that_takes_nothing_and_writes_everything_afterwards() {
    let mut reporting = reporting(40).await;
    for _ in 0..20 {
        send(&reporting.sender, FromNode::Heartbeat(Heartbeat {})).await;
        sleep(Duration::from_secs(5)).await;
    }
    assert!(!reporting.session.is_finished());
    assert!(
        reporting.told.try_recv().is_err(),
        "nothing is written, so nothing is acknowledged"
    );
    reporting.replica.cut.store(false, Ordering::Relaxed);
    let acknowledged = async {
        loop {
            let told = reporting.told.recv().await.unwrap().unwrap();
            // Behind gRPC's prefix.
            match ControlMessage::decode(told.slice(5..)).unwrap().message {
                Some(ToNode::ReportAck(ack)) if ack.sequence == 40 => return,
                Some(ToNode::ReportAck(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    };
    timeout(Duration::from_secs(10), acknowledged).await.unwrap();
    let pod: Pod = reporting
        .replica
        .registry()
        .get(&ObjectKey::new("default", "p40"))
        .await
        .unwrap();
    assert_eq!(pod.status.unwrap().phase, "Running");
}

#[tokio::test(start_paused = true)]
async fn a_session_whose_node_acknowledges_nothing_ends() {
    let replica = Replica::start(&MemoryStore::default()).await;
    let inner = &replica.link.inner;
    for reads in [true, false] {
        let opening = inner.hub.open(NODE.into(), 0).await.unwrap();
        let mailbox = Arc::clone(&opening.mailbox);
        let (outgoing, mut told) = mpsc::channel(1);
        let (_acks, acknowledged) = watch::channel(0);
        let welcome = message(ToNode::Welcome(Default::default()));
        let churn = async {
            loop {
                let key = ObjectKey::new("default", "p");
                let uid = uuid::Uuid::new_v4().to_string().into();
                mailbox.put(PodChange::Removed { key, uid });
                sleep(Duration::from_millis(100)).await;
                while reads && told.try_recv().is_ok() {}
            }
        };
        let ended = tokio::select! {
            ended = timeout(LONG, session::send(inner, NODE, welcome, opening, acknowledged, &outgoing)) => ended,
            () = churn => unreachable!("it never ends"),
        };
        let status = ended.expect("its mailbox only grows").unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        let expected = if reads { "not acknowledged" } else { "not read" };
        assert!(status.message().contains(expected), "{status}");
    }
}
