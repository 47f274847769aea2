//! Under another runtime: Debian 12's podman with its CNI backend (later ones have netavark alone).

use std::{
    fs,
    net::{IpAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};

use crate::{
    node::{Node, Pod, inside, on_node},
    reaches,
};

/// podman with storage, networks and cgroups of this test's own. Its containers have this machine's programs for a root.
struct Podman<'a> {
    node: &'a Node,
    cgroup: String,
}

impl<'a> Podman<'a> {
    /// With one network: our plugin, and host ports by the reference plugin.
    fn start(node: &'a Node) -> Self {
        for path in ["/run", "/var/lib", "/dev/shm"] {
            mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        }
        let mut plugin = node.config("1.0.0", json!({"capabilities": {"ips": true, "mac": true}}));
        for key in ["cniVersion", "name"] {
            plugin.as_object_mut().unwrap().remove(key);
        }
        let portmap = json!({"type": "portmap", "capabilities": {"portMappings": true}, "snat": false});
        let list = json!({"cniVersion": "1.0.0", "name": "net", "plugins": [plugin, portmap]});
        fs::create_dir_all(node.path("net.d")).unwrap();
        fs::write(node.path("net.d/10-net.conflist"), list.to_string()).unwrap();
        let plugins = Path::new(env!("CARGO_BIN_EXE_orlop-bridge")).parent().unwrap();
        let containers = format!(
            "[network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = [{plugins:?}, \"/usr/lib/cni\"]\nnetwork_config_dir = {:?}\n\
             default_network = \"net\"\n[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\n\
             [containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n",
            node.path("net.d"),
        );
        fs::write(node.path("containers.conf"), containers).unwrap();
        let storage = format!(
            "[storage]\ndriver = \"vfs\"\nrunroot = \"/run/containers\"\ngraphroot = {:?}\n",
            node.path("storage")
        );
        fs::write(node.path("storage.conf"), storage).unwrap();
        let root = node.path("root");
        for folder in ["usr", "proc", "sys", "dev", "etc", "run", "tmp"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        for link in ["bin", "lib", "lib64"] {
            std::os::unix::fs::symlink(format!("usr/{link}"), root.join(link)).unwrap();
        }
        let podman = Self {
            node,
            cgroup: format!("orlop-podman-{}", std::process::id()),
        };
        let info = podman.does(&["info", "--format", "{{.Host.NetworkBackend}}"]);
        assert_eq!(info.trim(), "cni", "this podman has no CNI backend: Debian 12's has");
        podman
    }

    fn ran(&self, arguments: &[&str]) -> (bool, String) {
        let output = Command::new("podman")
            .args(arguments)
            .env("CONTAINERS_CONF", self.node.path("containers.conf"))
            .env("CONTAINERS_STORAGE_CONF", self.node.path("storage.conf"))
            .output()
            .unwrap_or_else(|e| panic!("podman: {e}: run cargo xtask setup"));
        let said = if output.status.success() {
            output.stdout
        } else {
            output.stderr
        };
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    }

    fn does(&self, arguments: &[&str]) -> String {
        let (success, said) = self.ran(arguments);
        assert!(success, "podman {arguments:?}: {said}");
        said
    }

    /// Runs a container that sleeps.
    fn run(&self, name: &str, options: &[&str]) -> (bool, String) {
        let root = self.node.path("root");
        let mut all = vec![
            "run",
            "--detach",
            "--name",
            name,
            "--log-driver",
            "none",
            "--cgroup-parent",
        ];
        let parent = format!("/{}", self.cgroup);
        all.extend([parent.as_str(), "--volume", "/usr:/usr:ro"]);
        all.extend(options);
        all.extend(["--rootfs", root.to_str().unwrap(), "sleep", "infinity"]);
        self.ran(&all)
    }

    /// A container's namespace, and what podman says of its network.
    fn attached(&self, name: &str) -> (Pod, Value) {
        let text = self.does(&["inspect", name, "--format", "{{json .NetworkSettings}}"]);
        let settings: Value = serde_json::from_str(&text).unwrap();
        let pod = Pod {
            id: name.to_owned(),
            netns: PathBuf::from(settings["SandboxKey"].as_str().unwrap()),
        };
        (pod, settings["Networks"]["net"].clone())
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        self.ran(&["rm", "--all", "--force", "--time", "0"]);
        let own = |path: &Path| -> Vec<PathBuf> {
            let below = fs::read_dir(path).into_iter().flatten().flatten();
            below.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
        };
        for hierarchy in own(Path::new("/sys/fs/cgroup")) {
            let cgroup = hierarchy.join(&self.cgroup);
            for child in own(&cgroup) {
                fs::remove_dir(child).ok();
            }
            fs::remove_dir(cgroup).ok();
        }
    }
}

fn address(network: &Value) -> IpAddr {
    network["IPAddress"].as_str().unwrap().parse().unwrap()
}

/// The rules that lead a port of the host to somewhere.
fn port_rules() -> usize {
    let output = Command::new("iptables").args(["-t", "nat", "-S"]).output().unwrap();
    String::from_utf8_lossy(&output.stdout)
        .matches("--to-destination")
        .count()
}

#[test]
fn podman_runs_containers_on_our_network() {
    on_node(|node| {
        let podman = Podman::start(node);
        let (ran, said) = podman.run("web", &["--publish", "8080:80"]);
        assert!(ran, "{said}");
        let wishes = ["--ip", "10.99.0.77", "--mac-address", "0a:00:00:00:00:77"];
        let (ran, said) = podman.run("client", &wishes);
        assert!(ran, "{said}");
        let ((web, of_web), (client, of_client)) = (podman.attached("web"), podman.attached("client"));
        assert_eq!(of_web["Gateway"], "10.99.0.1");
        assert_eq!(of_client["IPAddress"], "10.99.0.77");
        assert_eq!(of_client["MacAddress"], "0a:00:00:00:00:77");
        assert!(reaches(&client, &web, address(&of_web)));
        let six = of_web["GlobalIPv6Address"].as_str().unwrap().parse().unwrap();
        assert!(reaches(&client, &web, six), "{six}");
        // The port of the host leads to the container.
        let server = inside(&web, || TcpListener::bind("0.0.0.0:80").unwrap());
        let accepted = std::thread::spawn(move || server.accept().unwrap());
        node.ip("addr add 192.168.99.1/32 dev lo");
        let outside = "192.168.99.1:8080".parse().unwrap();
        TcpStream::connect_timeout(&outside, Duration::from_secs(20)).unwrap();
        accepted.join().unwrap();
        assert_eq!((node.leases().len(), node.veths().len(), port_rules()), (4, 2, 1));

        // Stopped, it has no network; started again, it has one.
        podman.does(&["stop", "--time", "0", "web"]);
        assert_eq!((node.leases().len(), node.veths().len(), port_rules()), (2, 1, 0));
        podman.does(&["start", "web"]);
        let (web, of_web) = podman.attached("web");
        assert!(reaches(&client, &web, address(&of_web)));

        // What our plugin refuses is told, and leaves nothing.
        let (ran, said) = podman.run("astray", &["--ip", "10.1.2.3"]);
        assert!(!ran && said.contains("10.1.2.3"), "{said}");
        assert_eq!((node.leases().len(), node.veths().len()), (4, 2));
        podman.does(&["rm", "--all", "--force", "--time", "0"]);
        assert_eq!((node.leases().len(), node.veths().len(), port_rules()), (0, 0, 0));
    });
}
