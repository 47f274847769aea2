//! The plugin as a runtime calls it: the real binary, in namespaces that each test makes. Needs root.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, UdpSocket},
    path::Path,
    sync::Arc,
    time::Duration,
};

use node::{Node, Pod, inside, ip, on_node, start};
use serde_json::{Value, json};

mod addressing;
mod cnitool;
mod foreign;
mod hostile;
mod node;
mod podman;
mod removal;

fn with_result(config: &Value, result: &Value) -> Value {
    let mut config = config.clone();
    config["prevResult"] = result.clone();
    config
}

fn addresses(result: &Value) -> Vec<IpAddr> {
    let ips = result["ips"].as_array().unwrap().iter();
    ips.map(|ip| {
        ip["address"]
            .as_str()
            .unwrap()
            .split('/')
            .next()
            .unwrap()
            .parse()
            .unwrap()
    })
    .collect()
}

/// A datagram there and back.
fn reaches(from: &Pod, to: &Pod, address: IpAddr) -> bool {
    let server = inside(to, move || UdpSocket::bind((address, 7)).unwrap());
    let echo = std::thread::spawn(move || {
        server.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        let mut buffer = [0; 64];
        if let Ok((length, peer)) = server.recv_from(&mut buffer) {
            server.send_to(&buffer[..length], peer).ok();
        }
    });
    let client = inside(from, move || {
        let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).unwrap();
        socket.connect((address, 7)).unwrap();
        socket
    });
    client.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    client.send(b"ahoy").unwrap();
    let mut buffer = [0; 64];
    let answered = client.recv(&mut buffer).is_ok_and(|n| &buffer[..n] == b"ahoy");
    echo.join().unwrap();
    answered
}

#[test]
fn every_version_adds_checks_and_deletes() {
    on_node(|node| {
        for (index, version) in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"].into_iter().enumerate() {
            let pod = node.pod(&format!("UPPER-{index}"));
            let config = node.config(version, json!({}));
            let result = node.call("ADD", &pod, &config).expect();
            assert_eq!(result["cniVersion"], version);
            let family = if version < "1.0.0" { json!("4") } else { Value::Null };
            assert_eq!(result["ips"][0]["version"], family);
            assert_eq!(result["ips"][0]["gateway"], "10.99.0.1");
            assert_eq!(result["ips"][1]["gateway"], "fd99::1");
            assert_eq!(result["interfaces"].as_array().unwrap().len(), 3);
            assert_eq!(result["interfaces"][2]["sandbox"], pod.netns.to_str().unwrap());
            let with_result = with_result(&config, &result);
            match version {
                "0.3.1" => assert_eq!(node.call("CHECK", &pod, &with_result).code(), 1),
                _ => assert_eq!(node.call("CHECK", &pod, &with_result).expect(), Value::Null),
            }
            node.call("DEL", &pod, &with_result).expect();
            assert_eq!(node.leases().len(), 0);
            assert_eq!(node.veths(), Vec::<String>::new());
            if version != "0.3.1" {
                let code = node.call("CHECK", &pod, &with_result).code();
                assert_eq!(code, 103);
            }
        }
    });
}

#[test]
fn pods_reach_each_other_and_the_gateway() {
    on_node(|node| {
        let config = node.config("1.1.0", json!({}));
        let (a, b) = (node.pod("a"), node.pod("b"));
        node.call("ADD", &a, &config).expect();
        let result = node.call("ADD", &b, &config).expect();
        for address in addresses(&result) {
            // At once: no wait for duplicates, no port that is not forwarding yet.
            assert!(reaches(&a, &b, address), "{address}");
        }
        let shown = inside(&a, || (ip("-j addr show eth0"), ip("-j route"), ip("-6 route")));
        let link: Value = serde_json::from_str(&shown.0).unwrap();
        assert_eq!(link[0]["mtu"], 1400);
        assert!(!shown.0.contains("tentative"));
        let routes: Value = serde_json::from_str(&shown.1).unwrap();
        assert!(
            routes
                .as_array()
                .unwrap()
                .iter()
                .any(|r| r["dst"] == "default" && r["gateway"] == "10.99.0.1")
        );
        assert!(shown.2.contains("default via fd99::1"), "{}", shown.2);
        // The node itself is a neighbour through the bridge's addresses.
        let server = UdpSocket::bind("10.99.0.1:9").unwrap();
        server.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        inside(&a, || {
            UdpSocket::bind("0.0.0.0:0")
                .unwrap()
                .send_to(b"x", "10.99.0.1:9")
                .unwrap()
        });
        assert_eq!(server.recv(&mut [0; 8]).unwrap(), 1);
    });
}

