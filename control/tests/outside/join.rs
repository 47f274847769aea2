//! How a machine becomes a node.

use orlop_control::server::identity::{Identity, NODES};
use orlop_proto::{
    api::v1::{CreateRequest, DeleteRequest, Object, object::Body, objects_client::ObjectsClient},
    cluster::v1::{
        CreateTokenRequest, JoinRequest, JoinResponse, RenewRequest, RevokeTokenRequest, join_client::JoinClient,
    },
    core::v1::Node,
    meta::v1::ObjectMeta,
};
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use tonic::{Code, Status};

use crate::{
    harness::{Control, Pair, subject},
    log::Log,
};

fn request(key: &KeyPair) -> Vec<u8> {
    CertificateParams::default()
        .serialize_request(key)
        .expect("request")
        .der()
        .to_vec()
}

pub async fn token(control: &Control, uses: u32, ttl_seconds: i64) -> String {
    let mut client = JoinClient::new(control.unix().await);
    client
        .create_token(CreateTokenRequest { ttl_seconds, uses })
        .await
        .expect("token")
        .into_inner()
        .token
}

pub async fn join(control: &Control, token: &str, name: &str, key: &KeyPair) -> Result<JoinResponse, Status> {
    let mut client = JoinClient::new(control.channel(None).await.expect("connects"));
    let message = JoinRequest {
        token: token.to_owned(),
        node_name: name.to_owned(),
        certificate_request: request(key).into(),
    };
    client.join(message).await.map(tonic::Response::into_inner)
}

pub async fn renew(control: &Control, pair: &Pair, key: &KeyPair) -> Result<JoinResponse, Status> {
    renew_by(control, pair, request(key)).await
}

/// With a request (PKCS #10) of one's own.
pub async fn renew_by(control: &Control, pair: &Pair, request: Vec<u8>) -> Result<JoinResponse, Status> {
    let mut client = JoinClient::new(control.channel(Some(pair)).await.expect("connects"));
    let message = RenewRequest {
        certificate_request: request.into(),
    };
    client.renew(message).await.map(tonic::Response::into_inner)
}

pub fn pair(response: &JoinResponse, key: &KeyPair) -> Pair {
    Pair {
        certificate: CertificateDer::from(response.certificate.to_vec()),
        key: key.serialize_der(),
        issuers: Vec::new(),
    }
}

#[tokio::test]
async fn a_machine_joins_and_renews() {
    let control = Control::start().await;
    let token = token(&control, 1, 60).await;
    // What a machine checks before it trusts control: the CA in the handshake is the token's.
    let stream = control.tls(None, &[b"h2"]).await.expect("handshake");
    let chain = stream.get_ref().1.peer_certificates().expect("chain").to_vec();
    let hash = hex::encode(Sha256::digest(chain.last().expect("the CA")));
    assert_eq!(token.rsplit('.').next(), Some(hash.as_str()));

    let key = KeyPair::generate().expect("key");
    let joined = join(&control, &token, "n1", &key).await.expect("joins");
    assert_eq!(joined.ca_certificate, control.ca().to_vec());
    assert!(joined.not_after.is_some());
    match Identity::from_certificate(&joined.certificate) {
        Identity::Node { name, .. } => assert_eq!(&*name, "n1"),
        other => panic!("{other:?}"),
    }
    // An answer that was lost is asked for again, and uses nothing up.
    join(&control, &token, "n1", &key).await.expect("joins again");

    let next = KeyPair::generate().expect("key");
    let renewed = renew(&control, &pair(&joined, &key), &next)
        .await
        .expect("renews with a new key");
    renew(&control, &pair(&joined, &key), &next)
        .await
        .expect("the certificate before is good until the next renewal");
    let third = KeyPair::generate().expect("key");
    renew(&control, &pair(&renewed, &next), &third).await.expect("renews");
    let status = renew(&control, &pair(&joined, &key), &next)
        .await
        .expect_err("two renewals ago");
    assert_eq!(status.code(), Code::Unauthenticated);
    control.stop().await;
}

#[tokio::test]
async fn all_bad_tokens_get_one_answer() {
    let log = Log::start();
    let control = Control::start().await;
    let good = token(&control, 1, 60).await;
    let mut parts: Vec<&str> = good.split('.').collect();
    let wrong_secret = "00".repeat(32);
    parts[2] = &wrong_secret;
    let guessed = parts.join(".");
    parts[1] = "0123456789abcdef";
    let unknown = parts.join(".");
    let expired = token(&control, 0, 1).await;
    let used_up = token(&control, 1, 60).await;
    let first = KeyPair::generate().expect("key");
    join(&control, &used_up, "first", &first).await.expect("joins");
    let revoked = token(&control, 0, 60).await;
    let id = revoked.split('.').nth(1).expect("id").to_owned();
    let mut client = JoinClient::new(control.unix().await);
    client
        .revoke_token(RevokeTokenRequest { id: id.clone() })
        .await
        .expect("revokes");
    let again = client
        .revoke_token(RevokeTokenRequest { id })
        .await
        .expect_err("is gone");
    assert_eq!(again.code(), Code::NotFound);
    tokio::time::sleep(std::time::Duration::from_millis(2100)).await;

    let key = KeyPair::generate().expect("key");
    let mut answers = std::collections::BTreeSet::new();
    for (bad, reason) in [
        ("", "not written like a token"),
        ("orlop1.x.y.z", "not written like a token"),
        ("orlop1./../../x.y.z", "not written like a token"),
        (&guessed, "wrong secret"),
        (&unknown, "unknown"),
        (&expired, "expired"),
        (&used_up, "used up"),
        (&revoked, "unknown"),
    ] {
        let before = log.length();
        let status = join(&control, bad, "guesser", &key).await.expect_err(bad);
        assert_eq!(status.code(), Code::Unauthenticated, "{bad}");
        let logged = log.since(before, &["join refused: token", "guesser", &format!("{reason:?}")]);
        assert_eq!(logged, 1, "{bad}: the log knows why: {reason}");
        answers.insert(status.message().to_owned());
    }
    assert_eq!(answers.len(), 1, "{answers:?}");
    join(&control, &good, "n2", &key)
        .await
        .expect("the guesses used nothing up");
    control.stop().await;
}

