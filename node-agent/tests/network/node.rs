//! A node for a test: a thread in network and mount namespaces of its own, without a way out, gone with the thread.

use std::{
    fs::{self, File},
    net::{IpAddr, UdpSocket},
    os::{fd::AsFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};
use orlop_node::network::{CniNetwork, Network, PodNetwork, Settings, Stale};
use orlop_proto::node::v1::Welcome;

/// The test's node.
pub struct Node {
    dir: PathBuf,
}

/// Runs the test on a node of its own.
pub fn on_node<F: Future<Output = ()>>(test: impl FnOnce(Node) -> F + Send + 'static) {
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("these tests need root");
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_PRIVATE | MsFlags::MS_REC,
            None::<&str>,
        )
        .unwrap();
        let dir = tempfile::Builder::new().prefix("orlop-network-").tempdir().unwrap();
        // A file system of its own: what a failed test leaves mounted goes with it.
        mount(Some("tmpfs"), dir.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let _unmount = Mounted(dir.path().to_owned());
        let node = Node {
            dir: dir.path().to_owned(),
        };
        fs::create_dir(node.path("bin")).unwrap();
        fs::create_dir(node.path("net.d")).unwrap();
        fs::write(node.path("boot_id"), "this boot\n").unwrap();
        fs::copy(bridge_plugin(), node.path("bin").join("orlop-bridge")).unwrap();
        node.ip("link set lo up");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test(node));
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

/// The plugin's program, built as this test is.
fn bridge_plugin() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let target = std::env::current_exe()
            .unwrap()
            .parent()
            .unwrap()
            .parent()
            .unwrap()
            .to_owned();
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let built = Command::new(cargo)
            // With the features of the whole workspace, as `cargo xtask test` has built it already.
            .args(["build", "--quiet", "--workspace", "--exclude", "orlop-ebpf"])
            .args(["--bin", "orlop-bridge", "--target-dir"])
            .arg(target.parent().unwrap())
            .args(if target.ends_with("release") {
                &["--release"] as &[&str]
            } else {
                &[]
            })
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .status()
            .unwrap();
        assert!(built.success());
        target.join("orlop-bridge")
    })
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).ok();
    }
}

impl Node {
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn settings(&self) -> Settings {
        Settings {
            conf_dir: self.path("net.d"),
            bin_dirs: vec![self.path("bin"), "/usr/lib/cni".into()],
            data_dir: self.path("data"),
            run_dir: self.path("run"),
            node_address: None,
            plugin_timeout: Duration::from_secs(20),
            boot_id_file: self.path("boot_id"),
            capability_args: Default::default(),
        }
    }

    /// The agent's network, as it is after a start.
    pub fn network(&self) -> CniNetwork {
        CniNetwork::new(self.settings())
    }

    /// The same with control's ranges: its own configuration is written.
    pub async fn configured(&self) -> CniNetwork {
        let network = self.network();
        let ranges = welcome(&["10.244.1.0/24"]);
        network
            .configure(&ranges, &Default::default(), Stale::Removed)
            .await
            .unwrap();
        network
    }

    /// Our plugin's configuration as the agent wrote it, for chains that begin with it.
    pub fn own_plugin(&self) -> serde_json::Value {
        let bytes = fs::read(self.path("net.d/10-orlop.conflist")).unwrap();
        let list: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        list["plugins"][0].clone()
    }

    /// A sandbox with a namespace.
    pub async fn sandbox(&self, network: &CniNetwork, id: &str) -> PodNetwork {
        PodNetwork {
            namespace: "default".into(),
            name: format!("pod-{id}"),
            uid: format!("uid-{id}"),
            sandbox_id: id.to_owned(),
            netns: network.create_namespace(id).await.unwrap(),
        }
    }

    /// A plugin that is a shell script. It finds its stdin in `$IN`, and every call is a line of the file `calls`.
    pub fn script(&self, name: &str, body: &str) {
        let path = self.path("bin").join(name);
        let calls = self.path("calls");
        let log = format!("echo \"$CNI_COMMAND {name}\" >>{}", calls.display());
        fs::write(&path, format!("#!/bin/sh\nIN=$(cat)\n{log}\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// The scripts' calls so far.
    pub fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    pub fn conflist(&self, name: &str, value: &serde_json::Value) {
        fs::write(self.path("net.d").join(name), value.to_string()).unwrap();
    }

    pub fn ip(&self, args: &str) -> String {
        ip(args)
    }

    /// Names of the host's veths.
    pub fn veths(&self) -> usize {
        let links: serde_json::Value = serde_json::from_str(&ip("-j link show type veth")).unwrap();
        links
            .as_array()
            .unwrap()
            .iter()
            .filter(|l| l["ifname"].as_str().is_some_and(|n| n.starts_with('o')))
            .count()
    }

    /// Addresses that are leased.
    pub fn leases(&self) -> usize {
        let bytes = fs::read(self.path("run/ipam/orlop.json")).unwrap_or_else(|_| b"{\"leases\":{}}".into());
        let state: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        state["leases"].as_object().unwrap().len()
    }
}

/// What control says at first.
pub fn welcome(ranges: &[&str]) -> Welcome {
    Welcome {
        pod_cidrs: ranges.iter().map(|r| (*r).to_owned()).collect(),
        cluster_pod_cidr: "10.244.0.0/16".into(),
        service_cidr: "10.96.0.0/12".into(),
    }
}

/// `ip ARGS` in the calling thread's namespace.
pub fn ip(args: &str) -> String {
    let output = Command::new("ip").args(args.split_whitespace()).output().unwrap();
    assert!(
        output.status.success(),
        "ip {args}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Runs `f` in a namespace.
pub fn inside<T: Send + 'static>(netns: &Path, f: impl FnOnce() -> T + Send + 'static) -> T {
    let netns = File::open(netns).unwrap();
    std::thread::spawn(move || {
        setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
        f()
    })
    .join()
    .unwrap()
}

/// Whether a datagram from one sandbox reaches another, which has this address.
pub fn reaches(from: &PodNetwork, to: &PodNetwork, address: IpAddr) -> bool {
    let server = inside(&to.netns, move || UdpSocket::bind((address, 7)).unwrap());
    server.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    inside(&from.netns, move || {
        let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        UdpSocket::bind(any).unwrap().send_to(b"ahoy", (address, 7)).unwrap()
    });
    let mut buffer = [0; 8];
    server
        .recv(&mut buffer)
        .is_ok_and(|length| &buffer[..length] == b"ahoy")
}
