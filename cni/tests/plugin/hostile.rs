//! Input that nobody should send: every call ends with the specification's error, and nothing is made.

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use crate::node::{Answer, Node, Pod, Running, on_node, start};

fn raw(env: &[(&str, &str)], stdin: &[u8]) -> Answer {
    start(Path::new(env!("CARGO_BIN_EXE_orlop-bridge")), env, stdin).end()
}

fn add_with(node: &Node, variable: &str, value: &str) -> u64 {
    let pod = node.pod(&format!("h{}", node.veths().len() + value.len()));
    let netns = pod.netns.to_str().unwrap().to_owned();
    let mut env = vec![
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "id"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_NETNS", &*netns),
    ];
    env.retain(|(key, _)| *key != variable);
    env.push((variable, value));
    let code = raw(&env, node.config("1.1.0", json!({})).to_string().as_bytes()).code();
    node.destroy(&pod);
    code
}

fn nothing_was_made(node: &Node) {
    assert_eq!(node.veths().len(), 0);
    assert_eq!(node.leases().len(), 0);
    assert!(!node.ip("-br link").contains("orlop0"));
}

#[test]
fn stdin() {
    on_node(|node| {
        let pod = node.pod("a");
        let netns = pod.netns.to_str().unwrap();
        let env = [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "a"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", netns),
        ];
        let good = node.config("1.1.0", json!({})).to_string();
        for cut in 0..good.len() {
            if cut % 7 == 0 {
                assert_eq!(raw(&env, &good.as_bytes()[..cut]).code(), 6, "{cut}");
            }
        }
        let deep = "[".repeat(100_000);
        let large = format!("{{\"a\":\"{}\"}}", "x".repeat(5 << 20));
        for garbage in [
            b"\xff\xfe".as_slice(),
            b"null",
            b"[]",
            b"\"x\"",
            b"{}{}",
            deep.as_bytes(),
            large.as_bytes(),
        ] {
            assert_eq!(raw(&env, garbage).code(), 6);
        }
        let versions = [
            (json!("9.9.9"), 1),
            (json!("0.2.0"), 1),
            (json!(null), 6),
            (json!(1), 6),
        ];
        for (version, code) in versions {
            let mut config = node.config("1.1.0", json!({}));
            config["cniVersion"] = version;
            assert_eq!(raw(&env, config.to_string().as_bytes()).code(), code);
        }
        nothing_was_made(node);
    });
}

