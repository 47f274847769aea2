//! The peer: the real Kubernetes, its four programs of the control plane, driven through its REST API (JSON over HTTP/2).

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http2::{SendRequest, handshake},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use orlop_control::{config::PkiConfig, pki::Authority};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{
    etcd,
    isolation::{ADDRESS, Place},
    ours,
    process::{Memory, Process},
};

const PORT: u16 = 6443;
const START: Duration = Duration::from_secs(90);

/// Running peers.
pub struct Kubernetes {
    processes: Vec<Process>,
    /// Talks to its API server.
    pub api: Api,
}

impl Kubernetes {
    /// Starts etcd, API server, controller manager and scheduler on an empty store, and waits until the API is ready.
    pub async fn start(place: &Place) -> Result<Self> {
        let folder = place.folder("kubernetes")?;
        let pki = folder.join("pki");
        // Certificates for it are made by our own authority: its administrator is "system:masters" too.
        let authority = Authority::open(&pki, &PkiConfig::default())?;
        authority.server(&[])?;
        authority.admin()?;
        let tls = ours::admin(&pki)?;
        let etcd = etcd::Server::start(&place.peers.join("etcd-server"), &folder).await?;
        let mut processes = vec![etcd.process];
        processes.push(api_server(place, &folder, &pki)?);
        let mut connected = None;
        let end = Instant::now() + START;
        while connected.is_none() {
            for process in &mut processes {
                process.check()?;
            }
            ensure!(
                Instant::now() < end,
                "kube-apiserver is not ready within {} s",
                START.as_secs()
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
            if let Ok(api) = Api::connect(Arc::clone(&tls), 4).await
                && api.get("/readyz").await.is_ok()
                && api.get("/api/v1/namespaces/default").await.is_ok()
            {
                connected = Some(api);
            }
        }
        let api = connected.context("no connection")?;
        let kubeconfig = folder.join("kubeconfig");
        fs::write(&kubeconfig, client_configuration(&pki).to_string())?;
        processes.push(controller_manager(place, &folder, &kubeconfig)?);
        processes.push(scheduler(place, &folder, &kubeconfig)?);
        Ok(Self { processes, api })
    }

    /// The memory of all four.
    pub fn memory(&self) -> Result<Memory> {
        let mut sum = Memory::default();
        for process in &self.processes {
            sum = sum.plus(process.memory()?);
        }
        Ok(sum)
    }

    /// Fails when one of them has ended.
    pub fn check(&mut self) -> Result<()> {
        self.processes.iter_mut().try_for_each(Process::check)
    }
}

fn api_server(place: &Place, folder: &Path, pki: &Path) -> Result<Process> {
    let file = |name: &str| pki.join(name).display().to_string();
    let arguments = [
        format!("--etcd-servers=http://127.0.0.1:{}", etcd::PORT),
        format!("--secure-port={PORT}"),
        format!("--advertise-address={ADDRESS}"),
        "--service-cluster-ip-range=10.96.0.0/12".to_owned(),
        format!("--tls-cert-file={}", file("server.crt")),
        format!("--tls-private-key-file={}", file("server.key")),
        format!("--client-ca-file={}", file("ca.crt")),
        "--authorization-mode=AlwaysAllow".to_owned(),
        "--service-account-issuer=https://bench.invalid".to_owned(),
        // It reads public keys from certificates, and not from private keys in PKCS 8.
        format!("--service-account-key-file={}", file("server.crt")),
        format!("--service-account-signing-key-file={}", file("server.key")),
        // Nodes come as they are, without a kubelet; pods without a service account.
        "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition".to_owned(),
        // Its protection against too many requests would measure itself.
        "--max-requests-inflight=4000".to_owned(),
        "--max-mutating-requests-inflight=2000".to_owned(),
    ];
    Process::start(&place.peers.join("kube-apiserver"), folder, &arguments)
}

fn controller_manager(place: &Place, folder: &Path, kubeconfig: &Path) -> Result<Process> {
    let arguments = [
        format!("--kubeconfig={}", kubeconfig.display()),
        "--leader-elect=false".to_owned(),
        "--kube-api-qps=2000".to_owned(),
        "--kube-api-burst=4000".to_owned(),
        // Nodes without kubelets would be declared lost.
        "--controllers=*,-nodelifecycle,-nodeipam,-node-route-controller".to_owned(),
    ];
    Process::start(&place.peers.join("kube-controller-manager"), folder, &arguments)
}

fn scheduler(place: &Place, folder: &Path, kubeconfig: &Path) -> Result<Process> {
    let arguments = [
        format!("--kubeconfig={}", kubeconfig.display()),
        "--leader-elect=false".to_owned(),
        "--kube-api-qps=5000".to_owned(),
        "--kube-api-burst=10000".to_owned(),
        "--authentication-skip-lookup".to_owned(),
    ];
    Process::start(&place.peers.join("kube-scheduler"), folder, &arguments)
}

fn client_configuration(pki: &Path) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "bench",
        "clusters": [{"name": "bench", "cluster": {
            "server": format!("https://127.0.0.1:{PORT}"), "certificate-authority": pki.join("ca.crt")}}],
        "users": [{"name": "admin", "user": {
            "client-certificate": pki.join("admin.crt"), "client-key": pki.join("admin.key")}}],
        "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "admin"}}]
    })
}