#[tokio::test]
async fn a_token_for_three_is_good_for_three_of_twenty() {
    let control = Control::start().await;
    let token = token(&control, 3, 60).await;
    let joins = (0..20).map(|index| {
        let (control, token) = (&control, &token);
        async move { join(control, token, &format!("n{index}"), &KeyPair::generate().expect("key")).await }
    });
    let outcomes = futures::future::join_all(joins).await;
    let joined = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    // Joins that met each other too often are told to try again; none gets in beyond the limit.
    assert!((1..=3).contains(&joined), "{joined}");
    let refused = outcomes.iter().filter_map(|outcome| outcome.as_ref().err());
    for status in refused {
        assert!(
            matches!(status.code(), Code::Unauthenticated | Code::Aborted),
            "{status:?}"
        );
    }
    control.stop().await;
}

#[tokio::test]
async fn a_name_belongs_to_the_key_that_joined_first() {
    let control = Control::start().await;
    let token = token(&control, 0, 60).await;
    let first = KeyPair::generate().expect("key");
    let second = KeyPair::generate().expect("key");
    let joined = join(&control, &token, "n1", &first).await.expect("joins");
    let status = join(&control, &token, "n1", &second).await.expect_err("another key");
    assert_eq!(status.code(), Code::AlreadyExists);

    // Also while its Node object is there, however old the binding is.
    let mut objects = ObjectsClient::new(control.unix().await);
    let metadata = Some(ObjectMeta {
        name: "n1".to_owned(),
        ..ObjectMeta::default()
    });
    let object = Object {
        body: Some(Body::Node(Node {
            metadata,
            ..Node::default()
        })),
    };
    objects
        .create(CreateRequest { object: Some(object) })
        .await
        .expect("creates the node");
    let status = join(&control, &token, "n1", &second).await.expect_err("another key");
    assert_eq!(status.code(), Code::AlreadyExists);
    let delete = DeleteRequest {
        resource: "nodes".to_owned(),
        name: "n1".to_owned(),
        ..DeleteRequest::default()
    };
    objects.delete(delete).await.expect("deletes the node");
    renew(&control, &pair(&joined, &first), &first)
        .await
        .expect("the first key still has the name");
    control.stop().await;
}

#[tokio::test]
async fn bad_names_and_requests() {
    let control = Control::start().await;
    let token = token(&control, 0, 60).await;
    let key = KeyPair::generate().expect("key");
    for name in ["", "N1", "a/b", "../x", "a\u{0}", "n1\n", &"a".repeat(254)] {
        let status = join(&control, &token, name, &key).await.expect_err(name);
        assert_eq!(status.code(), Code::InvalidArgument, "{name:?}");
    }
    let mut client = JoinClient::new(control.channel(None).await.expect("connects"));
    let garbage = JoinRequest {
        token: token.clone(),
        node_name: "n1".to_owned(),
        certificate_request: vec![1, 2, 3].into(),
    };
    assert_eq!(
        client.join(garbage).await.expect_err("garbage").code(),
        Code::InvalidArgument
    );
    for ttl_seconds in [-1, 31 * 24 * 3600, i64::MAX] {
        let mut admin = JoinClient::new(control.unix().await);
        let status = admin
            .create_token(CreateTokenRequest { ttl_seconds, uses: 0 })
            .await
            .expect_err("ttl");
        assert_eq!(status.code(), Code::InvalidArgument);
    }
    control.stop().await;
}

#[tokio::test]
async fn tokens_and_names_survive_a_restart() {
    let control = Control::start().await;
    let token = token(&control, 2, 600).await;
    let first = KeyPair::generate().expect("key");
    let joined = join(&control, &token, "n1", &first).await.expect("joins");
    let directory = control.stop().await;

    let control = Control::start_in(directory, "").await;
    renew(&control, &pair(&joined, &first), &first)
        .await
        .expect("the certificate is of the same CA");
    let second = KeyPair::generate().expect("key");
    assert_eq!(
        join(&control, &token, "n1", &second).await.expect_err("taken").code(),
        Code::AlreadyExists
    );
    join(&control, &token, "n2", &second).await.expect("one use is left");
    assert_eq!(
        join(&control, &token, "n3", &second).await.expect_err("used up").code(),
        Code::Unauthenticated
    );
    control.stop().await;
}

#[tokio::test]
async fn a_forged_node_of_a_name_that_has_a_key_is_refused() {
    let control = Control::start().await;
    let token = token(&control, 0, 60).await;
    join(&control, &token, "n1", &KeyPair::generate().expect("key"))
        .await
        .expect("joins");
    // Signed by our CA, for the right name, but with a key that the name does not have: an old machine's.
    let old = control.forge(|params| params.distinguished_name = subject("system:node:n1", NODES));
    let status = renew(&control, &old, &KeyPair::generate().expect("key"))
        .await
        .expect_err("refused");
    assert_eq!(status.code(), Code::Unauthenticated);
    control.stop().await;
}