#[test]
fn del_of_what_is_gone_is_a_success() {
    on_node(|node| {
        let config = node.config("1.1.0", json!({}));
        let mut pod = node.pod("a");
        node.call("DEL", &pod, &config).expect();
        node.call("ADD", &pod, &config).expect();
        node.destroy(&pod);
        node.call("DEL", &pod, &config).expect();
        node.call("DEL", &pod, &config).expect();
        pod.netns = "".into();
        node.call("DEL", &pod, &config).expect();
        assert_eq!((node.leases().len(), node.veths().len()), (0, 0));
    });
}

#[test]
fn a_second_add_is_refused_and_leaves_the_first() {
    on_node(|node| {
        let config = node.config("1.1.0", json!({}));
        let (a, b) = (node.pod("a"), node.pod("b"));
        let result = node.call("ADD", &a, &config).expect();
        assert_eq!(node.call("ADD", &a, &config).code(), 101);
        node.call("CHECK", &a, &with_result(&config, &result)).expect();
        node.call("ADD", &b, &config).expect();
        assert!(reaches(&b, &a, addresses(&result)[0]));
        // Many at once of one attachment: one wins, and nothing of it is undone by the losers.
        let c = node.pod("c");
        let calls: Vec<_> = (0..8).map(|_| node.start("ADD", &c, &config)).collect();
        let answers: Vec<_> = calls.into_iter().map(node::Running::end).collect();
        assert_eq!(answers.iter().filter(|a| a.success).count(), 1, "{answers:?}");
        assert!(
            answers.iter().filter(|a| !a.success).all(|a| a.json()["code"] == 101),
            "{answers:?}"
        );
        let winner = answers.into_iter().find(|a| a.success).unwrap().json();
        node.call("CHECK", &c, &with_result(&config, &winner)).expect();
    });
}

#[test]
fn calls_for_one_container_at_once_leave_no_address_unleased() {
    on_node(|node| {
        let config = node.config("1.1.0", json!({}));
        for round in 0..20 {
            let pod = node.pod(&format!("p{round}"));
            let verbs = ["ADD", "ADD", "DEL", "ADD", "DEL", "ADD", "DEL", "ADD"];
            let calls: Vec<_> = verbs.iter().map(|verb| node.start(verb, &pod, &config)).collect();
            let answers: Vec<_> = calls.into_iter().map(node::Running::end).collect();
            let shown: Value = serde_json::from_str(&inside(&pod, || ip("-j addr show"))).unwrap();
            let links = shown.as_array().unwrap().iter();
            let used: BTreeSet<String> = links
                .filter(|link| link["ifname"] == "eth0")
                .flat_map(|link| link["addr_info"].as_array().unwrap())
                .filter(|address| address["scope"] == "global")
                .map(|address| address["local"].as_str().unwrap().to_owned())
                .collect();
            // What is in use is leased, else the next container gets it too; and what is not in use is free.
            let leased: BTreeSet<String> = node.leases().into_keys().collect();
            assert_eq!(used, leased, "round {round}: {answers:?}");
            node.call("DEL", &pod, &config).expect();
            assert_eq!((node.leases().len(), node.veths().len()), (0, 0));
        }
    });
}

