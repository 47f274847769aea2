use std::sync::Mutex as Lock;

use base64::Engine as _;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpListener,
};

use super::*;
use crate::runtime::image_source::{CONFIG, LAYER, architecture};

/// A registry in a few lines, that can misbehave as real ones would not.
#[derive(Default)]
struct Fake {
    /// By tag or digest.
    manifests: HashMap<String, Bytes>,
    blobs: HashMap<String, Bytes>,
    /// `Basic` or `Bearer` authentication, for `user` with `sesame`.
    scheme: Option<&'static str>,
    /// So many requests are answered with 503 first.
    failures: Lock<u32>,
    /// The first answer with a blob ends after so many bytes.
    cut: Lock<Option<usize>>,
    /// And so does each.
    always_cut: bool,
    ranges: bool,
    /// Answers do not say how long they are.
    endless: bool,
    /// By tag or digest, where to ask instead.
    redirects: HashMap<String, String>,
    /// Asked for it, this one says nothing.
    silent: Option<&'static str>,
    /// The challenge, if it is another than `scheme` has.
    challenge: Option<String>,
    requests: Lock<Vec<String>>,
    authorizations: Lock<Vec<String>>,
}

impl Fake {
    fn with_image(mut self, tag: &str, layer: &'static [u8]) -> Self {
        let config = Bytes::from_static(b"{}");
        let manifest = image_of(&config, &[layer]).to_bytes();
        self.blobs.insert(digest_of(&config), config);
        self.blobs.insert(digest_of(layer), Bytes::from_static(layer));
        self.manifests.insert(digest_of(&manifest), manifest.clone());
        self.manifests.insert(tag.to_owned(), manifest);
        self
    }

    async fn serve(self) -> (String, Arc<Self>) {
        self.serve_with(None).await
    }

    /// With TLS, if there is a certificate.
    async fn serve_with(self, tls: Option<tokio_rustls::TlsAcceptor>) -> (String, Arc<Self>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let fake = Arc::new(self);
        let (served, own) = (fake.clone(), host.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (fake, host, tls) = (served.clone(), own.clone(), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        None => fake.answer(stream, &host).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                fake.answer(stream, &host).await;
                            }
                        }
                    }
                });
            }
        });
        (host, fake)
    }

    async fn answer(&self, mut stream: impl AsyncRead + AsyncWrite + Unpin, host: &str) {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let Ok(byte) = stream.read_u8().await else { return };
            head.push(byte);
        }
        let head = String::from_utf8(head).unwrap();
        let path = head.split(' ').nth(1).unwrap().to_owned();
        let header = |name: &str| {
            let mut lines = head.lines().filter_map(|line| line.split_once(": "));
            lines
                .find(|(key, _)| key.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.to_owned())
        };
        let (given, range) = (header("authorization").unwrap_or_default(), header("range"));
        self.requests
            .lock()
            .unwrap()
            .push(format!("{path} {}", range.clone().unwrap_or_default()));
        self.authorizations.lock().unwrap().push(given.clone());
        if self.silent.is_some_and(|silent| path.ends_with(silent)) {
            std::future::pending::<()>().await;
        }
        let (status, extra, body) = self.respond(host, &path, &given, range.as_deref());
        let mut sent = body.clone();
        let cut = match path.contains("/blobs/") {
            true if self.always_cut => *self.cut.lock().unwrap(),
            true => self.cut.lock().unwrap().take(),
            false => None,
        };
        if let Some(cut) = cut {
            sent.truncate(cut);
        }
        let length = match self.endless {
            true => String::new(),
            false => format!("content-length: {}\r\n", body.len()),
        };
        let answer = format!("HTTP/1.1 {status}\r\n{extra}{length}connection: close\r\n\r\n");
        stream.write_all(answer.as_bytes()).await.ok();
        stream.write_all(&sent).await.ok();
        if path.ends_with("/flood") {
            // Until nobody reads any more.
            while stream.write_all(&[b' '; 1 << 16]).await.is_ok() {}
        }
        stream.shutdown().await.ok();
    }

    fn respond(&self, host: &str, path: &str, given: &str, range: Option<&str>) -> (&'static str, String, Bytes) {
        let basic = format!(
            "Basic {}",
            base64::engine::general_purpose::STANDARD.encode("user:sesame")
        );
        let none = String::new;
        if path.starts_with("/token") {
            return match given == basic && path.contains("repository%3Aapp%3Apull") {
                true => ("200 OK", none(), Bytes::from_static(br#"{"token":"open"}"#)),
                false => ("401 Unauthorized", none(), Bytes::from_static(b"who are you?")),
            };
        }
        let wanted = match self.scheme {
            Some("Bearer") => "Bearer open".to_owned(),
            Some(_) => basic,
            None => given.to_owned(),
        };
        if given != wanted {
            let challenge = match self.scheme {
                _ if self.challenge.is_some() => self.challenge.clone().unwrap(),
                Some("Bearer") => format!("Bearer realm=\"http://{host}/token\",service=\"fake\""),
                _ => "Basic realm=\"fake\"".to_owned(),
            };
            let extra = format!("www-authenticate: {challenge}\r\n");
            return ("401 Unauthorized", extra, Bytes::new());
        }
        let left = *self.failures.lock().unwrap();
        if left > 0 {
            *self.failures.lock().unwrap() = left - 1;
            return ("503 Service Unavailable", none(), Bytes::from_static(b"busy"));
        }
        let name = path.rsplit('/').next().unwrap();
        if let Some(target) = self.redirects.get(name) {
            return (
                "307 Temporary Redirect",
                format!("location: {target}\r\n"),
                Bytes::new(),
            );
        }
        if let Some(manifest) = self.manifests.get(name).filter(|_| path.contains("/manifests/")) {
            return ("200 OK", none(), manifest.clone());
        }
        match (self.blobs.get(name), range) {
            (Some(blob), Some(range)) if self.ranges => {
                let from = range.trim_start_matches("bytes=").trim_end_matches('-');
                (
                    "206 Partial Content",
                    none(),
                    blob.slice(from.parse::<usize>().unwrap()..),
                )
            }
            (Some(blob), _) => ("200 OK", none(), blob.clone()),
            (None, _) => {
                let body = br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#;
                ("404 Not Found", none(), Bytes::from_static(body))
            }
        }
    }
}

fn described(media_type: &str, bytes: &[u8]) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: digest_of(bytes),
        size: bytes.len() as u64,
        platform: None,
        annotations: BTreeMap::new(),
    }
}

