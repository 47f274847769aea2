//! Address management by another plugin: what goes out and comes back are the cni-plugin crate's types.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use serde_json::{Value, json};

use crate::{
    addresses,
    node::{Answer, Node, Pod, on_node, start},
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
        node.call("DEL", &a, &config).expect();
        node.call("DEL", &b, &config).expect();
        assert_eq!(reserved(), full - 2);
        assert_eq!(node.veths().len(), 0);
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
