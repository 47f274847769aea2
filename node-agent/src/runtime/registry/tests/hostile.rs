//! Registries that lie, stall, break off, or lead elsewhere: an error each, within bounds.

use super::*;

fn plain(host: &str) -> Registries {
    registries(&[(host, RegistrySettings::default())])
}

#[tokio::test]
async fn a_blob_is_as_long_as_its_manifest_says() {
    for (endless, bytes, why) in [
        (false, "layer and more", "says that it has 14 bytes, its manifest 5"),
        (false, "lay", "says that it has 3 bytes, its manifest 5"),
        (true, "layer and more", "longer than the 5 bytes"),
        (true, "lay", "ended after 3 of 5 bytes"),
    ] {
        let mut fake = Fake::default().with_image("1", b"layer");
        fake.endless = endless;
        fake.blobs
            .insert(digest_of(b"layer"), Bytes::from_static(bytes.as_bytes()));
        let (host, _) = fake.serve().await;
        let found = pull(&plain(&host), &format!("{host}/app:1")).await.unwrap();
        let refused = read(&found, &digest_of(b"layer")).await.unwrap_err();
        assert!(refused.to_string().contains(why), "{refused}");
    }
}

#[tokio::test]
async fn connections_that_always_break_are_given_up() {
    let fake = Fake {
        cut: Lock::new(Some(1)),
        always_cut: true,
        ..Fake::default()
    };
    let (host, fake) = fake.with_image("1", b"0123456789").serve().await;
    let found = pull(&plain(&host), &format!("{host}/app:1")).await.unwrap();
    let refused = read(&found, &digest_of(b"0123456789")).await.unwrap_err();
    assert!(refused.to_string().contains(&digest_of(b"0123456789")), "{refused}");
    assert!(
        fake.requests.lock().unwrap().len() < 20,
        "it is asked a bounded number of times"
    );
}

#[tokio::test]
async fn a_registry_that_says_nothing_is_given_up() {
    for silent in ["/1", "/sha256:"] {
        let layer: &'static [u8] = b"layer";
        let mut fake = Fake::default().with_image("1", layer);
        let digest: &'static str = digest_of(layer).leak();
        fake.silent = Some(if silent == "/1" { "/1" } else { digest });
        let (host, _) = fake.serve().await;
        let refused = match pull(&plain(&host), &format!("{host}/app:1")).await {
            Ok(found) => read(&found, digest).await.unwrap_err().to_string(),
            Err(refused) => refused,
        };
        assert!(refused.contains("no answer within 2 s"), "{refused}");
    }
}

#[tokio::test]
async fn floods_are_cut_off() {
    // An answer of any status is read to its bound only: these never end.
    for (scheme, why) in [(None, "larger than 4194304 bytes"), (Some("Basic"), "unauthorized")] {
        let mut fake = Fake {
            scheme,
            endless: true,
            ..Fake::default()
        };
        fake.manifests.insert("flood".to_owned(), Bytes::from_static(b"{"));
        let (host, _) = fake.serve().await;
        let refused = pull(&plain(&host), &format!("{host}/app:flood")).await.err().unwrap();
        assert!(refused.contains(why), "{refused}");
    }
    let fake = Fake {
        endless: true,
        ..Fake::default()
    };
    let (host, _) = fake.serve().await;
    let refused = pull(&plain(&host), &format!("{host}/app/unknown:flood"))
        .await
        .err()
        .unwrap();
    assert!(refused.contains("HTTP status 404") && refused.len() < 1000, "{refused}");
}

#[tokio::test]
async fn indexes_in_indexes_end() {
    let mut fake = Fake::default().with_image("0", b"layer");
    for depth in 1..=MAX_NESTING + 1 {
        let inner = fake.manifests[&(depth - 1).to_string()].clone();
        let mut descriptor = described("application/vnd.oci.image.index.v1+json", &inner);
        descriptor.platform = None;
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [descriptor]}).to_string();
        let index = Bytes::from(index);
        fake.manifests.insert(digest_of(&index), index.clone());
        fake.manifests.insert(depth.to_string(), index);
    }
    let (host, _) = fake.serve().await;
    let registries = plain(&host);
    pull(&registries, &format!("{host}/app:{MAX_NESTING}")).await.unwrap();
    let deep = format!("{host}/app:{}", MAX_NESTING + 1);
    let refused = pull(&registries, &deep).await.err().unwrap();
    assert!(refused.contains("too deep"), "{refused}");
}

