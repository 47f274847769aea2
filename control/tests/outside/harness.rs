//! Starts control in this process, and reaches it as clients do.

use std::{
    net::SocketAddr,
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use hyper_util::rt::TokioIo;
use orlop_control::{
    config::Config,
    run,
    server::{Listener, Trust},
};
use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair};
use rustls::{ClientConfig, RootCertStore, SignatureScheme, client::ResolvesClientCert, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, pem::PemObject};
use tempfile::TempDir;
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream, UnixStream},
    task::JoinHandle,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

/// A control plane of its own.
pub struct Control {
    pub directory: Arc<TempDir>,
    pub address: SocketAddr,
    pub socket: PathBuf,
    running: Running,
}

enum Running {
    /// In this process.
    Here {
        shutdown: CancellationToken,
        task: JoinHandle<Result<(), run::RunError>>,
    },
    /// The program itself.
    Program(Child),
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Self::Program(child) = self {
            // It may have ended.
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// A client certificate and its key.
#[derive(Clone)]
pub struct Pair {
    pub certificate: CertificateDer<'static>,
    pub key: Vec<u8>,
    /// What is shown behind it.
    pub issuers: Vec<CertificateDer<'static>>,
}

impl Control {
    pub async fn start() -> Self {
        Self::start_with("").await
    }

    pub async fn start_with(extra: &str) -> Self {
        let directory = Arc::new(tempfile::tempdir().expect("directory"));
        Self::start_in(directory, extra).await
    }

    /// In a directory that may have been used before.
    pub async fn start_in(directory: Arc<TempDir>, extra: &str) -> Self {
        let config: Config = toml::from_str(&configuration(&directory, extra)).expect("configuration");
        config.check().expect("sound configuration");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let address = listener.local_addr().expect("address");
        let shutdown = CancellationToken::new();
        let inherited = vec![Listener::Tcp(listener, Trust::Tls)];
        let task = tokio::spawn(run::run(config, inherited, shutdown.clone()));
        Self::served(directory, address, Running::Here { shutdown, task }).await
    }

    /// The program, as a process of its own: what it takes can be measured.
    pub async fn program(extra: &str) -> Self {
        Self::program_in(Arc::new(tempfile::tempdir().expect("directory")), extra).await
    }

    /// The same in a directory that may have been used before.
    pub async fn program_in(directory: Arc<TempDir>, extra: &str) -> Self {
        let file = directory.path().join("control.toml");
        std::fs::write(&file, configuration(&directory, extra)).expect("writes");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
        let address = listener.local_addr().expect("address");
        let mut command = Command::new(env!("CARGO_BIN_EXE_orlop-control"));
        command.arg("--config").arg(file);
        command.env("LISTEN_FDS", "1").env_remove("LISTEN_PID");
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let inherited = listener.as_raw_fd();
        // SAFETY: both calls only change descriptors of the child. Where the listener is the third already, it is kept open.
        unsafe {
            command.pre_exec(move || {
                let done = if inherited == 3 {
                    libc::fcntl(3, libc::F_SETFD, 0)
                } else {
                    libc::dup2(inherited, 3)
                };
                if done == -1 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().expect("starts");
        Self::served(directory, address, Running::Program(child)).await
    }

    /// When it can be reached.
    async fn served(directory: Arc<TempDir>, address: SocketAddr, running: Running) -> Self {
        let mut control = Self {
            socket: directory.path().join("control.sock"),
            directory,
            address,
            running,
        };
        for _ in 0..500 {
            if UnixStream::connect(&control.socket).await.is_ok() {
                return control;
            }
            let ended = match &mut control.running {
                Running::Here { task, .. } => task.is_finished(),
                Running::Program(child) => child.try_wait().expect("a child").is_some(),
            };
            assert!(!ended, "control ended at its start");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("control did not start");
    }

    /// The process that it is.
    pub fn pid(&self) -> u32 {
        match &self.running {
            Running::Here { .. } => std::process::id(),
            Running::Program(child) => child.id(),
        }
    }

    /// Ends it in good order; the directory stays.
    pub async fn stop(mut self) -> Arc<TempDir> {
        if let Running::Here { shutdown, task } = &mut self.running {
            shutdown.cancel();
            task.await.expect("no panic").expect("a good end");
        }
        Arc::clone(&self.directory)
    }

    fn pki(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.directory.path().join("data/pki").join(file)).expect(file)
    }

    pub fn ca(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(&self.pki("ca.crt")).expect("ca.crt")
    }

    /// A pair that control made.
    pub fn pair(&self, name: &str) -> Pair {
        let certificate = CertificateDer::from_pem_slice(&self.pki(&format!("{name}.crt"))).expect("certificate");
        let key = KeyPair::from_pem(&String::from_utf8(self.pki(&format!("{name}.key"))).expect("text")).expect("key");
        Pair {
            certificate,
            key: key.serialize_der(),
            issuers: Vec::new(),
        }
    }

    /// A pair that the CA's key signs, with this subject, as nobody but a test would make it.
    pub fn forge(&self, change: impl FnOnce(&mut CertificateParams)) -> Pair {
        let key = KeyPair::from_pem(&String::from_utf8(self.pki("ca.key")).expect("text")).expect("key");
        let issuer = Issuer::from_ca_cert_der(&self.ca(), key).expect("issuer");
        sign(&issuer, change)
    }

    /// TLS as far as the handshake; in TLS 1.3 the client hears of a refusal only when it reads.
    pub async fn tls(&self, pair: Option<&Pair>, alpn: &[&[u8]]) -> std::io::Result<TlsStream<TcpStream>> {
        connect(self.address, self.ca(), pair, alpn).await
    }

    /// A handshake with this certificate that control ends, by the first read at the latest: our address, and what we saw of it. `None`
    /// when control goes on.
    pub async fn refused_handshake(&self, pair: &Pair) -> Option<(SocketAddr, std::io::Error)> {
        let stream = TcpStream::connect(self.address).await.expect("control is there");
        let own = stream.local_addr().expect("an address");
        let handshake = async {
            let mut stream = handshake(stream, self.ca(), Some(pair), &[b"h2"]).await?;
            // In HTTP/2 the server speaks unasked.
            stream.read_u8().await
        };
        let ended = tokio::time::timeout(Duration::from_secs(20), handshake).await;
        ended.expect("an end, or an answer").err().map(|error| (own, error))
    }

    /// A channel over TLS.
    pub async fn channel(&self, pair: Option<&Pair>) -> Result<Channel, tonic::transport::Error> {
        let (address, ca, pair) = (self.address, self.ca(), pair.cloned());
        let connector = tower::service_fn(move |_| {
            let (ca, pair) = (ca.clone(), pair.clone());
            async move { connect(address, ca, pair.as_ref(), &[b"h2"]).await.map(TokioIo::new) }
        });
        endpoint().connect_with_connector(connector).await
    }

    /// An administrator's channel over TLS.
    pub async fn admin(&self) -> Channel {
        self.channel(Some(&self.pair("admin"))).await.expect("connects")
    }

    /// A channel over the unix socket.
    pub async fn unix(&self) -> Channel {
        let path = self.socket.clone();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        endpoint().connect_with_connector(connector).await.expect("connects")
    }
}

fn configuration(directory: &TempDir, extra: &str) -> String {
    let (socket, data) = (directory.path().join("control.sock"), directory.path().join("data"));
    format!("data_dir = {data:?}\nunix_socket = {socket:?}\nlisten = []\nserver_names = [\"control.test\"]\n{extra}")
}

/// Signs a client certificate, good unless `change` spoils it.
pub fn sign(issuer: &Issuer<'_, KeyPair>, change: impl FnOnce(&mut CertificateParams)) -> Pair {
    let key = KeyPair::generate().expect("key");
    let mut params = CertificateParams::default();
    params.distinguished_name = subject("orlop-admin", "system:masters");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    change(&mut params);
    let certificate = params.signed_by(&key, issuer).expect("signs");
    Pair {
        certificate: certificate.into(),
        key: key.serialize_der(),
        issuers: Vec::new(),
    }
}

pub fn subject(name: &str, group: &str) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    subject.push(DnType::OrganizationName, group);
    subject
}

/// Shows a certificate without a look at whether the key is its key.
#[derive(Debug)]
struct Shown(Arc<CertifiedKey>);

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn endpoint() -> Endpoint {
    Endpoint::from_static("http://control.test").timeout(Duration::from_secs(30))
}

async fn connect(
    address: SocketAddr,
    ca: CertificateDer<'static>,
    pair: Option<&Pair>,
    alpn: &[&[u8]],
) -> std::io::Result<TlsStream<TcpStream>> {
    handshake(TcpStream::connect(address).await?, ca, pair, alpn).await
}

async fn handshake(
    stream: TcpStream,
    ca: CertificateDer<'static>,
    pair: Option<&Pair>,
    alpn: &[&[u8]],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(ca).map_err(std::io::Error::other)?;
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(std::io::Error::other)?
        .with_root_certificates(roots);
    let mut config = match pair {
        None => builder.with_no_client_auth(),
        Some(pair) => {
            let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(pair.key.clone()));
            let key = rustls::crypto::ring::sign::any_supported_type(&key).map_err(std::io::Error::other)?;
            let chain = std::iter::once(&pair.certificate)
                .chain(&pair.issuers)
                .cloned()
                .collect();
            builder.with_client_cert_resolver(Arc::new(Shown(Arc::new(CertifiedKey::new(chain, key)))))
        }
    };
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    let name = ServerName::try_from("control.test").map_err(std::io::Error::other)?;
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}
