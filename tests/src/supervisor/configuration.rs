//! What runs in a lab's members, and its configuration.

use std::{
    fs,
    net::Ipv4Addr,
    os::unix::fs::symlink,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::service::Service;
use crate::{
    client::Client,
    layout::{
        API_PORT, ETCD_ADDRESS, ETCD_CLIENTS, ETCD_MEMBER, Members, Spec, StoreEngine, control_address, control_name,
    },
    registry,
};

/// Debian's libfaketime: what stands before the clock of a program.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// Steps the wall clock that a service sees: so many seconds ahead of the machine's.
pub fn set_clock(spec: &Spec, service: &str, offset_seconds: i64) -> Result<()> {
    let (path, next) = (spec.clock(service), spec.clock(service).with_extension("next"));
    // Renamed, so that nobody reads half of it.
    fs::write(&next, format!("{offset_seconds:+}\n")).context("writing a clock")?;
    fs::rename(&next, &path).context("setting a clock")
}

/// What makes a service follow its clock's file.
fn clock(spec: &Spec, service: &str) -> Result<Vec<(String, String)>> {
    if !spec.clocks.iter().any(|known| known == service) {
        return Ok(Vec::new());
    }
    if !Path::new(FAKETIME).is_file() {
        bail!("{FAKETIME} is not there: run cargo xtask setup");
    }
    set_clock(spec, service, 0)?;
    let file = spec.clock(service).display().to_string();
    let settings = [
        ("LD_PRELOAD", FAKETIME),
        ("FAKETIME_TIMESTAMP_FILE", &file),
        ("FAKETIME_CACHE_DURATION", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("DONT_FAKE_MONOTONIC", "1"),
        ("NO_FAKE_STAT", "1"),
    ];
    Ok(settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into())
}

/// The agent's own programs: they come in its version.
const STARTED_BY_AGENTS: [&str; 2] = ["orlop-bridge", "orlop-logger"];
/// What a lab's logs show; `ORLOP_LAB_LOG` overrides it.
const LOG_FILTER: &str = "info";

/// Writes a control replica's `control.toml`, and gives it the CA of the first.
pub fn write_control(spec: &Spec, index: u16) -> Result<()> {
    let directory = spec.member_directory(&control_name(index));
    let pki = directory.join("data/pki");
    fs::create_dir_all(&pki).context("making control's folder")?;
    if index > 1 {
        let first = spec.member_directory(&control_name(1)).join("data/pki");
        for file in ["ca.crt", "ca.key"] {
            fs::copy(first.join(file), pki.join(file)).with_context(|| format!("giving {file} to a replica"))?;
        }
    }
    let store = match spec.store {
        StoreEngine::Embedded => "[store]\nengine = \"embedded\"\n".to_owned(),
        StoreEngine::Etcd => {
            let endpoints: Vec<String> = (1..=spec.etcd_members)
                .map(|member| etcd_url(ETCD_ADDRESS, member, ETCD_CLIENTS))
                .collect();
            format!("[store]\nengine = \"etcd\"\n[store.etcd]\nendpoints = {endpoints:?}\n")
        }
    };
    let address = control_address(index);
    let text = format!(
        "data_dir = {:?}\nunix_socket = \"/run/orlop/control.sock\"\n\
         server_names = [\"localhost\", \"127.0.0.1\", \"{address}\"]\n{}\n{store}",
        directory.join("data"),
        spec.control_extra,
    );
    fs::write(directory.join("control.toml"), text).context("writing control.toml")
}

/// A control replica.
pub fn control(spec: &Spec, name: &str) -> Result<Service> {
    let config = spec.member_directory(name).join("control.toml");
    let command = vec![
        program(spec, "orlop-control"),
        "--config".to_owned(),
        config.display().to_string(),
    ];
    with_clock(spec, service(spec, name, "control", command))
}

fn with_clock(spec: &Spec, mut service: Service) -> Result<Service> {
    let name = format!("{}/{}", service.member, service.name);
    service.environment.extend(clock(spec, &name)?);
    Ok(service)
}

/// The port of etcd's first member for its peers; each further member's is ten higher.
const ETCD_PEERS: u16 = 2380;

fn etcd_url(host: Ipv4Addr, index: u16, first: u16) -> String {
    format!("http://{host}:{}", first + 10 * (index - 1))
}

/// All members of etcd, in one member of the lab: control reaches them by its cable, they each other without one.
pub fn etcd(spec: &Spec) -> Result<Vec<Service>> {
    let names = spec.etcd_names();
    let peers: Vec<String> = (1..)
        .zip(&names)
        .map(|(index, name)| format!("{name}={}", etcd_url(Ipv4Addr::LOCALHOST, index, ETCD_PEERS)))
        .collect();
    let mut services = Vec::new();
    for (index, name) in (1..).zip(&names) {
        let data = spec.member_directory(ETCD_MEMBER).join(name);
        fs::create_dir_all(&data).context("making etcd's folder")?;
        let clients = [Ipv4Addr::LOCALHOST, ETCD_ADDRESS].map(|host| etcd_url(host, index, ETCD_CLIENTS));
        let clients = clients.join(",");
        let own_peers = etcd_url(Ipv4Addr::LOCALHOST, index, ETCD_PEERS);
        let mut command = vec!["etcd".to_owned()];
        let data = data.display().to_string();
        for (flag, value) in [
            ("--name", name.as_str()),
            ("--data-dir", &data),
            ("--listen-client-urls", &clients),
            ("--advertise-client-urls", &clients),
            ("--listen-peer-urls", &own_peers),
            ("--initial-advertise-peer-urls", &own_peers),
            ("--initial-cluster", &peers.join(",")),
            // A busy machine is late now and then: that alone makes no election.
            ("--heartbeat-interval", "200"),
            ("--election-timeout", "2000"),
            ("--quota-backend-bytes", &spec.etcd_quota.to_string()),
        ] {
            command.extend([flag.to_owned(), value.to_owned()]);
        }
        services.push(service(spec, ETCD_MEMBER, name, command));
    }
    Ok(services)
}

/// The lab's registries of images, one service each.
pub fn registries(spec: &Spec) -> Vec<Service> {
    let programs = registry::programs(spec).into_iter();
    programs
        .map(|(name, command)| service(spec, registry::MEMBER, name, command))
        .collect()
}

/// Writes `node.toml`.
pub fn write_node(spec: &Spec, name: &str, address: Ipv4Addr, token: &str) -> Result<()> {
    let directory = spec.member_directory(name);
    fs::create_dir_all(directory.join("data")).context("making a node's folder")?;
    let controls: Vec<String> = (1..=spec.controls)
        .map(|index| format!("https://{}:{API_PORT}", control_address(index)))
        .collect();
    let text = format!(
        "# Every node shares the machine's disk: how full that is is no concern here.\n\
         disk_pressure_percent = 0\nnode_name = \"{name}\"\nnode_address = \"{address}\"\ndata_dir = {:?}\nlog_dir = {:?}\n\
         control = {controls:?}\njoin_token = \"{token}\"\nimage_dirs = [{:?}]\n\
         pause_binary = {:?}\nlogger_binary = {:?}\n{}\n{}",
        directory.join("data"),
        directory.join("log"),
        spec.orlop.join("images"),
        spec.static_binaries.join("orlop-pause"),
        spec.installed(name).join("orlop-logger"),
        spec.node_extra,
        if spec.registry {
            registry::known_to_nodes(spec)
        } else {
            String::new()
        },
    );
    fs::write(directory.join("node.toml"), text).context("writing node.toml")
}

/// A node's containerd: its own root, state and socket; no CRI.
pub fn containerd(spec: &Spec, name: &str) -> Result<Service> {
    let directory = spec.member_directory(name).join("containerd");
    fs::create_dir_all(&directory).context("making containerd's folder")?;
    let config = directory.join("config.toml");
    // From 2.0 on the configuration has a version of its own, and CRI is several plugins.
    let own = spec.containerd.get(name);
    let (version, cri) = match own {
        None => (2, ""),
        Some(_) => (3, "\"io.containerd.cri.v1.runtime\", \"io.containerd.cri.v1.images\", "),
    };
    let text = format!(
        "version = {version}\nroot = {:?}\nstate = \"/run/containerd\"\n\
         disabled_plugins = [{cri}\"io.containerd.grpc.v1.cri\", \"io.containerd.snapshotter.v1.btrfs\", \
         \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.snapshotter.v1.devmapper\", \"io.containerd.snapshotter.v1.aufs\"]\n\
         [grpc]\naddress = \"/run/containerd/containerd.sock\"\n",
        directory.join("root"),
    );
    fs::write(&config, text).context("writing containerd's configuration")?;
    let program = own.map_or_else(|| "containerd".into(), |programs| programs.join("containerd"));
    let command = vec![
        program.display().to_string(),
        "--config".to_owned(),
        config.display().to_string(),
    ];
    let mut service = service(spec, name, "containerd", command);
    if let Some(programs) = own {
        // Its shim is found by the PATH, and each has its own.
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = [programs.clone()].into_iter().chain(std::env::split_paths(&path));
        let path = std::env::join_paths(folders).context("a PATH for containerd")?;
        let path = path.into_string().ok().context("the PATH is not UTF-8")?;
        service.environment.push(("PATH".to_owned(), path));
    }
    Ok(service)
}

/// A node's agent. The CNI plugin is put where operators put it.
pub fn agent(spec: &Spec, name: &str) -> Result<Service> {
    let config = spec.member_directory(name).join("node.toml");
    let command = vec![
        program(spec, "orlop-node"),
        "--config".to_owned(),
        config.display().to_string(),
    ];
    with_clock(spec, service(spec, name, "agent", command))
}

/// Has a node's agent start the programs that are in a folder: at once, also where others are started now.
pub fn install_programs(spec: &Spec, name: &str, binaries: &Path) -> Result<()> {
    let folder = spec.installed(name);
    fs::create_dir_all(&folder).context("making a node's folder of programs")?;
    for program in STARTED_BY_AGENTS {
        let (link, next) = (folder.join(program), folder.join(format!(".{program}.new")));
        symlink(binaries.join(program), &next)
            .and_then(|()| fs::rename(&next, &link))
            .with_context(|| format!("linking {}", link.display()))?;
    }
    Ok(())
}

/// Puts the CNI plugin into a node's `/opt/cni/bin`.
pub fn install_plugin(spec: &Spec, name: &str, holder: i32) -> Result<()> {
    let target = Path::new("/proc")
        .join(holder.to_string())
        .join("root/opt/cni/bin/orlop-bridge");
    symlink(spec.installed(name).join("orlop-bridge"), &target).with_context(|| format!("linking {}", target.display()))
}

/// Waits until control answers.
pub fn wait_for_control(members: &Members, name: &str, deadline: Instant) -> Result<()> {
    loop {
        let last = match Client::connect_to(members, name).and_then(|client| client.ready()) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        if Instant::now() > deadline {
            bail!("control does not answer on its unix socket: {last:#}");
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// A token by which all nodes of the lab join.
pub fn join_token(members: &Members) -> Result<String> {
    Client::connect(members)?.create_token()
}

fn service(spec: &Spec, member: &str, name: &str, command: Vec<String>) -> Service {
    let filter = std::env::var("ORLOP_LAB_LOG").unwrap_or_else(|_| LOG_FILTER.to_owned());
    Service {
        member: member.to_owned(),
        name: name.to_owned(),
        command,
        environment: vec![("RUST_LOG".to_owned(), filter)],
        cgroup: format!("{}/system/{name}", spec.cgroup(member)),
        listeners: Vec::new(),
    }
}

fn program(spec: &Spec, name: &str) -> String {
    spec.binaries.join(name).display().to_string()
}
