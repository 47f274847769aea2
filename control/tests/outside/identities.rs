//! Certificates and nodes that claim more than they are.

use std::{
    io::Write,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use orlop_control::server::identity::{Identity, NODES};
use orlop_proto::{
    api::v1::{CreateRequest, GetRequest, ListRequest, Object, object::Body, objects_client::ObjectsClient},
    core::v1::{Event, Node, ObjectReference, PodStatus},
    metrics::v1::{
        ListNodesRequest, ListPodsRequest, NodeMetrics, NodeReport, PodMetrics, metrics_client::MetricsClient,
    },
    node::v1::{
        ControlMessage, EventReport, Heartbeat, Hello, NodeMessage, PodReport, change::Change,
        control_message::Message as ToNode, node_link_client::NodeLinkClient, node_message::Message as FromNode,
    },
};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use tracing_subscriber::{filter::LevelFilter, fmt::MakeWriter};

use crate::{
    harness::{Control, Pair, sign, subject},
    join::{join, pair, renew, token},
    requests::{Client, pod, remove},
};

/// What was logged in this process, from the first call on.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn start() -> Self {
        static LOG: OnceLock<Log> = OnceLock::new();
        LOG.get_or_init(|| {
            let log = Log::default();
            let subscriber = tracing_subscriber::fmt()
                .with_max_level(LevelFilter::WARN)
                .with_ansi(false)
                .with_writer(log.clone());
            subscriber.init();
            log
        })
        .clone()
    }

    /// Whether a line has all of these.
    fn has(&self, parts: &[&str]) -> bool {
        let bytes = self.0.lock().expect("no panic").clone();
        let text = String::from_utf8_lossy(&bytes);
        text.lines().any(|line| parts.iter().all(|part| line.contains(part)))
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no panic").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;
    fn make_writer(&self) -> Self {
        self.clone()
    }
}

async fn list(control: &Control, pair: &Pair) -> Result<(), Option<Code>> {
    let Ok(channel) = control.channel(Some(pair)).await else {
        return Err(None);
    };
    let request = ListRequest {
        resource: "nodes".to_owned(),
        ..ListRequest::default()
    };
    match ObjectsClient::new(channel).list(request).await {
        Ok(_) => Ok(()),
        Err(status) if matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated) => {
            Err(Some(status.code()))
        }
        Err(_) => Err(None),
    }
}

#[tokio::test]
async fn certificates_that_are_no_proof() {
    let log = Log::start();
    let control = Control::start().await;
    let admin = control.pair("admin");
    let token = token(&control, 0, 60).await;
    let key = KeyPair::generate().expect("key");
    let joined = pair(&join(&control, &token, "leaf", &key).await.expect("joins"), &key);

    let uses = |uses: Vec<ExtendedKeyUsagePurpose>| control.forge(move |params| params.extended_key_usages = uses);
    let mut damaged = admin.clone();
    let mut bytes = damaged.certificate.to_vec();
    *bytes.last_mut().expect("bytes") ^= 1;
    damaged.certificate = bytes.into();
    let mut cut = admin.clone();
    cut.certificate = admin.certificate[..admin.certificate.len() / 2].to_vec().into();
    let mut crossed = admin.clone();
    crossed.key.clone_from(&joined.key);
    let mut nodes = joined.clone();
    nodes.key.clone_from(&admin.key);
    // A node that plays authority: its own certificate stands behind what it signed.
    let leaf = Issuer::from_ca_cert_der(
        &joined.certificate,
        KeyPair::try_from(joined.key.as_slice()).expect("key"),
    );
    let mut of_a_leaf = sign(&leaf.expect("issuer"), |_| {});
    of_a_leaf.issuers = vec![joined.certificate.clone()];
    let mut impostor = CertificateParams::default();
    impostor.distinguished_name = rcgen::DistinguishedName::new();
    impostor.distinguished_name.push(rcgen::DnType::CommonName, "orlop-ca");
    impostor.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let impostor_key = KeyPair::generate().expect("key");
    let impostor_certificate = impostor.self_signed(&impostor_key).expect("signs");
    let mut with_its_authority = sign(&Issuer::new(impostor, impostor_key), |_| {});
    with_its_authority.issuers = vec![impostor_certificate.into(), control.ca()];
    let over = time_ago(Duration::from_secs(60));
    for (what, pair) in [
        (
            "over for a minute",
            control.forge(|params| params.not_after = over.into()),
        ),
        ("for servers", uses(vec![ExtendedKeyUsagePurpose::ServerAuth])),
        ("for code", uses(vec![ExtendedKeyUsagePurpose::CodeSigning])),
        (
            "for mail and times",
            uses(vec![
                ExtendedKeyUsagePurpose::EmailProtection,
                ExtendedKeyUsagePurpose::TimeStamping,
            ]),
        ),
        ("the authority itself", control.pair("ca")),
        ("control's own", control.pair("server")),
        ("a damaged signature", damaged),
        ("half a certificate", cut),
        ("the administrator's with a node's key", crossed),
        ("a node's with the administrator's key", nodes),
        ("signed by a node", of_a_leaf),
        ("of another authority of the same name, with it", with_its_authority),
    ] {
        assert_eq!(list(&control, &pair).await, Err(None), "{what}");
    }
    assert!(log.has(&["TLS handshake refused"]), "refusals are logged");

    for (name, group) in [
        ("orlop-admin", "System:Masters"),
        ("orlop-admin", "system:masters\0"),
        ("orlop-admin", "system:masters,system:nodes"),
        ("orlop-admin", ""),
        ("system:node:", NODES),
        ("system:node:never-joined", NODES),
        ("system:node:leaf/../other", NODES),
        ("SYSTEM:NODE:leaf", NODES),
    ] {
        let pair = control.forge(|params| params.distinguished_name = subject(name, group));
        assert_eq!(
            list(&control, &pair).await,
            Err(Some(Code::PermissionDenied)),
            "{name} {group}"
        );
        let outcome = session(&control, &pair, hello("leaf")).await;
        let code = outcome.err().map(|status| status.code());
        assert!(
            matches!(code, Some(Code::PermissionDenied | Code::Unauthenticated)),
            "{name} {group}: {code:?}"
        );
    }
    assert!(log.has(&["call refused", "never-joined"]), "refusals are logged");
    assert_eq!(list(&control, &admin).await, Ok(()));
    control.stop().await;
}

