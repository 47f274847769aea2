//! Certificates and nodes that claim more than they are.

use std::{io::ErrorKind, time::Duration};

use orlop_control::server::identity::{Identity, NODES};
use orlop_proto::{
    api::v1::{CreateRequest, GetRequest, ListRequest, Object, object::Body, objects_client::ObjectsClient},
    core::v1::{Event, Node, NodeAddress, NodeStatus, ObjectReference, PodIp, PodStatus},
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
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::{
    harness::{Control, Pair, sign, subject},
    join::{join, pair, renew_by, token},
    log::Log,
    requests::{Client, pod, remove},
};

/// The status of a call with this certificate.
async fn list(control: &Control, pair: &Pair) -> Code {
    let channel = control.channel(Some(pair)).await.expect("a handshake");
    let request = ListRequest {
        resource: "nodes".to_owned(),
        ..ListRequest::default()
    };
    let answer = ObjectsClient::new(channel).list(request).await;
    answer.map_or_else(|status| status.code(), |_| Code::Ok)
}

/// Shows a certificate, and has control end the handshake for it: with an alert, or by closing. The refusal is logged with the address
/// of this very connection.
async fn refused_in_tls(control: &Control, log: &Log, what: &str, pair: &Pair) {
    let before = log.length();
    let refused = control.refused_handshake(pair).await;
    let (address, error) = refused.unwrap_or_else(|| panic!("{what}: let in"));
    let alert = error.get_ref().and_then(|inner| inner.downcast_ref());
    let by_alert = matches!(alert, Some(rustls::Error::AlertReceived(_)));
    let closed = matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset);
    assert!(by_alert || closed, "{what}: {error:?}");
    log.comes(before, &["TLS handshake refused", &format!("peer={address} ")])
        .await;
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
        refused_in_tls(&control, &log, what, &pair).await;
    }

    // Names that no other test has: the log is that of them all.
    for (name, group) in [
        ("crossed-admin", "System:Masters"),
        ("crossed-admin", "system:masters\0"),
        ("crossed-admin", "system:masters,system:nodes"),
        ("crossed-admin", ""),
        ("system:node:", NODES),
        ("system:node:never-joined", NODES),
        ("system:node:leaf/../other", NODES),
        ("SYSTEM:NODE:leaf", NODES),
    ] {
        let pair = control.forge(|params| params.distinguished_name = subject(name, group));
        let caller = match Identity::from_certificate(&pair.certificate) {
            Identity::Node { name, .. } => format!("node {name}"),
            _ => format!("stranger {name}"),
        };
        let refusals = |method: &'static str| ["call refused".to_owned(), format!("\"{caller}\""), method.to_owned()];
        let before = log.length();
        assert_eq!(list(&control, &pair).await, Code::PermissionDenied, "{name} {group}");
        assert_eq!(log.since(before, &refusals("Objects/List")), 1, "{name} {group}");
        let outcome = session(&control, &pair, hello("leaf")).await;
        let code = outcome.err().map(|status| status.code());
        assert!(
            matches!(code, Some(Code::PermissionDenied | Code::Unauthenticated)),
            "{name} {group}: {code:?}"
        );
        // A name that no key is bound to is refused by what stands in the greeting.
        let node = name.strip_prefix("system:node:").unwrap_or(name);
        let logged = log.since(before, &refusals("NodeLink/Session"))
            + log.since(before, &["a node gave another's name", &format!("node={node:?}")]);
        assert_eq!(logged, 1, "{name} {group}");
    }
    assert_eq!(list(&control, &admin).await, Code::Ok);
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

/// What a node would like to be.
const GREED: [fn(&mut CertificateParams); 4] = [
    |wanted| wanted.distinguished_name = subject("system:node:cert-b", NODES),
    |wanted| wanted.distinguished_name = subject("orlop-admin", "system:masters"),
    |wanted| wanted.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth],
    |wanted| {
        wanted.distinguished_name = subject("system:node:cert-b", "system:masters");
        wanted.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    },
];

/// A node's certificate, as far as its name and what it is for.
fn is_a_nodes(der: &[u8], node: &str) {
    let (_, certificate) = X509Certificate::from_der(der).expect("a certificate");
    let subject = certificate.subject();
    let names: Vec<&str> = subject
        .iter_common_name()
        .filter_map(|name| name.as_str().ok())
        .collect();
    let groups: Vec<&str> = subject
        .iter_organization()
        .filter_map(|name| name.as_str().ok())
        .collect();
    assert_eq!((names, groups), (vec![&*format!("system:node:{node}")], vec![NODES]));
    let constraints = certificate.basic_constraints().expect("one at most");
    assert!(
        !constraints.is_some_and(|constraints| constraints.value.ca),
        "an authority"
    );
    let uses = certificate
        .extended_key_usage()
        .expect("one at most")
        .expect("uses")
        .value;
    assert!(uses.client_auth && !uses.server_auth && !uses.any, "{uses:?}");
}

#[tokio::test]
async fn a_node_gets_no_certificate_but_its_own() {
    let log = Log::start();
    let control = Control::start().await;
    let mut admin = ObjectsClient::new(control.unix().await);
    let token = token(&control, 0, 600).await;
    let (a, _) = node(&control, &mut admin, &token, "cert-a").await;
    let (_, _) = node(&control, &mut admin, &token, "cert-b").await;
    // Whatever stands in the request: the certificate is for the caller's own name and group, for clients, and no authority's.
    let mut key = KeyPair::generate().expect("key");
    let mut holder = a.clone();
    for greed in GREED {
        let mut wanted = CertificateParams::default();
        greed(&mut wanted);
        let next = KeyPair::generate().expect("key");
        let request = wanted.serialize_request(&next).expect("a request").der().to_vec();
        // Basic constraints (RFC 5280, 4.2.1.9) are really asked for.
        let has_constraints = request.windows(3).any(|bytes| bytes == [0x55, 0x1d, 0x13]);
        assert_eq!(has_constraints, wanted.is_ca != IsCa::NoCa);
        let renewed = renew_by(&control, &holder, request).await.expect("renews");
        is_a_nodes(&renewed.certificate, "cert-a");
        holder = pair(&renewed, &next);
        key = next;
    }
    // With a token, but for a name that has a key.
    let before = log.length();
    let status = join(&control, &token, "cert-b", &key).await.expect_err("taken");
    assert_eq!(status.code(), Code::AlreadyExists);
    assert_eq!(
        log.since(before, &["join refused: the name has another key", "cert-b"]),
        1
    );
    let a = holder;
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
