//! The other control replicas, for what only they know: they are asked as an administrator would, over the API's port.

use std::{
    collections::HashMap,
    net::SocketAddrV4,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::future::join_all;
use hyper_util::rt::TokioIo;
use orlop_proto::{
    coordination::v1::Lease,
    metrics::v1::{LatestReport, ListReportsRequest, metrics_client::MetricsClient},
};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use crate::{
    cache::{Cache, Reader},
    controllers::api_endpoints,
    pki::{Authority, PkiError},
};

/// A replica that takes longer is passed over: it is dead or stopped, and its nodes are about to connect elsewhere.
const PATIENCE: Duration = Duration::from_secs(2);
/// The largest answer of a replica.
const MESSAGE: usize = 256 << 20;

/// The other replicas, as their Leases name them.
pub struct Peers {
    leases: Reader<Lease>,
    own: Option<SocketAddrV4>,
    authority: Arc<Authority>,
    channels: Mutex<HashMap<SocketAddrV4, Channel>>,
}

impl std::fmt::Debug for Peers {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Peers")
            .field("own", &self.own)
            .finish_non_exhaustive()
    }
}

impl Peers {
    /// `own` is where the others reach this one.
    pub fn new(cache: &Cache, own: Option<SocketAddrV4>, authority: Arc<Authority>) -> Self {
        Self {
            leases: cache.reader(),
            own,
            authority,
            channels: Mutex::default(),
        }
    }

    /// What the others have heard of their nodes, as far as they answer in time.
    pub(super) async fn reports(&self) -> Vec<LatestReport> {
        let mut replicas = api_endpoints::replicas(&self.leases);
        replicas.retain(|replica| Some(*replica) != self.own);
        self.lock().retain(|replica, _| replicas.contains(replica));
        let answers = join_all(replicas.into_iter().map(|replica| self.ask(replica))).await;
        answers.into_iter().flatten().collect()
    }

    async fn ask(&self, replica: SocketAddrV4) -> Vec<LatestReport> {
        let channel = match self.channel(replica) {
            Ok(channel) => channel,
            Err(error) => {
                tracing::warn!(%replica, error = &error as &dyn std::error::Error, "no certificate to ask other replicas with");
                return Vec::new();
            }
        };
        let mut client = MetricsClient::new(channel).max_decoding_message_size(MESSAGE);
        let call = client.list_reports(ListReportsRequest::default());
        let why = match tokio::time::timeout(PATIENCE, call).await {
            Ok(Ok(answer)) => return answer.into_inner().items,
            Ok(Err(status)) => status.to_string(),
            Err(_) => "no answer".to_owned(),
        };
        // The next question begins with a connection of its own.
        self.lock().remove(&replica);
        tracing::info!(%replica, why, "a replica was not heard: the metrics of its nodes are missing");
        Vec::new()
    }

    fn channel(&self, replica: SocketAddrV4) -> Result<Channel, PkiError> {
        if let Some(channel) = self.lock().get(&replica) {
            return Ok(channel.clone());
        }
        let connector = TlsConnector::from(Arc::new(self.tls()?));
        let dial = tower::service_fn(move |_| {
            let connector = connector.clone();
            async move {
                let stream = TcpStream::connect(replica).await?;
                stream.set_nodelay(true)?;
                let name = ServerName::IpAddress(std::net::IpAddr::V4(*replica.ip()).into());
                connector.connect(name, stream).await.map(TokioIo::new)
            }
        });
        let channel = Endpoint::from_static("http://replica")
            .connect_timeout(PATIENCE)
            .connect_with_connector_lazy(dial);
        self.lock().insert(replica, channel.clone());
        Ok(channel)
    }

    fn tls(&self) -> Result<ClientConfig, PkiError> {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.certificate().clone())?;
        let (certificate, key) = self.authority.replica()?;
        let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![certificate], key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SocketAddrV4, Channel>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
