//! What stands before the services: plain HTTP pages, and the question who may call what.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::{Method as HttpMethod, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep_until, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body, service::Routes};
use tower::ServiceExt;

use super::{
    PeerAddress, ServerMetrics,
    identity::{Access, Identity},
    metrics::Method,
};
use crate::{pki::NodeKeys, store::Store};

/// Prometheus text (the classic format, whole lines) that comes behind the server's own.
pub type MetricsSource = Arc<dyn Fn() -> String + Send + Sync>;

/// Whether control can serve; starts with "no".
#[derive(Clone, Default)]
pub struct Readiness {
    ready: Arc<AtomicBool>,
    store: Option<Arc<dyn Store>>,
}

impl Readiness {
    /// As long as this store has trouble, control is not healthy.
    pub fn over(store: Arc<dyn Store>) -> Self {
        Self {
            ready: Arc::default(),
            store: Some(store),
        }
    }

    /// Says yes or no.
    pub fn set(&self, ready: bool) {
        self.ready.store(ready, Ordering::Release);
    }

    /// What was said last.
    pub fn get(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    fn trouble(&self) -> Option<String> {
        self.store.as_ref().and_then(|store| store.trouble())
    }
}

/// The services and what guards them.
pub struct Front {
    routes: Routes,
    keys: NodeKeys,
    readiness: Readiness,
    metrics: ServerMetrics,
    registry: Registry,
    sources: Vec<MetricsSource>,
    applies: Arc<Semaphore>,
    apply_timeout: Duration,
}

impl Front {
    /// `routes` are the gRPC services, `sources` what else `/metrics` shows.
    pub fn new(
        routes: Routes,
        keys: NodeKeys,
        readiness: Readiness,
        sources: Vec<MetricsSource>,
        concurrent_applies: usize,
        apply_timeout: Duration,
    ) -> Self {
        let metrics = ServerMetrics::default();
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        let applies = Arc::new(Semaphore::new(concurrent_applies));
        Self {
            routes: routes.prepare(),
            keys,
            readiness,
            metrics,
            registry,
            sources,
            applies,
            apply_timeout,
        }
    }

    pub(super) fn metrics(&self) -> &ServerMetrics {
        &self.metrics
    }

    /// Answers one request. The connection has put [`Identity`] and [`PeerAddress`] into its extensions.
    pub(super) async fn handle(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let identity = request
            .extensions()
            .get::<Identity>()
            .cloned()
            .unwrap_or(Identity::Anonymous);
        let is_grpc = request
            .headers()
            .get(header::CONTENT_TYPE)
            .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
        if !is_grpc {
            return Ok(self.page(&request, &identity));
        }
        if let Err(status) = self.admit(&request, &identity).await {
            self.metrics.refused.inc();
            let peer = request.extensions().get::<PeerAddress>().and_then(|peer| peer.0);
            tracing::warn!(
                target: "audit",
                caller = identity.describe().escape_debug().to_string(),
                method = request.uri().path(),
                ?peer,
                code = ?status.code(),
                "call refused"
            );
            return Ok(status.into_http());
        }
        if request.uri().path() == "/orlop.api.v1.Objects/Apply" {
            return Ok(self.apply(request).await);
        }
        self.routes.clone().oneshot(request).await
    }

    /// Large messages are taken in only when there is a place to work on them; until then HTTP/2 holds them back. A client
    /// that neither sends nor reads keeps its place only for a time.
    async fn apply(&self, request: Request<Incoming>) -> Response<Body> {
        let Ok(place) = Arc::clone(&self.applies).acquire_owned().await else {
            return Status::unavailable("control stops").into_http();
        };
        let deadline = Instant::now() + self.apply_timeout;
        let Ok(answer) = timeout_at(deadline, self.routes.clone().oneshot(request)).await else {
            tracing::warn!("an Apply was given up: its manifest did not come in time");
            return Status::deadline_exceeded("the manifest did not come in time").into_http();
        };
        let Ok(response) = answer;
        let ended = CancellationToken::new();
        let until_the_body_ends = ended.clone().drop_guard();
        tokio::spawn(async move {
            tokio::select! {
                () = ended.cancelled() => {}
                () = sleep_until(deadline) => {}
            }
            drop(place);
        });
        response.map(|body| {
            Body::new(body.map_frame(move |frame| {
                let _held = &until_the_body_ends;
                frame
            }))
        })
    }

    async fn admit(&self, request: &Request<Incoming>, identity: &Identity) -> Result<(), Status> {
        let path = request.uri().path();
        match identity.access(path) {
            Access::Allowed => {}
            Access::Denied => {
                return Err(Status::permission_denied(format!(
                    "{} may not call {path}",
                    identity.describe()
                )));
            }
            Access::Unauthenticated => return Err(Status::unauthenticated("a client certificate is needed")),
        }
        if let Identity::Node { name, key } = identity {
            let current = self.keys.is_current(name, *key).await.map_err(|error| {
                tracing::error!(%error, "node's key not checked");
                Status::unavailable("the store cannot be reached")
            })?;
            if !current {
                return Err(Status::unauthenticated("the node's name has another key"));
            }
        }
        // Only methods that exist are counted by name: labels must stay few.
        if is_known(path) {
            self.metrics
                .calls
                .get_or_create(&Method {
                    method: path.trim_start_matches('/').to_owned(),
                })
                .inc();
        }
        Ok(())
    }

