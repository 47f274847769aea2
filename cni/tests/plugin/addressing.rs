//! Which addresses are given, and what the bridge and the neighbours learn of them.

use std::{fs, net::UdpSocket, time::Duration};

use serde_json::{Value, json};

use crate::{
    addresses,
    node::{Pod, inside, ip, on_node},
    reaches,
};

#[test]
fn a_full_range_names_itself_and_takes_what_is_returned() {
    on_node(|node| {
        let ranges = json!([[{"subnet": "10.99.0.0/29"}]]);
        let config = node.config("1.1.0", json!({"ipam": {"ranges": ranges}}));
        let pods: Vec<Pod> = (0..6).map(|i| node.pod(&format!("p{i}"))).collect();
        for pod in &pods[..5] {
            node.call("ADD", pod, &config).expect();
        }
        let refused = node.call("ADD", &pods[5], &config);
        assert!(
            refused.stdout.contains("10.99.0.1-10.99.0.6 of 10.99.0.0/29"),
            "{}",
            refused.stdout
        );
        assert_eq!(refused.code(), 102);
        assert_eq!(node.veths().len(), 5);
        // The node is well all the same.
        node.call("STATUS", &pods[5], &config).expect();
        node.call("DEL", &pods[2], &config).expect();
        let result = node.call("ADD", &pods[5], &config).expect();
        assert_eq!(addresses(&result)[0].to_string(), "10.99.0.4");
    });
}

#[test]
fn a_reboot_frees_all_leases() {
    on_node(|node| {
        let config = node.config("1.1.0", json!({}));
        let pods: Vec<Pod> = (0..3).map(|i| node.pod(&format!("p{i}"))).collect();
        for pod in &pods {
            node.call("ADD", pod, &config).expect();
            node.destroy(pod);
        }
        node.ip("link del orlop0");
        fs::write(node.path("boot_id"), "another boot\n").unwrap();
        let again = node.pod("p9");
        node.call("ADD", &again, &config).expect();
        assert_eq!(node.leases().len(), 2);
    });
}

#[test]
fn a_gateway_that_differs_is_replaced_only_by_force() {
    on_node(|node| {
        let (a, b) = (node.pod("a"), node.pod("b"));
        node.call("ADD", &a, &node.config("1.1.0", json!({}))).expect();
        let ranges = json!({"ipam": {"ranges": [[{"subnet": "10.98.0.0/24"}]]}});
        let moved = node.config("1.1.0", ranges);
        assert_eq!(node.call("ADD", &b, &moved).code(), 7);
        assert_eq!((node.leases().len(), node.veths().len()), (2, 1));
        let mut forced = moved;
        forced["forceAddress"] = json!(true);
        node.call("ADD", &b, &forced).expect();
        let shown = node.ip("-br addr show orlop0");
        assert!(
            shown.contains("10.98.0.1/24") && !shown.contains("10.99.0.1"),
            "{shown}"
        );
    });
}

#[test]
fn capabilities_choose_addresses() {
    on_node(|node| {
        let asked = json!({"runtimeConfig": {"mac": "02:11:22:33:44:55", "ips": ["10.99.0.77", "fd99::77/64"]}});
        let config = node.config("1.1.0", asked);
        let result = node.call("ADD", &node.pod("a"), &config).expect();
        assert_eq!(result["interfaces"][2]["mac"], "02:11:22:33:44:55");
        assert_eq!(result["ips"][0]["address"], "10.99.0.77/24");
        assert_eq!(result["ips"][1]["address"], "fd99::77/64");
        assert_eq!(node.call("ADD", &node.pod("b"), &config).code(), 102);
    });
}

#[test]
fn an_address_that_moves_is_announced() {
    on_node(|node| {
        // One address to give: the second pod gets the first one's, with another hardware address.
        let ranges = json!([
            [{"subnet": "10.99.0.0/24", "rangeStart": "10.99.0.5", "rangeEnd": "10.99.0.5"}],
            [{"subnet": "fd99::/64", "rangeStart": "fd99::5", "rangeEnd": "fd99::5"}],
        ]);
        let config = node.config("1.1.0", json!({"ipam": {"ranges": ranges}}));
        let (first, second) = (node.pod("first"), node.pod("second"));
        // Another port: a bridge without any loses its carrier, and the node forgets its neighbours.
        let mut other = node.config("1.1.0", json!({"ipam": {"ranges": [[{"subnet": "fd98::/64"}]]}}));
        other["name"] = json!("other");
        node.call("ADD", &node.pod("other"), &other).expect();
        let learnt = |address: &str, mac: &Value| {
            let shown =
                || -> Value { serde_json::from_str(&ip(&format!("-j neigh show {address} dev orlop0"))).unwrap() };
            for _ in 0..200 {
                if shown()[0]["lladdr"] == *mac {
                    return;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            panic!("{}, not {mac}", shown());
        };
        let before = node.call("ADD", &first, &config).expect();
        for (any, address) in [("0.0.0.0:0", "10.99.0.5"), ("[::]:0", "fd99::5")] {
            UdpSocket::bind(any).unwrap().send_to(b"x", (address, 9)).unwrap();
            learnt(address, &before["interfaces"][2]["mac"]);
        }
        node.call("DEL", &first, &config).expect();
        // Nothing is sent to it: only the announcement can teach the node.
        let after = node.call("ADD", &second, &config).expect();
        assert_ne!(before["interfaces"][2]["mac"], after["interfaces"][2]["mac"]);
        for address in ["10.99.0.5", "fd99::5"] {
            learnt(address, &after["interfaces"][2]["mac"]);
        }
    });
}

#[test]
fn each_range_of_a_set_has_its_gateway() {
    on_node(|node| {
        // The first range has one address besides its gateway.
        let ranges = json!([[{"subnet": "10.99.0.0/30"}, {"subnet": "10.98.0.0/24"}]]);
        let config = node.config("1.1.0", json!({"forceAddress": true, "ipam": {"ranges": ranges}}));
        let (a, b, c) = (node.pod("a"), node.pod("b"), node.pod("c"));
        let first = node.call("ADD", &a, &config).expect();
        let second = node.call("ADD", &b, &config).expect();
        node.call("ADD", &c, &config).expect();
        assert_eq!(first["ips"][0]["gateway"], "10.99.0.1");
        assert_eq!(second["ips"][0]["gateway"], "10.98.0.1");
        let shown = node.ip("-br addr show orlop0");
        assert!(
            shown.contains("10.99.0.1/30") && shown.contains("10.98.0.1/24"),
            "{shown}"
        );
        assert!(reaches(&c, &b, addresses(&second)[0]));
    });
}

#[test]
fn the_bridge_follows_the_mtu() {
    on_node(|node| {
        for (index, mtu) in [1400, 1300, 1450].into_iter().enumerate() {
            let pod = node.pod(&format!("p{index}"));
            let result = node
                .call("ADD", &pod, &node.config("1.1.0", json!({"mtu": mtu})))
                .expect();
            for interface in result["interfaces"].as_array().unwrap() {
                assert_eq!(interface["mtu"], mtu);
            }
            assert!(node.ip("link show orlop0").contains(&format!("mtu {mtu} ")));
            assert!(inside(&pod, || ip("link show eth0")).contains(&format!("mtu {mtu} ")));
        }
    });
}
