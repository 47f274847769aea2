//! What a node says: its greeting; its status and its pods', validated as control does; events, of which little is taken over; its
//! measurements, shown as Prometheus reads them.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use orlop_control::{
    link::{own_labels, taken_over},
    metrics::NodeMetricsStore,
    model::{validate_create, validate_status_update},
};
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
        Kind::Hello(hello) => {
            let labels = own_labels("n1", &hello.labels);
            assert!(
                labels.len() <= 3 && labels["kubernetes.io/hostname"] == "n1",
                "{labels:?}"
            );
            let mut node = typed::<Node>();
            node.meta_mut().labels = labels;
            // A value may be none that a label can have: that is refused, whatever it is.
            validate_create(&node.into_object());
        }
        Kind::Event(report) => {
            let event = report.event.unwrap_or_default();
            let about = event.involved_object.clone().unwrap_or_default();
            let taken = taken_over("n1", event, about);
            assert!(taken.message.len() <= 1024 && taken.reason.len() <= 128);
            assert!(taken.involved_object.expect("it is about something").field_path.len() <= 256);
            assert!(taken.metadata.is_none(), "a node names no event");
        }
        // Numbers alone.
        Kind::Ack(_) | Kind::Heartbeat(_) | Kind::SnapshotEnd(_) => {}
    }
});

fn typed<T: Resource>() -> T {
    let mut object = T::default();
    object.set_type();
    object.meta_mut().name = "a".to_owned();
    object
}
