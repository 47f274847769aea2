//! The agent's CNI runtime with real plugins in real namespaces. Needs root.

use std::{
    collections::BTreeSet,
    fs,
    net::UdpSocket,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use node::{Node, inside, ip, on_node, reaches, welcome};
use orlop_node::desired::Routes;
use orlop_node::network::{CniNetwork, Network, NetworkError, Settings, Stale};
use serde_json::{Value, json};

mod interop;
mod kernel;
mod node;

const RESULT: &str = r#"echo '{"cniVersion":"1.0.0","interfaces":[{"name":"v0"},{"name":"eth0","sandbox":"'$CNI_NETNS'"}],
    "ips":[{"address":"10.9.0.2/24","interface":1}],"dns":{}}'"#;
/// As a plugin of a chain: what came before goes on, and stands in a file.
const PASS: &str = r#"[ "$CNI_COMMAND" = ADD ] && echo "$IN" | jq -c .prevResult; exit 0"#;

fn no_routes() -> Routes {
    Routes::new()
}

fn chain(node: &Node, version: &str, plugins: &[Value]) {
    node.conflist(
        "00-test.conflist",
        &json!({"cniVersion": version, "name": "test", "plugins": plugins}),
    );
}

#[test]
fn pods_are_wired_checked_and_taken_down() {
    on_node(async |node: Node| {
        let network = node.network();
        assert!(network.ready().await.unwrap_err().contains("no network configuration"));
        network
            .configure(&welcome(&["10.244.1.0/24", "fd44::/64"]), &no_routes(), Stale::Removed)
            .await
            .unwrap();
        network.ready().await.unwrap();
        let (a, b) = (node.sandbox(&network, "a").await, node.sandbox(&network, "b").await);
        let status = network.add(&a).await.unwrap();
        assert_eq!(status.addresses.len(), 2);
        assert_eq!(status.gateway.unwrap().to_string(), "10.244.1.1");
        node.ip(&format!("link show {}", status.host_interface));
        network.add(&b).await.unwrap();
        network.check(&a).await.unwrap();

        assert!(reaches(&b, &a, status.addresses[0]));
        // The pod's own loopback is up.
        inside(&a.netns, || {
            UdpSocket::bind("127.0.0.1:0")
                .unwrap()
                .send_to(b"x", "127.0.0.1:9")
                .unwrap()
        });
        assert_eq!(
            fs::read_to_string("/proc/thread-self/net/dev")
                .unwrap()
                .matches("orlop0")
                .count(),
            1
        );

        inside(&a.netns, || ip("addr flush dev eth0"));
        assert!(matches!(
            network.check(&a).await,
            Err(NetworkError::Plugin { code: 103, .. })
        ));
        for pod in [&a, &b] {
            network.del(pod).await.unwrap();
            network.delete_namespace(&pod.sandbox_id).await.unwrap();
            network.del(pod).await.unwrap();
            network.delete_namespace(&pod.sandbox_id).await.unwrap();
        }
        assert_eq!((node.leases(), node.veths()), (0, 0));
        assert_eq!(network.list().await.unwrap(), []);
        assert_eq!(fs::read_dir(node.path("data/cni/results")).unwrap().count(), 0);
    });
}

#[test]
fn a_new_agent_finds_what_the_old_one_made() {
    on_node(async |node: Node| {
        let old = node.network();
        old.configure(&welcome(&["10.244.1.0/24"]), &no_routes(), Stale::Removed)
            .await
            .unwrap();
        let pod = node.sandbox(&old, "a").await;
        let status = old.add(&pod).await.unwrap();
        drop(old);
        let new = node.network();
        let found = new.list().await.unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].pod.as_ref(), Some(&pod));
        assert_eq!(found[0].status.as_ref(), Some(&status));
        assert_eq!(found[0].netns.as_ref(), Some(&pod.netns));
        assert_eq!(new.create_namespace("a").await.unwrap(), pod.netns);
        // The same answer, and nothing is added twice.
        assert_eq!(new.add(&pod).await.unwrap(), status);
        new.check(&pod).await.unwrap();
        // DEL goes by what the ADD was made with, though the configuration is another now.
        new.configure(&welcome(&["10.244.9.0/24"]), &no_routes(), Stale::Removed)
            .await
            .unwrap();
        new.del(&pod).await.unwrap();
        assert_eq!((node.leases(), node.veths()), (0, 0));
    });
}

