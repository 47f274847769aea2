//! What the agent makes of the kernel itself: namespaces, routes, and the configuration that follows the uplink.

use std::{fs, net::UdpSocket, sync::Arc};

use orlop_node::desired::Routes;
use orlop_node::network::{CniNetwork, Network, NetworkError, Settings, Stale};
use orlop_proto::node::v1::Route;
use serde_json::Value;

use crate::{
    no_routes,
    node::{Node, inside, ip, on_node, welcome},
};

fn routes(list: &[(&str, &str)]) -> Routes {
    let route = |(range, address): &(&str, &str)| {
        let route = Route {
            node_name: range.to_string(),
            node_address: address.to_string(),
            pod_cidrs: vec![range.to_string()],
        };
        (Arc::from(&*route.node_name), Arc::new(route))
    };
    list.iter().map(route).collect()
}

#[test]
fn namespaces_that_are_held_or_half_made() {
    on_node(async |node: Node| {
        let network = node.network();
        let path = network.create_namespace("a").await.unwrap();
        let inode = || std::os::unix::fs::MetadataExt::ino(&fs::metadata(&path).unwrap());
        let first = inode();
        assert_eq!(network.create_namespace("a").await.unwrap(), path);
        assert_eq!(inode(), first);
        // Held open, and mounted over twice.
        let _held = fs::File::open(&path).unwrap();
        let bind = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some(&path), &path, None::<&str>, bind, None::<&str>).unwrap();
        network.delete_namespace("a").await.unwrap();
        assert!(!path.exists());
        // A crash between the file and the mount.
        fs::write(&path, "").unwrap();
        assert!(network.list().await.unwrap()[0].netns.is_some());
        network.create_namespace("a").await.unwrap();
        assert_ne!(inode(), 0);
        inside(&path, || ip("link show lo"));
        for id in ["../x", "", "a/b"] {
            assert!(
                matches!(network.create_namespace(id).await, Err(NetworkError::Invalid(_))),
                "{id:?}"
            );
        }
    });
}

#[test]
fn the_configuration_follows_the_range_and_the_uplink() {
    on_node(async |node: Node| {
        node.ip("link add up0 mtu 1450 type veth peer name other");
        node.ip("addr add 192.0.2.1/24 dev up0");
        node.ip("link set up0 up");
        let settings = Settings {
            node_address: Some("192.0.2.1".parse().unwrap()),
            ..node.settings()
        };
        let network = CniNetwork::new(settings);
        let conflist =
            || -> Value { serde_json::from_slice(&fs::read(node.path("net.d/10-orlop.conflist")).unwrap()).unwrap() };
        network
            .configure(&welcome(&["10.244.1.0/24"]), &no_routes(), Stale::Removed)
            .await
            .unwrap();
        assert_eq!(conflist()["plugins"][0]["mtu"], 1450);
        let written = || {
            fs::metadata(node.path("net.d/10-orlop.conflist"))
                .unwrap()
                .modified()
                .unwrap()
        };
        let before = written();
        network
            .configure(&welcome(&["10.244.1.0/24"]), &no_routes(), Stale::Removed)
            .await
            .unwrap();
        assert_eq!(written(), before);
        assert_eq!(fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap().trim(), "1");
        let pod = node.sandbox(&network, "a").await;
        network.add(&pod).await.unwrap();
        network.del(&pod).await.unwrap();
        network
            .configure(&welcome(&["10.244.7.0/24"]), &no_routes(), Stale::Removed)
            .await
            .unwrap();
        assert_eq!(
            conflist()["plugins"][0]["ipam"]["ranges"][0][0]["subnet"],
            "10.244.7.0/24"
        );
        let status = network.add(&pod).await.unwrap();
        assert_eq!(status.addresses[0].to_string(), "10.244.7.2");
        assert!(
            network
                .configure(&welcome(&[]), &no_routes(), Stale::Removed)
                .await
                .is_err()
        );
        assert!(
            network
                .configure(&welcome(&["garbage"]), &no_routes(), Stale::Removed)
                .await
                .is_err()
        );
    });
}

#[test]
fn a_plugin_in_trouble_does_not_cost_a_pod_its_address() {
    on_node(async |node: Node| {
        let network = node.configured().await;
        let pod = node.sandbox(&network, "a").await;
        let had = network.add(&pod).await.unwrap().addresses;
        network.del(&pod).await.unwrap();
        let another = node.sandbox(&network, "b").await;
        assert_ne!(network.add(&another).await.unwrap().addresses, had);
        // Our plugin, whose first ADD meets a port that does not come up in time.
        fs::rename(node.path("bin/orlop-bridge"), node.path("real")).unwrap();
        let (once, real) = (node.path("once"), node.path("real"));
        node.script(
            "orlop-bridge",
            &format!(
                "if [ $CNI_COMMAND = ADD ] && mkdir {}; then echo '{{\"code\":11,\"msg\":\"later\"}}'; exit 1; fi\n\
                 printf %s \"$IN\" | {}",
                once.display(),
                real.display()
            ),
        );
        let error = network.add(&pod).await.unwrap_err().to_string();
        assert!(error.contains("later"), "{error}");
        assert_eq!(network.add(&pod).await.unwrap().addresses, had);
    });
}

#[test]
fn routes_follow_and_others_are_left_alone() {
    on_node(async |node: Node| {
        node.ip("link add up0 type veth peer name other");
        node.ip("addr add 192.0.2.1/24 dev up0");
        node.ip("link set up0 up");
        node.ip("link set other up");
        node.ip("route add 198.51.100.0/24 via 192.0.2.9");
        let network = node.network();
        let ours = || {
            let mut lines: Vec<String> = ip("route show proto 79").lines().map(|l| l.trim().to_owned()).collect();
            lines.sort();
            lines
        };
        let own = welcome(&["10.244.1.0/24"]);
        let two = routes(&[("10.244.2.0/24", "192.0.2.2"), ("10.244.3.0/24", "192.0.2.3")]);
        network.configure(&own, &two, Stale::Removed).await.unwrap();
        let none = "unreachable 10.244.0.0/16 metric 4294967294";
        let all = [
            "10.244.2.0/24 via 192.0.2.2 dev up0",
            "10.244.3.0/24 via 192.0.2.3 dev up0",
            none,
        ];
        assert_eq!(ours(), all);
        network.configure(&own, &two, Stale::Removed).await.unwrap();
        assert_eq!(ours(), all);
        // Another agent that only has its ledger, which may be behind: nothing goes.
        node.network().configure(&own, &no_routes(), Stale::Kept).await.unwrap();
        assert_eq!(ours(), all);
        // Another agent: one route moved, one gone, one that cannot be set, one new.
        let moved = routes(&[
            ("10.244.2.0/24", "192.0.2.22"),
            ("10.244.4.0/24", "203.0.113.1"),
            ("10.244.5.0/24", "192.0.2.5"),
        ]);
        let error = node
            .network()
            .configure(&own, &moved, Stale::Removed)
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("10.244.4.0/24") && !error.contains("10.244.5.0"),
            "{error}"
        );
        assert_eq!(
            ours(),
            [
                "10.244.2.0/24 via 192.0.2.22 dev up0",
                "10.244.5.0/24 via 192.0.2.5 dev up0",
                none
            ]
        );
        // No node has it: it does not leave by another way.
        let sent = UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"x", "10.244.200.1:9");
        assert_eq!(sent.unwrap_err().kind(), std::io::ErrorKind::HostUnreachable);
        assert!(node.ip("route").contains("198.51.100.0/24 via 192.0.2.9"));
    });
}
