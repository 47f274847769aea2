//! Images from a registry, those of other tools, and the removal of unused ones: docker-registry, containerd, and what is on disk.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use orlop_node::runtime::{
    garbage::GcSettings,
    image_source::{CONFIG, LAYER, Manifest, digest_of},
    registry::{PullSettings, RegistrySettings, Secret},
};
use orlop_proto::core::v1::PodStatus;

use super::{
    node::{Node, pod},
    registry::{self, Registry},
    stage::{Stage, on_stage},
};
use crate::condition;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";

#[test]
fn images_come_from_a_registry() {
    on_stage("pods::images::images_come_from_a_registry", async |stage| {
        let (mut node, stage) = registry_node(stage, |_| {}).await;
        let mut open = Registry::start(&stage, 5000, false).await;
        let _guarded = Registry::start(&stage, 5001, true).await;
        let program = registry::program(&stage);
        let (ours, foreign) = registry::platforms();
        let layers = [program.clone(), registry::layer(&[("about", b"second layer")])];
        let (first, first_id) = open.push("team/app:ours", ours, "V=1", &layers).await;
        let (other, _) = open.push("team/app:other", foreign, "V=1", &layers).await;
        let index = serde_json::json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [other, first]});
        let index = open
            .push_manifest("team/app:1", INDEX, index.to_string().into_bytes())
            .await;

        // One pull for many pods.
        let names: Vec<String> = (0..5).map(|at| format!("p{at}")).collect();
        for name in &names {
            node.want(&pod(name, &[("web", &["sleep"], &open.name("team/app:1"))]));
        }
        for name in &names {
            let status = node
                .until(name, "is ready", |status| condition(status, "Ready") == "True")
                .await;
            assert!(status.container_statuses[0].image_id.contains(&first_id), "{status:?}");
        }
        let layer = digest_of(&program);
        assert_eq!(open.asked(&layer), 1, "one pull for five pods");

        // By digest, and with credentials.
        let by_digest = open.name(&format!("team/app@{}", index.digest));
        for (name, image) in [("digest", by_digest.as_str()), ("basic", "127.0.0.1:5001/team/app:1")] {
            node.want(&pod(name, &[("web", &["sleep"], image)]));
            node.until(name, "is ready", |status| condition(status, "Ready") == "True")
                .await;
        }
        assert_eq!(open.asked(&layer), 1, "what containerd has is not pulled again");

        // A tag that moves: only Always sees it, and only while the registry answers.
        let (_, moved_id) = open.push("team/app:1", ours, "V=2", &layers).await;
        let of_policy = |name: &str, policy: &str| {
            let mut pod = pod(name, &[("web", &["sleep"], "127.0.0.1:5000/team/app:1")]);
            pod.spec.get_or_insert_default().containers[0].image_pull_policy = policy.into();
            pod
        };
        for (name, policy, id) in [("kept", "IfNotPresent", &first_id), ("asked", "Always", &moved_id)] {
            node.want(&of_policy(name, policy));
            let status = node
                .until(name, "is ready", |status| condition(status, "Ready") == "True")
                .await;
            assert!(status.container_statuses[0].image_id.contains(id), "{status:?}");
        }
        open.stop();
        node.want(&of_policy("late", "IfNotPresent"));
        node.until("late", "is ready", |status| condition(status, "Ready") == "True")
            .await;
        node.want(&of_policy("alone", "Always"));
        node.until("alone", "cannot ask", |status| {
            waiting(status).contains("127.0.0.1:5000: ")
        })
        .await;

        let others = ["digest", "basic", "kept", "asked", "late", "alone"].map(str::to_owned);
        for name in names.iter().chain(&others) {
            node.delete(name, 0).await;
        }
        node.until_empty().await;
        node.assert_nothing_left();
    });
}

