//! CPU time and packets, against what the kernel says elsewhere.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use orlop_node::dataplane::{Attachment, Dataplane as _, EbpfDataplane, PodInterface, cgroup_id};

use crate::stage::{Stage, ip, run};

fn started(stage: &Stage) -> EbpfDataplane {
    EbpfDataplane::start(stage.config.clone()).expect("start the dataplane")
}

/// A child that burns CPU until it is killed.
struct Burner(Child);

impl Burner {
    fn start(cgroup: &std::path::Path) -> Self {
        fs::create_dir_all(cgroup).expect("make a cgroup");
        let child = Command::new("sh")
            .args(["-c", "read go; while :; do :; done"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("a shell");
        fs::write(cgroup.join("cgroup.procs"), child.id().to_string()).expect("move the child");
        let mut burner = Self(child);
        burner
            .0
            .stdin
            .take()
            .expect("a pipe")
            .write_all(b"go\n")
            .expect("start it");
        burner
    }

    /// Time on a CPU in nanoseconds.
    fn time(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/schedstat", self.0.id())).expect("schedstat");
        stat.split(' ')
            .next()
            .and_then(|field| field.parse().ok())
            .expect("a number")
    }
}

impl Drop for Burner {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

fn near(have: u64, want: u64, percent: u64) -> bool {
    have.abs_diff(want) * 100 <= want * percent
}

#[test]
fn cpu_time_is_that_of_the_container() {
    run("metrics::cpu_time_is_that_of_the_container", |stage| {
        let dataplane = started(stage);
        let node = stage.cgroup.join("orlop/node_1");
        let container = node.join("pod-1/container-1");
        // A container's own cgroups count for it; what is not a container of this node does not count.
        let (inner, outside) = (container.join("inner"), stage.cgroup.join("orlop/other/pod/container"));
        let (burning, beside) = (Burner::start(&inner), Burner::start(&outside));
        let id = cgroup_id(&container).expect("a cgroup");
        let start = Instant::now();
        while burning.time() < 1_000_000_000 {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "the machine gives no CPU time"
            );
            thread::sleep(Duration::from_millis(50));
        }
        let counters = dataplane.read_counters_now().expect("counters");
        let (have, want) = (counters.cpu_by_cgroup[&id], burning.time());
        assert!(near(have, want, 5), "{have} ns counted, {want} ns used");
        assert_eq!(counters.cpu_by_cgroup.len(), 1, "{counters:?}");
        thread::sleep(Duration::from_millis(500));
        let later = dataplane.read_counters_now().expect("counters").cpu_by_cgroup[&id];
        assert!(later > have);
        drop((burning, beside));
        thread::sleep(Duration::from_millis(100));
        fs::remove_dir(&inner).expect("remove the cgroup");
        fs::remove_dir(&container).expect("remove the cgroup");
        for _ in 0..3 {
            dataplane.read_counters_now().expect("counters");
        }
        assert!(
            dataplane
                .read_counters_now()
                .expect("counters")
                .cpu_by_cgroup
                .is_empty(),
            "gone with its cgroup"
        );
    });
}

fn statistic(interface: &str, name: &str) -> u64 {
    // sysfs belongs to another namespace here; `ip` asks this one.
    let output = Command::new("ip")
        .args(["-s", "-j", "link", "show", interface])
        .output()
        .expect("ip");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let (direction, what) = name.split_once('.').expect("two parts");
    json[0]["stats64"][direction][what].as_u64().expect("a number")
}

#[test]
fn traffic_is_that_of_the_interface_and_links_outlive_the_agent() {
    run(
        "metrics::traffic_is_that_of_the_interface_and_links_outlive_the_agent",
        |stage| {
            let dataplane = started(stage);
            let pod = format!("pod-{}", std::process::id());
            ip(&["netns", "add", &pod]);
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| exchange(stage, dataplane, &pod)));
            ip(&["netns", "del", &pod]);
            result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        },
    );
}

fn exchange(stage: &Stage, dataplane: EbpfDataplane, pod: &str) {
    ip(&[
        "link", "add", "host0", "type", "veth", "peer", "name", "eth0", "netns", pod,
    ]);
    ip(&["addr", "add", "10.244.1.1/24", "dev", "host0"]);
    ip(&["link", "set", "host0", "up"]);
    ip(&["-n", pod, "addr", "add", "10.244.1.2/24", "dev", "eth0"]);
    ip(&["-n", pod, "link", "set", "eth0", "up"]);
    let interface = PodInterface {
        pod_uid: "5d1f0e2a-uid".into(),
        host_interface: "host0".into(),
    };
    let (rx, tx) = (statistic("host0", "rx.bytes"), statistic("host0", "tx.bytes"));
    dataplane.attach_pod_now(&interface).expect("attach");
    dataplane.attach_pod_now(&interface).expect("attach again");

    let listener = TcpListener::bind("10.244.1.1:9000").expect("listen");
    let mut client = Command::new("ip")
        .args([
            "netns",
            "exec",
            pod,
            "bash",
            "-c",
            "exec 3<>/dev/tcp/10.244.1.1/9000; head -c 3000000 /dev/zero >&3; wc -c <&3",
        ])
        .stdout(Stdio::null())
        .spawn()
        .expect("a client");
    let (mut stream, _) = listener.accept().expect("accept");
    let transfer = |stream: &mut TcpStream| {
        let mut received = vec![0; 3_000_000];
        stream.read_exact(&mut received).expect("read");
        stream.write_all(&received[..1_000_000]).expect("write");
    };
    transfer(&mut stream);
    drop(stream);
    client.wait().expect("the client ends");
    thread::sleep(Duration::from_millis(100));
    let counted = |dataplane: &EbpfDataplane| {
        dataplane
            .read_counters_now()
            .expect("counters")
            .network_by_pod
            .get("5d1f0e2a-uid")
            .copied()
    };
    let have = counted(&dataplane).expect("the pod's counters");
    let (received, sent) = (statistic("host0", "tx.bytes") - tx, statistic("host0", "rx.bytes") - rx);
    assert!(
        sent > 3_000_000 && near(have.tx_bytes, sent, 5),
        "{} bytes counted, {sent} sent",
        have.tx_bytes
    );
    assert!(
        received > 1_000_000 && near(have.rx_bytes, received, 5),
        "{} bytes counted, {received} received",
        have.rx_bytes
    );
    assert!(
        have.tx_packets >= 3_000_000 / 1500 && have.rx_packets >= 1_000_000 / 1500,
        "{have:?}"
    );

    drop(dataplane);
    let again = started(stage);
    let adopted = counted(&again).expect("the pod's counters are adopted");
    assert!(adopted.tx_bytes >= have.tx_bytes);
    again.attach_pod_now(&interface).expect("attach after a restart");
    assert!(counted(&again).expect("still there").tx_bytes >= have.tx_bytes);
    somebody_detaches(stage, &again, &interface);
    assert!(counted(&again).expect("still there").tx_bytes >= have.tx_bytes);
    again.detach_pod_now("5d1f0e2a-uid").expect("detach");
    again.detach_pod_now("5d1f0e2a-uid").expect("detach again");
    assert_eq!(counted(&again), None);
    assert_eq!(
        fs::read_dir(stage.config.bpffs.join("orlop/node_1/pods"))
            .expect("links")
            .count(),
        0
    );
}