#[test]
fn an_interface_of_somebody_else_is_left_alone() {
    on_node(|node| {
        let pod = node.pod("a");
        inside(&pod, || ip("link add eth0 type veth peer name other"));
        let config = node.config("1.1.0", json!({}));
        assert_eq!(node.call("ADD", &pod, &config).code(), 101);
        assert!(inside(&pod, || ip("-br link")).contains("eth0"));
        assert_eq!((node.leases().len(), node.veths().len()), (0, 0));
    });
}

#[test]
fn a_container_that_returns_with_a_new_namespace_is_added() {
    on_node(|node| {
        let config = node.config("1.1.0", json!({}));
        let old = node.pod("a");
        let before = node.call("ADD", &old, &config).expect();
        // The old namespace lives on without a name, as a process in it would have it.
        let _alive = fs::File::open(&old.netns).unwrap();
        node.destroy(&old);
        let new = node.pod("a");
        let after = node.call("ADD", &new, &config).expect();
        assert_eq!(before["ips"], after["ips"]);
        assert_eq!(node.veths().len(), 1);
        node.call("CHECK", &new, &with_result(&config, &after)).expect();
    });
}

#[test]
fn a_failed_add_leaves_nothing() {
    on_node(|node| {
        let pod = node.pod("a");
        // The last step fails: no such gateway in reach.
        let routes = json!([{"dst": "10.50.0.0/16", "gw": "10.60.0.1"}]);
        let config = node.config("1.1.0", json!({"ipam": {"routes": routes}}));
        assert_eq!(node.call("ADD", &pod, &config).code(), 100);
        assert_eq!((node.leases().len(), node.veths().len()), (0, 0));
        assert!(!inside(&pod, || ip("-br link")).contains("eth0"));
        node.call("ADD", &pod, &node.config("1.1.0", json!({}))).expect();
    });
}

#[test]
fn fifty_at_once_get_fifty_addresses() {
    on_node(|node| {
        let config = node.config("1.1.0", json!({}));
        let pods: Vec<Pod> = (0..50).map(|i| node.pod(&format!("p{i}"))).collect();
        let calls: Vec<_> = pods.iter().map(|pod| node.start("ADD", pod, &config)).collect();
        let results: Vec<Value> = calls.into_iter().map(|call| call.end().expect()).collect();
        let distinct: BTreeSet<IpAddr> = results.iter().flat_map(addresses).collect();
        assert_eq!(distinct.len(), 100);
        for pair in [(0, 49), (17, 3)] {
            assert!(reaches(&pods[pair.0], &pods[pair.1], addresses(&results[pair.1])[0]));
        }
        let calls: Vec<_> = pods.iter().map(|pod| node.start("DEL", pod, &config)).collect();
        for call in calls {
            call.end().expect();
        }
        assert_eq!((node.leases().len(), node.veths().len()), (0, 0));
    });
}

#[test]
fn a_kill_at_any_moment_leaks_nothing() {
    on_node(|node| {
        let config = node.config("1.1.0", json!({}));
        let pods: Vec<Pod> = (0..40).map(|i| node.pod(&format!("p{i}"))).collect();
        let mut ended = 0;
        for (index, pod) in pods.iter().enumerate() {
            let mut call = node.start("ADD", pod, &config);
            // From before it has begun to after it has ended.
            std::thread::sleep(Duration::from_micros(400 * index as u64));
            call.0.kill().unwrap();
            ended += usize::from(call.0.wait().unwrap().success());
            // The next ADD of the same container takes up what was left, unless that was complete.
            if index % 4 == 0 {
                let answer = node.call("ADD", pod, &config);
                assert!(answer.success || answer.json()["code"] == 101, "{answer:?}");
            }
        }
        assert!(ended < pods.len(), "nothing was killed in time");
        let kept = &pods[0];
        node.call("DEL", kept, &config).expect();
        let result = node.call("ADD", kept, &config).expect();
        let mut gc = config.clone();
        gc["cni.dev/valid-attachments"] = json!([{"containerID": kept.id, "ifname": "eth0"}]);
        node.call("GC", kept, &gc).expect();
        assert_eq!((node.leases().len(), node.veths().len()), (2, 1));
        node.call("CHECK", kept, &with_result(&config, &result)).expect();
        // DEL finds by the container alone what a killed ADD left, too.
        gc["cni.dev/valid-attachments"] = json!([]);
        node.call("GC", kept, &gc).expect();
        assert_eq!((node.leases().len(), node.veths().len()), (0, 0));
    });
}

