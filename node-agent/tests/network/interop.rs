//! Other people's plugins under the agent: the reference plugins of Debian's containernetworking-plugins.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, TcpListener, TcpStream},
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use orlop_node::network::{CniNetwork, Network, Stale};
use serde_json::{Value, json};

use crate::{
    chain, no_routes,
    node::{Node, inside, ip, on_node, reaches, welcome},
};

fn record(node: &Node, sandbox: &str) -> Value {
    let bytes = fs::read(node.path(&format!("data/cni/results/{sandbox}.json"))).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

/// Files that host-local keeps an address in.
fn reserved(node: &Node, network: &str) -> usize {
    let entries = fs::read_dir(node.path("host-local").join(network))
        .into_iter()
        .flatten();
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("10."))
        .count()
}

#[test]
fn the_reference_bridge_sorts_before_ours_and_is_taken() {
    on_node(async |node: Node| {
        let network = node.configured().await;
        let bridge = json!({
            "type": "bridge", "bridge": "theirs0", "isDefaultGateway": true,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.98.0.0/24"}]], "dataDir": node.path("host-local")},
        });
        node.conflist(
            "05-theirs.conflist",
            &json!({"cniVersion": "1.0.0", "name": "theirs", "plugins": [bridge]}),
        );
        network.ready().await.unwrap();
        let (a, b) = (node.sandbox(&network, "a").await, node.sandbox(&network, "b").await);
        let status = network.add(&a).await.unwrap();
        let address = status.addresses[0];
        assert!(address.to_string().starts_with("10.98.0."), "{address}");
        assert_eq!(status.gateway.unwrap().to_string(), "10.98.0.1");
        // The host's end is the veth, not the bridge.
        assert!(
            node.ip(&format!("link show {}", status.host_interface))
                .contains("master theirs0")
        );
        network.add(&b).await.unwrap();
        network.check(&a).await.unwrap();
        assert!(reaches(&b, &a, address));
        // A new agent has the result and the configuration on disk, though that is another one by now.
        assert_eq!(record(&node, "a")["result"]["ips"][0]["gateway"], "10.98.0.1");
        fs::remove_file(node.path("net.d/05-theirs.conflist")).unwrap();
        let network = node.network();
        network.check(&a).await.unwrap();
        inside(&a.netns, || ip("route del default"));
        network.check(&a).await.unwrap_err();
        assert_eq!(reserved(&node, "theirs"), 2);
        network.del(&a).await.unwrap();
        network.delete_namespace("b").await.unwrap();
        network.del(&b).await.unwrap();
        assert_eq!(reserved(&node, "theirs"), 0);
        // A namespace's links go some time after its last user.
        let begin = Instant::now();
        while node.ip("link").contains("master theirs0") {
            assert!(begin.elapsed() < Duration::from_secs(60), "{}", node.ip("link"));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let c = node.sandbox(&network, "c").await;
        let status = network.add(&c).await.unwrap();
        assert!(status.addresses[0].to_string().starts_with("10.244.1."));
    });
}

/// Address management of others in our plugin, and others' plugins after ours: host ports, system controls, a bandwidth limit
/// and the firewall's rules for a pod, each seen where it acts and gone after DEL.
#[test]
fn four_reference_plugins_chain_after_ours() {
    on_node(async |node: Node| {
        let mut settings = node.settings();
        let mapping = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]);
        settings.capability_args.insert("portMappings".into(), mapping);
        let network = CniNetwork::new(settings);
        network
            .configure(&welcome(&["10.244.1.0/24"]), &no_routes(), Stale::Removed)
            .await
            .unwrap();
        let mut own = node.own_plugin();
        own["ipam"] = json!({
            "type": "host-local", "ranges": [[{"subnet": "10.98.0.0/24"}]], "dataDir": node.path("host-local"),
        });
        let rate = |key: &str| (format!("{key}Rate"), format!("{key}Burst"));
        let mut bandwidth = json!({"type": "bandwidth"});
        for (rate, burst) in [rate("ingress"), rate("egress")] {
            bandwidth[rate] = json!(80_000_000);
            bandwidth[burst] = json!(8_000_000);
        }
        let mut plugins = vec![
            own,
            json!({"type": "tuning", "sysctl": {"net.core.somaxconn": "321"}, "mtu": 1300}),
            bandwidth,
            json!({"type": "firewall", "backend": "iptables"}),
            json!({"type": "portmap", "capabilities": {"portMappings": true}, "snat": false}),
        ];
        chain(&node, "1.0.0", &plugins);
        network.ready().await.unwrap();
        let pod = node.sandbox(&network, "a").await;
        let address = network.add(&pod).await.unwrap().addresses[0];
        assert_eq!(address.to_string(), "10.98.0.2");
        let shown = inside(&pod.netns, || {
            (
                fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap(),
                ip("link show eth0"),
            )
        });
        assert_eq!(shown.0.trim(), "321");
        assert!(shown.1.contains("mtu 1300"), "{}", shown.1);
        let limited = |node: &Node| node.ip("-d link").contains("qdisc tbf");
        assert!(limited(&node));
        assert!(rules().contains("-s 10.98.0.2/32 -j ACCEPT"), "{}", rules());
        the_nodes_port_leads_to_the_pods(&node, &pod.netns, address);
        // The last plugin's result is kept, with what the others added to ours: the bandwidth plugin's interface.
        let kept = record(&node, "a");
        assert_eq!(kept["list"]["plugins"].as_array().unwrap().len(), 5);
        assert_eq!(kept["result"]["interfaces"].as_array().unwrap().len(), 4, "{kept}");
        network.del(&pod).await.unwrap();
        let left = rules();
        assert!(!left.contains("10.98.0.2") && !left.contains("8080"), "{left}");
        assert!(!limited(&node));
        assert_eq!((reserved(&node, "test"), node.veths()), (0, 0));

        // CHECK reaches each of them, but for portmap's, which wants IPv6 rules where there is no IPv6.
        plugins.pop();
        chain(&node, "1.0.0", &plugins);
        let pod = node.sandbox(&network, "b").await;
        network.add(&pod).await.unwrap();
        network.check(&pod).await.unwrap();
        let checked = async |plugin: &str| {
            let error = network.check(&pod).await.unwrap_err().to_string();
            assert!(error.contains(&format!("plugin {plugin} CHECK")), "{error}");
        };
        assert!(
            Command::new("iptables")
                .args(["-F", "CNI-FORWARD"])
                .status()
                .unwrap()
                .success()
        );
        checked("firewall").await;
        inside(&pod.netns, || fs::write("/proc/sys/net/core/somaxconn", "99").unwrap());
        checked("tuning").await;
        inside(&pod.netns, || ip("addr flush dev eth0"));
        checked("orlop-bridge").await;
        network.del(&pod).await.unwrap();
        assert_eq!((reserved(&node, "test"), node.veths()), (0, 0));
    });
}

