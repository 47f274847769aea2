//! Who the node is: its key, the certificate that control gave it, and the CA that it trusts.
//!
//! All lie in `DATA_DIR/pki`: `node.key` (0600, made here, never sent), `node.crt`, `ca.crt`. The key is on disk before the
//! first request goes out, so a join that was cut off can be repeated: control refuses a name that has another key.

mod authority;

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::Engine;
use orlop_proto::cluster::v1::{JoinRequest, JoinResponse, RenewRequest, join_client::JoinClient};
use rand::Rng;
use rcgen::{CertificateParams, KeyPair};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{
    config::Config,
    link::{DialError, connect},
};

const BACKOFF_MIN: Duration = Duration::from_millis(250);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// A call to control takes at most this long.
const DEADLINE: Duration = Duration::from_secs(15);
/// How often it is looked whether the certificate is to be renewed.
const CHECK: Duration = Duration::from_secs(60);
/// After a new certificate: one of a very short life is not renewed without a pause.
const PAUSE: Duration = Duration::from_secs(1);

/// Why the node has no identity, or cannot get one.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is not what was written there.
    #[error("{path}: {reason}")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The token is not of the form `orlop1.ID.SECRET.CAHASH`.
    #[error("the join token is not of the form orlop1.ID.SECRET.CAHASH")]
    BadToken,
    /// The node has not joined and has no token.
    #[error("the node has not joined, and there is no join_token")]
    NoToken,
    /// Control could not be reached, or is not the one that the token names.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// Control refused.
    #[error("control refused: {0}")]
    Refused(#[source] Box<tonic::Status>),
    /// Control's answer makes no sense.
    #[error("control's answer is unusable: {0}")]
    Answer(String),
    /// A key or certificate could not be made or used.
    #[error("cryptography: {0}")]
    Crypto(String),
}

/// The node's identity; it may come into being, and be renewed, while it is used.
pub struct Identity {
    dir: PathBuf,
    config: Config,
    current: watch::Sender<Option<Current>>,
}

#[derive(Clone)]
struct Current {
    tls: Arc<ClientConfig>,
    times: Times,
}

/// A certificate's times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Times {
    /// When two thirds of its time are over.
    renew_at: SystemTime,
    /// When control takes it no longer.
    not_after: SystemTime,
}

/// What is to be done about the certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    /// Nothing yet.
    Nothing,
    /// A new one by means of the one that is there.
    Renewal,
    /// A new one by means of the join token: there is none, or none that control takes.
    Join,
}

fn due(times: Option<Times>, now: SystemTime) -> Due {
    match times {
        Some(times) if now < times.renew_at => Due::Nothing,
        Some(times) if now < times.not_after => Due::Renewal,
        Some(_) | None => Due::Join,
    }
}

impl Identity {
    /// Loads what there is. A damaged certificate is an error; a missing one is not.
    pub fn open(config: &Config) -> Result<Self, IdentityError> {
        let dir = config.data_dir.join("pki");
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        made.map_err(|source| IdentityError::Io {
            path: dir.clone(),
            source,
        })?;
        let identity = Self {
            dir,
            config: config.clone(),
            current: watch::channel(None).0,
        };
        if let (Some(certificate), Some(ca)) = (identity.read("node.crt")?, identity.read("ca.crt")?) {
            let key = identity.key()?;
            identity.use_certificate(&certificate, &ca, &key)?;
        }
        Ok(identity)
    }

    /// Whether the node has joined.
    pub fn is_joined(&self) -> bool {
        self.current.borrow().is_some()
    }

    /// The TLS configuration for the next connection to control.
    pub fn tls(&self) -> Result<Arc<ClientConfig>, String> {
        self.current
            .borrow()
            .as_ref()
            .map(|current| Arc::clone(&current.tls))
            .ok_or_else(|| "not joined yet".to_owned())
    }

    /// Returns when the node has joined. Cancel-safe.
    pub async fn joined(&self) {
        let mut current = self.current.subscribe();
        // The sender is `self`, so this ends only with a value.
        let _ = current.wait_for(Option::is_some).await;
    }