#[test]
fn after_a_reboot_everything_is_made_anew() {
    on_node(async |node: Node| {
        let network = node.configured().await;
        let pods = [node.sandbox(&network, "a").await, node.sandbox(&network, "b").await];
        let (before_a, before_b) = (
            network.add(&pods[0]).await.unwrap().addresses,
            network.add(&pods[1]).await.unwrap().addresses,
        );
        // A reboot: the namespaces, the bridge, the leases and the boot id go; the cached results stay.
        for pod in &pods {
            network.delete_namespace(&pod.sandbox_id).await.unwrap();
        }
        node.ip("link del orlop0");
        fs::remove_dir_all(node.path("run/ipam")).unwrap();
        fs::write(node.path("boot_id"), "another\n").unwrap();
        // An agent that dies after it has cleared what the reboot left.
        node.network().gc(&BTreeSet::new()).await.unwrap();
        assert_eq!(node.leases(), 0);
        // Nobody can be told of other addresses, so the pods get those that they had, in whatever order they come.
        let network = node.network();
        let again = |name: &str, uid: &str| {
            let (network, name, uid) = (&network, name.to_owned(), uid.to_owned());
            let node = &node;
            async move {
                let mut pod = node.sandbox(network, &name).await;
                pod.uid = uid;
                let status = network.add(&pod).await.unwrap();
                network.check(&pod).await.unwrap();
                (pod, status.addresses)
            }
        };
        let (b, after_b) = again("b2", "uid-b").await;
        let (_, after_a) = again("a2", "uid-a").await;
        assert_eq!((after_a, &after_b), (before_a, &before_b));
        assert_eq!((node.leases(), node.veths()), (2, 2));
        // The same for a sandbox that is made anew within a boot; unless somebody else has the address by then.
        network.del(&b).await.unwrap();
        network.delete_namespace("b2").await.unwrap();
        let (b, after_b) = again("b3", "uid-b").await;
        assert_eq!(after_b, before_b);
        network.del(&b).await.unwrap();
        network.delete_namespace("b3").await.unwrap();
        let mut thief = node.sandbox(&network, "c").await;
        thief.uid = "uid-b".to_owned();
        network.add(&thief).await.unwrap();
        fs::create_dir_all(node.path("data/cni/addresses")).unwrap();
        fs::write(
            node.path("data/cni/addresses/uid-d.json"),
            format!("[\"{}/24\"]", before_b[0]),
        )
        .unwrap();
        let (_, other) = again("d", "uid-d").await;
        assert_ne!(other, before_b);
        assert_eq!((node.leases(), node.veths()), (3, 3));
        // A pod that is no more leaves nothing.
        network.del(&thief).await.unwrap();
        network.forget("uid-b");
        assert_eq!(fs::read_dir(node.path("data/cni/addresses")).unwrap().count(), 0);
    });
}

#[test]
fn an_add_that_was_cut_off_is_cleared_and_done_again() {
    on_node(async |node: Node| {
        let network = node.configured().await;
        node.script("slow", r#"[ "$CNI_COMMAND" = DEL ] || sleep 60"#);
        chain(&node, "1.1.0", &[node.own_plugin(), json!({"type": "slow"})]);
        let pod = node.sandbox(&network, "a").await;
        let started = Instant::now();
        // As a killed agent does: the call ends in the middle.
        tokio::time::timeout(Duration::from_secs(2), network.add(&pod))
            .await
            .unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(10));
        assert_eq!(node.veths(), 1);
        let new = node.network();
        let found = new.list().await.unwrap();
        assert_eq!((found[0].pod.as_ref(), found[0].status.as_ref()), (Some(&pod), None));
        fs::remove_file(node.path("net.d/00-test.conflist")).unwrap();
        new.add(&pod).await.unwrap();
        assert_eq!(node.calls(), ["ADD slow", "DEL slow"]);
        assert_eq!((node.leases(), node.veths()), (1, 1));
    });
}

