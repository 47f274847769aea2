//! Type information of kernel and maps: whatever it says, an end.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_node::dataplane::btf::Btf;

fuzz_target!(|bytes: &[u8]| {
    let Ok(btf) = Btf::parse(bytes) else { return };
    for id in 0..16 {
        assert!(btf.shape(id).len() <= 1 << 20);
    }
    for (structure, member) in [("task_struct", "cgroups"), ("", "")] {
        let _found_or_not = btf.member_offset(structure, member);
    }
});