    /// Joins if that is still to be done, and renews the certificate when two thirds of its time are over. A machine that was off
    /// for so long that its certificate has expired joins again with the same key, if its token is still good. Until `stop`.
    pub async fn keep(&self, stop: CancellationToken) {
        let mut backoff = BACKOFF_MIN;
        let mut attempt = 0;
        while !stop.is_cancelled() {
            let times = self.current.borrow().as_ref().map(|current| current.times);
            let wait = match due(times, SystemTime::now()) {
                Due::Nothing => CHECK,
                due => {
                    attempt += 1;
                    match self.attempt(due, attempt).await {
                        Ok(()) => {
                            backoff = BACKOFF_MIN;
                            PAUSE
                        }
                        Err(error) => {
                            tracing::warn!(%error, ?due, expired = times.is_some() && due == Due::Join, "no new certificate");
                            let wait = rand::rng().random_range(backoff / 2..=backoff);
                            backoff = (backoff * 2).min(BACKOFF_MAX);
                            wait
                        }
                    }
                }
            };
            tokio::select! {
                () = sleep(wait) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    async fn attempt(&self, due: Due, attempt: usize) -> Result<(), IdentityError> {
        match due {
            Due::Nothing => Ok(()),
            Due::Renewal => self.renew_once(attempt).await,
            Due::Join => match self.join_once(attempt).await {
                // Expired by our clock, perhaps not by control's.
                Err(error) if self.is_joined() => self.renew_once(attempt).await.map_err(|_| error),
                done => done,
            },
        }
    }

    /// Joins with the configured token: one attempt, at one of control's addresses.
    pub async fn join_once(&self, attempt: usize) -> Result<(), IdentityError> {
        let token = self
            .config
            .token()
            .map_err(|error| IdentityError::Answer(error.to_string()))?;
        let token = token.ok_or(IdentityError::NoToken)?;
        let hash = ca_hash(&token)?;
        let key = self.key()?;
        let tls = finish(
            builder()
                .dangerous()
                .with_custom_certificate_verifier(authority::pinned(hash))
                .with_no_client_auth(),
        );
        let channel = connect(self.address(attempt)?, tls).await?;
        let request = JoinRequest {
            token,
            node_name: self.config.node_name.clone(),
            certificate_request: certificate_request(&key)?.into(),
        };
        let answer = call(JoinClient::new(channel).join(request)).await?;
        if authority::hash(&answer.ca_certificate) != hash {
            return Err(IdentityError::Answer(
                "its CA is not the one that the token names".to_owned(),
            ));
        }
        self.accept(&answer, &key)?;
        tracing::info!(node = self.config.node_name, "joined");
        Ok(())
    }

    async fn renew_once(&self, attempt: usize) -> Result<(), IdentityError> {
        let tls = self.tls().map_err(IdentityError::Answer)?;
        let key = self.key()?;
        let channel = connect(self.address(attempt)?, tls).await?;
        let request = RenewRequest {
            certificate_request: certificate_request(&key)?.into(),
        };
        let answer = call(JoinClient::new(channel).renew(request)).await?;
        self.accept(&answer, &key)?;
        tracing::info!(node = self.config.node_name, "certificate renewed");
        Ok(())
    }

    fn address(&self, attempt: usize) -> Result<&str, IdentityError> {
        let addresses = &self.config.control;
        if addresses.is_empty() {
            return Err(DialError::NoAddress.into());
        }
        Ok(&addresses[attempt % addresses.len()])
    }

    /// Checks what control gave and keeps it. The CA is written first: a certificate without it would not be loaded.
    fn accept(&self, answer: &JoinResponse, key: &KeyPair) -> Result<(), IdentityError> {
        let (_, parsed) = X509Certificate::from_der(&answer.certificate)
            .map_err(|error| IdentityError::Answer(format!("not a certificate: {error}")))?;
        if parsed.public_key().raw != key_info(key) {
            return Err(IdentityError::Answer("the certificate is for another key".to_owned()));
        }
        let (certificate, ca) = (
            pem("CERTIFICATE", &answer.certificate),
            pem("CERTIFICATE", &answer.ca_certificate),
        );
        self.write("ca.crt", &ca, 0o644)?;
        self.write("node.crt", &certificate, 0o644)?;
        self.use_certificate(&certificate, &ca, key)
    }

    fn use_certificate(&self, certificate: &str, ca: &str, key: &KeyPair) -> Result<(), IdentityError> {
        let damaged = |name: &str, reason: String| IdentityError::Damaged {
            path: self.dir.join(name),
            reason,
        };
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes())
            .map_err(|error| damaged("node.crt", error.to_string()))?;
        let ca = CertificateDer::from_pem_slice(ca.as_bytes()).map_err(|error| damaged("ca.crt", error.to_string()))?;
        let times = times(&certificate).map_err(|reason| damaged("node.crt", reason))?;
        let mut roots = RootCertStore::empty();
        roots.add(ca).map_err(|error| damaged("ca.crt", error.to_string()))?;
        let key =
            PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| damaged("node.key", error.to_owned()))?;
        let tls = builder()
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![certificate], key)
            .map_err(|error| damaged("node.crt", error.to_string()))?;
        self.current.send_replace(Some(Current {
            tls: finish(tls),
            times,
        }));
        Ok(())
    }

    /// The node's key; made and written when there is none.
    fn key(&self) -> Result<KeyPair, IdentityError> {
        // Two tasks must not make two keys.
        static MAKING: Mutex<()> = Mutex::new(());
        let _one_at_a_time = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(text) = self.read("node.key")? {
            let damaged = |error: rcgen::Error| IdentityError::Damaged {
                path: self.dir.join("node.key"),
                reason: error.to_string(),
            };
            return KeyPair::from_pem(&text).map_err(damaged);
        }
        let key = KeyPair::generate().map_err(crypto)?;
        self.write("node.key", &key.serialize_pem(), 0o600)?;
        Ok(key)
    }

