//! TLS: our certificate with the CA behind it, and the check of client certificates.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use rustls::{
    RootCertStore, ServerConfig,
    server::WebPkiClientVerifier,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio_util::sync::CancellationToken;

use crate::pki::{Authority, PkiError, ServerIdentity};

/// How often the server's certificate is looked at.
const CHECK: Duration = Duration::from_secs(3600);

/// The TLS side of the listeners; its certificate can be changed while it serves.
pub struct ServerTls {
    config: Arc<ServerConfig>,
    shown: Arc<Shown>,
    authority: Arc<Authority>,
    names: Vec<String>,
}

/// The certificate that is shown now.
#[derive(Debug)]
struct Shown(ArcSwap<CertifiedKey>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

impl ServerTls {
    /// Makes or loads the server's certificate for these names.
    ///
    /// # Errors
    /// When the certificate cannot be made, or TLS refuses it.
    pub fn new(authority: Arc<Authority>, names: &[String]) -> Result<Self, PkiError> {
        let mut roots = RootCertStore::empty();
        roots.add(authority.certificate().clone())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let shown = Arc::new(Shown(ArcSwap::new(certified(authority.server(names)?)?)));
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::clone(&shown) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        // A resumed session would not look at the client's certificate again.
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self {
            config: Arc::new(config),
            shown,
            authority,
            names: names.to_vec(),
        })
    }

    pub(super) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }

    /// Makes a new certificate when the one that is shown is near its end.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn renew(&self) -> Result<SystemTime, PkiError> {
        let identity = self.authority.server(&self.names)?;
        self.authority.admin()?;
        let not_after = identity.not_after;
        self.shown.0.store(certified(identity)?);
        Ok(not_after)
    }

    /// Renews every now and then, until `shutdown`.
    pub async fn keep_fresh(self: Arc<Self>, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(CHECK) => {}
            }
            let this = Arc::clone(&self);
            match tokio::task::spawn_blocking(move || this.renew()).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => {
                    tracing::error!(error = &error as &dyn std::error::Error, "certificate not renewed");
                }
                Err(error) => tracing::error!(%error, "certificate not renewed"),
            }
        }
    }
}

fn certified(identity: ServerIdentity) -> Result<Arc<CertifiedKey>, PkiError> {
    let key = rustls::crypto::ring::sign::any_supported_type(&identity.key)?;
    Ok(Arc::new(CertifiedKey::new(identity.chain, key)))
}
