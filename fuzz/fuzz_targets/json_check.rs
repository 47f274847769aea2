//! JSON to objects: the check by schema and serde agree, and an object's JSON comes back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_proto::{api::v1::Object, json};

fuzz_target!(|text: &str| {
    let Ok(value) = json::parse(text) else { return };
    let Ok(object) = Object::from_value(&value) else { return };
    // A time keeps whole seconds, or microseconds: it is the JSON that comes back.
    let written = object.to_value().expect("an object has JSON");
    let read = Object::from_value(&written).expect("its own JSON is read");
    assert_eq!(read.to_value().expect("an object has JSON"), written);
});
