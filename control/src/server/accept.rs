//! Takes connections, bounded in number and time.

use std::{
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Coalesced, Front, Identity, Listener, PeerAddress, ServerTls, Trust};
use crate::{config::Limits, panics};

/// HTTP/2 begins with so many bytes; a connection that has not sent them in time is closed.
const PREFACE: usize = 24;
/// Between pings on a quiet HTTP/2 connection, and how long the answer may take.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// What HTTP/2 may have in flight to us on one stream and one connection.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// The same for those who have not said who they are, and how many requests they may have open.
const ANONYMOUS_STREAM_WINDOW: u32 = 64 << 10;
const ANONYMOUS_CONNECTION_WINDOW: u32 = 128 << 10;
const ANONYMOUS_STREAMS: u32 = 16;
/// What we buffer for a stream whose reader is slow.
const SEND_BUFFER: usize = 256 << 10;
/// After accept() failed for want of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(50);

/// The accept loop's state, shared by all listeners.
pub(super) struct Acceptor {
    front: Arc<Front>,
    tls: Arc<ServerTls>,
    limits: Limits,
    total: Arc<Semaphore>,
    anonymous: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    connections: TaskTracker,
    shutdown: CancellationToken,
}

impl Acceptor {
    pub(super) fn new(
        front: Arc<Front>,
        tls: Arc<ServerTls>,
        limits: Limits,
        connections: TaskTracker,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            front,
            tls,
            total: Arc::new(Semaphore::new(limits.connections)),
            anonymous: Arc::new(Semaphore::new(limits.anonymous_connections)),
            handshakes: Arc::new(Semaphore::new(limits.handshakes)),
            limits,
            connections,
            shutdown,
        }
    }

    /// Accepts until shutdown.
    pub(super) async fn run(self: Arc<Self>, listener: Listener) {
        loop {
            // Cancel safety: accept() of both kinds loses no connection when it is dropped.
            let accepted = tokio::select! {
                () = self.shutdown.cancelled() => return,
                accepted = accept(&listener) => accepted,
            };
            let accepted = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    if !is_of_one_connection(&error) {
                        tracing::warn!(%error, "accept failed");
                        sleep(PAUSE).await;
                    }
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&self.total).try_acquire_owned() else {
                self.front.metrics().turn_away("too many connections");
                continue;
            };
            let this = Arc::clone(&self);
            let connection = async move { this.connection(accepted, permit).await };
            self.connections.spawn(panics::contained(connection));
        }
    }

    async fn connection(&self, accepted: Accepted, _permit: OwnedSemaphorePermit) {
        self.front.metrics().connections.inc();
        match accepted {
            Accepted::Tcp(stream, address, Trust::Insecure) => {
                let identity = Identity::Admin {
                    name: "insecure listener".into(),
                };
                self.serve(stream, identity, Some(address), None).await;
            }
            Accepted::Tcp(stream, address, Trust::Tls) => self.handshake(stream, address).await,
            Accepted::Unix(stream) => match peer_of(&stream) {
                Some(identity) => self.serve(stream, identity, None, None).await,
                None => self.front.metrics().turn_away("unix socket: uid"),
            },
        }
        self.front.metrics().connections.dec();
    }

    async fn handshake(&self, stream: TcpStream, address: SocketAddr) {
        let attempt = async {
            // Waiting for a place counts against the time as well.
            let _place = self.handshakes.acquire().await.map_err(io::Error::other)?;
            TlsAcceptor::from(self.tls.config()).accept(stream).await
        };
        let stream = match timeout(self.limits.handshake_timeout, attempt).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                tracing::warn!(peer = %address, %error, "TLS handshake refused");
                return self.front.metrics().turn_away("handshake");
            }
            Err(_) => {
                tracing::debug!(peer = %address, "TLS handshake too slow");
                return self.front.metrics().turn_away("handshake timeout");
            }
        };
        let (_, session) = stream.get_ref();
        let identity = session
            .peer_certificates()
            .and_then(<[_]>::first)
            .map_or(Identity::Anonymous, |certificate| {
                Identity::from_certificate(certificate)
            });
        let http2 = session.alpn_protocol() == Some(b"h2");
        let _anonymous = if identity == Identity::Anonymous {
            let Ok(permit) = self.anonymous.try_acquire() else {
                return self.front.metrics().turn_away("too many anonymous connections");
            };
            Some(permit)
        } else {
            None
        };
        // Boxed, both: the handshake's room is not kept for as long as the connection is, and a TLS stream is large to be moved about.
        Box::pin(self.serve(Box::new(stream), identity, Some(address), Some(http2))).await;
    }

    /// Serves one connection to its end. `http2` is what ALPN said; `None` where there was none.
    async fn serve<S>(&self, stream: S, identity: Identity, address: Option<SocketAddr>, http2: Option<bool>)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let received = Arc::new(AtomicUsize::new(0));
        let counted = Counted {
            stream,
            received: Arc::clone(&received),
        };
        let is_anonymous = identity == Identity::Anonymous;
        let front = Arc::clone(&self.front);
        let service = service_fn(move |mut request| {
            request.extensions_mut().insert(identity.clone());
            request.extensions_mut().insert(PeerAddress(address));
            // Boxed: an answer that goes on for long, as a node's session does, needs no room for how it began.
            Box::pin(Arc::clone(&front).handle(request))
        });
        let builder = self.builder(http2, is_anonymous);
        let mut connection = pin!(builder.serve_connection(TokioIo::new(Coalesced::new(counted)), service));
        let mut early = pin!(sleep(self.limits.handshake_timeout));
        let mut lifetime = pin!(sleep(self.limits.anonymous_lifetime));
        let mut begun = false;
        let mut closing = false;
        let mut expired = false;
        loop {
            // Cancel safety: the futures are pinned outside and polled again; nothing is lost.
            tokio::select! {
                result = &mut connection => {
                    if let Err(error) = result {
                        tracing::debug!(?address, %error, "connection ended");
                    }
                    return;
                }
                () = &mut early, if !begun => {
                    begun = true;
                    if received.load(Ordering::Relaxed) < PREFACE {
                        return self.front.metrics().turn_away("silent");
                    }
                }
                // What is open may end; what does not end is cut off.
                () = &mut lifetime, if is_anonymous => {
                    if expired {
                        return self.front.metrics().turn_away("anonymous for too long");
                    }
                    expired = true;
                    connection.as_mut().graceful_shutdown();
                    lifetime.as_mut().reset(Instant::now() + self.limits.handshake_timeout);
                }
                () = self.shutdown.cancelled(), if !closing => {
                    closing = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }

    fn builder(&self, http2: Option<bool>, is_anonymous: bool) -> auto::Builder<Requests> {
        let (stream_window, connection_window, streams) = if is_anonymous {
            let streams = self.limits.streams_per_connection.min(ANONYMOUS_STREAMS);
            (ANONYMOUS_STREAM_WINDOW, ANONYMOUS_CONNECTION_WINDOW, streams)
        } else {
            (STREAM_WINDOW, CONNECTION_WINDOW, self.limits.streams_per_connection)
        };
        let mut builder = auto::Builder::new(Requests);
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.handshake_timeout)
            .max_buf_size(
                usize::try_from(self.limits.header_bytes)
                    .unwrap_or(usize::MAX)
                    .max(8192),
            )
            .http2()
            .timer(TokioTimer::new())
            .initial_stream_window_size(stream_window)
            .initial_connection_window_size(connection_window)
            .max_concurrent_streams(streams)
            .max_header_list_size(self.limits.header_bytes)
            .max_send_buf_size(SEND_BUFFER)
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT);
        match http2 {
            Some(true) => builder.http2_only(),
            Some(false) => builder.http1_only(),
            None => builder,
        }
    }
}

