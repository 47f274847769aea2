use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicUsize, Ordering},
};

use orlop_proto::core::v1::{Container, ContainerPort, PodCondition, PodIp, PodSpec, PodStatus, ServiceSpec};
use proptest::prelude::*;

use super::*;

fn service() -> Service {
    Service {
        metadata: Some(ObjectMeta {
            name: "web".into(),
            namespace: "default".into(),
            uid: "service".into(),
            ..ObjectMeta::default()
        }),
        spec: Some(ServiceSpec {
            ports: vec![
                ServicePort {
                    name: "http".into(),
                    port: 80,
                    target_port: Some(IntOrString::String("http".into()).into()),
                    ..ServicePort::default()
                },
                ServicePort {
                    name: "metrics".into(),
                    port: 9090,
                    ..ServicePort::default()
                },
            ],
            selector: [("app".to_owned(), "web".to_owned())].into(),
            cluster_ip: "10.96.0.20".into(),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

fn pod(index: usize, port: Option<i32>, ready: bool) -> Arc<Pod> {
    let ports = port.map(|port| ContainerPort {
        name: "http".into(),
        container_port: port,
        protocol: "TCP".into(),
    });
    let status = if ready { "True" } else { "False" };
    Arc::new(Pod {
        metadata: Some(ObjectMeta {
            name: format!("web-{index}"),
            namespace: "default".into(),
            uid: format!("uid-{index}"),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec {
            node_name: "n1".into(),
            containers: vec![Container {
                ports: ports.into_iter().collect(),
                ..Container::default()
            }],
            ..PodSpec::default()
        }),
        status: Some(PodStatus {
            phase: "Running".into(),
            pod_ip: format!("10.244.{}.{}", index / 250, index % 250 + 2),
            conditions: vec![PodCondition {
                r#type: "Ready".into(),
                status: status.into(),
                ..PodCondition::default()
            }],
            ..PodStatus::default()
        }),
        ..Pod::default()
    })
}

/// Applies writes as the registry would.
fn apply(slices: &mut Vec<Arc<EndpointSlice>>, writes: &[SliceWrite]) {
    static NAMES: AtomicUsize = AtomicUsize::new(0);
    for write in writes {
        match write {
            SliceWrite::Create(slice) => {
                let mut slice = slice.clone();
                slice.meta_mut().name = format!("web-{}", NAMES.fetch_add(1, Ordering::Relaxed));
                slices.push(Arc::new(slice));
            }
            SliceWrite::Update(slice) => {
                let position = slices.iter().position(|old| old.name() == slice.name()).unwrap();
                slices[position] = Arc::new(slice.clone());
            }
            SliceWrite::Delete(slice) => slices.retain(|old| old.name() != slice.name()),
        }
    }
}

fn settle(pods: &[Arc<Pod>], slices: &mut Vec<Arc<EndpointSlice>>) -> usize {
    let writes = plan(&service(), pods.iter(), slices);
    apply(slices, &writes);
    assert!(
        plan(&service(), pods.iter(), slices).is_empty(),
        "a second look has nothing to do"
    );
    writes.len()
}

#[test]
fn conditions_follow_the_pod() {
    let mut leaving = Pod::clone(&pod(3, Some(8080), true));
    leaving.meta_mut().deletion_timestamp = Some(prost_types::Timestamp::default());
    let mut ended = Pod::clone(&pod(4, Some(8080), true));
    ended.status.get_or_insert_default().phase = "Failed".into();
    let pods = [
        pod(1, Some(8080), true),
        pod(2, Some(8080), false),
        Arc::new(leaving),
        Arc::new(ended),
    ];
    let mut slices = Vec::new();
    settle(&pods, &mut slices);
    let slice = &slices[0];
    let found: Vec<_> = slice
        .endpoints
        .iter()
        .map(|endpoint| {
            let conditions = endpoint.conditions.unwrap();
            (
                conditions.ready.unwrap(),
                conditions.serving.unwrap(),
                conditions.terminating.unwrap(),
            )
        })
        .collect();
    assert_eq!(found, [(true, true, false), (false, false, false), (false, true, true)]);
    assert_eq!(slice.meta().labels[SERVICE_NAME], "web");
    assert_eq!(slice.meta().labels[MANAGED_BY], MANAGER);
    assert_eq!(slice.meta().owner_references[0].uid, "service");
    let ports: Vec<_> = slice
        .ports
        .iter()
        .map(|port| (port.name.as_deref().unwrap(), port.port.unwrap()))
        .collect();
    assert_eq!(ports, [("http", 8080), ("metrics", 9090)]);
}

#[test]
fn an_address_that_no_slice_may_have_is_left_out() {
    let with = |index: usize, ips: &[&str]| {
        let mut pod = Pod::clone(&pod(index, Some(80), true));
        let status = pod.status.get_or_insert_default();
        status.pod_ip = ips[0].into();
        status.pod_ips = ips.iter().map(|ip| PodIp { ip: (*ip).into() }).collect();
        Arc::new(pod)
    };
    let pods = [
        with(1, &["10.244.0.1"]),
        with(2, &["127.0.0.1"]),
        with(3, &["fd00::3", "10.244.0.3"]),
        with(4, &["fd00::4"]),
    ];
    let mut slices = Vec::new();
    settle(&pods, &mut slices);
    let found: BTreeSet<&str> = slices[0]
        .endpoints
        .iter()
        .map(|endpoint| endpoint.addresses[0].as_str())
        .collect();
    assert_eq!(found, ["10.244.0.1", "10.244.0.3"].into());
}

#[test]
fn publish_not_ready_addresses() {
    let mut service = service();
    service.spec.get_or_insert_default().publish_not_ready_addresses = true;
    let writes = plan(&service, [pod(1, Some(80), false)].iter(), &[]);
    let [SliceWrite::Create(slice)] = &writes[..] else {
        panic!("{writes:?}")
    };
    assert_eq!(slice.endpoints[0].conditions.unwrap().ready, Some(true));
}

#[test]
fn pods_with_other_ports_get_their_own_slice() {
    let pods = [pod(1, Some(8080), true), pod(2, Some(8081), true), pod(3, None, true)];
    let mut slices = Vec::new();
    settle(&pods, &mut slices);
    let ports: BTreeSet<Vec<i32>> = slices
        .iter()
        .map(|slice| slice.ports.iter().map(|port| port.port.unwrap()).collect())
        .collect();
    assert_eq!(ports, [vec![8080, 9090], vec![8081, 9090], vec![9090]].into());
}

#[test]
fn without_pods_there_is_one_empty_slice() {
    let mut slices = Vec::new();
    assert_eq!(settle(&[], &mut slices), 1);
    assert!(slices.len() == 1 && slices[0].endpoints.is_empty());
    assert_eq!(settle(&[pod(1, Some(80), true)], &mut slices), 1);
    assert_eq!(slices.len(), 1);
    assert_eq!(settle(&[], &mut slices), 1);
    assert!(slices.len() == 1 && slices[0].endpoints.is_empty());
}

#[test]
fn one_change_is_one_write() {
    let mut pods: Vec<_> = (0..350).map(|index| pod(index, Some(80), true)).collect();
    let mut slices = Vec::new();
    settle(&pods, &mut slices);
    assert_eq!(slices.len(), 4);
    pods[120] = pod(120, Some(80), false);
    assert_eq!(settle(&pods, &mut slices), 1);
    pods.push(pod(350, Some(80), true));
    assert_eq!(settle(&pods, &mut slices), 1);
    pods.remove(10);
    assert_eq!(settle(&pods, &mut slices), 1);
    assert_eq!(slices.len(), 4);
}

#[test]
fn a_changed_address_is_an_update_in_place() {
    let mut slices = Vec::new();
    settle(&[pod(1, Some(80), true)], &mut slices);
    let mut moved = Pod::clone(&pod(1, Some(80), true));
    moved.status.get_or_insert_default().pod_ip = "10.244.9.9".into();
    let writes = plan(&service(), [Arc::new(moved)].iter(), &slices);
    let [SliceWrite::Update(slice)] = &writes[..] else {
        panic!("{writes:?}")
    };
    assert_eq!(slice.endpoints[0].addresses, ["10.244.9.9"]);
}

#[test]
fn only_what_slices_show_matters() {
    let before = pod(1, Some(80), true);
    let mut after = Pod::clone(&before);
    after.meta_mut().annotations.insert("note".into(), "x".into());
    assert!(!matters(&before, &after));
    after.status.get_or_insert_default().pod_ip = "10.244.9.9".into();
    assert!(matters(&before, &after));
    assert!(matters(&before, &pod(1, Some(80), false)));
}

proptest! {
    /// Whatever happens to the pods: every pod is in exactly one slice, no slice is too long, a second look is idle.
    #[test]
    fn any_history_converges(rounds in prop::collection::vec(prop::collection::btree_map(0usize..400, (0u8..3, any::<bool>()), 0..300), 1..5)) {
        let mut slices = Vec::new();
        for round in rounds {
            let pods: Vec<_> = round
                .iter()
                .map(|(index, (port, ready))| pod(*index, (*port > 0).then(|| 8000 + i32::from(*port)), *ready))
                .collect();
            settle(&pods, &mut slices);
            let counts = addresses(&slices);
            prop_assert_eq!(counts.len(), pods.len());
            prop_assert!(counts.values().all(|count| *count == 1));
            prop_assert!(slices.iter().all(|slice| slice.endpoints.len() <= SLICE_MAX));
        }
    }
}
