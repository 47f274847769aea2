//! Address management by another plugin: what goes out and comes back are the cni-plugin crate's types.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    addresses,
    node::{Answer, Node, Pod, inside, ip, on_node, start},
    reaches, with_result,
};

fn config(node: &Node, plugin: &str) -> Value {
    json!({
        "cniVersion": "1.0.0", "name": "net", "type": "orlop-bridge", "bridge": "orlop0", "isDefaultGateway": true,
        "ipam": {
            "type": plugin, "ranges": [[{"subnet": "10.97.0.0/24"}]], "routes": [{"dst": "10.50.0.0/16"}],
            "dataDir": node.path("host-local"),
        },
    })
}

fn script(node: &Node, name: &str, body: &str) {
    fs::create_dir_all(node.path("bin")).unwrap();
    let path = node.path("bin").join(name);
    fs::write(
        &path,
        format!(
            "#!/bin/sh\ncat >/dev/null\necho $CNI_COMMAND >>{}\n{body}\n",
            node.path("calls").display()
        ),
    )
    .unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// With the node's own scripts as `CNI_PATH`.
fn call(node: &Node, verb: &str, pod: &Pod, config: &Value) -> Answer {
    let (netns, path) = (pod.netns.to_str().unwrap(), node.path("bin"));
    let env = [
        ("CNI_COMMAND", verb),
        ("CNI_CONTAINERID", &pod.id),
        ("CNI_IFNAME", "eth0"),
        ("CNI_NETNS", netns),
        ("CNI_PATH", path.to_str().unwrap()),
        ("PATH", "/usr/bin:/bin"),
    ];
    start(
        Path::new(env!("CARGO_BIN_EXE_orlop-bridge")),
        &env,
        config.to_string().as_bytes(),
    )
    .end()
}

#[test]
fn host_local_gives_addresses() {
    on_node(|node| {
        let config = config(node, "host-local");
        let (a, b) = (node.pod("a"), node.pod("b"));
        node.call("ADD", &a, &config).expect();
        let result = node.call("ADD", &b, &config).expect();
        assert_eq!(result["ips"][0]["gateway"], "10.97.0.1");
        assert!(reaches(&a, &b, addresses(&result)[0]));
        node.call("CHECK", &b, &with_result(&config, &result)).expect();
        let reserved = || fs::read_dir(node.path("host-local/net")).unwrap().flatten().count();
        let full = reserved();
        // CHECK asks it too: here it has forgotten what it gave.
        let note = node.path("host-local/net").join(addresses(&result)[0].to_string());
        let kept = fs::read(&note).unwrap();
        fs::remove_file(&note).unwrap();
        let answer = node.call("CHECK", &b, &with_result(&config, &result));
        assert!(answer.stdout.contains("host-local"), "{answer:?}");
        assert!(!answer.success);
        fs::write(&note, kept).unwrap();
        node.call("DEL", &a, &config).expect();
        node.call("DEL", &b, &config).expect();
        assert_eq!(reserved(), full - 2);
        assert_eq!(node.veths().len(), 0);
    });
}

#[test]
fn static_gives_the_addresses_that_are_written() {
    on_node(|node| {
        let config = |address: &str| {
            let mut config = config(node, "static");
            config["ipam"] = json!({
                "type": "static", "addresses": [{"address": address, "gateway": "10.97.0.1"}], "routes": [{"dst": "10.50.0.0/16"}],
            });
            config
        };
        let (a, b) = (node.pod("a"), node.pod("b"));
        node.call("ADD", &a, &config("10.97.0.7/24")).expect();
        let result = node.call("ADD", &b, &config("10.97.0.8/24")).expect();
        assert_eq!(result["ips"][0]["address"], "10.97.0.8/24");
        assert!(reaches(&a, &b, addresses(&result)[0]));
        assert!(inside(&b, || ip("route")).contains("10.50.0.0/16 via 10.97.0.1"));
        node.call("CHECK", &b, &with_result(&config("10.97.0.8/24"), &result))
            .expect();
        inside(&b, || ip("addr flush dev eth0"));
        let checked = with_result(&config("10.97.0.8/24"), &result);
        assert_eq!(node.call("CHECK", &b, &checked).code(), 103);
        node.call("DEL", &a, &config("10.97.0.7/24")).expect();
        node.call("DEL", &b, &config("10.97.0.8/24")).expect();
        assert_eq!(node.veths().len(), 0);
    });
}

#[test]
fn fifty_at_once_get_fifty_addresses_of_host_local() {
    on_node(|node| {
        let config = config(node, "host-local");
        let pods: Vec<Pod> = (0..50).map(|i| node.pod(&format!("p{i}"))).collect();
        let calls: Vec<_> = pods.iter().map(|pod| node.start("ADD", pod, &config)).collect();
        let results: Vec<Value> = calls.into_iter().map(|call| call.end().expect()).collect();
        let distinct: BTreeSet<_> = results.iter().flat_map(addresses).collect();
        assert_eq!(distinct.len(), 50);
        let calls: Vec<_> = pods.iter().map(|pod| node.start("DEL", pod, &config)).collect();
        for call in calls {
            call.end().expect();
        }
        assert_eq!(node.veths().len(), 0);
    });
}

/// Processes with that word in their command line.
fn running(word: &str) -> usize {
    let commands = fs::read_dir("/proc").unwrap().flatten();
    commands
        .filter_map(|dir| fs::read(dir.path().join("cmdline")).ok())
        .filter(|line| line.split(|byte| *byte == 0).any(|one| one == word.as_bytes()))
        .count()
}

#[test]
fn a_delegate_that_hangs_is_killed_with_its_children_and_rolled_back() {
    on_node(|node| {
        let pod = node.pod("a");
        // A number that no other test sleeps for.
        let seconds = format!("3{}", std::process::id());
        let mut hangs = config(node, "hangs");
        hangs["ipamTimeoutSeconds"] = json!(1);
        script(
            node,
            "hangs",
            &format!("[ $CNI_COMMAND = DEL ] && exit 0; sleep {seconds} & wait"),
        );
        let answer = call(node, "ADD", &pod, &hangs);
        assert!(
            answer.stdout.contains("hangs") && answer.stdout.contains("did not end within 1 s"),
            "{answer:?}"
        );
        assert_eq!(answer.code(), 104);
        assert_eq!(fs::read_to_string(node.path("calls")).unwrap(), "ADD\nDEL\n");
        assert_eq!(node.veths().len(), 0);
        for verb in ["CHECK", "DEL"] {
            script(node, "hangs", &format!("sleep {seconds} & wait"));
            let checked = with_result(&hangs, &json!({"cniVersion": "1.0.0", "ips": []}));
            assert_eq!(call(node, verb, &pod, &checked).code(), 104, "{verb}");
        }
        // A child that leaves with stdout in its hands is no better.
        script(node, "hangs", &format!("sleep {seconds} & exit 0"));
        assert_eq!(call(node, "ADD", &pod, &hangs).code(), 104);
        let begin = Instant::now();
        while running(&seconds) > 0 {
            assert!(begin.elapsed() < Duration::from_secs(60), "children live on");
            std::thread::sleep(Duration::from_millis(20));
        }
    });
}

#[test]
fn a_delegate_that_prints_without_end_is_stopped() {
    on_node(|node| {
        let pod = node.pod("a");
        script(node, "talks", "[ $CNI_COMMAND = DEL ] && exit 0; exec yes garbage");
        let mut talks = config(node, "talks");
        // It is not this that ends it.
        talks["ipamTimeoutSeconds"] = json!(600);
        let answer = call(node, "ADD", &pod, &talks);
        assert!(answer.stdout.contains("printed more than"), "{answer:?}");
        assert_eq!(answer.code(), 104);
        assert_eq!(fs::read_to_string(node.path("calls")).unwrap(), "ADD\nDEL\n");
        assert_eq!(node.veths().len(), 0);
    });
}

#[test]
fn a_delegate_ends_with_us() {
    on_node(|node| {
        let pod = node.pod("a");
        let pid = node.path("pid");
        script(
            node,
            "waits",
            &format!("echo $$ >{0}.new; mv {0}.new {0}; exec sleep 600", pid.display()),
        );
        let (netns, path) = (pod.netns.to_str().unwrap(), node.path("bin"));
        let env = [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "a"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", netns),
            ("CNI_PATH", path.to_str().unwrap()),
            ("PATH", "/usr/bin:/bin"),
        ];
        let config = config(node, "waits").to_string();
        let mut ours = start(Path::new(env!("CARGO_BIN_EXE_orlop-bridge")), &env, config.as_bytes());
        let begin = Instant::now();
        let until = |what: &str, done: &dyn Fn() -> bool| {
            while !done() {
                assert!(begin.elapsed() < Duration::from_secs(60), "{what}");
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        until("the delegate was started", &|| pid.exists());
        let stat = format!("/proc/{}/stat", fs::read_to_string(&pid).unwrap().trim());
        // As a runtime does that has lost its patience.
        ours.0.kill().unwrap();
        ours.0.wait().unwrap();
        until("the delegate ended", &|| {
            fs::read_to_string(&stat).map_or(true, |line| line.contains(") Z "))
        });
    });
}

#[test]
fn a_failed_add_returns_the_delegated_address() {
    on_node(|node| {
        let mut config = config(node, "host-local");
        config["ipam"]["routes"] = json!([{"dst": "10.50.0.0/16", "gw": "10.60.0.1"}]);
        assert_eq!(node.call("ADD", &node.pod("a"), &config).code(), 100);
        let names = fs::read_dir(node.path("host-local/net")).unwrap().flatten();
        let left = names
            .filter(|e| e.file_name().to_string_lossy().starts_with("10.97"))
            .count();
        assert_eq!((left, node.veths().len()), (0, 0));
    });
}

#[test]
fn a_delegates_error_is_handed_on() {
    on_node(|node| {
        let pod = node.pod("a");
        script(
            node,
            "sulky",
            r#"echo '{"cniVersion":"1.0.0","code":77,"msg":"no","details":"why"}'; exit 1"#,
        );
        let answer = call(node, "ADD", &pod, &config(node, "sulky"));
        assert!(answer.stdout.contains("sulky: no"), "{answer:?}");
        assert_eq!(answer.code(), 77);
        // A failed ADD of the delegate is followed by its DEL.
        assert_eq!(fs::read_to_string(node.path("calls")).unwrap(), "ADD\nDEL\n");
        assert_eq!(call(node, "DEL", &pod, &config(node, "sulky")).code(), 77);

        script(node, "mad", "echo garbage");
        assert_eq!(call(node, "ADD", &pod, &config(node, "mad")).code(), 104);
        script(node, "mute", "exit 0");
        assert_eq!(call(node, "ADD", &pod, &config(node, "mute")).code(), 104);
        call(node, "DEL", &pod, &config(node, "mute")).expect();
        // The crate's types refuse what is no address before it is used, and a configuration before a plugin sees it.
        script(
            node,
            "wild",
            r#"echo '{"cniVersion":"1.0.0","ips":[{"address":"10.97.0.300/24"}]}'"#,
        );
        assert_eq!(call(node, "ADD", &pod, &config(node, "wild")).code(), 104);
        std::fs::remove_file(node.path("calls")).unwrap();
        let mut odd = config(node, "mute");
        odd["args"] = json!({"cni": {}, "x": 1});
        odd["dns"] = json!({"nameservers": ["not an address"]});
        assert_eq!(call(node, "ADD", &pod, &odd).code(), 6);
        assert!(!node.path("calls").exists());
        assert_eq!(call(node, "ADD", &pod, &config(node, "absent")).code(), 5);
        assert_eq!(call(node, "DEL", &pod, &config(node, "absent")).code(), 5);
        assert_eq!(call(node, "ADD", &pod, &config(node, "../mute")).code(), 7);
        assert_eq!(node.veths().len(), 0);
    });
}

#[test]
fn status_and_gc_reach_the_delegate() {
    on_node(|node| {
        script(node, "fine", "exit 0");
        let mut config = config(node, "fine");
        config["cniVersion"] = json!("1.1.0");
        config["cni.dev/valid-attachments"] = json!([]);
        call(node, "STATUS", &node.pod("a"), &config).expect();
        call(node, "GC", &node.pod("b"), &config).expect();
        assert_eq!(fs::read_to_string(node.path("calls")).unwrap(), "STATUS\nGC\n");
        script(
            node,
            "fine",
            r#"echo '{"cniVersion":"1.1.0","code":51,"msg":"limited"}'; exit 1"#,
        );
        assert_eq!(call(node, "STATUS", &node.pod("c"), &config).code(), 51);
    });
}

#[test]
fn a_gateway_that_is_not_named_is_the_subnets_first_address() {
    on_node(|node| {
        let reply = r#"{"cniVersion":"1.0.0","ips":[{"address":"10.97.0.9/24"},{"address":"fd97::9/64"}]}"#;
        script(
            node,
            "plain",
            &format!("[ $CNI_COMMAND = ADD ] && echo '{reply}'; exit 0"),
        );
        let result = call(node, "ADD", &node.pod("a"), &config(node, "plain")).expect();
        assert_eq!(result["ips"][0]["gateway"], "10.97.0.1");
        assert_eq!(result["ips"][1]["gateway"], "fd97::1");
        let shown = node.ip("-br addr show orlop0");
        assert!(
            shown.contains("10.97.0.1/24") && shown.contains("fd97::1/64"),
            "{shown}"
        );
    });
}
