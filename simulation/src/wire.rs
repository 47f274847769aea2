//! The network between nodes and control: connections of bytes in memory, each with its weather. Above them is the real link: gRPC over
//! HTTP/2, at both ends.

use std::{
    cell::Cell,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use hyper_util::rt::TokioIo;
use orlop_control::{link::Link, pki::KeyHash, server::identity::Identity};
use orlop_node::link::{Dial, DialError};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf},
    sync::{mpsc, watch},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, server::Connected};

use crate::environment::Chance;

/// Bytes that an end may be ahead of the other.
const BUFFER: usize = 64 << 10;
/// A dial that nobody answers is given up after this time.
const DIAL: Duration = Duration::from_secs(5);

/// How a node's connections fare. What does not pass waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Weather {
    /// Nothing passes from the node to control.
    pub up_is_cut: bool,
    /// Nothing passes from control to the node.
    pub down_is_cut: bool,
}

/// A connection as control's end has it: it knows which node's certificate was shown.
pub struct Accepted {
    stream: DuplexStream,
    identity: Identity,
}

impl Connected for Accepted {
    type ConnectInfo = Identity;

    fn connect_info(&self) -> Identity {
        self.identity.clone()
    }
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Where a control process takes connections; they end with it.
#[derive(Clone)]
pub struct Port {
    connections: mpsc::UnboundedSender<io::Result<Accepted>>,
    closed: CancellationToken,
}

impl Port {
    /// Serves the link until `closed`.
    pub fn open(link: &Link, closed: CancellationToken) -> Self {
        let (connections, mut accepted) = mpsc::unbounded_channel();
        let incoming = futures::stream::poll_fn(move |context| accepted.poll_recv(context));
        let server = tonic::transport::Server::builder().add_service(link.service());
        let ended = closed.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = server.serve_with_incoming(incoming) => {}
                () = ended.cancelled() => {}
            }
        });
        Self { connections, closed }
    }
}

/// A node's way to whichever control process there is.
pub struct Wire {
    node: Arc<str>,
    ports: watch::Receiver<Option<Port>>,
    weather: watch::Receiver<Weather>,
    /// Cancelled when all present connections break.
    broken: Mutex<CancellationToken>,
    chance: Mutex<Chance>,
    /// The longest time that bytes travel.
    latency: Duration,
}

impl Wire {
    /// A node's.
    pub fn new(
        node: &str,
        ports: watch::Receiver<Option<Port>>,
        weather: watch::Receiver<Weather>,
        latency: Duration,
        seed: u64,
    ) -> Self {
        Self {
            node: node.into(),
            ports,
            weather,
            broken: Mutex::default(),
            chance: Mutex::new(Chance::new(seed, 3)),
            latency,
        }
    }

    /// Breaks all present connections; both ends hear of it.
    pub fn cut(&self) {
        let mut broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *broken).cancel();
    }

    fn chance(&self) -> Chance {
        let mut chance = self.chance.lock().unwrap_or_else(PoisonError::into_inner);
        Chance::new(chance.seed(), 4)
    }

    fn unreachable(&self) -> DialError {
        DialError::BadAddress {
            address: "control".to_owned(),
            reason: format!("{} cannot reach it", self.node),
        }
    }

    /// Carries bytes both ways until an end closes, control ends, or the connection is broken.
    fn carry(&self, client: DuplexStream, server: DuplexStream, closed: CancellationToken) {
        let (from_node, to_node) = tokio::io::split(client);
        let (from_control, to_control) = tokio::io::split(server);
        let is_cut: fn(&Weather) -> bool = |weather| weather.up_is_cut;
        let up = pump(
            from_node,
            to_control,
            self.weather.clone(),
            is_cut,
            self.chance(),
            self.latency,
        );
        let is_cut: fn(&Weather) -> bool = |weather| weather.down_is_cut;
        let down = pump(
            from_control,
            to_node,
            self.weather.clone(),
            is_cut,
            self.chance(),
            self.latency,
        );
        let broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone();
        tokio::spawn(async move {
            tokio::select! {
                () = up => {}
                () = down => {}
                () = broken.cancelled() => {}
                () = closed.cancelled() => {}
            }
        });
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut weather: watch::Receiver<Weather>,
    is_cut: fn(&Weather) -> bool,
    mut chance: Chance,
    latency: Duration,
) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let length = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(length) => length,
        };
        sleep(chance.up_to(latency)).await;
        // The sender lives as long as the simulation.
        if weather.wait_for(|weather| !is_cut(weather)).await.is_err() || to.write_all(&buffer[..length]).await.is_err()
        {
            return;
        }
    }
}

#[async_trait]
impl Dial for Wire {
    async fn dial(&self) -> Result<Channel, DialError> {
        let weather = *self.weather.borrow();
        let port = self.ports.borrow().clone();
        let Some(port) = port else {
            return Err(self.unreachable());
        };
        if weather != Weather::default() {
            sleep(DIAL).await;
            return Err(self.unreachable());
        }
        let (client, near) = tokio::io::duplex(BUFFER);
        let (far, server) = tokio::io::duplex(BUFFER);
        self.carry(near, far, port.closed.clone());
        let accepted = Accepted {
            stream: server,
            identity: Identity::Node {
                name: Arc::clone(&self.node),
                key: KeyHash::of(self.node.as_bytes()),
            },
        };
        if port.connections.send(Ok(accepted)).is_err() {
            return Err(self.unreachable());
        }
        let once = Cell::new(Some(client));
        let connector = tower::service_fn(move |_| {
            let client = once.take().ok_or(io::ErrorKind::ConnectionRefused);
            async move { Ok::<_, io::Error>(TokioIo::new(client?)) }
        });
        let endpoint = Endpoint::from_static("http://control").connect_timeout(DIAL);
        endpoint
            .connect_with_connector(connector)
            .await
            .map_err(|source| DialError::Connect {
                address: "control".to_owned(),
                source,
            })
    }
}
