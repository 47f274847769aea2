//! The page with Prometheus text, over HTTP on a unix socket.

use std::{convert::Infallible, fs, io, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::CONTENT_TYPE,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::UnixListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::Latest;

/// A client that sends no request for this long is dropped.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// So many clients are served at once; the others wait.
const CONNECTIONS: usize = 32;

/// Serves `GET /metrics` on `path` (mode 0600, in place of what a former life left) until `stop`.
pub async fn serve(path: &Path, latest: Latest, stop: CancellationToken) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    let clients = TaskTracker::new();
    loop {
        let (stream, _) = tokio::select! {
            accepted = listener.accept(), if clients.len() < CONNECTIONS => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a client of the metrics socket was lost");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = tokio::time::sleep(Duration::from_millis(50)), if clients.len() >= CONNECTIONS => continue,
            () = stop.cancelled() => break,
        };
        let latest = latest.clone();
        let stop = stop.clone();
        clients.spawn(async move {
            let page = service_fn(move |request| std::future::ready(Ok::<_, Infallible>(answer(&request, &latest))));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), page);
            tokio::select! {
                done = connection => if let Err(error) = done {
                    tracing::debug!(%error, "a client of the metrics socket went away");
                },
                () = stop.cancelled() => {}
            }
        });
    }
    let _gone = fs::remove_file(path);
    Ok(())
}

fn answer(request: &Request<Incoming>, latest: &Latest) -> Response<Full<Bytes>> {
    let (status, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => (StatusCode::OK, latest.prometheus()),
        (&Method::GET, "/healthz") => (StatusCode::OK, "ok\n".to_owned()),
        (&Method::GET, _) => (StatusCode::NOT_FOUND, "see /metrics\n".to_owned()),
        _ => (StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let text = hyper::header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, text);
    response
}

#[cfg(test)]
mod tests {
    use orlop_proto::metrics::v1::{Cpu, NodeMetrics, NodeReport};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixStream,
    };

    use super::*;

    #[tokio::test]
    async fn serves_the_latest_report() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.sock");
        fs::write(&path, "left by a former life").unwrap();
        let latest = Latest::default();
        let cpu = Cpu {
            usage_core_nanoseconds: 2_000_000_000,
            usage_nanocores: 0,
        };
        latest.set(NodeReport {
            node: Some(NodeMetrics {
                name: "n1".into(),
                cpu: Some(cpu),
                ..Default::default()
            }),
            ..Default::default()
        });
        let stop = CancellationToken::new();
        let server = tokio::spawn({
            let (path, stop) = (path.clone(), stop.clone());
            async move { serve(&path, latest, stop).await }
        });
        let mut stream = loop {
            match UnixStream::connect(&path).await {
                Ok(stream) => break stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            .await
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200 OK"), "{text}");
        assert!(text.contains("node_cpu_usage_seconds_total{node=\"n1\"} 2\n"), "{text}");
        stop.cancel();
        server.await.unwrap().unwrap();
        assert!(!path.exists());
    }
}
