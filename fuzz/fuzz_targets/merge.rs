//! Apply's merge, of two JSON values: applying the same again changes nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_control::merge;
use orlop_proto::{ResourceKind, api::v1::Object, json};

fuzz_target!(|text: &str| {
    let Some((given, live)) = text.split_once("\n---\n") else {
        return;
    };
    let (Ok(given), Ok(live)) = (json::parse(given), json::parse(live)) else {
        return;
    };
    for kind in ResourceKind::ALL {
        // Whatever it is, no panic; of sound objects of one kind, an end.
        let merged = merge::apply(kind, &given, Some(&live));
        let is_sound = |value| Object::from_value_as(*kind, value).is_ok();
        if is_sound(&given) && is_sound(&live) && is_sound(&merged) {
            assert_eq!(merge::apply(kind, &given, Some(&merged)), merged);
        }
    }
});
