//! A node for a test: a thread in network and mount namespaces of its own. There is no way out of them, and all of it is gone
//! with the thread.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};
use serde_json::{Value, json};

/// The test's node.
#[derive(Debug)]
pub struct Node {
    dir: PathBuf,
    host: File,
}

/// A container's network namespace.
#[derive(Debug, Clone)]
pub struct Pod {
    pub id: String,
    pub netns: PathBuf,
}

/// How a call ended.
#[derive(Debug)]
pub struct Answer {
    pub success: bool,
    pub stdout: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    pub fn expect(self) -> Value {
        assert!(self.success, "{}", self.stdout);
        if self.stdout.is_empty() {
            Value::Null
        } else {
            self.json()
        }
    }

    /// The error's code; checks the whole shape of the error.
    pub fn code(self) -> u64 {
        assert!(!self.success, "{}", self.stdout);
        let error = self.json();
        assert!(error["msg"].as_str().is_some_and(|m| !m.is_empty()), "{error}");
        assert!(
            error["cniVersion"].is_string() && error["details"].is_string(),
            "{error}"
        );
        error["code"].as_u64().unwrap_or_else(|| panic!("{error}"))
    }
}

/// Runs the test on a node of its own.
pub fn on_node(test: impl FnOnce(&Arc<Node>) + Send + 'static) {
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
        let host = File::open("/proc/thread-self/ns/net").unwrap();
        let dir = tempfile::Builder::new().prefix("orlop-bridge-").tempdir().unwrap();
        // A file system of its own: what a failed test leaves mounted goes with it.
        mount(Some("tmpfs"), dir.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let _unmount = Mounted(dir.path().to_owned());
        fs::write(dir.path().join("boot_id"), "this boot\n").unwrap();
        let node = Arc::new(Node {
            dir: dir.path().to_owned(),
            host,
        });
        node.ip("link set lo up");
        test(&node);
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
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

    /// A container with a namespace.
    pub fn pod(&self, id: &str) -> Pod {
        let netns = self.path(&format!("ns-{id}"));
        File::create(&netns).unwrap();
        let target = netns.clone();
        // A thread in the same mount namespace, that only makes the namespace.
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            mount(
                Some("/proc/thread-self/ns/net"),
                &target,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
            .unwrap();
        })
        .join()
        .unwrap();
        Pod {
            id: id.to_owned(),
            netns,
        }
    }

    pub fn destroy(&self, pod: &Pod) {
        umount2(&pod.netns, MntFlags::MNT_DETACH).unwrap();
        fs::remove_file(&pod.netns).unwrap();
    }

    pub fn leases(&self) -> BTreeMap<String, Value> {
        match fs::read(self.path("leases/net.json")) {
            Ok(bytes) => {
                let state: Value = serde_json::from_slice(&bytes).unwrap();
                serde_json::from_value(state["leases"].clone()).unwrap()
            }
            Err(_) => BTreeMap::new(),
        }
    }

    /// Names of the host's veths.
    pub fn veths(&self) -> Vec<String> {
        let links: Value = serde_json::from_str(&self.ip("-j link show type veth")).unwrap();
        links
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|l| l["ifname"].as_str().map(str::to_owned))
            .collect()
    }

    /// `ip ARGS` on the node.
    pub fn ip(&self, args: &str) -> String {
        ip(args)
    }

    /// A configuration over the node's directories.
    pub fn config(&self, version: &str, more: Value) -> Value {
        let mut config = json!({
            "cniVersion": version, "name": "net", "type": "orlop-bridge", "bridge": "orlop0",
            "isGateway": true, "isDefaultGateway": true, "hairpinMode": true, "mtu": 1400,
            "ipam": {
                "type": "orlop",
                "ranges": [[{"subnet": "10.99.0.0/24"}], [{"subnet": "fd99::/64"}]],
                "dataDir": self.path("leases"), "bootIdFile": self.path("boot_id"),
            },
        });
        merge(&mut config, more);
        config
    }

    pub fn call(&self, verb: &str, pod: &Pod, config: &Value) -> Answer {
        self.start(verb, pod, config).end()
    }

    pub fn start(&self, verb: &str, pod: &Pod, config: &Value) -> Running {
        let netns = pod.netns.to_str().unwrap();
        let env = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", &pod.id),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", netns),
        ];
        start(
            Path::new(env!("CARGO_BIN_EXE_orlop-bridge")),
            &env,
            config.to_string().as_bytes(),
        )
    }

    /// Whether the node's own namespace is the calling thread's.
    pub fn enter(&self) {
        setns(self.host.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
    }
}

/// A call under way.
#[derive(Debug)]
pub struct Running(pub Child);

impl Running {
    pub fn end(self) -> Answer {
        let output = self.0.wait_with_output().unwrap();
        Answer {
            success: output.status.success(),
            stdout: String::from_utf8(output.stdout).unwrap(),
        }
    }
}

/// Starts a plugin with exactly this environment.
pub fn start(plugin: &Path, env: &[(&str, &str)], stdin: &[u8]) -> Running {
    let mut child = Command::new(plugin)
        .env_clear()
        .env("CNI_PATH", "/usr/lib/cni")
        .envs(env.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{}: {e}", plugin.display()));
    // One that refuses its environment may be gone before it has read.
    child.stdin.take().unwrap().write_all(stdin).ok();
    Running(child)
}

/// Runs `f` in the pod's namespace.
pub fn inside<T: Send + 'static>(pod: &Pod, f: impl FnOnce() -> T + Send + 'static) -> T {
    let netns = File::open(&pod.netns).unwrap();
    std::thread::spawn(move || {
        setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
        f()
    })
    .join()
    .unwrap()
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

fn merge(into: &mut Value, more: Value) {
    match (into, more) {
        (Value::Object(into), Value::Object(more)) => {
            for (key, value) in more {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, more) => *into = more,
    }
}