#[tokio::test]
async fn credentials_do_not_follow_a_redirection() {
    let (elsewhere, thief) = Fake::default().with_image("1", b"layer").serve().await;
    let mut fake = Fake {
        scheme: Some("Basic"),
        ..Fake::default()
    };
    fake = fake.with_image("1", b"layer");
    let digest = digest_of(b"layer");
    fake.redirects
        .insert(digest.clone(), format!("http://{elsewhere}/v2/app/blobs/{digest}"));
    fake.redirects
        .insert("round".to_owned(), "/v2/app/manifests/round".to_owned());
    fake.redirects
        .insert("away".to_owned(), format!("http://{elsewhere}/v2/app/manifests/none"));
    let (host, own) = fake.serve().await;
    let registries = registries(&[(&host, of_user("sesame"))]);
    let found = pull(&registries, &format!("{host}/app:1")).await.unwrap();
    assert_eq!(read(&found, &digest).await.unwrap(), b"layer");
    assert!(
        own.authorizations
            .lock()
            .unwrap()
            .iter()
            .any(|given| given.starts_with("Basic"))
    );
    assert_eq!(*thief.authorizations.lock().unwrap(), [""]);
    let refused = pull(&registries, &format!("{host}/app:round")).await.err().unwrap();
    assert!(refused.contains("redirects too often"), "{refused}");
    // What another host says of itself is not told.
    let refused = pull(&registries, &format!("{host}/app:away")).await.err().unwrap();
    assert!(
        refused.contains("404") && !refused.contains("MANIFEST_UNKNOWN"),
        "{refused}"
    );
}

#[tokio::test]
async fn tls_is_checked_and_never_left() {
    rustls::crypto::ring::default_provider().install_default().ok();
    let dir = tempfile::tempdir().unwrap();
    let certified = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let other = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let of_ca = |name: &str, pem: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, pem).unwrap();
        RegistrySettings {
            ca: Some(path),
            ..RegistrySettings::default()
        }
    };
    let trusted = of_ca("ca.pem", &certified.cert.pem());
    let key = rustls_pki_types::PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder().with_no_client_auth();
    let config = config
        .with_single_cert(vec![certified.cert.der().clone()], key)
        .unwrap();
    let (plain_host, bare) = Fake::default().with_image("1", b"layer").serve().await;
    let mut fake = Fake::default().with_image("1", b"layer");
    let down = format!("http://{plain_host}/v2/app/manifests/1");
    fake.redirects.insert("down".to_owned(), down);
    let (host, _) = fake.serve_with(Some(Arc::new(config.clone()).into())).await;

    let good = registries(&[(&host, trusted.clone())]);
    let found = pull(&good, &format!("{host}/app:1")).await.unwrap();
    assert_eq!(read(&found, &digest_of(b"layer")).await.unwrap(), b"layer");
    let refused = pull(&good, &format!("{host}/app:down")).await.err().unwrap();
    assert!(refused.contains("where there is no TLS"), "{refused}");

    let asking = Fake {
        scheme: Some("Bearer"),
        challenge: Some(format!("Bearer realm=\"http://{plain_host}/token\"")),
        ..Fake::default()
    };
    let (asking, _) = asking.serve_with(Some(Arc::new(config).into())).await;
    let settings = RegistrySettings {
        ca: trusted.ca.clone(),
        ..of_user("sesame")
    };
    let refused = pull(&registries(&[(&asking, settings)]), &format!("{asking}/app:1")).await;
    let refused = refused.err().unwrap();
    assert!(refused.contains("not asked without TLS"), "{refused}");
    assert!(bare.requests.lock().unwrap().is_empty(), "nothing is asked without TLS");

    for (settings, why) in [
        (of_ca("other.pem", &other.cert.pem()), "certificate"),
        (of_ca("empty.pem", ""), "holds no PEM certificate"),
        (
            RegistrySettings {
                ca: Some(dir.path().join("none")),
                ..RegistrySettings::default()
            },
            "No such file",
        ),
    ] {
        let refused = pull(&registries(&[(&host, settings)]), &format!("{host}/app:1")).await;
        let refused = refused.err().unwrap();
        assert!(refused.contains(why), "{refused}");
    }
    // One that is not configured is never asked without TLS.
    let impatient = PullSettings {
        timeout_seconds: 1,
        ..PullSettings::default()
    };
    let unknown = Registries::new(impatient, BTreeMap::new());
    pull(&unknown, &format!("{plain_host}/app:1")).await.err().unwrap();
    assert!(bare.requests.lock().unwrap().is_empty(), "nothing is asked without TLS");
}