#[test]
fn killed_deletes_leak_nothing_either() {
    on_node(|node| {
        let config = node.config("1.1.0", json!({}));
        let pods: Vec<Pod> = (0..20).map(|i| node.pod(&format!("p{i}"))).collect();
        for (index, pod) in pods.iter().enumerate() {
            node.call("ADD", pod, &config).expect();
            let mut call = node.start("DEL", pod, &config);
            std::thread::sleep(Duration::from_micros(300 * index as u64));
            call.0.kill().unwrap();
            call.0.wait().unwrap();
            node.call("DEL", pod, &config).expect();
        }
        assert_eq!((node.leases().len(), node.veths().len()), (0, 0));
    });
}

#[test]
fn check_sees_what_was_changed_behind_its_back() {
    on_node(|node| {
        let config = node.config("1.1.0", json!({}));
        // Where (in the pod, or on the node), and what `ip` does there.
        let changes = [
            (true, "addr flush dev eth0 scope global"),
            (true, "route del default"),
            (true, "link set eth0 down"),
            (true, "link set eth0 address 02:00:00:00:00:09"),
            (false, "link set VETH nomaster"),
            (false, "addr flush dev orlop0"),
        ];
        for (index, (in_pod, change)) in changes.into_iter().enumerate() {
            let pod = node.pod(&format!("p{index}"));
            let result = node.call("ADD", &pod, &config).expect();
            let with_result = with_result(&config, &result);
            node.call("CHECK", &pod, &with_result).expect();
            if in_pod {
                inside(&pod, || ip(change));
            } else {
                node.ip(&change.replace("VETH", &node.veths()[0]));
            }
            assert_eq!(node.call("CHECK", &pod, &with_result).code(), 103, "{change}");
            node.call("DEL", &pod, &with_result).expect();
        }
        assert_eq!(node.call("CHECK", &node.pod("x"), &config).code(), 7);
    });
}

#[test]
fn status_says_why_not() {
    on_node(|node| {
        let pod = node.pod("unused");
        let config = node.config("1.1.0", json!({}));
        node.call("STATUS", &pod, &config).expect();
        node.ip("link add orlop0 type veth peer name other");
        assert_eq!(node.call("STATUS", &pod, &config).code(), 50);
        node.ip("link del orlop0");
        let no_boot_id = node.config("1.1.0", json!({"ipam": {"bootIdFile": "/nowhere"}}));
        assert_eq!(node.call("STATUS", &pod, &no_boot_id).code(), 50);
        let no_dir = node.config("1.1.0", json!({"ipam": {"dataDir": "/proc/none"}}));
        assert_eq!(node.call("STATUS", &pod, &no_dir).code(), 50);
        for verb in ["STATUS", "GC"] {
            assert_eq!(node.call(verb, &pod, &node.config("1.0.0", json!({}))).code(), 1);
        }
    });
}

#[test]
fn garbage_of_other_networks_is_left_alone() {
    on_node(|node| {
        let mine = node.config("1.1.0", json!({}));
        let ranges = json!({"ipam": {"ranges": [[{"subnet": "fd98::/64"}]]}});
        let mut other = node.config("1.1.0", ranges);
        other["name"] = json!("other");
        let (a, b) = (node.pod("a"), node.pod("b"));
        node.call("ADD", &a, &mine).expect();
        let result = node.call("ADD", &b, &other).expect();
        // Without a list nothing is known to be garbage.
        node.call("GC", &a, &mine).expect();
        assert_eq!(node.veths().len(), 2);
        let mut gc = mine.clone();
        gc["cni.dev/attachments"] = json!([{"containerID": a.id, "ifname": "eth0"}]);
        node.call("GC", &a, &gc).expect();
        assert_eq!(node.veths().len(), 2);
        // As libcni writes an empty list, and under both names.
        gc["cni.dev/attachments"] = Value::Null;
        gc["cni.dev/valid-attachments"] = Value::Null;
        node.call("GC", &a, &gc).expect();
        assert_eq!((node.leases().len(), node.veths().len()), (0, 1));
        node.call("CHECK", &b, &with_result(&other, &result)).expect();
    });
}

