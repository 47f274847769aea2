//! The agent's own files: what was added to a sandbox, the addresses that a pod had, whose a state folder is.
#![no_main]

use std::{fs, path::PathBuf, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use orlop_node::{
    network::{addresses::Addresses, attachments::Attachments},
    runtime::files::read_pod_id,
};

static DIR: LazyLock<PathBuf> = LazyLock::new(|| {
    // In memory: what is written is synced.
    let dir = PathBuf::from(format!("/dev/shm/orlop-fuzz-agent-{}", std::process::id()));
    for part in ["cni/results", "cni/addresses"] {
        fs::create_dir_all(dir.join(part)).expect("a directory");
    }
    dir
});

fuzz_target!(|bytes: &[u8]| {
    for file in [
        "cni/results/a.json",
        "cni/addresses/a",
        "cni/addresses/a.json",
        "pod.json",
    ] {
        fs::write(DIR.join(file), bytes).expect("writes");
    }
    let attachments = Attachments::new(&DIR);
    if let Ok(record) = attachments.read("a") {
        let record = record.expect("it is there");
        let text = serde_json::to_vec(&record).expect("a record has JSON");
        fs::write(DIR.join("cni/results/a.json"), text).expect("writes");
        let again = attachments.read("a").expect("its own JSON").expect("it is there");
        // Fractions in a plugin's result may differ in the last digit.
        assert_eq!(
            (again.pod, again.namespace, again.boot_id),
            (record.pod, record.namespace, record.boot_id)
        );
    }
    let known = Addresses::new(&DIR).of("a");
    if !known.is_empty() {
        let addresses = Addresses::new(&DIR);
        addresses.keep("a", known.clone(), true).expect("keeps");
        assert_eq!(Addresses::new(&DIR).of("a"), known);
    }
    if let Some(pod) = read_pod_id(&DIR) {
        let written = serde_json::json!({"namespace": pod.namespace, "name": pod.name, "uid": pod.uid});
        fs::write(DIR.join("pod.json"), written.to_string()).expect("writes");
        assert_eq!(read_pod_id(&DIR), Some(pod));
    }
});