fn time_ago(ago: Duration) -> std::time::SystemTime {
    std::time::SystemTime::now() - ago
}

/// A node's end of its session.
struct Session {
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

fn hello(name: &str) -> Hello {
    Hello {
        node_name: name.to_owned(),
        protocol: orlop_control::link::PROTOCOL,
        ..Hello::default()
    }
}

/// A session as far as Welcome.
async fn session(control: &Control, pair: &Pair, hello: Hello) -> Result<Session, Status> {
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
async fn node(control: &Control, admin: &mut Client, token: &str, name: &str) -> (Pair, Object) {
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

/// Deletion that waits for the node's word.
async fn remove_gracefully(client: &mut Client, name: &str) {
    let request = orlop_proto::api::v1::DeleteRequest {
        resource: "pods".to_owned(),
        name: name.to_owned(),
        ..Default::default()
    };
    client.delete(request).await.expect("begins");
}

#[tokio::test]
async fn a_node_gets_no_certificate_but_its_own() {
    let control = Control::start().await;
    let mut admin = ObjectsClient::new(control.unix().await);
    let token = token(&control, 0, 600).await;
    let (a, _) = node(&control, &mut admin, &token, "cert-a").await;
    let (_, _) = node(&control, &mut admin, &token, "cert-b").await;
    // Whatever stands in the request, and it asks for an authority too: the certificate is for the caller's own name.
    let key = KeyPair::generate().expect("key");
    let renewed = renew(&control, &a, &key).await.expect("renews");
    match Identity::from_certificate(&renewed.certificate) {
        Identity::Node { name, .. } => assert_eq!(&*name, "cert-a"),
        other => panic!("{other:?}"),
    }
    // With a token, but for a name that has a key.
    let status = join(&control, &token, "cert-b", &key).await.expect_err("taken");
    assert_eq!(status.code(), Code::AlreadyExists);
    // And nothing of the API.
    let mut client = ObjectsClient::new(control.channel(Some(&a)).await.expect("connects"));
    let object = Object {
        body: Some(Body::Node(Node::default())),
    };
    let status = client
        .update_status(orlop_proto::api::v1::UpdateRequest { object: Some(object) })
        .await
        .expect_err("refused");
    assert_eq!(status.code(), Code::PermissionDenied);
    let get = GetRequest {
        resource: "nodes".to_owned(),
        name: "cert-b".to_owned(),
        ..GetRequest::default()
    };
    assert_eq!(
        client.get(get).await.expect_err("refused").code(),
        Code::PermissionDenied
    );
    let mut readings = MetricsClient::new(control.channel(Some(&a)).await.expect("connects"));
    let status = readings
        .list_pods(ListPodsRequest::default())
        .await
        .expect_err("refused");
    assert_eq!(status.code(), Code::PermissionDenied);
    control.stop().await;
}
