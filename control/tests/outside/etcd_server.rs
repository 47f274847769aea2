//! A real etcd on this machine, for the tests from outside and for those of the store.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

/// An etcd of one member; its process ends with this value.
pub struct EtcdServer {
    dir: TempDir,
    clients: String,
    peers: String,
    quota_bytes: u64,
    process: Option<Child>,
}

impl EtcdServer {
    /// Starts one, which answers a moment later. It takes no writes when its database is larger than the quota; 0: etcd's own.
    pub fn start(quota_bytes: u64) -> Self {
        // Both are held until both are known, so that they differ.
        let free = [0, 0].map(|_: u16| TcpListener::bind("127.0.0.1:0").expect("a free port"));
        let [clients, peers] = free.map(|listener| format!("http://{}", listener.local_addr().expect("an address")));
        let mut server = Self {
            dir: tempfile::tempdir().expect("directory"),
            clients,
            peers,
            quota_bytes,
            process: None,
        };
        server.run();
        server
    }

    /// Starts it again on the same data.
    pub fn run(&mut self) {
        let (clients, peers) = (&self.clients, &self.peers);
        let process = Command::new("etcd")
            .args(["--name", "a", "--data-dir"])
            .arg(self.dir.path())
            .args(["--listen-client-urls", clients, "--advertise-client-urls", clients])
            .args(["--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers])
            .args(["--initial-cluster", &format!("a={peers}")])
            .args(["--quota-backend-bytes", &self.quota_bytes.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is installed (cargo xtask setup)");
        self.process = Some(process);
    }

    /// Kills it.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("it is killed");
            process.wait().expect("it ends");
        }
    }

    /// Where it answers.
    pub fn endpoint(&self) -> String {
        self.clients.clone()
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.stop();
    }
}
