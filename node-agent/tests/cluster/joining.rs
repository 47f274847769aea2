//! How a machine becomes a node, and stays one: tokens, keys, certificates that are renewed or expire.

use std::{sync::Arc, time::Duration};

use orlop_node::{
    identity::IdentityError,
    link::{Dial as _, DialError},
};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::harness::{Cluster, eventually};

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