/// By removing a pin, and through the link itself: both are noticed, and mended by attaching again.
fn somebody_detaches(stage: &Stage, dataplane: &EbpfDataplane, interface: &PodInterface) {
    let uid = &interface.pod_uid;
    let links = stage.config.bpffs.join("orlop/node_1/pods");
    let (ingress, egress) = (
        links.join(format!("{uid}_ingress")),
        links.join(format!("{uid}_egress")),
    );
    let nothing: Vec<String> = Vec::new();
    for side in [&ingress, &egress] {
        assert_eq!(dataplane.repair_now().expect("looks"), nothing);
        let report = dataplane.verify_now().expect("verify");
        assert_eq!((report.differences, report.pods), (nothing.clone(), 1));
        if side == &ingress {
            fs::remove_file(side).expect("unpin");
        } else {
            let detached = Command::new("bpftool")
                .args(["link", "detach", "pinned"])
                .arg(side)
                .status();
            assert!(detached.expect("bpftool").success());
        }
        assert_eq!(dataplane.repair_now().expect("looks"), std::slice::from_ref(uid));
        let report = dataplane.verify_now().expect("verify").to_string();
        let program = if side == &ingress { "pod_ingress" } else { "pod_egress" };
        let said = format!("pod {uid}: {program} is not attached to its interface host0");
        assert!(report.contains(&said), "{report}");
        dataplane.attach_pod_now(interface).expect("attach again");
    }
    assert_eq!(dataplane.repair_now().expect("looks"), nothing);
    // The node's own programs it attaches itself.
    fs::remove_file(dataplane.kernel().pins.link("connect4")).expect("unpin");
    dataplane.health().expect_err("it is not attached");
    assert_eq!(dataplane.repair_now().expect("repairs"), nothing);
    dataplane.health().expect("attached again");
}

/// As on kernels before 6.6.
#[test]
fn traffic_is_counted_without_tcx_too() {
    run("metrics::traffic_is_counted_without_tcx_too", |stage| {
        let dataplane = started(stage);
        ip(&["link", "add", "host0", "type", "veth", "peer", "name", "pod0"]);
        let interface = PodInterface {
            pod_uid: "uid".into(),
            host_interface: "host0".into(),
        };
        dataplane
            .attach_pod_with(&interface, Attachment::Clsact)
            .expect("attach");
        dataplane
            .attach_pod_with(&interface, Attachment::Clsact)
            .expect("attach again");
        ip(&["addr", "add", "10.244.1.1/24", "dev", "host0"]);
        ip(&["link", "set", "host0", "up"]);
        ip(&["link", "set", "pod0", "up"]);
        let socket = UdpSocket::bind("10.244.1.1:0").expect("bind");
        ip(&[
            "neigh",
            "add",
            "10.244.1.2",
            "lladdr",
            "02:00:00:00:00:02",
            "dev",
            "host0",
        ]);
        let counted = || dataplane.read_counters_now().expect("counters").network_by_pod["uid"];
        let before = counted();
        for _ in 0..10 {
            socket.send_to(&[0; 1000], "10.244.1.2:9").expect("send");
        }
        let after = counted();
        assert!(
            after.rx_packets >= before.rx_packets + 10 && after.rx_packets < before.rx_packets + 15,
            "{after:?}"
        );
        assert!(after.rx_bytes >= before.rx_bytes + 10 * 1042, "{after:?}");

        drop(dataplane);
        let dataplane = started(stage);
        dataplane
            .attach_pod_with(&interface, Attachment::Clsact)
            .expect("attach after a restart");
        let adopted = dataplane.read_counters_now().expect("counters").network_by_pod["uid"];
        assert!(adopted.rx_bytes >= after.rx_bytes, "{adopted:?} after {after:?}");

        dataplane.detach_pod_now("uid").expect("detach");
        assert_eq!(dataplane.read_counters_now().expect("counters").network_by_pod.len(), 0);
        let filters = Command::new("tc")
            .args(["filter", "show", "dev", "host0", "egress"])
            .output()
            .expect("tc");
        assert!(
            filters.stdout.is_empty(),
            "{}",
            String::from_utf8_lossy(&filters.stdout)
        );
    });
}
