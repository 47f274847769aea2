//! What a node says: its status and its pods', validated as control does; its measurements, shown as Prometheus reads them.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use orlop_control::{metrics::NodeMetricsStore, model::validate_status_update};
use orlop_proto::{
    Resource,
    api::v1::Object,
    core::v1::{Node, Pod},
    node::v1::{NodeMessage, node_message::Message as Kind},
};
use prost::Message;

fn checked(new: impl Resource, old: impl Resource) {
    let (new, old) = (new.into_object(), old.into_object());
    if validate_status_update(&new, &old).is_empty() {
        let written = new.to_value().expect("an object has JSON");
        Object::from_value(&written).expect("its own JSON is read");
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(NodeMessage { message: Some(message) }) = NodeMessage::decode(bytes) else {
        return;
    };
    match message {
        Kind::Node(report) => checked(
            Node {
                status: report.status,
                ..typed()
            },
            typed::<Node>(),
        ),
        Kind::Pod(report) => checked(
            Pod {
                status: report.status,
                ..typed()
            },
            typed::<Pod>(),
        ),
        Kind::Metrics(report) => {
            let store = NodeMetricsStore::default();
            store.put(&Arc::from("n1"), report);
            for line in store
                .prometheus()
                .split_terminator('\n')
                .filter(|line| !line.starts_with("# "))
            {
                let (series, value) = line.rsplit_once(' ').expect("a value");
                assert!(series.ends_with('}') && value.parse::<f64>().is_ok(), "{line:?}");
            }
        }
        _ => {}
    }
});

fn typed<T: Resource>() -> T {
    let mut object = T::default();
    object.set_type();
    object.meta_mut().name = "a".to_owned();
    object
}
