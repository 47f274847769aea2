//! The one way in: a single accept loop for all listeners.
//!
//! A TLS listener speaks HTTP/2 (gRPC) and HTTP/1.1 (`/healthz`, `/readyz`, `/metrics`) on the same port. A client certificate is
//! asked for in the handshake; one that is given must be ours and valid, or the handshake fails. Whether one is needed is
//! decided per call by [`Identity::access`], since a joining machine has none yet.

mod accept;
mod coalesce;
mod front;
pub mod identity;
mod listen;
mod metrics;
mod tls;

use std::{io, sync::Arc, time::Duration};

pub use coalesce::Coalesced;
pub use front::{Front, MetricsSource, Readiness};
pub use identity::{Identity, PeerAddress, caller};
pub use listen::{Listener, Trust, bind, inherited};
pub use metrics::ServerMetrics;
pub use tls::ServerTls;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::config::Limits;

/// How long open requests may go on after a shutdown was asked for.
const DRAIN: Duration = Duration::from_secs(3);

/// Everything that connections need.
pub struct Server {
    front: Arc<Front>,
    tls: Arc<ServerTls>,
    limits: Limits,
}

impl Server {
    /// With the services behind `front` and the TLS identity.
    pub fn new(front: Front, tls: ServerTls, limits: Limits) -> Self {
        Self {
            front: Arc::new(front),
            tls: Arc::new(tls),
            limits,
        }
    }

    /// The TLS identity, to be renewed.
    pub fn tls(&self) -> Arc<ServerTls> {
        Arc::clone(&self.tls)
    }

    /// Serves all listeners until `shutdown`, then lets open requests end for a few seconds.
    ///
    /// # Errors
    /// When there is no listener.
    pub async fn serve(self, listeners: Vec<Listener>, shutdown: CancellationToken) -> io::Result<()> {
        if listeners.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "nothing to listen on"));
        }
        let connections = TaskTracker::new();
        let acceptor = Arc::new(accept::Acceptor::new(
            self.front,
            self.tls,
            self.limits,
            connections.clone(),
            shutdown,
        ));
        let loops = listeners
            .into_iter()
            .map(|listener| Arc::clone(&acceptor).run(listener));
        futures::future::join_all(loops).await;
        connections.close();
        if tokio::time::timeout(DRAIN, connections.wait()).await.is_err() {
            tracing::info!(connections = connections.len(), "connections cut off at shutdown");
        }
        Ok(())
    }
}
