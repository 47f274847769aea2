//! Objects as they come over gRPC: defaults twice are defaults once, and what is valid comes back from its own JSON.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_control::model::{default_object, validate_create, validate_status_update, validate_update};
use orlop_proto::api::v1::Object;
use prost::Message;

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut object) = Object::decode(bytes) else { return };
    if object.body.is_none() {
        return;
    }
    default_object(&mut object);
    let mut again = object.clone();
    default_object(&mut again);
    assert_eq!(again, object, "defaults of defaults");
    validate_update(&object, &object);
    validate_status_update(&object, &object);
    let written = object.to_value();
    if validate_create(&object).is_empty() {
        let written = written.expect("a valid object has JSON");
        let read = Object::from_value(&written).expect("a valid object's JSON is read");
        assert_eq!(read.to_value().expect("an object that was read has JSON"), written);
    }
});
