//! A real etcd on this machine, and what only it promises.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
};

use etcd_client::{Client, CompactionOptions};
use tempfile::TempDir;

use super::*;
use crate::store::etcd::{EtcdOptions, EtcdStore};

pub(crate) struct Etcd {
    server: Server,
    store: Arc<dyn Store>,
}

/// The process; it ends with this value.
struct Server {
    dir: TempDir,
    client_port: u16,
    peer_port: u16,
    process: Option<Child>,
}

impl Server {
    fn start() -> Self {
        // Both are held until both are known, so that they differ.
        let free = [0, 0].map(|_: u16| TcpListener::bind("127.0.0.1:0").unwrap());
        let [client_port, peer_port] = free.map(|listener| listener.local_addr().unwrap().port());
        let dir = tempfile::tempdir().unwrap();
        let mut server = Self {
            dir,
            client_port,
            peer_port,
            process: None,
        };
        server.run();
        server
    }

    fn run(&mut self) {
        let (client, peer) = (self.endpoint(), format!("http://127.0.0.1:{}", self.peer_port));
        let process = Command::new("etcd")
            .args(["--name", "a", "--data-dir"])
            .arg(self.dir.path())
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("a={peer}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is installed");
        self.process = Some(process);
    }

    fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    async fn client(&self) -> Client {
        Client::connect([self.endpoint()], None).await.unwrap()
    }

    async fn store(&self) -> Arc<dyn Store> {
        let options = EtcdOptions {
            endpoints: vec![self.endpoint()],
            request_timeout: Duration::from_secs(3),
            bookmark_interval: Duration::from_millis(100),
            compact_interval: None,
        };
        let store: Arc<dyn Store> = Arc::new(EtcdStore::connect(options).await.unwrap());
        for _ in 0..600 {
            if store.revision().await.is_ok() {
                return store;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("etcd does not come up");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

pub(crate) async fn bench() -> Etcd {
    let server = Server::start();
    let store = server.store().await;
    Etcd { server, store }
}

impl Etcd {
    /// The store through a connection of its own, as another process has it.
    pub(crate) async fn connect(&self) -> Arc<dyn Store> {
        self.server.store().await
    }

    pub(crate) fn stop(&mut self) {
        self.server.stop();
    }

    pub(crate) fn run(&mut self) {
        self.server.run();
    }
}

#[async_trait]
impl Bench for Etcd {
    fn store(&self) -> Arc<dyn Store> {
        self.store.clone()
    }
    async fn restart(&mut self) {
        self.server.stop();
        self.server.run();
        self.store = self.server.store().await;
    }
    async fn compact(&self, revision: Revision) {
        let options = CompactionOptions::new().with_physical();
        let revision = i64::try_from(revision).unwrap();
        self.server
            .client()
            .await
            .compact(revision, Some(options))
            .await
            .unwrap();
    }
    async fn write_raw(&self, key: &Key, bytes: &[u8]) {
        self.server
            .client()
            .await
            .put(format!("/orlop/v1/{key}"), bytes, None)
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_etcd_calls_fail_in_time_and_a_watch_goes_on_afterwards() {
    let mut bench = bench().await;
    let store = bench.store();
    let mut last = store.revision().await.unwrap();
    let mut watch = store.watch("pods/", last).await.unwrap();
    write(&store, put("pods/a", "1")).await;
    assert_eq!(shorts(&next(&mut watch, &mut last).await.unwrap()), ["+pods/a=1"]);

    bench.server.stop();
    let calls = async {
        let error = store.commit(all([put("pods/a", "2")])).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
        let error = store.get(&key("pods/a")).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
        let error = store.list("pods/").await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    };
    tokio::time::timeout(Duration::from_secs(30), calls).await.unwrap();

    bench.server.run();
    // Through another connection, before the watch is back.
    let other = bench.server.store().await;
    write(&other, put("pods/a", "3")).await;
    write(&other, delete("pods/a")).await;
    assert_eq!(shorts(&next(&mut watch, &mut last).await.unwrap()), ["~pods/a=3<1"]);
    assert_eq!(shorts(&next(&mut watch, &mut last).await.unwrap()), ["-pods/a<3"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn markers_are_invisible() {
    let bench = bench().await;
    let store = bench.store();
    let start = store.revision().await.unwrap();
    let mut everything = store.watch("", start).await.unwrap();
    write(&store, put("pods/a", "1")).await;
    let mut pods = store.watch("pods/", start).await.unwrap();
    let mut last = start;
    assert_eq!(shorts(&next(&mut pods, &mut last).await.unwrap()), ["+pods/a=1"]);
    write(&store, put("pods/b", "1")).await;
    last = start;
    assert_eq!(shorts(&next(&mut everything, &mut last).await.unwrap()), ["+pods/a=1"]);
    assert_eq!(shorts(&next(&mut everything, &mut last).await.unwrap()), ["+pods/b=1"]);
    assert_eq!(store.list("").await.unwrap().records.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_is_compacted_by_us() {
    let bench = bench().await;
    let options = EtcdOptions {
        endpoints: vec![bench.server.endpoint()],
        compact_interval: Some(Duration::from_millis(200)),
        ..EtcdOptions::default()
    };
    let store: Arc<dyn Store> = Arc::new(EtcdStore::connect(options).await.unwrap());
    let first = write(&store, put("pods/a", "1")).await;
    for _ in 0..100 {
        write(&store, put("pods/a", "2")).await;
        match store.watch("pods/", first).await {
            Err(StoreError::Compacted { oldest, .. }) => {
                assert!(oldest > first);
                return;
            }
            Err(other) => panic!("{other}"),
            Ok(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
    panic!("it is never compacted");
}
