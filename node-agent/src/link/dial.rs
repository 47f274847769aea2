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

/// Control's, where an address names none.
const PORT: u16 = 6443;
/// TCP and TLS together must be done after this time.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where there is another replica to turn to, a connection on which nothing came for so long is asked for a sign of life: a PING of
/// HTTP/2, which a stopped process does not answer.
const ASK_AFTER: Duration = Duration::from_secs(2);
/// The connection is over when none came within this time. Both, and the way to another replica, fit into what is left to a node
/// whose Lease was about to be renewed: control gives it up after 16 s, and renews every 10 s.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);

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
        let endpoint = endpoint(address)?;
        if self.addresses.len() < 2 {
            return open(address, endpoint, tls).await;
        }
        let watched = endpoint
            .http2_keep_alive_interval(ASK_AFTER)
            .keep_alive_timeout(ANSWER_WITHIN)
            .keep_alive_while_idle(true);
        open(address, watched, tls).await
    }
}

/// One connection to `https://HOST:PORT`.
pub async fn connect(address: &str, tls: Arc<rustls::ClientConfig>) -> Result<Channel, DialError> {
    open(address, endpoint(address)?, tls).await
}

fn bad(address: &str, reason: &str) -> DialError {
    DialError::BadAddress {
        address: address.to_owned(),
        reason: reason.to_owned(),
    }
}

fn endpoint(address: &str) -> Result<Endpoint, DialError> {
    let uri: Uri = address.parse().map_err(|_| bad(address, "not a URI"))?;
    let host = uri.host().ok_or_else(|| bad(address, "has no host"))?;
    let port = uri.port_u16().unwrap_or(PORT);
    // tonic sees a plain connection: TLS is done here, since it checks certificates in its own way when joining.
    let endpoint = Endpoint::from_shared(format!("http://{host}:{port}")).map_err(|_| bad(address, "not a URI"))?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_adaptive_window(true)
        .tcp_nodelay(true))
}

async fn open(address: &str, endpoint: Endpoint, tls: Arc<rustls::ClientConfig>) -> Result<Channel, DialError> {
    let host = endpoint
        .uri()
        .host()
        .unwrap_or_default()
        .trim_matches(['[', ']'])
        .to_owned();
    let port = endpoint.uri().port_u16().unwrap_or(PORT);
    let name = ServerName::try_from(host.clone()).map_err(|_| bad(address, "not a host name or address"))?;
    let connector = TlsConnector::from(tls);
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
