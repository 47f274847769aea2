//! What registries answer: manifests and indexes; and of an image's manifest and configuration the names of its snapshots.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_node::runtime::{containerd::images::snapshots, reference::is_digest, registry};

fuzz_target!(|text: &str| {
    let (manifest, configuration) = text.split_once("\n---\n").unwrap_or((text, ""));
    let _refused_or_read = registry::check(manifest.as_bytes());
    if let Ok(snapshots) = snapshots(manifest.as_bytes(), configuration.as_bytes()) {
        assert!(snapshots.iter().all(|name| is_digest(name)), "{snapshots:?}");
    }
});