fn image_of(config: &[u8], layers: &[&[u8]]) -> Manifest {
    let layers = layers.iter().map(|layer| described(LAYER, layer)).collect();
    Manifest::new(described(CONFIG, config), layers)
}

fn registries(settings: &[(&str, RegistrySettings)]) -> Registries {
    // Another test may have been first.
    rustls::crypto::ring::default_provider().install_default().ok();
    let settings = settings.iter().map(|(host, settings)| {
        let mut settings = settings.clone();
        settings.plain_http = settings.ca.is_none();
        ((*host).to_owned(), settings)
    });
    let pull = PullSettings {
        timeout_seconds: 2,
        max_image_bytes: 1000,
        ..PullSettings::default()
    };
    Registries::new(pull, settings.collect())
}

fn of_user(password: &str) -> RegistrySettings {
    RegistrySettings {
        username: Some("user".to_owned()),
        password: Some(Secret(password.to_owned())),
        ..RegistrySettings::default()
    }
}

async fn pull(registries: &Registries, reference: &str) -> Result<FoundImage, String> {
    let found = registries.find(&Reference::parse(reference).unwrap()).await;
    found.map(Option::unwrap).map_err(|error| {
        assert_eq!(error.reason(), "ErrImagePull");
        error.to_string()
    })
}

async fn read(found: &FoundImage, digest: &str) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    found.blobs.open(digest).await?.read_to_end(&mut bytes).await?;
    Ok(bytes)
}

#[tokio::test]
async fn of_an_index_this_platforms_manifest_is_taken() {
    let of = |os: &str, architecture: &str, bytes: &[u8]| Descriptor {
        platform: Some(Platform {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
        }),
        ..described(MANIFEST, bytes)
    };
    let mut fake = Fake::default().with_image("plain", b"layer");
    let ours = fake.manifests["plain"].clone();
    let index = |manifests: Vec<Descriptor>| {
        let index = serde_json::json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests,
        });
        Bytes::from(index.to_string())
    };
    let many = index(vec![
        of("windows", architecture(), b"a"),
        of("linux", "s390x", b"b"),
        of("linux", architecture(), &ours),
    ]);
    let by_digest = digest_of(&many);
    fake.manifests.insert(by_digest.clone(), many.clone());
    fake.manifests.insert("many".to_owned(), many);
    let foreign = index(vec![of("linux", "s390x", b"b"), of("windows", "amd64", b"a")]);
    fake.manifests.insert("foreign".to_owned(), foreign);
    let (host, _) = fake.serve().await;
    let registries = registries(&[(&host, RegistrySettings::default())]);
    for reference in [format!("{host}/app:many"), format!("{host}/app:x@{by_digest}")] {
        let found = pull(&registries, &reference).await.unwrap();
        assert_eq!(found.manifest, ours);
        assert_eq!(found.media_type, MANIFEST);
        assert_eq!(read(&found, &digest_of(b"layer")).await.unwrap(), b"layer");
    }
    let refused = pull(&registries, &format!("{host}/app:foreign")).await.err().unwrap();
    assert!(refused.contains("for linux/s390x, windows/amd64"), "{refused}");
}