#[test]
fn what_is_being_unpacked_outlasts_a_collection() {
    on_stage(
        "pods::images::what_is_being_unpacked_outlasts_a_collection",
        async |stage| {
            let (mut node, stage) = registry_node(stage, |_| {}).await;
            // As another tool leaves it: the image is there, and none of its layers is unpacked.
            let program = registry::program(&stage);
            let own = (0..8).map(|at| registry::layer(&[(&format!("layer-{at}"), b"its only file")]));
            let layers: Vec<Vec<u8>> = std::iter::once(program).chain(own).collect();
            let archive = stage.dir.join("imported.tar");
            std::fs::write(&archive, docker_archive("docker.io/library/imported:1", &layers)).unwrap();
            node.ctr(&["images", "import", "--no-unpack", archive.to_str().unwrap()]);
            node.want(&pod("imported", &[("web", &["sleep"], "imported:1")]));
            // Whatever nothing holds goes with each of these.
            let collect = async {
                loop {
                    node.ctr(&["leases", "create", "--id", "collect"]);
                    node.ctr(&["leases", "delete", "--sync", "collect"]);
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            };
            let unpacked = node.until("imported", "is ready or says why not", |status| {
                condition(status, "Ready") == "True" || !waiting(status).is_empty()
            });
            let status = tokio::select! {
                status = unpacked => status,
                () = collect => unreachable!("it goes on for ever"),
            };
            assert_eq!(waiting(&status), "");
            assert!(
                !node.ctr(&["leases", "list"]).contains("orlop-import"),
                "its lease is gone"
            );
            node.delete("imported", 0).await;
            node.until_empty().await;
            node.assert_nothing_left();
        },
    );
}

#[test]
fn unused_images_go_when_the_disk_is_full() {
    on_stage("pods::images::unused_images_go_when_the_disk_is_full", async |stage| {
        // Every disk is fuller than this.
        let full = GcSettings {
            high_threshold_percent: 0,
            low_threshold_percent: 0,
            minimum_age_seconds: 0,
            interval_seconds: 1,
        };
        let (mut node, stage) = registry_node(stage, |images| images.gc = full).await;
        let open = Registry::start(&stage, 5000, false).await;
        let program = registry::program(&stage);
        let (ours, _) = registry::platforms();
        let own = |name: &str| registry::layer(&[(name, b"of this image alone")]);
        for name in ["used", "unused"] {
            let layers = [program.clone(), own(name)];
            open.push(&format!("{name}:1"), ours, "V=1", &layers).await;
            node.want(&pod(name, &[("web", &["sleep"], &open.name(&format!("{name}:1")))]));
        }
        for name in ["used", "unused"] {
            node.until(name, "is ready", |status| condition(status, "Ready") == "True")
                .await;
        }
        let snapshots = |node: &Node| node.ctr(&["snapshots", "list"]).lines().count();
        let (before, process) = (snapshots(&node), node.process("used", "web").await);
        let lease = node.ctr(&["leases", "create", "--id", "orlop-import-of-another-life"]);
        assert!(lease.contains("of-another-life"), "{lease}");
        node.delete("unused", 0).await;
        node.until_true("the unused image is gone", |node| {
            let images = node.ctr(&["images", "list", "-q"]);
            !images.contains("unused") && snapshots(node) < before
        })
        .await;
        node.until_true("the lease of an import that was cut off is gone", |node| {
            !node.ctr(&["leases", "list"]).contains("of-another-life")
        })
        .await;
        let images = node.ctr(&["images", "list", "-q"]);
        assert!(images.contains("/used:1") && images.contains("pause"), "{images}");
        let mut again = pod("again", &[("web", &["sleep"], &open.name("used:1"))]);
        again.spec.get_or_insert_default().containers[0].image_pull_policy = "Never".into();
        node.want(&again);
        node.want(&pod("unused", &[("web", &["sleep"], &open.name("unused:1"))]));
        for name in ["again", "unused"] {
            node.until(name, "is ready", |status| condition(status, "Ready") == "True")
                .await;
        }
        assert_eq!(node.process("used", "web").await, process, "it was left alone");
        for name in ["used", "again", "unused"] {
            node.delete(name, 0).await;
        }
        node.until_empty().await;
        node.until_true("no image is left but the pause image", |node| {
            let images = node.ctr(&["images", "list", "-q"]);
            images.lines().count() == 1 && images.contains("pause")
        })
        .await;
        node.assert_nothing_left();
    });
}

#[test]
fn a_pull_that_nobody_waits_for_any_more_leaves_nothing() {
    on_stage(
        "pods::images::a_pull_that_nobody_waits_for_any_more_leaves_nothing",
        async |stage| {
            let (mut node, _) = registry_node(stage, |_| {}).await;
            stalling_registry(false).await;
            node.want(&pod("stalled", &[("web", &["sleep"], "127.0.0.1:5000/stalled:1")]));
            node.until_true("it is being written", |node| {
                node.ctr(&["leases", "list"]).contains("orlop-import")
                    && node.ctr(&["content", "active"]).contains("orlop-")
            })
            .await;
            node.delete("stalled", 0).await;
            node.until_true("it is given up", |node| {
                !node.ctr(&["leases", "list"]).contains("orlop-import")
            })
            .await;
            assert!(!node.ctr(&["images", "list", "-q"]).contains("stalled"));
            node.until_empty().await;
            node.assert_nothing_left();
        },
    );
}

#[test]
fn a_registry_in_drops_does_not_outlast_a_failed_write() {
    on_stage(
        "pods::images::a_registry_in_drops_does_not_outlast_a_failed_write",
        async |stage| {
            let (mut node, _) = registry_node(stage, |_| {}).await;
            let asked = stalling_registry(true).await;
            node.want(&pod("drops", &[("web", &["sleep"], "127.0.0.1:5000/stalled:1")]));
            node.until_true("it is being written", |node| {
                node.ctr(&["content", "active"]).contains("orlop-")
            })
            .await;
            let before = asked.load(Ordering::SeqCst);
            node.kill_containerd();
            node.start_containerd();
            // At ten bytes a second the piece that was begun would be whole in half a day.
            node.until_true("it is begun anew", |_| asked.load(Ordering::SeqCst) > before)
                .await;
            node.delete("drops", 0).await;
            node.until_empty().await;
        },
    );
}

/// A registry at port 5000 that gives half of a layer, and then next to nothing. Counts how often it was asked for the layer.
async fn stalling_registry(dripping: bool) -> Arc<AtomicUsize> {
    let layer = registry::layer(&[("half", &vec![7; 4 << 20])]);
    let config = serde_json::json!({"rootfs": {"type": "layers", "diff_ids": [digest_of(&layer)]}}).to_string();
    let manifest = Manifest::new(
        registry::described(CONFIG, config.as_bytes()),
        vec![registry::described(LAYER, &layer)],
    );
    registry::stalling(5000, manifest.to_bytes(), config, layer, dripping).await
}

/// An archive of an image of these layers, as docker saves one.
fn docker_archive(name: &str, layers: &[Vec<u8>]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|layer| digest_of(layer)).collect();
    let config = serde_json::json!({
        "architecture": registry::platforms().0, "os": "linux",
        "config": {"Entrypoint": ["/fixture"], "Cmd": ["sleep"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let names: Vec<String> = (0..layers.len()).map(|at| format!("layer-{at}.tar")).collect();
    let manifest = serde_json::json!([{"Config": "config.json", "RepoTags": [name], "Layers": names}]);
    let (config, manifest) = (config.to_string(), manifest.to_string());
    let mut files = vec![
        ("manifest.json", manifest.as_bytes()),
        ("config.json", config.as_bytes()),
    ];
    files.extend(names.iter().map(String::as_str).zip(layers.iter().map(Vec::as_slice)));
    registry::layer(&files)
}

/// A node that knows the registries of these tests, and their stage.
pub(super) async fn registry_node(stage: Stage, change: impl FnOnce(&mut PullSettings)) -> (Node, Stage) {
    let plain = RegistrySettings {
        plain_http: true,
        ..RegistrySettings::default()
    };
    let user = RegistrySettings {
        username: Some("user".into()),
        password: Some(Secret("sesame".into())),
        ..plain.clone()
    };
    let registries = [
        ("127.0.0.1:5000", plain.clone()),
        ("127.0.0.1:5001", user),
        ("localhost:5001", plain),
    ];
    let registries = registries.map(|(host, registry)| (host.to_owned(), registry)).into();
    let node = Node::start_with(stage.clone(), |config| {
        config.registries = registries;
        change(&mut config.images);
    });
    (node.await, stage)
}

/// Why the container waits.
pub(super) fn waiting(status: &PodStatus) -> String {
    let state = status.container_statuses.first().and_then(|one| one.state.clone());
    let waiting = state.and_then(|state| state.waiting).unwrap_or_default();
    match waiting.reason.as_str() {
        "ErrImagePull" | "ImagePullBackOff" => waiting.message,
        _ => String::new(),
    }
}