#[test]
fn a_plugin_that_hangs_is_killed_with_its_children_and_rolled_back() {
    on_node(async |node: Node| {
        let network = CniNetwork::new(Settings {
            plugin_timeout: Duration::from_millis(700),
            ..node.settings()
        });
        network
            .configure(&welcome(&["10.244.1.0/24"]), &no_routes(), Stale::Removed)
            .await
            .unwrap();
        let pids = node.path("pids");
        let hang = format!(
            "[ $CNI_COMMAND = DEL ] && exit 0; sleep 300 & echo $! >{}; wait",
            pids.display()
        );
        node.script("hang", &hang);
        chain(&node, "1.1.0", &[node.own_plugin(), json!({"type": "hang"})]);
        let pod = node.sandbox(&network, "a").await;
        let error = network.add(&pod).await.unwrap_err().to_string();
        assert!(error.contains("plugin hang ADD: did not end within"), "{error}");
        assert_eq!((node.leases(), node.veths()), (0, 0));
        let child = fs::read_to_string(&pids).unwrap();
        let stat = Path::new("/proc").join(child.trim()).join("stat");
        let gone = || fs::read_to_string(&stat).map_or(true, |s| s.contains(") Z "));
        for _ in 0..100 {
            if gone() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(gone(), "{stat:?} still runs");
        // A child that leaves with stdout in its hands does not hold the call either.
        node.script("hang", "sleep 300 & exit 0");
        assert!(network.add(&pod).await.is_err());
    });
}

#[test]
fn garbage_from_a_plugin_is_an_error_and_rolled_back() {
    on_node(async |node: Node| {
        let network = node.network();
        let pod = node.sandbox(&network, "a").await;
        let bodies = [
            ("echo garbage", "not JSON"),
            ("echo '[]'", "no result"),
            ("true", "no result"),
            ("echo '{\"cniVersion\":\"1.0.0\"}'", "no address"),
            ("echo '{\"ips\":[{\"address\":\"10.0.0.1\"}]}'", "not CNI's"),
            ("head -c 5000000 /dev/zero | tr '\\0' x", "more than"),
            ("echo moan >&2; exit 3", "moan"),
            ("kill -9 $$", "signal"),
            ("echo '{\"code\":11,\"msg\":\"later\"}'; exit 1", "code 11"),
        ];
        chain(&node, "1.0.0", &[json!({"type": "odd"})]);
        for (body, expected) in bodies {
            node.script("odd", &format!("[ $CNI_COMMAND = DEL ] && exit 0; {body}"));
            let error = network.add(&pod).await.unwrap_err().to_string();
            assert!(error.contains(expected), "{body}: {error}");
            assert_eq!(node.calls().last().unwrap(), "DEL odd", "{body}");
            assert_eq!(network.list().await.unwrap()[0].pod, None);
        }
        chain(&node, "1.0.0", &[json!({"type": "absent"})]);
        assert!(
            network
                .add(&pod)
                .await
                .unwrap_err()
                .to_string()
                .contains("no such program")
        );
        assert!(network.ready().await.unwrap_err().contains("absent"));
    });
}

#[test]
fn a_chain_runs_forth_and_back_with_the_results() {
    on_node(async |node: Node| {
        let mut settings = node.settings();
        settings
            .capability_args
            .insert("portMappings".into(), json!([{"hostPort": 80}]));
        let network = CniNetwork::new(settings);
        let keep = format!(
            "echo \"$IN\" >{}/$CNI_COMMAND.$(basename $0)\nenv >{0}/env\n",
            node.path("").display()
        );
        node.script("first", &format!("{keep}[ $CNI_COMMAND = ADD ] && {RESULT}; exit 0"));
        node.script("second", &format!("{keep}{PASS}"));
        let second = json!({"type": "second", "capabilities": {"portMappings": true, "bandwidth": true}});
        chain(&node, "1.0.0", &[json!({"type": "first"}), second]);
        let pod = node.sandbox(&network, "a").await;
        let status = network.add(&pod).await.unwrap();
        assert_eq!(
            (&*status.host_interface, status.addresses[0].to_string()),
            ("v0", "10.9.0.2".to_owned())
        );
        network.check(&pod).await.unwrap();
        network.del(&pod).await.unwrap();
        let order = [
            "ADD first",
            "ADD second",
            "CHECK first",
            "CHECK second",
            "DEL second",
            "DEL first",
        ];
        assert_eq!(node.calls(), order);
        let given = |name: &str| -> Value { serde_json::from_slice(&fs::read(node.path(name)).unwrap()).unwrap() };
        let added = given("ADD.second");
        assert_eq!(
            (&added["name"], &added["cniVersion"]),
            (&json!("test"), &json!("1.0.0"))
        );
        assert_eq!(added["runtimeConfig"], json!({"portMappings": [{"hostPort": 80}]}));
        assert_eq!(added.get("capabilities"), None);
        assert_eq!(added["prevResult"]["ips"][0]["address"], "10.9.0.2/24");
        assert_eq!(given("ADD.first").get("prevResult"), None);
        for name in ["CHECK.first", "DEL.first", "DEL.second"] {
            assert_eq!(given(name)["prevResult"], added["prevResult"], "{name}");
        }
        let env = fs::read_to_string(node.path("env")).unwrap();
        let netns = pod.netns.display();
        for expected in [
            "CNI_CONTAINERID=a\n",
            "CNI_IFNAME=eth0\n",
            &format!("CNI_NETNS={netns}\n"),
            "K8S_POD_NAME=pod-a;",
            "CNI_PATH=/",
        ] {
            assert!(env.contains(expected), "{expected}: {env}");
        }
    });
}

#[test]
fn a_failed_delete_is_remembered() {
    on_node(async |node: Node| {
        let network = node.network();
        node.script("first", &format!("[ $CNI_COMMAND = ADD ] && {RESULT}; exit 0"));
        node.script("second", PASS);
        chain(&node, "1.0.0", &[json!({"type": "first"}), json!({"type": "second"})]);
        let pod = node.sandbox(&network, "a").await;
        network.add(&pod).await.unwrap();
        node.script("second", "exit 1");
        network.del(&pod).await.unwrap_err();
        // The first one's DEL ran all the same, and all of it runs again.
        assert_eq!(node.calls().last().unwrap(), "DEL first");
        node.script("second", PASS);
        network.del(&pod).await.unwrap();
        assert_eq!(network.list().await.unwrap()[0].pod, None);
    });
}

#[test]
fn what_nobody_wants_is_collected() {
    on_node(async |node: Node| {
        let network = node.configured().await;
        let kept = node.sandbox(&network, "kept").await;
        network.add(&kept).await.unwrap();
        network.add(&node.sandbox(&network, "lost").await).await.unwrap();
        node.sandbox(&network, "pinned-only").await;
        let hidden = node.sandbox(&network, "hidden").await;
        network.add(&hidden).await.unwrap();
        // As if the disk had lost it: only the plugin can know.
        fs::remove_file(node.path("data/cni/results/hidden.json")).unwrap();
        network.delete_namespace("hidden").await.unwrap();
        network.gc(&BTreeSet::from(["kept".to_owned()])).await.unwrap();
        let left: Vec<String> = network
            .list()
            .await
            .unwrap()
            .into_iter()
            .map(|a| a.sandbox_id)
            .collect();
        assert_eq!(left, ["kept"]);
        assert_eq!((node.leases(), node.veths()), (1, 1));
        network.check(&kept).await.unwrap();
    });
}

#[test]
fn many_at_once() {
    on_node(async |node: Node| {
        let network = Arc::new(node.network());
        network
            .configure(&welcome(&["10.244.1.0/24"]), &no_routes(), Stale::Removed)
            .await
            .unwrap();
        let mut pods = Vec::new();
        for index in 0..20 {
            pods.push(node.sandbox(&network, &format!("p{index}")).await);
        }
        // Each is asked for twice: one ADD, one answer.
        let calls = pods.iter().flat_map(|pod| [network.add(pod), network.add(pod)]);
        let all: Vec<_> = futures::future::join_all(calls).await;
        let addresses: BTreeSet<_> = all.into_iter().map(|status| status.unwrap().addresses[0]).collect();
        assert_eq!((addresses.len(), node.leases()), (20, 20));
        for result in futures::future::join_all(pods.iter().map(|pod| network.del(pod))).await {
            result.unwrap();
        }
        assert_eq!((node.leases(), node.veths()), (0, 0));
    });
}

#[test]
fn a_result_that_cannot_be_read_is_cleared_and_stops_no_other() {
    on_node(async |node: Node| {
        let network = node.configured().await;
        for (id, garbage) in [("a", ""), ("b", "{\"pod\":"), ("c", "[]")] {
            let pod = node.sandbox(&network, id).await;
            network.add(&pod).await.unwrap();
            fs::write(node.path(&format!("data/cni/results/{id}.json")), garbage).unwrap();
        }
        let pod = node.sandbox(&network, "a").await;
        let found = network.list().await.unwrap();
        assert_eq!(found.len(), 3);
        assert!(found.iter().all(|attachment| attachment.pod.is_none()), "{found:?}");
        network.add(&pod).await.unwrap();
        network.check(&pod).await.unwrap();
        network.gc(&BTreeSet::from(["a".to_owned()])).await.unwrap();
        assert_eq!((node.leases(), node.veths()), (1, 1));
    });
}
