//! Who gets in.

use std::time::{Duration, SystemTime};

use orlop_proto::{
    api::v1::{ListRequest, objects_client::ObjectsClient},
    cluster::v1::{CreateTokenRequest, join_client::JoinClient},
};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{Code, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::harness::{Control, Pair, sign, subject};

async fn list(channel: Channel) -> Result<(), Code> {
    let request = ListRequest {
        resource: "nodes".to_owned(),
        ..ListRequest::default()
    };
    ObjectsClient::new(channel)
        .list(request)
        .await
        .map(drop)
        .map_err(|status| status.code())
}

/// What a call with this certificate gets: an answer, a status, or no connection.
async fn attempt(control: &Control, pair: Option<&Pair>) -> Result<(), Option<Code>> {
    match control.channel(pair).await {
        Err(_) => Err(None),
        Ok(channel) => list(channel).await.map_err(|code| match code {
            // The handshake's alert comes with the first read: the call fails, and was not answered.
            Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled => None,
            code => Some(code),
        }),
    }
}

#[tokio::test]
async fn only_a_good_certificate_of_our_ca_is_an_administrator() {
    let control = Control::start().await;
    assert_eq!(attempt(&control, Some(&control.pair("admin"))).await, Ok(()));
    assert_eq!(attempt(&control, None).await, Err(Some(Code::Unauthenticated)));

    let yesterday = SystemTime::now() - Duration::from_secs(24 * 3600);
    let tomorrow = SystemTime::now() + Duration::from_secs(24 * 3600);
    let expired = control.forge(|params| params.not_after = yesterday.into());
    let early = control.forge(|params| params.not_before = tomorrow.into());
    let server_use = control.forge(|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    let authority = control.forge(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    for (name, pair) in [
        ("expired", expired),
        ("not yet good", early),
        ("for servers", server_use),
        ("an authority", authority),
        ("control's own", control.pair("server")),
        ("of another CA with our CA's name", of_another_ca()),
        ("self-signed", self_signed()),
    ] {
        assert_eq!(attempt(&control, Some(&pair)).await, Err(None), "{name}");
    }
    control.stop().await;
}

fn of_another_ca() -> Pair {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, "orlop-ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    sign(&Issuer::new(params, KeyPair::generate().expect("key")), |_| {})
}

fn self_signed() -> Pair {
    let key = KeyPair::generate().expect("key");
    let mut params = CertificateParams::default();
    params.distinguished_name = subject("orlop-admin", "system:masters");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let certificate = params.self_signed(&key).expect("signs");
    Pair {
        certificate: certificate.into(),
        key: key.serialize_der(),
        issuers: Vec::new(),
    }
}

#[tokio::test]
async fn other_names_of_our_ca_are_refused_by_call() {
    let control = Control::start().await;
    let signed = |name: &'static str, group: &'static str| {
        control.forge(move |params| params.distinguished_name = subject(name, group))
    };
    for (name, group) in [
        ("system:node:n1", "system:nodes"),
        ("orlop-admin", "system:nodes"),
        ("system:node:", "system:nodes"),
        ("orlop-admin", "system:masters "),
        ("system:masters", "somebody"),
    ] {
        let outcome = attempt(&control, Some(&signed(name, group))).await;
        assert_eq!(outcome, Err(Some(Code::PermissionDenied)), "{name} {group}");
    }
    // Two groups in one name are nobody's, even when one of them is the administrators'.
    let both = control.forge(|params| {
        params.distinguished_name = subject("orlop-admin", "system:masters");
        params.custom_extensions.clear();
        params
            .distinguished_name
            .push(rcgen::DnType::from_oid(&[2, 5, 4, 11]), "system:nodes");
    });
    assert_eq!(
        attempt(&control, Some(&both)).await,
        Ok(()),
        "another attribute is no group"
    );

    let node = control
        .channel(Some(&signed("system:node:n1", "system:nodes")))
        .await
        .expect("connects");
    let status = JoinClient::new(node)
        .create_token(CreateTokenRequest::default())
        .await
        .expect_err("refused");
    assert_eq!(status.code(), Code::PermissionDenied);
    control.stop().await;
}

#[tokio::test]
async fn the_unix_socket_and_health_are_open_to_whom_they_should() {
    let control = Control::start().await;
    list(control.unix().await).await.expect("the owner is an administrator");
    let mode = std::fs::metadata(&control.socket).expect("socket");
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777,
        0o600
    );

    let anonymous = control.channel(None).await.expect("connects");
    let health = HealthClient::new(anonymous)
        .check(HealthCheckRequest::default())
        .await
        .expect("open to all");
    assert_eq!(health.into_inner().status, 1);
    control.stop().await;
}

async fn get(control: &Control, pair: Option<&Pair>, path: &str) -> String {
    let mut stream = control.tls(pair, &[b"http/1.1"]).await.expect("handshake");
    let request = format!("GET {path} HTTP/1.1\r\nHost: control.test\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("writes");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("reads");
    answer
}

#[tokio::test]
async fn pages_over_http1() {
    let control = Control::start().await;
    let admin = control.pair("admin");
    assert!(get(&control, None, "/healthz").await.starts_with("HTTP/1.1 200"));
    assert!(get(&control, None, "/readyz").await.ends_with("ok\n"));
    assert!(get(&control, None, "/metrics").await.starts_with("HTTP/1.1 403"));
    assert!(get(&control, None, "/").await.starts_with("HTTP/1.1 404"));
    let metrics = get(&control, Some(&admin), "/metrics").await;
    assert!(metrics.contains("orlop_control_connections"), "{metrics}");
    control.stop().await;
}

#[tokio::test]
async fn silent_and_stalled_connections_are_closed() {
    let control = Control::start_with("[limits]\nhandshake_timeout = \"300ms\"\n").await;
    let closed = |mut stream: TcpStream| async move {
        let mut byte = [0];
        let read = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut byte)).await;
        matches!(read, Ok(Ok(0) | Err(_)))
    };
    let silent = TcpStream::connect(control.address).await.expect("connects");
    assert!(closed(silent).await, "no handshake");
    let mut half = TcpStream::connect(control.address).await.expect("connects");
    half.write_all(&[22, 3, 1, 2, 0, 1]).await.expect("writes");
    assert!(closed(half).await, "half a handshake");

    let mut shaken = control.tls(None, &[b"h2"]).await.expect("handshake");
    shaken.write_all(b"PRI * HTTP/2").await.expect("writes");
    let mut rest = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(10), shaken.read_to_end(&mut rest)).await;
    assert!(read.is_ok(), "half a preface");

    // Everybody else is served meanwhile and afterwards.
    list(control.admin().await).await.expect("answers");
    control.stop().await;
}

#[tokio::test]
async fn too_many_anonymous_connections_leave_room_for_others() {
    let control = Control::start_with("[limits]\nanonymous_connections = 2\n").await;
    let mut held = Vec::new();
    for _ in 0..8 {
        if let Ok(channel) = control.channel(None).await {
            held.push(channel);
        }
    }
    list(control.admin().await)
        .await
        .expect("administrators are counted apart");
    let mut open = 0;
    for channel in &held {
        if list(channel.clone()).await == Err(Code::Unauthenticated) {
            open += 1;
        }
    }
    assert!(open >= 1, "some are served");
    drop(held);
    control.stop().await;
}
