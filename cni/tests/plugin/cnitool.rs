//! Under another runtime: the CNI project's own `cnitool`, which `cargo xtask setup` installs.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};

use crate::{
    addresses,
    node::{Node, Pod, inside, ip, on_node},
    reaches,
};

/// `cnitool VERB net NAMESPACE`, which looks for the network in the node's files.
fn cnitool(node: &Node, verb: &str, pod: &Pod) -> Output {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.orlop/tools/bin/cnitool");
    let program = if own.is_file() { own } else { "cnitool".into() };
    let plugin = PathBuf::from(env!("CARGO_BIN_EXE_orlop-bridge"));
    Command::new(&program)
        .args([verb, "net"])
        .arg(&pod.netns)
        .env("NETCONFPATH", node.path("net.d"))
        .env("CNI_PATH", plugin.parent().unwrap())
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}: run cargo xtask setup", program.display()))
}

fn succeeds(node: &Node, verb: &str, pod: &Pod) -> String {
    let output = cnitool(node, verb, pod);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "cnitool {verb}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

fn fails(node: &Node, verb: &str, pod: &Pod) -> String {
    let output = cnitool(node, verb, pod);
    assert!(!output.status.success(), "cnitool {verb} succeeded");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The network is ours alone, and cnitool's cache is this test's.
fn configure(node: &Node, version: &str) {
    let cache = node.path("lib");
    fs::create_dir_all(&cache).unwrap();
    mount(Some(&cache), "/var/lib", None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    write(node, version, json!({}));
}

fn write(node: &Node, version: &str, more: Value) {
    let mut plugin = node.config(version, more);
    for key in ["cniVersion", "name"] {
        plugin.as_object_mut().unwrap().remove(key);
    }
    let list = json!({"cniVersion": version, "name": "net", "plugins": [plugin]});
    fs::create_dir_all(node.path("net.d")).unwrap();
    fs::write(node.path("net.d/10-net.conflist"), list.to_string()).unwrap();
}

#[test]
fn cnitool_drives_every_verb() {
    on_node(|node| {
        configure(node, "1.1.0");
        let (a, b) = (node.pod("a"), node.pod("b"));
        succeeds(node, "status", &a);
        let result: Value = serde_json::from_str(&succeeds(node, "add", &a)).unwrap();
        assert_eq!(result["cniVersion"], "1.1.0");
        assert_eq!(result["interfaces"][2]["sandbox"], a.netns.to_str().unwrap());
        succeeds(node, "add", &b);
        assert!(reaches(&b, &a, addresses(&result)[0]));
        succeeds(node, "check", &a);
        inside(&a, || ip("route del default"));
        let said = fails(node, "check", &a);
        assert!(said.contains("default") || said.contains("0.0.0.0/0"), "{said}");
        assert!(fails(node, "add", &b).contains("eth0"), "an interface is there already");
        for _ in 0..2 {
            succeeds(node, "del", &a);
        }
        assert_eq!((node.leases().len(), node.veths().len()), (2, 1));
        // It takes everything for garbage, calls DEL for what it remembers, and then GC without a list.
        succeeds(node, "gc", &b);
        assert_eq!((node.leases().len(), node.veths().len()), (0, 0));
        node.ip("link del orlop0");
        node.ip("link add orlop0 type veth peer name other");
        assert!(fails(node, "status", &a).contains("not a bridge"));
    });
}

#[test]
fn cnitool_shows_errors_and_speaks_older_versions() {
    on_node(|node| {
        configure(node, "0.4.0");
        let pod = node.pod("a");
        let result: Value = serde_json::from_str(&succeeds(node, "add", &pod)).unwrap();
        assert_eq!(
            (&result["cniVersion"], &result["ips"][0]["version"]),
            (&json!("0.4.0"), &json!("4"))
        );
        succeeds(node, "check", &pod);
        succeeds(node, "del", &pod);
        write(node, "1.0.0", json!({"ipMasq": true}));
        let said = fails(node, "add", &pod);
        assert!(said.contains("ipMasq"), "{said}");
        assert_eq!((node.leases().len(), node.veths().len()), (0, 0));
    });
}
