//! Certificates that claim more than they are.

use std::{io::ErrorKind, time::Duration};

use orlop_control::server::identity::{Identity, NODES};
use orlop_proto::{
    api::v1::{GetRequest, ListRequest, Object, object::Body, objects_client::ObjectsClient},
    core::v1::Node,
    metrics::v1::{ListPodsRequest, metrics_client::MetricsClient},
};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tonic::Code;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::{
    harness::{Control, Pair, sign, subject},
    join::{join, pair, renew_by, token},
    log::Log,
    nodes::{hello, node, session},
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
