//! The connections of `store`'s clients, the same for both sides but for TLS: what is ready at the same time is sent together, as
//! control does it with its answers. So the clients, which share the machine with the server, take less of it.

use std::sync::Arc;

use anyhow::Result;
use hyper_util::rt::TokioIo;
use orlop_control::server::Coalesced;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

const HOST: &str = "127.0.0.1";

/// To a port of the loopback interface; without TLS when there is none.
pub async fn connect(port: u16, tls: Option<Arc<ClientConfig>>) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{HOST}:{port}"))?
        .http2_adaptive_window(true)
        .tcp_nodelay(true);
    let tls = tls.map(TlsConnector::from);
    let dial = tower::service_fn(move |_: Uri| {
        let tls = tls.clone();
        async move {
            let stream = TcpStream::connect((HOST, port)).await?;
            stream.set_nodelay(true)?;
            let stream: Box<dyn Stream> = match tls {
                Some(tls) => {
                    let name = ServerName::try_from(HOST).map_err(std::io::Error::other)?;
                    Box::new(Coalesced::new(tls.connect(name, stream).await?))
                }
                None => Box::new(Coalesced::new(stream)),
            };
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    Ok(endpoint.connect_with_connector(dial).await?)
}

/// With or without TLS.
trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}
impl<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Stream for S {}
