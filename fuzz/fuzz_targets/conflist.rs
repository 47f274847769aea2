//! The agent's reading of CNI configuration: refused, or a list with plugins that it could call.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_node::network::conflist::{ConfList, VERSIONS, plugin_type};

fuzz_target!(|bytes: &[u8]| {
    let Ok(list) = ConfList::parse(bytes) else { return };
    assert!(VERSIONS.contains(&list.version.as_str()));
    for plugin in &list.plugins {
        let name = plugin_type(plugin);
        assert!(!name.is_empty() && !name.contains('/'), "{name:?} could be a path");
        list.config(plugin, &[]);
    }
});