#[test]
fn a_result_from_before_is_passed_on() {
    on_node(|node| {
        let before = json!({
            "cniVersion": "1.0.0", "dns": {"nameservers": ["10.96.0.10"]},
            "interfaces": [{"name": "net1", "sandbox": "/other"}], "ips": [{"address": "10.7.0.2/24", "interface": 0}],
        });
        let config = with_result(&node.config("1.0.0", json!({})), &before);
        let result = node.call("ADD", &node.pod("a"), &config).expect();
        assert_eq!(result["interfaces"][0]["name"], "net1");
        assert_eq!(result["ips"][0]["address"], "10.7.0.2/24");
        assert_eq!(result["ips"][1]["interface"], 3);
        assert_eq!(result["dns"]["nameservers"][0], "10.96.0.10");
    });
}

/// The reference bridge plugin with host-local, with the same configuration, answers with the same but for names of the
/// host's link and hardware addresses.
#[test]
fn the_result_is_the_reference_plugins() {
    on_node(|node| {
        for version in ["0.3.1", "0.4.0", "1.0.0"] {
            let (ours, theirs) = (
                node.pod(&format!("ours{version}")),
                node.pod(&format!("theirs{version}")),
            );
            let config = node.config(version, json!({"ipam": {"routes": [{"dst": "10.50.0.0/16"}]}}));
            let own = node.call("ADD", &ours, &config).expect();
            node.call("DEL", &ours, &config).expect();
            node.ip("link del orlop0");
            let mut config = config;
            let ipam = config["ipam"].as_object_mut().unwrap();
            ipam.remove("bootIdFile");
            ipam.insert("type".into(), json!("host-local"));
            ipam.insert("dataDir".into(), json!(node.path(&format!("reference{version}"))));
            config["type"] = json!("bridge");
            let call = |verb| {
                let netns = theirs.netns.to_str().unwrap();
                let id = &*theirs.id;
                let env = [
                    ("CNI_COMMAND", verb),
                    ("CNI_CONTAINERID", id),
                    ("CNI_IFNAME", "eth0"),
                    ("CNI_NETNS", netns),
                ];
                start(Path::new("/usr/lib/cni/bridge"), &env, config.to_string().as_bytes()).end()
            };
            let reference = call("ADD").expect();
            call("DEL").expect();
            node.ip("link del orlop0");
            let plain = |mut result: Value| {
                for interface in result["interfaces"].as_array_mut().unwrap() {
                    for key in ["mac", "sandbox"] {
                        if interface[key].is_string() {
                            interface[key] = json!("set");
                        }
                    }
                }
                result["interfaces"][1]["name"] = json!("host's");
                for ip in result["ips"].as_array_mut().unwrap() {
                    ip["address"] = json!(ip["address"].as_str().unwrap().split_once('/').unwrap().1);
                }
                result
            };
            assert_eq!(plain(own), plain(reference));
        }
    });
}

#[test]
fn a_port_without_addresses() {
    on_node(|node: &Arc<Node>| {
        let config = json!({"cniVersion": "1.1.0", "name": "net", "type": "orlop-bridge", "bridge": "l2", "ipam": {}});
        let pod = node.pod("a");
        let result = node.call("ADD", &pod, &config).expect();
        assert_eq!(result.get("ips"), None);
        assert!(inside(&pod, || ip("-br link")).contains("eth0"));
        node.call("CHECK", &pod, &with_result(&config, &result)).expect();
        node.call("DEL", &pod, &config).expect();
        node.enter();
    });
}
