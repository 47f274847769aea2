//! A real etcd of this test's own, for several controls.

use std::{sync::Arc, time::Duration};

use etcd_client::{Client, CompactionOptions};
use tempfile::TempDir;

use crate::{etcd_server::EtcdServer, harness::Control};

/// The server; it ends with this value.
pub struct Etcd {
    server: EtcdServer,
}

impl Etcd {
    /// Starts one, which answers when this returns.
    pub async fn start() -> Self {
        let etcd = Self {
            server: EtcdServer::start(0),
        };
        for _ in 0..600 {
            if let Ok(mut client) = Client::connect([etcd.server.endpoint()], None).await
                && client.get("is it up?", None).await.is_ok()
            {
                return etcd;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("etcd does not come up");
    }

    /// A control over it; further ones are given the CA of the first, as operators do.
    pub async fn control(&self, first: Option<&Control>) -> Control {
        let directory = Arc::new(tempfile::tempdir().expect("directory"));
        if let Some(first) = first {
            let pki = directory.path().join("data/pki");
            std::fs::create_dir_all(&pki).expect("pki");
            for file in ["ca.crt", "ca.key"] {
                std::fs::copy(first.directory.path().join("data/pki").join(file), pki.join(file)).expect(file);
            }
        }
        self.control_in(directory).await
    }

    /// A control over it in a directory that may have been used before.
    pub async fn control_in(&self, directory: Arc<TempDir>) -> Control {
        let extra = format!(
            "[store]\nengine = \"etcd\"\n[store.etcd]\nendpoints = [{:?}]\n",
            self.server.endpoint()
        );
        Control::start_in(directory, &extra).await
    }

    /// Puts bytes that nobody wrote at a key of control's.
    pub async fn damage(&self, key: &str, value: &[u8]) {
        let mut client = Client::connect([self.server.endpoint()], None).await.expect("connects");
        let key = format!("/orlop/v1/{key}");
        let there = client.get(key.clone(), None).await.expect("answers");
        assert_eq!(there.count(), 1, "{key}");
        client.put(key, value, None).await.expect("writes");
    }

    /// Forgets all that was before the present revision.
    pub async fn compact(&self) {
        let mut client = Client::connect([self.server.endpoint()], None).await.expect("connects");
        let now = client.get("any", None).await.expect("answers");
        let revision = now.header().expect("a header").revision();
        let physical = CompactionOptions::new().with_physical();
        client.compact(revision, Some(physical)).await.expect("compacts");
    }
}
