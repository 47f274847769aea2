//! Where a test plays.

use std::{
    env, fs,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{self, Command},
    sync::Arc,
    thread,
    time::Duration,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use orlop_node::dataplane::{Config, EbpfDataplane, ServiceChanges, Sizes, kernel};
use orlop_proto::node::v1 as link;

const INSIDE: &str = "ORLOP_DATAPLANE_TEST_CGROUP";

/// Small maps: tests are many.
pub const SIZES: Sizes = Sizes {
    frontends: 64,
    slots: 512,
    pods: 16,
    containers: 16,
    sockets: 32,
};

/// What a test has.
pub struct Stage {
    pub config: Config,
    /// The root of "cgroup2" here.
    pub cgroup: PathBuf,
}

/// Runs `body` in a process and namespaces of its own. `name` is the path of the calling test.
pub fn run(name: &str, body: fn(&Stage)) {
    assert!(
        nix::unistd::geteuid().is_root(),
        "these tests need root: they load programs into the kernel"
    );
    if let Some(cgroup) = env::var_os(INSIDE) {
        return body(&enter(Path::new(&cgroup)));
    }
    let root = kernel::find_cgroup2().expect("cgroup2 is mounted");
    let cgroup = root.join(format!("orlop-test-{}-{}", process::id(), name.replace("::", "-")));
    fs::create_dir(&cgroup).expect("make a cgroup");
    let status = Command::new(env::current_exe().expect("this program"))
        .args(["--exact", name, "--nocapture", "--test-threads=1", "--include-ignored"])
        .env(INSIDE, &cgroup)
        .status()
        .expect("run this program again");
    remove_cgroups(&cgroup);
    assert!(status.success(), "{name}: {status}");
}

fn remove_cgroups(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroups(&entry.path());
        }
    }
    // A process that has ended leaves its cgroup a moment later.
    for _attempt in 0..100 {
        if fs::remove_dir(cgroup).is_ok() {
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
    panic!("{} cannot be removed", cgroup.display());
}

fn enter(cgroup: &Path) -> Stage {
    let clients = cgroup.join("clients");
    fs::create_dir_all(&clients).expect("make a cgroup");
    fs::write(clients.join("cgroup.procs"), "0").expect("enter the cgroup");
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("new namespaces");
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .expect("private mounts");
    let bpffs = PathBuf::from("/mnt");
    mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), None::<&str>).expect("a bpffs");
    ip(&["link", "set", "lo", "up"]);
    Stage {
        config: Config {
            bpffs,
            instance: "node_1".into(),
            cgroup_root: Some(cgroup.to_path_buf()),
            sizes: SIZES,
        },
        cgroup: cgroup.to_path_buf(),
    }
}

/// Runs `ip` in this namespace.
pub fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().expect("ip");
    assert!(
        output.status.success(),
        "ip {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The port of every backend.
pub const BACKEND_PORT: u16 = 8080;
/// The port of every service.
pub const SERVICE_PORT: u16 = 80;

/// A pod's address.
pub fn pod(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 1, last)
}

/// A ClusterIP.
pub fn cluster_ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 96, 0, last)
}

/// A ClusterIP with the services' port.
pub fn vip(last: u8) -> SocketAddr {
    SocketAddr::from((cluster_ip(last), SERVICE_PORT))
}

/// The same as an AF_INET6 socket says it.
pub fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(v4) => SocketAddr::from((v4.to_ipv6_mapped(), address.port())),
        IpAddr::V6(_) => address,
    }
}

/// A service at `cluster_ip(last)` for TCP and UDP, with these pods as backends (1 ready, 2 terminating).
pub fn service(last: u8, backends: &[(u8, u8)]) -> Arc<link::Service> {
    let packed: Vec<u8> = backends
        .iter()
        .flat_map(|(pod, state)| {
            let port = BACKEND_PORT.to_be_bytes();
            [10, 244, 1, *pod, port[0], port[1], *state, 0]
        })
        .collect();
    Arc::new(link::Service {
        namespace: "default".into(),
        name: format!("s{last}"),
        uid: format!("uid-{last}"),
        addresses: vec![cluster_ip(last).octets().to_vec().into()],
        ports: [6, 17]
            .map(|protocol| link::ServicePort {
                name: String::new(),
                protocol,
                port: SERVICE_PORT.into(),
                backends_v4: packed.clone().into(),
            })
            .to_vec(),
    })
}

/// Upserts these.
pub fn upsert(dataplane: &EbpfDataplane, services: &[Arc<link::Service>]) {
    dataplane
        .apply_now(&ServiceChanges {
            upserts: services.to_vec(),
            ..Default::default()
        })
        .expect("apply services");
}

/// These, and no others.
pub fn whole(dataplane: &EbpfDataplane, services: &[Arc<link::Service>]) {
    dataplane
        .apply_now(&ServiceChanges {
            upserts: services.to_vec(),
            complete: true,
            ..Default::default()
        })
        .expect("apply services");
}

/// Starts servers on `pod(last)` that answer with their number: TCP on connect, then every byte; UDP every datagram.
pub fn serve(last: u8) {
    ip(&["addr", "add", &format!("{}/32", pod(last)), "dev", "lo"]);
    let tcp = TcpListener::bind((pod(last), BACKEND_PORT)).expect("listen");
    thread::spawn(move || {
        for stream in tcp.incoming() {
            let mut stream = stream.expect("accept");
            thread::spawn(move || {
                let mut byte = [0];
                let _gone = stream.write_all(&[last]);
                while stream.read_exact(&mut byte).is_ok() && stream.write_all(&[last]).is_ok() {}
            });
        }
    });
    let udp = UdpSocket::bind((pod(last), BACKEND_PORT)).expect("bind");
    thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = udp.recv_from(&mut buffer) {
            let _gone = udp.send_to(&[last], from);
        }
    });
}

/// Connects, and says who answered.
pub fn ask(address: SocketAddr) -> io::Result<u8> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    Ok(byte[0])
}