/// A gigabyte is not read, let alone kept: the call ends after a few megabytes of it.
#[test]
fn a_stdin_without_end_is_refused_early() {
    const GIGABYTE: usize = 1 << 30;
    for (start, rest) in [("", b'['), ("{\"name\":\"", b'x'), ("", b' ')] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_orlop-bridge"))
            .env_clear()
            .envs([
                ("CNI_COMMAND", "ADD"),
                ("CNI_CONTAINERID", "a"),
                ("CNI_IFNAME", "eth0"),
                ("CNI_NETNS", "/nowhere"),
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let block = vec![rest; 1 << 16];
        let mut taken = 0;
        if stdin.write_all(start.as_bytes()).is_ok() {
            while taken < GIGABYTE && stdin.write_all(&block).is_ok() {
                taken += block.len();
            }
        }
        drop(stdin);
        assert_eq!(Running(child).end().code(), 6);
        assert!(taken < 16 << 20, "{taken} bytes were read");
    }
}

#[test]
fn configurations() {
    on_node(|node| {
        let pod = node.pod("a");
        let cases = [
            (json!({"ipMasq": true}), 2),
            (json!({"vlan": 7}), 2),
            (json!({"vlanTrunk": [{"id": 7}]}), 2),
            (json!({"macspoofchk": true}), 2),
            (json!({"promiscMode": true}), 7),
            (json!({"name": "../x"}), 7),
            (json!({"name": ""}), 7),
            (json!({"bridge": "a/../b"}), 7),
            (json!({"bridge": "sixteen-letters!"}), 7),
            (json!({"mtu": 12}), 7),
            (json!({"mtu": -1}), 6),
            (json!({"bridge": 3}), 6),
            (json!({"ipam": {"type": "../host-local"}}), 7),
            (json!({"ipam": {"ranges": []}}), 7),
            (json!({"ipam": {"dataDir": "relative"}}), 7),
            (json!({"ipam": {"rangs": []}}), 6),
            (json!({"ipam": {"ranges": [[{"subnet": "10.1.0.0/99"}]]}}), 6),
            (json!({"runtimeConfig": {"mac": "01:00:00:00:00:01"}}), 7),
            (json!({"runtimeConfig": {"mac": "nonsense"}}), 6),
            (json!({"runtimeConfig": {"ips": ["nonsense"]}}), 7),
            (json!({"prevResult": {"ips": "x"}}), 6),
            (json!({"ipamTimeoutSeconds": 0}), 7),
            (json!({"ipamTimeoutSeconds": "1"}), 7),
            (json!({"ipamTimeoutSeconds": 1e9}), 7),
        ];
        for (more, code) in cases {
            let answer = node.call("ADD", &pod, &node.config("1.1.0", more.clone()));
            assert_eq!(answer.code(), code, "{more}");
        }
        let answer = node.call("ADD", &pod, &node.config("1.1.0", json!({"ipMasq": true})));
        assert!(
            answer.stdout.contains("ipMasq") && answer.stdout.contains("true"),
            "{answer:?}"
        );
        nothing_was_made(node);
    });
}

#[test]
fn environment() {
    on_node(|node| {
        let (long_id, long_path, long_args) = ("a".repeat(300), "/a".repeat(3000), "A=b;".repeat(17_000));
        let up = "../".repeat(40);
        let cases = [
            ("CNI_COMMAND", ""),
            ("CNI_COMMAND", "DESTROY"),
            ("CNI_CONTAINERID", ""),
            ("CNI_CONTAINERID", "../../etc/passwd"),
            ("CNI_CONTAINERID", &*long_id),
            ("CNI_IFNAME", ""),
            ("CNI_IFNAME", "an-interface-name-too-long"),
            ("CNI_IFNAME", "../x"),
            ("CNI_IFNAME", "lo"),
            ("CNI_NETNS", ""),
            ("CNI_NETNS", &*long_path),
            ("CNI_NETNS", "/etc/passwd"),
            ("CNI_NETNS", "/"),
            ("CNI_NETNS", "/dev/zero"),
            ("CNI_NETNS", "/proc/self/ns/net"),
            ("CNI_NETNS", "/proc/self/ns/mnt"),
            ("CNI_NETNS", "/proc/self/fd"),
            ("CNI_NETNS", "/proc/thread-self/ns/net"),
            ("CNI_NETNS", &*up),
            ("CNI_ARGS", "nonsense"),
            ("CNI_ARGS", &*long_args),
        ];
        for (variable, value) in cases {
            assert_eq!(add_with(node, variable, value), 4, "{variable}={value:.60}");
        }
        for gone in ["/nowhere", "../nowhere", "nowhere", "/etc/passwd/x"] {
            assert_eq!(add_with(node, "CNI_NETNS", gone), 3, "{gone}");
        }
        assert_eq!(add_with(node, "CNI_ARGS", "MAC=nonsense"), 7);
        let fifo = node.path("fifo");
        assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        assert_eq!(add_with(node, "CNI_NETNS", fifo.to_str().unwrap()), 4);
        // CHECK opens it too; DEL does without the namespace.
        let pod = Pod {
            id: "id".into(),
            netns: fifo,
        };
        let mut config = node.config("1.1.0", json!({"prevResult": {"cniVersion": "1.1.0", "ips": []}}));
        assert_eq!(node.call("CHECK", &pod, &config).code(), 4);
        node.call("DEL", &pod, &config).expect();
        config["cni.dev/valid-attachments"] = json!([{"containerID": "../..", "ifname": "../x"}]);
        node.call("GC", &pod, &config).expect();
        for (variable, value) in [("CNI_CONTAINERID", "../x"), ("CNI_IFNAME", "a/b")] {
            let mut env = vec![
                ("CNI_COMMAND", "DEL"),
                ("CNI_CONTAINERID", "id"),
                ("CNI_IFNAME", "eth0"),
            ];
            env.retain(|(key, _)| *key != variable);
            env.push((variable, value));
            assert_eq!(raw(&env, config.to_string().as_bytes()).code(), 4, "DEL {variable}");
        }
        nothing_was_made(node);
    });
}

#[test]
fn version_answers_without_anything_else() {
    let answer = raw(&[("CNI_COMMAND", "VERSION")], b"").expect();
    assert_eq!(answer["supportedVersions"], json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
    let answer: Value = raw(&[("CNI_COMMAND", "VERSION")], br#"{"cniVersion":"1.0.0"}"#).expect();
    assert_eq!(answer["cniVersion"], "1.0.0");
}