#[tokio::test]
async fn credentials_are_given_as_the_registry_wants_them() {
    for scheme in ["Basic", "Bearer"] {
        let fake = Fake {
            scheme: Some(scheme),
            ..Fake::default()
        };
        let (host, _) = fake.with_image("1", b"layer").serve().await;
        let reference = format!("{host}/app:1");
        let found = pull(&registries(&[(&host, of_user("sesame"))]), &reference)
            .await
            .unwrap();
        assert_eq!(read(&found, &digest_of(b"layer")).await.unwrap(), b"layer", "{scheme}");
        for settings in [of_user("wrong"), RegistrySettings::default()] {
            let refused = pull(&registries(&[(&host, settings)]), &reference).await.err().unwrap();
            assert!(refused.contains("unauthorized"), "{scheme}: {refused}");
            assert!(!refused.contains("wrong"), "{refused}");
        }
    }
}

#[tokio::test]
async fn a_manifest_that_its_digest_does_not_name_is_refused() {
    let mut fake = Fake::default().with_image("1", b"layer");
    let other = fake.manifests["1"].clone();
    let asked = digest_of(b"another manifest");
    fake.manifests.insert(asked.clone(), other);
    let (host, _) = fake.serve().await;
    let registries = registries(&[(&host, RegistrySettings::default())]);
    let refused = pull(&registries, &format!("{host}/app@{asked}")).await.err().unwrap();
    assert!(refused.contains(&asked), "{refused}");
}

#[tokio::test]
async fn a_download_goes_on_where_it_broke() {
    for ranges in [true, false] {
        let fake = Fake {
            ranges,
            cut: Lock::new(Some(4)),
            ..Fake::default()
        };
        let (host, fake) = fake.with_image("1", b"0123456789").serve().await;
        let registries = registries(&[(&host, RegistrySettings::default())]);
        let found = pull(&registries, &format!("{host}/app:1")).await.unwrap();
        assert_eq!(read(&found, &digest_of(b"0123456789")).await.unwrap(), b"0123456789");
        let requests = fake.requests.lock().unwrap();
        assert!(requests.last().unwrap().ends_with(" bytes=4-"), "{requests:?}");
    }
}

#[tokio::test]
async fn failures_that_may_pass_are_tried_again() {
    let fake = Fake {
        failures: Lock::new(2),
        ..Fake::default()
    };
    let (host, _) = fake.with_image("1", b"layer").serve().await;
    pull(
        &registries(&[(&host, RegistrySettings::default())]),
        &format!("{host}/app:1"),
    )
    .await
    .unwrap();
}

#[tokio::test]
async fn mirrors_are_asked_first_and_every_refusal_is_told() {
    let (origin, fake) = Fake::default().with_image("1", b"layer").serve().await;
    let (empty, _) = Fake::default().serve().await;
    let (full, _) = Fake::default().with_image("1", b"layer").serve().await;
    let with = |mirrors: &[&String]| RegistrySettings {
        mirrors: mirrors.iter().map(|mirror| (*mirror).clone()).collect(),
        ..RegistrySettings::default()
    };
    let plain = RegistrySettings::default;
    let mirrored = registries(&[(&origin, with(&[&empty, &full])), (&empty, plain()), (&full, plain())]);
    let found = pull(&mirrored, &format!("{origin}/app:1")).await.unwrap();
    assert_eq!(read(&found, &digest_of(b"layer")).await.unwrap(), b"layer");
    assert!(
        fake.requests.lock().unwrap().is_empty(),
        "the mirror had it, the origin was not asked"
    );
    let refused = pull(&mirrored, &format!("{origin}/app:2")).await.err().unwrap();
    for host in [&origin, &empty, &full] {
        assert!(
            refused.contains(&format!("{host}: HTTP status 404: MANIFEST_UNKNOWN: manifest unknown")),
            "{refused}"
        );
    }
}

#[tokio::test]
async fn images_over_the_limits_are_refused_before_they_come() {
    let mut fake = Fake::default();
    let large = [0u8; 600];
    let layers: Vec<&[u8]> = vec![&large, &large];
    let manifest = image_of(b"{}", &layers).to_bytes();
    fake.manifests.insert("large".to_owned(), manifest);
    let layers: Vec<&[u8]> = vec![b""; MAX_LAYERS + 1];
    let manifest = image_of(b"{}", &layers).to_bytes();
    fake.manifests.insert("deep".to_owned(), manifest);
    fake.manifests
        .insert("garbage".to_owned(), Bytes::from_static(b"<html>"));
    let (host, _) = fake.serve().await;
    let registries = registries(&[(&host, RegistrySettings::default())]);
    for (tag, why) in [
        ("large", "1200 bytes"),
        ("deep", "128 layers"),
        ("garbage", "its manifest"),
    ] {
        let refused = pull(&registries, &format!("{host}/app:{tag}")).await.err().unwrap();
        assert!(refused.contains(why), "{refused}");
    }
}

mod hostile;
