//! Texts of the kernel, and an image's StopSignal.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_node::{
    metrics::readings,
    node_status::meminfo,
    runtime::{cgroup::Cgroups, stop_signal},
};

fuzz_target!(|text: &str| {
    readings::busy_time(text);
    readings::figure(text, "inactive_file");
    meminfo(text, "MemTotal");
    Cgroups::parse(text).is_pure_v2();
    assert!((1..=64).contains(&stop_signal::number(text)));
});