/// Where hyper has the requests of HTTP/2 worked on: each in a task of its own, and a panic in it is that request's alone.
#[derive(Debug, Clone)]
struct Requests;

impl<F> hyper::rt::Executor<F> for Requests
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, request: F) {
        tokio::spawn(panics::contained(request));
    }
}

enum Accepted {
    Tcp(TcpStream, SocketAddr, Trust),
    Unix(UnixStream),
}

async fn accept(listener: &Listener) -> io::Result<Accepted> {
    match listener {
        Listener::Tcp(listener, trust) => {
            let (stream, address) = listener.accept().await?;
            stream.set_nodelay(true)?;
            Ok(Accepted::Tcp(stream, address, *trust))
        }
        Listener::Unix(listener) => Ok(Accepted::Unix(listener.accept().await?.0)),
    }
}

/// Errors of accept() that concern the connection, not the listener.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, InvalidInput, NotConnected};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset | InvalidInput | NotConnected
    )
}

/// root and our own user are administrators; nobody else is let in, whatever the socket's mode became.
fn peer_of(stream: &UnixStream) -> Option<Identity> {
    let peer = stream.peer_cred().ok()?;
    // SAFETY: geteuid has no arguments, touches no memory and cannot fail.
    let own = unsafe { libc::geteuid() };
    if peer.uid() == 0 || peer.uid() == own {
        return Some(Identity::Admin {
            name: format!("uid {} on the unix socket", peer.uid()).into(),
        });
    }
    tracing::warn!(uid = peer.uid(), pid = peer.pid(), "refused on the unix socket");
    None
}

/// A stream that counts what it received.
struct Counted<S> {
    stream: S,
    received: Arc<AtomicUsize>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.received
            .fetch_add(buffer.filled().len() - before, Ordering::Relaxed);
        result
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
