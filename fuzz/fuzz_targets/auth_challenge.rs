//! What a registry says when it refuses: a challenge that can be answered, or none.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_node::runtime::registry::endpoint::{Challenge, chosen};

fuzz_target!(|text: &str| {
    let headers: Vec<&str> = text.lines().collect();
    if let Some(Challenge::Bearer { realm, .. }) = chosen(&headers) {
        assert!(realm.len() <= text.len());
    }
});
