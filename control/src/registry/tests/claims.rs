use std::collections::HashSet;

use super::*;

fn small() -> RegistryConfig {
    RegistryConfig {
        service_cidr: "10.96.0.0/28".parse().unwrap(),
        pod_cidr: "10.244.0.0/22".parse().unwrap(),
        pod_cidr_prefix: 24,
    }
}

fn address(service: &Service) -> String {
    let spec = service.spec.clone().unwrap();
    assert_eq!(spec.cluster_ips, vec![spec.cluster_ip.clone()]);
    spec.cluster_ip
}

#[tokio::test]
async fn a_service_gets_an_address_and_keeps_it() {
    let world = world().await;
    let created = world.registry.create(service("a", "")).await.unwrap();
    let given: std::net::Ipv4Addr = address(&created).parse().unwrap();
    assert!(world.registry.config().service_cidr.contains(&given));
    assert!(
        u32::from(given) - u32::from(std::net::Ipv4Addr::new(10, 96, 0, 0)) >= 256,
        "{given}: the lower band is for given ones"
    );

    let mut update = service("a", "");
    update.spec.as_mut().unwrap().ports[0].port = 81;
    let updated = world.registry.update(update).await.unwrap();
    assert_eq!(address(&updated), given.to_string());
}

#[tokio::test]
async fn a_given_address_is_held_by_one_service_only() {
    let world = world().await;
    world.registry.create(service("a", "10.96.0.20")).await.unwrap();
    let error = world.registry.create(service("b", "10.96.0.20")).await.unwrap_err();
    assert!(
        message(&error).contains("spec.clusterIP: provided IP is already allocated"),
        "{error}"
    );
    let error = world.registry.create(service("a", "10.96.0.20")).await.unwrap_err();
    assert!(error.is_already_exists(), "{error}");
    for wrong in ["10.95.0.1", "10.96.0.0", "10.111.255.255", "10.96.0.1", "nonsense"] {
        let error = world.registry.create(service("c", wrong)).await.unwrap_err();
        assert!(matches!(error, RegistryError::Invalid { .. }), "{wrong}: {error}");
        assert!(message(&error).contains("spec.clusterIP"), "{error}");
    }
    world
        .registry
        .delete::<Service>(&key("a"), DeleteOptions::default())
        .await
        .unwrap();
    world.registry.create(service("b", "10.96.0.20")).await.unwrap();
}

#[tokio::test]
async fn the_dns_address_is_only_given() {
    let world = world().await;
    world.registry.create(service("dns", "10.96.0.10")).await.unwrap();
}

#[tokio::test]
async fn a_headless_service_claims_nothing() {
    let world = world().await;
    let created = world.registry.create(service("a", "None")).await.unwrap();
    assert_eq!(address(&created), "None");
    world.registry.create(service("b", "None")).await.unwrap();
    let claims = world.registry.store().list("clusterips/").await.unwrap();
    assert_eq!(claims.records.len(), 1, "only the kubernetes service's: {claims:?}");
}

#[tokio::test]
async fn the_address_of_a_service_cannot_change() {
    let world = world().await;
    world.registry.create(service("a", "10.96.0.20")).await.unwrap();
    for other in ["10.96.0.21", "None"] {
        let error = world.registry.update(service("a", other)).await.unwrap_err();
        assert!(matches!(error, RegistryError::Invalid { .. }), "{error}");
    }
}

#[tokio::test]
async fn concurrent_services_never_share_an_address_and_the_range_can_be_full() {
    let world = world_with(small()).await;
    // 14 usable, without 10.96.0.1 (kubernetes) and 10.96.0.10 (kept for DNS).
    let creations = (0..12).map(|number| world.registry.create(service(&format!("s{number}"), "")));
    let created = futures::future::join_all(creations).await;
    let addresses: HashSet<String> = created.into_iter().map(|service| address(&service.unwrap())).collect();
    assert_eq!(addresses.len(), 12);
    assert!(!addresses.contains("10.96.0.10") && !addresses.contains("10.96.0.1"));
    let error = world.registry.create(service("more", "")).await.unwrap_err();
    assert!(matches!(error, RegistryError::Exhausted(_)), "{error}");
    world.registry.create(service("dns", "10.96.0.10")).await.unwrap();

    world
        .registry
        .delete::<Service>(&key("s3"), DeleteOptions::default())
        .await
        .unwrap();
    let again = world.registry.create(service("more", "")).await.unwrap();
    assert!(addresses.contains(&address(&again)), "the freed one is used again");
}

