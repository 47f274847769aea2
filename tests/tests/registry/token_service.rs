//! What a registry of images sends people to for a token: one that asks for a password and signs what they may do, as the
//! distribution project's token specification says.

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use anyhow::{Context, Result, ensure};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use jiff::Timestamp;
use orlop_tests::{
    lab::Lab,
    namespaces::in_network,
    registry::{ADDRESS, ISSUER, MEMBER, PASSWORD, TOKEN_SERVICE_PORT, USER, file},
};
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair},
};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _};
use serde_json::json;

/// It serves until its process ends.
#[derive(Clone)]
pub struct TokenService {
    tls: Arc<ServerConfig>,
    signer: Arc<Signer>,
    /// What was asked for, and whether it was given.
    asked: Arc<Mutex<Vec<(String, bool)>>>,
}

struct Signer {
    key: EcdsaKeyPair,
    certificate: CertificateDer<'static>,
}

impl TokenService {
    /// Serves in the registries' network.
    pub fn start(lab: &Lab) -> Result<Self> {
        let certificate = |name: &str| CertificateDer::from_pem_file(file(&lab.spec, name)).context("a certificate");
        let key = |name: &str| PrivatePkcs8KeyDer::from_pem_file(file(&lab.spec, name)).context("a key");
        let tls = ServerConfig::builder().with_no_client_auth().with_single_cert(
            vec![certificate("server.pem")?],
            PrivateKeyDer::from(key("server.key")?),
        )?;
        let secret = key("token.key")?;
        let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
        let signer = Signer {
            key: EcdsaKeyPair::from_pkcs8(algorithm, secret.secret_pkcs8_der(), &SystemRandom::new())
                .map_err(|error| anyhow::anyhow!("the signing key: {error}"))?,
            certificate: certificate("token.pem")?,
        };
        let service = Self {
            tls: Arc::new(tls),
            signer: Arc::new(signer),
            asked: Arc::default(),
        };
        let listener = in_network(lab.members.get(MEMBER)?.pid, || {
            TcpListener::bind((ADDRESS, TOKEN_SERVICE_PORT)).context("listening for who wants a token")
        })?;
        let serving = service.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let serving = serving.clone();
                // Who goes away early is nothing to us.
                thread::spawn(move || serving.answer(stream).ok());
            }
        });
        Ok(service)
    }

    /// The scopes that were asked for, and whether a token was given.
    pub fn asked(&self) -> Vec<(String, bool)> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn answer(&self, stream: TcpStream) -> Result<()> {
        let connection = ServerConnection::new(self.tls.clone())?;
        let mut stream = BufReader::new(StreamOwned::new(connection, stream));
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            ensure!(
                stream.read_line(&mut line)? > 0 && lines.len() < 100,
                "this is no request"
            );
            if line.trim().is_empty() {
                break;
            }
            lines.push(line.trim().to_owned());
        }
        let target = lines[0].split(' ').nth(1).context("a target")?;
        let (_, query) = target.split_once('?').context("a query")?;
        let scope = query
            .split('&')
            .find_map(|pair| pair.strip_prefix("scope="))
            .unwrap_or_default()
            .replace("%3A", ":")
            .replace("%2F", "/")
            .replace("%2C", ",");
        let expected = format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
        let known = lines.iter().any(|line| {
            let header = line.split_once(": ");
            header.is_some_and(|(name, value)| name.eq_ignore_ascii_case("authorization") && value == expected)
        });
        self.asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((scope.clone(), known));
        let (status, body) = match known {
            true => ("200 OK", json!({"token": self.signer.token(&scope)?})),
            false => ("401 Unauthorized", json!({"details": "who are you?"})),
        };
        let body = body.to_string();
        write!(
            stream.get_mut(),
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        )?;
        stream.get_mut().conn.send_close_notify();
        stream.get_mut().flush().context("answering")
    }
}

impl Signer {
    /// A signed statement of what its holder may do for a minute: `repository:NAME:ACTION,ACTION`.
    fn token(&self, scope: &str) -> Result<String> {
        let mut parts = scope.splitn(3, ':');
        let mut part = || parts.next().context("a scope has three parts");
        let (kind, name, actions) = (part()?, part()?, part()?);
        let now = Timestamp::now().as_second();
        let header = json!({"typ": "JWT", "alg": "ES256", "x5c": [STANDARD.encode(&self.certificate)]});
        let claims = json!({
            "iss": ISSUER, "aud": ISSUER, "sub": USER, "jti": uuid::Uuid::new_v4().to_string(),
            "nbf": now - 30, "iat": now, "exp": now + 60,
            "access": [{"type": kind, "name": name, "actions": actions.split(',').collect::<Vec<_>>()}],
        });
        let encoded = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", encoded(header), encoded(claims));
        let signature = self.key.sign(&SystemRandom::new(), signed.as_bytes());
        let signature = signature.map_err(|error| anyhow::anyhow!("signing a token: {error}"))?;
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }
}
