//! What has to be gone when DEL returns, and what has to stay when the kernel refuses.

use std::fs;

use serde_json::json;

use super::{
    node::{inside, ip},
    on_node,
};

/// DEL does not wait for all of the kernel's removal, but for this much of it.
#[test]
fn both_ends_are_gone_when_del_returns() {
    on_node(|node| {
        let config = node.config("1.1.0", json!({}));
        let pod = node.pod("a");
        for _ in 0..20 {
            node.call("ADD", &pod, &config).expect();
            node.call("DEL", &pod, &config).expect();
            assert_eq!((node.veths(), node.leases().len()), (Vec::new(), 0));
            let left = inside(&pod, || ip("addr show"));
            assert!(!left.contains("eth0") && !left.contains("10.99."), "{left}");
            // What the kernel still does holds up nobody's turn.
            let netns = fs::File::open(&pod.netns).unwrap();
            rustix::fs::flock(&netns, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
        }
    });
}

/// Whoever is in the container can open its namespace and lock it.
#[test]
fn a_lock_that_the_container_holds_does_not_keep_its_address() {
    on_node(|node| {
        let config = node.config("1.1.0", json!({}));
        let pod = node.pod("a");
        node.call("ADD", &pod, &config).expect();
        let netns = fs::File::open(&pod.netns).unwrap();
        rustix::fs::flock(&netns, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
        node.call("DEL", &pod, &config).expect();
        assert_eq!((node.veths(), node.leases().len()), (Vec::new(), 0));
    });
}

#[test]
fn a_removal_that_the_kernel_refuses_keeps_the_lease() {
    on_node(|node| {
        let config = node.config("1.1.0", json!({}));
        let pod = node.pod("a");
        node.call("ADD", &pod, &config).expect();
        // The loopback interface cannot be removed: it gets the name, and the veth another.
        let name = orlop_bridge::names::host_interface("net", "a", "eth0");
        node.ip(&format!("link set {name} down"));
        node.ip(&format!("link set {name} name aside"));
        node.ip("link set lo down");
        node.ip(&format!("link set lo name {name}"));
        assert_eq!(node.call("DEL", &pod, &config).code(), 100);
        assert_eq!(node.leases().len(), 2, "the address may be somebody's still");
        node.ip(&format!("link set {name} name lo"));
        node.ip(&format!("link set aside name {name}"));
        node.call("DEL", &pod, &config).expect();
        assert_eq!((node.veths(), node.leases().len()), (Vec::new(), 0));
    });
}