/// Connections to the API server, used in turn.
#[derive(Clone)]
pub struct Api {
    tls: Arc<ClientConfig>,
    connections: Arc<Vec<SendRequest<Full<Bytes>>>>,
    next: Arc<AtomicUsize>,
}

impl Api {
    async fn connect(tls: Arc<ClientConfig>, count: usize) -> Result<Self> {
        let mut connections = Vec::new();
        for _ in 0..count {
            let stream = TcpStream::connect(("127.0.0.1", PORT)).await?;
            stream.set_nodelay(true)?;
            let name = ServerName::try_from("127.0.0.1")?;
            let stream = TlsConnector::from(Arc::clone(&tls)).connect(name, stream).await?;
            let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
            tokio::spawn(async move {
                // It ends when the senders are gone, or with the server: then the calls fail.
                let _ended = connection.await;
            });
            connections.push(sender);
        }
        Ok(Self {
            tls,
            connections: Arc::new(connections),
            next: Arc::default(),
        })
    }

    /// The same API over connections of its own.
    pub async fn another(&self, count: usize) -> Result<Self> {
        Self::connect(Arc::clone(&self.tls), count).await
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<hyper::Response<Incoming>> {
        let content = if method == Method::PATCH {
            "application/merge-patch+json"
        } else {
            "application/json"
        };
        let request = Request::builder()
            .method(method)
            .uri(format!("https://127.0.0.1:{PORT}{path}"))
            .header("content-type", content)
            .body(Full::new(body))?;
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.connections.len();
        let mut sender = self.connections[turn].clone();
        sender.ready().await?;
        Ok(sender.send_request(request).await?)
    }

    async fn call(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes> {
        let answer = self.send(method, path, body).await?;
        let status = answer.status();
        let body = answer.into_body().collect().await?.to_bytes();
        if !status.is_success() {
            bail!(
                "{path}: {status} {}",
                String::from_utf8_lossy(&body[..body.len().min(300)])
            );
        }
        Ok(body)
    }

    /// What is at a path.
    pub async fn get(&self, path: &str) -> Result<Bytes> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    /// Creates an object in a collection.
    pub async fn create(&self, path: &str, object: &Value) -> Result<()> {
        self.call(Method::POST, path, serde_json::to_vec(object)?.into())
            .await
            .map(drop)
    }

    /// Changes an object by a merge patch.
    pub async fn patch(&self, path: &str, patch: &Value) -> Result<()> {
        self.call(Method::PATCH, path, serde_json::to_vec(patch)?.into())
            .await
            .map(drop)
    }

    /// Whether a list has no object, by a first page of one.
    pub async fn is_empty(&self, collection: &str, fields: &str) -> Result<bool> {
        let list: Value = serde_json::from_slice(
            &self
                .get(&format!("{collection}?fieldSelector={fields}&limit=1"))
                .await?,
        )?;
        Ok(list["items"].as_array().is_some_and(Vec::is_empty))
    }

    /// Opens a watch and reads it to its end, one call of `line` for each event.
    pub async fn watch(&self, path: &str, mut line: impl FnMut(&[u8])) -> Result<()> {
        let answer = self.send(Method::GET, path, Bytes::new()).await?;
        ensure!(answer.status() == StatusCode::OK, "watch: {}", answer.status());
        let mut body = answer.into_body();
        let mut rest: Vec<u8> = Vec::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            rest.extend_from_slice(&data);
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                line(&rest[..end]);
                rest.drain(..=end);
            }
        }
        Ok(())
    }
}