#[tokio::test]
async fn concurrent_nodes_never_share_a_range_and_it_is_freed() {
    let world = world_with(small()).await;
    for name in ["n0", "n1", "n2", "n3", "n4"] {
        world.registry.create(node(name)).await.unwrap();
    }
    let given = ["n0", "n1", "n2", "n3"].map(|name| world.registry.assign_pod_cidr(name));
    let given = futures::future::join_all(given).await;
    let ranges: HashSet<String> = given
        .into_iter()
        .map(|node| node.unwrap().spec.unwrap().pod_cidr)
        .collect();
    assert_eq!(ranges.len(), 4, "{ranges:?}");
    let error = world.registry.assign_pod_cidr("n4").await.unwrap_err();
    assert!(matches!(error, RegistryError::Exhausted(_)), "{error}");
    let before = world.revision().await;
    world.registry.assign_pod_cidr("n0").await.unwrap();
    assert_eq!(world.revision().await, before, "a node keeps the range that it has");

    let gone: Node = world
        .registry
        .delete(&ObjectKey::new("", "n2"), DeleteOptions::default())
        .await
        .unwrap();
    let taken_over = world.registry.assign_pod_cidr("n4").await.unwrap();
    assert_eq!(taken_over.spec.unwrap().pod_cidr, gone.spec.unwrap().pod_cidr);
}

#[tokio::test]
async fn a_range_that_overlaps_anothers_is_refused() {
    let world = world().await;
    let node = |name: &str, range: &str| {
        let mut node = Node::default();
        node.meta_mut().name = name.to_owned();
        node.spec.get_or_insert_default().pod_cidr = range.to_owned();
        node
    };
    let overlap = |result: Result<Node, RegistryError>| {
        let text = result.unwrap_err().to_string();
        assert!(
            text.contains("spec.podCIDRs: ") && text.contains("of nodes/wide"),
            "{text}"
        );
    };
    let wide = world.registry.create(node("wide", "10.244.2.0/23")).await.unwrap();
    overlap(world.registry.create(node("in", "10.244.3.0/24")).await);
    overlap(world.registry.create(node("around", "10.244.0.0/20")).await);
    world.registry.create(node("beside", "10.244.4.0/24")).await.unwrap();
    world.registry.create(node("later", "")).await.unwrap();
    overlap(world.registry.update(node("later", "10.244.2.0/24")).await);
    world.registry.update(wide).await.unwrap();
}

#[tokio::test]
async fn a_range_of_ipv6_is_held_by_one_node_only_however_it_is_written() {
    let world = world().await;
    let ranged = |name: &str, range: &str| {
        let mut node = node(name);
        node.spec.get_or_insert_default().pod_cidr = range.to_owned();
        node
    };
    world.registry.create(ranged("a", "fd44:0:0:1::/64")).await.unwrap();
    for taken in [
        "fd44:0:0:1::/64",
        "FD44::1:0:0:0:0/64",
        "fd44::/48",
        "fd44:0:0:1:8000::/65",
    ] {
        let error = world.registry.create(ranged("b", taken)).await.unwrap_err();
        assert!(message(&error).contains("spec.podCIDRs"), "{taken}: {error}");
    }
    world.registry.create(ranged("b", "fd44:0:0:2::/64")).await.unwrap();
    // The lengths of one family are no matter of the other.
    let first = world.registry.create_node(node("c")).await.unwrap();
    assert_eq!(first.spec.unwrap().pod_cidr, "10.244.0.0/24");
}

#[tokio::test]
async fn ranges_that_overlap_are_never_both_given_to_nodes_that_are_written_at_once() {
    let ranged = |name: &str, range: &str| {
        let mut node = node(name);
        node.spec.get_or_insert_default().pod_cidr = range.to_owned();
        node
    };
    for round in 0..8 {
        let world = world().await;
        let registry = &world.registry;
        if round % 2 == 1 {
            registry.create_node(node("first")).await.unwrap();
        }
        registry.create(node("later")).await.unwrap();
        let (wide, narrow, later, chosen) = tokio::join!(
            registry.create(ranged("wide", "10.244.128.0/17")),
            registry.create(ranged("narrow", "10.244.129.0/24")),
            registry.update(ranged("later", "10.244.130.0/23")),
            registry.create_node(node("chosen")),
        );
        chosen.unwrap();
        assert_eq!(
            wide.is_ok(),
            narrow.is_err() && later.is_err(),
            "{wide:?} {narrow:?} {later:?}"
        );
        // One that the server is about to choose, and one that somebody names around it.
        let (wide, chosen) = tokio::join!(
            registry.create(ranged("around", "10.244.0.0/22")),
            registry.create_node(node("other")),
        );
        assert!(wide.is_err(), "it has a range of {round}: {wide:?}");
        chosen.unwrap();
        let nodes = registry.cache().reader::<Node>();
        registry
            .cache()
            .catch_up(std::time::Duration::from_secs(5))
            .await
            .unwrap();
        let ranges: Vec<ipnet::Ipv4Net> = nodes
            .snapshot()
            .objects
            .iter()
            .filter_map(|(_, node)| node.spec.clone().unwrap_or_default().pod_cidr.parse().ok())
            .collect();
        for (index, one) in ranges.iter().enumerate() {
            for other in &ranges[index + 1..] {
                assert!(!one.contains(other) && !other.contains(one), "{ranges:?}");
            }
        }
    }
}
