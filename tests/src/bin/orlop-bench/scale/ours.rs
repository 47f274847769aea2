//! Our control plane: the real program over a store on the disk, driven through gRPC over TLS.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use orlop_node::link::connect;
use orlop_proto::{
    Resource,
    api::v1::{ListRequest, Object, ObjectList, objects_client::ObjectsClient},
};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tonic::transport::Channel;

use super::{
    channel,
    isolation::Place,
    process::{Memory, Process},
};

const PORT: u16 = 7443;
const START: Duration = Duration::from_secs(60);
const MAX_MESSAGE: usize = 256 << 20;

/// A running `orlop-control`.
pub struct Control {
    process: Process,
    tls: Arc<ClientConfig>,
    /// `https://ADDRESS:PORT`.
    pub address: String,
    /// Where its unix socket is.
    pub socket: PathBuf,
}

/// A client on a connection.
pub type Objects = ObjectsClient<Channel>;

impl Control {
    /// Starts it on an empty store, with lines added to its configuration, and waits until it answers.
    pub async fn start(place: &Place, extra: &str) -> Result<Self> {
        let folder = place.folder("ours")?;
        let socket = folder.join("control.sock");
        let configuration = folder.join("control.toml");
        let text = format!(
            "data_dir = {:?}\nunix_socket = {socket:?}\nlisten = [\"127.0.0.1:{PORT}\"]\npod_cidr = \"10.128.0.0/9\"\n{extra}",
            folder.join("data")
        );
        fs::write(&configuration, text)?;
        let arguments = [Path::new("--config"), &configuration];
        let mut process = Process::start(&place.programs.join("orlop-control"), &folder, &arguments)?;
        let end = Instant::now() + START;
        let pki = folder.join("data").join("pki");
        let address = format!("https://127.0.0.1:{PORT}");
        loop {
            process.check()?;
            if let Ok(tls) = admin(&pki)
                && let Ok(channel) = connect(&address, Arc::clone(&tls)).await
                && ObjectsClient::new(channel).list(query("namespaces", "")).await.is_ok()
            {
                return Ok(Self {
                    process,
                    tls,
                    address,
                    socket,
                });
            }
            if Instant::now() > end {
                bail!("orlop-control does not answer within {} s", START.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A connection of its own.
    pub async fn connect(&self) -> Result<Objects> {
        let channel = connect(&self.address, Arc::clone(&self.tls)).await?;
        Ok(ObjectsClient::new(channel).max_decoding_message_size(MAX_MESSAGE))
    }

    /// Several.
    pub async fn connections(&self, count: usize) -> Result<Vec<Objects>> {
        let mut clients = Vec::new();
        for _ in 0..count {
            clients.push(self.connect().await?);
        }
        Ok(clients)
    }

    /// Several for many calls at once.
    pub async fn busy_connections(&self, count: usize) -> Result<Vec<Objects>> {
        let mut clients = Vec::new();
        for _ in 0..count {
            clients.push(busy_client(PORT, &self.tls).await?);
        }
        Ok(clients)
    }

    /// Its memory.
    pub fn memory(&self) -> Result<Memory> {
        self.process.memory()
    }

    /// Seconds of CPU that it has used.
    pub fn cpu_seconds(&self) -> Result<f64> {
        self.process.cpu_seconds()
    }

    /// Ends it in order.
    pub fn stop(mut self) {
        self.process.stop();
    }
}

/// A client for many calls at once, on a connection of its own.
pub async fn busy_client(port: u16, tls: &Arc<ClientConfig>) -> Result<Objects> {
    let channel = channel::connect(port, Some(Arc::clone(tls))).await?;
    Ok(ObjectsClient::new(channel).max_decoding_message_size(MAX_MESSAGE))
}

/// The administrator's side of TLS.
pub fn admin(pki: &Path) -> Result<Arc<ClientConfig>> {
    let read = |name: &str| fs::read(pki.join(name)).with_context(|| format!("reading {name}"));
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&read("ca.crt")?)?)?;
    let certificate = CertificateDer::from_pem_slice(&read("admin.crt")?)?;
    let key = PrivateKeyDer::from_pem_slice(&read("admin.key")?)?;
    let mut tls = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate], key)?;
    tls.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(tls))
}

/// An object from Kubernetes' JSON; fields that the model does not have are an error, not left out.
pub fn parse<T: Resource + DeserializeOwned>(json: &Value) -> Result<T> {
    orlop_proto::json::from_value(json).map_err(|errors| {
        let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
        anyhow!("not in our model: {}", errors.join("; "))
    })
}

fn query(resource: &str, fields: &str) -> ListRequest {
    ListRequest {
        resource: resource.to_owned(),
        field_selector: fields.to_owned(),
        ..ListRequest::default()
    }
}

/// The first objects of a kind that fields select.
pub async fn first(client: &Objects, resource: &str, fields: &str) -> Result<Vec<Object>> {
    let request = ListRequest {
        limit: 1,
        ..query(resource, fields)
    };
    let list: ObjectList = client.clone().list(request).await?.into_inner();
    Ok(list.items)
}

/// All objects of a kind.
pub async fn all(client: &Objects, resource: &str) -> Result<Vec<Object>> {
    Ok(client.clone().list(query(resource, "")).await?.into_inner().items)
}