    /// The pages that are not gRPC.
    fn page(&self, request: &Request<Incoming>, identity: &Identity) -> Response<Body> {
        let readable = *request.method() == HttpMethod::GET || *request.method() == HttpMethod::HEAD;
        match request.uri().path() {
            _ if !readable => text(StatusCode::METHOD_NOT_ALLOWED, "only GET, or gRPC\n"),
            // A restart heals no disk.
            "/livez" => text(StatusCode::OK, "ok\n"),
            page @ ("/healthz" | "/readyz") => match self.readiness.trouble() {
                Some(trouble) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{trouble}\n")),
                None if page == "/readyz" && !self.readiness.get() => {
                    text(StatusCode::SERVICE_UNAVAILABLE, "starting\n")
                }
                None => text(StatusCode::OK, "ok\n"),
            },
            "/metrics" if matches!(identity, Identity::Admin { .. }) => self.prometheus(),
            "/metrics" => {
                tracing::warn!(target: "audit", caller = identity.describe(), page = "/metrics", "page refused");
                text(StatusCode::FORBIDDEN, "only for administrators\n")
            }
            _ => text(
                StatusCode::NOT_FOUND,
                "not here; the API is gRPC: orlop.api.v1.Objects\n",
            ),
        }
    }

    fn prometheus(&self) -> Response<Body> {
        let mut page = String::new();
        if encode(&mut page, &self.registry).is_err() {
            return text(StatusCode::INTERNAL_SERVER_ERROR, "metrics cannot be written\n");
        }
        let mut page = classic(&page);
        for source in &self.sources {
            page.push_str(&source());
        }
        let mut response = text(StatusCode::OK, page);
        let kind = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }
}

/// Whether there is such a method of ours.
fn is_known(path: &str) -> bool {
    const SERVICES: [(&str, &[&str]); 4] = [
        (
            "orlop.api.v1.Objects",
            &[
                "Create",
                "Get",
                "List",
                "Watch",
                "Update",
                "UpdateStatus",
                "Patch",
                "Apply",
                "Delete",
            ],
        ),
        (
            "orlop.cluster.v1.Join",
            &["Join", "Renew", "CreateToken", "RevokeToken"],
        ),
        ("orlop.node.v1.NodeLink", &["Session"]),
        (
            "orlop.metrics.v1.Metrics",
            &["ListNodes", "ListPods", "ListServices", "ListReports"],
        ),
    ];
    let Some((service, method)) = path.trim_start_matches('/').split_once('/') else {
        return false;
    };
    SERVICES
        .iter()
        .any(|(name, methods)| *name == service && methods.contains(&method))
}

/// From OpenMetrics to Prometheus' own text format: no end mark, and a counter's description bears the name of its samples.
fn classic(page: &str) -> String {
    let mut result = String::with_capacity(page.len());
    let mut lines = page.lines().filter(|line| *line != "# EOF").peekable();
    while let Some(line) = lines.next() {
        let described = |line: &str, what: &str| {
            let (name, rest) = line.strip_prefix(what)?.split_once(' ')?;
            (!name.ends_with("_total")).then(|| (name.to_owned(), rest.to_owned()))
        };
        let counter = |line: &str| described(line, "# TYPE ").filter(|(_, kind)| kind == "counter");
        let of_next = lines.peek().and_then(|next| counter(next));
        if let Some((name, kind)) = counter(line) {
            result.push_str(&format!("# TYPE {name}_total {kind}\n"));
        } else if let Some((name, help)) =
            described(line, "# HELP ").filter(|(name, _)| of_next.as_ref().is_some_and(|next| next.0 == *name))
        {
            result.push_str(&format!("# HELP {name}_total {help}\n"));
        } else {
            result.push_str(line);
            result.push('\n');
        }
    }
    result
}

fn text(status: StatusCode, body: impl Into<String>) -> Response<Body> {
    let body = http_body_util::Full::new(bytes::Bytes::from(body.into()));
    let mut response = Response::new(Body::new(body.map_err(|never| match never {})));
    *response.status_mut() = status;
    let kind = header::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use super::{classic, is_known};

    #[test]
    fn every_method_of_ours_is_counted() {
        use prost::Message as _;
        let files = prost_types::FileDescriptorSet::decode(orlop_proto::FILE_DESCRIPTOR_SET).expect("descriptors");
        for file in &files.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    assert!(is_known(&path), "{path}");
                }
            }
        }
        assert!(!is_known("/orlop.api.v1.Objects/Destroy"));
    }

    #[test]
    fn counters_are_described_by_the_name_of_their_samples() {
        let open = "# HELP calls Calls.\n# TYPE calls counter\ncalls_total{a=\"b\"} 1\n# HELP open Open ones.\n# TYPE open gauge\nopen 2\n# EOF\n";
        let expected = "# HELP calls_total Calls.\n# TYPE calls_total counter\ncalls_total{a=\"b\"} 1\n# HELP open Open ones.\n# TYPE open gauge\nopen 2\n";
        assert_eq!(classic(open), expected);
        assert_eq!(classic(expected), expected);
    }
}
