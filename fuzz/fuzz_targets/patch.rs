//! Patches of a pod, JSON merge patch and JSON patch: refused, or an object whose own JSON comes back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_control::{api::patch::outcome, manifest};
use orlop_proto::{
    Resource,
    api::v1::{Object, patch_request::Patch},
    core::v1::Pod,
    json::from_value,
};

const POD: &str = r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "default", "labels": {"app": "web"}},
"spec": {"containers": [{"name": "web", "image": "web", "ports": [{"containerPort": 80}], "env": [{"name": "A", "value": "b"}]}]}}"#;

fuzz_target!(|text: &str| {
    let pod = manifest::parse(POD, &manifest::Limits::default())
        .expect("a pod")
        .remove(0)
        .object;
    for patch in [Patch::Merge(text.to_owned()), Patch::Json(text.to_owned())] {
        let Ok(object) = outcome(&Pod::KIND, &pod, patch) else {
            continue;
        };
        let written = object.to_value().expect("an object has JSON");
        let read = Object::from_value(&written).expect("its own JSON is read");
        assert_eq!(read.to_value().expect("an object has JSON"), written);
        let _as_pod: Pod = from_value(&written).expect("a patched pod is a pod");
    }
});
