//! Manifests: whatever the bytes, an answer within the limits; what is accepted is accepted again as its own JSON.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_control::manifest::{Limits, parse, parse_bytes};

fuzz_target!(|bytes: &[u8]| {
    let limits = Limits::default();
    let Ok(objects) = parse_bytes(bytes, &limits) else {
        return;
    };
    for object in objects {
        let json = object.value.to_string();
        let again = parse(&json, &limits).expect("what was read is read again");
        assert_eq!(again.len(), 1);
        assert_eq!(again[0].object, object.object);
    }
});