fn the_nodes_port_leads_to_the_pods(node: &Node, netns: &Path, address: IpAddr) {
    let server = inside(netns, move || TcpListener::bind((address, 80)).unwrap());
    let accepted = std::thread::spawn(move || server.accept().unwrap());
    node.ip("addr add 192.168.99.1/32 dev lo");
    let outside = "192.168.99.1:8080".parse().unwrap();
    TcpStream::connect_timeout(&outside, Duration::from_secs(20)).unwrap();
    accepted.join().unwrap();
}

/// All rules of the namespace that the calling thread is in.
fn rules() -> String {
    let tables = ["filter", "nat"].map(|table| {
        let output = Command::new("iptables").args(["-t", table, "-S"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    });
    tables.concat()
}

#[test]
fn a_reference_plugin_that_fails_undoes_the_whole_chain() {
    on_node(async |node: Node| {
        let network = node.configured().await;
        let broken = json!({"type": "tuning", "sysctl": {"net.no.such": "1"}});
        chain(
            &node,
            "1.0.0",
            &[
                node.own_plugin(),
                json!({"type": "firewall", "backend": "iptables"}),
                broken,
            ],
        );
        let pod = node.sandbox(&network, "a").await;
        let error = network.add(&pod).await.unwrap_err().to_string();
        assert!(
            error.contains("plugin tuning ADD") && error.contains("no/such"),
            "{error}"
        );
        assert_eq!((node.leases(), node.veths()), (0, 0));
        // The firewall's DEL finds its rules by the addresses of the result that the ADD had come to.
        assert!(!rules().contains("10.244.1."), "{}", rules());
    });
}

#[test]
fn an_add_that_was_cut_off_is_undone_by_how_far_it_came() {
    on_node(async |node: Node| {
        let network = node.configured().await;
        node.script("slow", r#"[ "$CNI_COMMAND" = DEL ] || sleep 60"#);
        let firewall = json!({"type": "firewall", "backend": "iptables"});
        chain(&node, "1.0.0", &[node.own_plugin(), firewall, json!({"type": "slow"})]);
        let pod = node.sandbox(&network, "a").await;
        // As a killed agent does: the call ends in the middle.
        let cut_off = tokio::time::timeout(Duration::from_secs(3), network.add(&pod)).await;
        cut_off.unwrap_err();
        assert_eq!(node.calls(), ["ADD slow"]);
        assert!(rules().contains("10.244.1."), "{}", rules());
        // The next agent, whatever the configuration is by then.
        fs::remove_file(node.path("net.d/00-test.conflist")).unwrap();
        let network = node.network();
        network.gc(&BTreeSet::new()).await.unwrap();
        assert_eq!(node.calls(), ["ADD slow", "DEL slow"]);
        assert!(!rules().contains("10.244.1."), "{}", rules());
        assert_eq!((node.leases(), node.veths()), (0, 0));
        assert_eq!(network.list().await.unwrap(), []);
    });
}

#[test]
fn a_plugin_that_prints_without_end_is_stopped_and_rolled_back() {
    on_node(async |node: Node| {
        let network = node.configured().await;
        node.script("talks", "[ $CNI_COMMAND = DEL ] && exit 0; exec yes garbage");
        chain(&node, "1.0.0", &[node.own_plugin(), json!({"type": "talks"})]);
        let pod = node.sandbox(&network, "a").await;
        let error = network.add(&pod).await.unwrap_err().to_string();
        assert!(error.contains("plugin talks ADD: printed more than"), "{error}");
        assert_eq!(node.calls(), ["ADD talks", "DEL talks"]);
        assert_eq!((node.leases(), node.veths()), (0, 0));
    });
}

#[test]
fn configurations_that_others_could_have_written_are_refused() {
    on_node(async |node: Node| {
        let network = node.network();
        node.script("evil", "[ $CNI_COMMAND = DEL ]");
        chain(&node, "1.0.0", &[json!({"type": "evil"})]);
        let file = node.path("net.d/00-test.conflist");
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        mode(&file, 0o666);
        let why = network.ready().await.unwrap_err();
        assert!(why.contains("can be written by everybody (mode 666)"), "{why}");
        let pod = node.sandbox(&network, "a").await;
        assert!(network.add(&pod).await.unwrap_err().to_string().contains("everybody"));
        // Our own is behind it, and is taken.
        network
            .configure(&welcome(&["10.244.1.0/24"]), &no_routes(), Stale::Removed)
            .await
            .unwrap();
        network.ready().await.unwrap();
        network.add(&pod).await.unwrap();
        network.del(&pod).await.unwrap();
        // A link to a place where everybody can put another file.
        let elsewhere = node.path("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        fs::rename(&file, elsewhere.join("test.conflist")).unwrap();
        mode(&elsewhere.join("test.conflist"), 0o644);
        symlink(elsewhere.join("test.conflist"), &file).unwrap();
        mode(&elsewhere, 0o777);
        network.add(&pod).await.unwrap();
        network.del(&pod).await.unwrap();
        assert!(node.calls().is_empty(), "{:?}", node.calls());
        // Where nobody else can, a link is as good as a file.
        mode(&elsewhere, 0o755);
        network.add(&pod).await.unwrap_err();
        assert_eq!(node.calls(), ["ADD evil", "DEL evil"]);
        fs::remove_file(&file).unwrap();
        // A link to nowhere, and a FIFO that nobody writes to, hold nothing up.
        symlink("/nowhere", &file).unwrap();
        let fifo = node.path("net.d/01-fifo.conflist");
        assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        network.add(&pod).await.unwrap();
    });
}

#[test]
fn a_half_written_file_does_not_take_the_network_down() {
    on_node(async |node: Node| {
        let network = node.configured().await;
        node.script(
            "late",
            r#"[ "$CNI_COMMAND" = ADD ] && echo "$IN" | jq -c .prevResult; exit 0"#,
        );
        let plugins = json!([node.own_plugin(), {"type": "late"}]);
        let text = json!({"cniVersion": "1.0.0", "name": "late", "plugins": plugins}).to_string();
        let path = node.path("net.d/05-late.conflist");
        let mut expected = Vec::new();
        // Not whole yet: the one behind it is used. Whole, then being written again: its last good content is.
        for (index, length, late) in [
            (0, 0, false),
            (1, text.len() / 2, false),
            (2, text.len(), true),
            (3, 0, true),
            (4, text.len() - 1, true),
        ] {
            fs::write(&path, &text[..length]).unwrap();
            network.ready().await.unwrap();
            let pod = node.sandbox(&network, &format!("p{index}")).await;
            network.add(&pod).await.unwrap();
            if late {
                expected.push("ADD late");
            }
            assert_eq!(node.calls(), expected, "{length}");
        }
        assert_eq!(node.veths(), 5);
    });
}
