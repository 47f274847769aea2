//! What control says to a node, as far as the maps and the plan: messages one after the other, each with its length.
#![no_main]

use jiff::Timestamp;
use libfuzzer_sys::fuzz_target;
use orlop_node::{
    dataplane::{
        ServiceChanges,
        planner::{Limits, Planner, Writes},
    },
    link::told,
    plan::{Context, Progress, plan, status::pod_status},
    reconciler::Settings,
    runtime::Observed,
};
use orlop_proto::node::v1::{ControlMessage, control_message::Message as Kind};
use prost::Message;

const LIMITS: Limits = Limits {
    frontends: 64,
    slots: 256,
};

fuzz_target!(|bytes: &[u8]| {
    let mut rest = bytes;
    let (mut welcome, mut updates) = (None, Vec::new());
    while let Ok(message) = ControlMessage::decode_length_delimited(&mut rest)
        && updates.len() < 64
    {
        match message.message {
            Some(Kind::Welcome(given)) => welcome = Some(given),
            Some(Kind::Update(update)) => updates.push(update),
            _ => {}
        }
        if rest.is_empty() {
            break;
        }
    }
    let desired = told(welcome.unwrap_or_default(), updates);

    let mut planner = Planner::new(LIMITS);
    let changes = ServiceChanges {
        upserts: desired.services.iter().cloned().collect(),
        removals: Vec::new(),
        complete: true,
    };
    let writes = planner.apply(&changes);
    for (base, slots) in writes.slots.iter() {
        assert!(base > 0 && base as usize + slots.len() <= LIMITS.slots as usize);
    }
    if writes.full.is_none() {
        assert_eq!(
            planner.apply(&changes),
            Writes::default(),
            "the same again writes nothing"
        );
    }

    let (progress, settings) = (
        Progress::default(),
        Settings {
            memory_capacity: 1 << 30,
            ..Settings::default()
        },
    );
    let context = Context {
        desired: &desired,
        progress: &progress,
        settings: &settings,
        now: Timestamp::UNIX_EPOCH,
    };
    plan(context, &Observed::default());
    for pod in desired.pods.values() {
        pod_status(context, pod, None, &pod.status.clone().unwrap_or_default());
    }
});