    fn read(&self, name: &str) -> Result<Option<String>, IdentityError> {
        let path = self.dir.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(IdentityError::Io { path, source }),
        }
    }

    fn write(&self, name: &str, text: &str, mode: u32) -> Result<(), IdentityError> {
        let (path, temporary) = (self.dir.join(name), self.dir.join(format!("{name}.tmp")));
        let write = || -> io::Result<()> {
            match fs::remove_file(&temporary) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = File::options()
                .write(true)
                .create_new(true)
                .mode(mode)
                .open(&temporary)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&self.dir)?.sync_all()
        };
        write().map_err(|source| IdentityError::Io {
            path: path.clone(),
            source,
        })
    }
}

async fn call(
    call: impl Future<Output = Result<tonic::Response<JoinResponse>, tonic::Status>>,
) -> Result<JoinResponse, IdentityError> {
    match tokio::time::timeout(DEADLINE, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(IdentityError::Refused(Box::new(status))),
        Err(_) => Err(IdentityError::Refused(Box::new(tonic::Status::deadline_exceeded(
            "no answer",
        )))),
    }
}

fn builder() -> rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier> {
    ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap_or_else(|_| ClientConfig::builder())
}

fn finish(mut tls: ClientConfig) -> Arc<ClientConfig> {
    tls.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would keep the old certificate after a renewal.
    tls.resumption = rustls::client::Resumption::disabled();
    Arc::new(tls)
}

/// The CAHASH of a token.
fn ca_hash(token: &str) -> Result<[u8; 32], IdentityError> {
    let mut parts = token.split('.');
    let (Some("orlop1"), Some(_), Some(_), Some(hash), None) =
        (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(IdentityError::BadToken);
    };
    let hash = hex::decode(hash).map_err(|_| IdentityError::BadToken)?;
    hash.try_into().map_err(|_| IdentityError::BadToken)
}

fn certificate_request(key: &KeyPair) -> Result<Vec<u8>, IdentityError> {
    let request = CertificateParams::default().serialize_request(key).map_err(crypto)?;
    Ok(request.der().to_vec())
}

fn key_info(key: &KeyPair) -> Vec<u8> {
    use rcgen::PublicKeyData;
    key.subject_public_key_info()
}

fn crypto(error: rcgen::Error) -> IdentityError {
    IdentityError::Crypto(error.to_string())
}

/// A certificate's times.
fn times(certificate: &[u8]) -> Result<Times, String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| error.to_string())?;
    let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    let validity = parsed.validity();
    let (from, until) = (seconds(validity.not_before), seconds(validity.not_after));
    let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(seconds);
    Ok(Times {
        renew_at: at(from + until.saturating_sub(from) / 3 * 2),
        not_after: at(until),
    })
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = text
        .as_bytes()
        .chunks(64)
        .filter_map(|line| std::str::from_utf8(line).ok())
        .collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn tokens() {
        let hash = "ab".repeat(32);
        assert_eq!(ca_hash(&format!("orlop1.id.secret.{hash}")).unwrap(), [0xab; 32]);
        for bad in [
            "",
            "orlop1",
            "orlop1.a.b.c",
            "orlop1.a.b",
            "orlop2.a.b.ab",
            &format!("orlop1.a.b.{hash}.x"),
        ] {
            assert!(matches!(ca_hash(bad), Err(IdentityError::BadToken)), "{bad}");
        }
    }

    #[test]
    fn the_key_is_made_once_and_only_its_owner_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            data_dir: dir.path().to_owned(),
            ..Config::default()
        };
        let identity = Identity::open(&config).unwrap();
        let key = identity.key().unwrap().serialize_pem();
        assert!(!identity.is_joined());
        assert_eq!(Identity::open(&config).unwrap().key().unwrap().serialize_pem(), key);
        let mode = fs::metadata(dir.path().join("pki/node.key"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::write(dir.path().join("pki/node.key"), "garbage").unwrap();
        assert!(matches!(identity.key(), Err(IdentityError::Damaged { .. })));
    }

    #[test]
    fn what_is_due_and_when() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let times = Times {
            renew_at: at(20),
            not_after: at(30),
        };
        assert_eq!(due(None, at(0)), Due::Join);
        for (now, expected) in [
            (0, Due::Nothing),
            (19, Due::Nothing),
            (20, Due::Renewal),
            (29, Due::Renewal),
            (30, Due::Join),
            (1000, Due::Join),
        ] {
            assert_eq!(due(Some(times), at(now)), expected, "{now}");
        }
    }

    #[test]
    fn pem_is_what_others_read() {
        let der = vec![7; 100];
        let text = pem("CERTIFICATE", &der);
        assert_eq!(CertificateDer::from_pem_slice(text.as_bytes()).unwrap().as_ref(), der);
    }
}
