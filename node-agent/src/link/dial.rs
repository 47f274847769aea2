//! How control is reached: mutual TLS over HTTP/2, one address after the other.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

/// TCP and TLS together must be done after this time.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why control could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The configuration names no control.
    #[error("no control address is configured")]
    NoAddress,
    /// An address that is none.
    #[error("{address}: {reason}")]
    BadAddress {
        /// As configured.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The node has no usable identity.
    #[error("identity: {0}")]
    Identity(String),
    /// The connection failed, or TLS did.
    #[error("{address}: {source}")]
    Connect {
        /// Where to.
        address: String,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
}

/// Gives a connection to control.
#[async_trait]
pub trait Dial: Send + Sync + 'static {
    /// A fresh connection; each call may try another address.
    async fn dial(&self) -> Result<Channel, DialError>;
}

/// What TLS configuration to use for the next connection: an identity changes when it is renewed.
pub type TlsSource = Arc<dyn Fn() -> Result<Arc<rustls::ClientConfig>, String> + Send + Sync>;

/// Dials the configured addresses in turn, from a random one on: the nodes spread over control's replicas.
pub struct TlsDialer {
    addresses: Vec<String>,
    tls: TlsSource,
    next: AtomicUsize,
}

impl TlsDialer {
    /// `addresses` are `https://HOST:PORT`.
    pub fn new(addresses: Vec<String>, tls: TlsSource) -> Self {
        let first = rand::random_range(0..addresses.len().max(1));
        Self {
            addresses,
            tls,
            next: AtomicUsize::new(first),
        }
    }
}

#[async_trait]
impl Dial for TlsDialer {
    async fn dial(&self) -> Result<Channel, DialError> {
        if self.addresses.is_empty() {
            return Err(DialError::NoAddress);
        }
        let address = &self.addresses[self.next.fetch_add(1, Ordering::Relaxed) % self.addresses.len()];
        let tls = (self.tls)().map_err(DialError::Identity)?;
        connect(address, tls).await
    }
}

/// One connection to `https://HOST:PORT`.
pub async fn connect(address: &str, tls: Arc<rustls::ClientConfig>) -> Result<Channel, DialError> {
    let bad = |reason: &str| DialError::BadAddress {
        address: address.to_owned(),
        reason: reason.to_owned(),
    };
    let uri: Uri = address.parse().map_err(|_| bad("not a URI"))?;
    let host = uri
        .host()
        .ok_or_else(|| bad("has no host"))?
        .trim_matches(['[', ']'])
        .to_owned();
    let port = uri.port_u16().unwrap_or(6443);
    let name = ServerName::try_from(host.clone()).map_err(|_| bad("not a host name or address"))?;
    let connector = TlsConnector::from(tls);
    // tonic sees a plain connection: TLS is done here, since it checks certificates in its own way when joining.
    let endpoint = Endpoint::from_shared(format!("http://{}:{port}", uri.host().unwrap_or_default()))
        .map_err(|_| bad("not a URI"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_adaptive_window(true)
        .tcp_nodelay(true);
    let dial = tower::service_fn(move |_: Uri| {
        let (connector, name, host) = (connector.clone(), name.clone(), host.clone());
        async move {
            let work = async {
                let stream = TcpStream::connect((host.as_str(), port)).await?;
                stream.set_nodelay(true)?;
                connector.connect(name, stream).await.map(TokioIo::new)
            };
            tokio::time::timeout(CONNECT_TIMEOUT, work)
                .await
                .map_err(|_| std::io::ErrorKind::TimedOut)?
        }
    });
    endpoint
        .connect_with_connector(dial)
        .await
        .map_err(|source| DialError::Connect {
            address: address.to_owned(),
            source,
        })
}
