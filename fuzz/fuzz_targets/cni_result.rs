//! What plugins print: the last one's result as the agent reads it, and what address management answers to our plugin.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use orlop_bridge::{delegate, version::CniVersion};
use orlop_node::network::result::status;

fuzz_target!(|text: &str| {
    if let Ok(value) = serde_json::from_str(text)
        && let Ok(status) = status(&value, Path::new("/run/netns/a"))
    {
        assert!(!status.addresses.is_empty());
    }
    if let Ok(result) = delegate::read_result("delegate", text) {
        assert!(!result.ips.is_empty());
        for version in CniVersion::ALL {
            result.to_json(version);
        }
    }
    assert_ne!(delegate::read_error("delegate", text).code, 0);
});
