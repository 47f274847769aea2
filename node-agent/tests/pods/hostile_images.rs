//! Images that lie, that want out of their root, or that unpack to too much: each shows why, and nothing of it stays.

use orlop_node::runtime::image_source::{CONFIG, Descriptor, LAYER, LAYER_GZIP, Manifest, digest_of};

use super::{
    images::{registry_node, waiting},
    node::{Node, pod},
    registry::{self, Registry},
    stage::on_stage,
};
use crate::condition;

#[test]
fn hostile_and_refused_images_show_why_and_leave_nothing() {
    on_stage(
        "pods::hostile_images::hostile_and_refused_images_show_why_and_leave_nothing",
        async |stage| {
            let (mut node, stage) = registry_node(stage, |_| {}).await;
            let open = Registry::start(&stage, 5000, false).await;
            let _guarded = Registry::start(&stage, 5001, true).await;
            let program = registry::program(&stage);
            let (ours, foreign) = registry::platforms();
            let outside = format!("orlop-escape-{}", std::process::id());
            let up = "../".repeat(12);
            let escape = registry::layer(&[
                (&format!("{up}tmp/{outside}"), b"x"),
                (&format!("/tmp/{outside}-absolute"), b"x"),
                ("root", b""),
                (&format!("root/tmp/{outside}-link"), b"x"),
            ]);
            open.push("escape:1", ours, "V=1", &[program.clone(), escape]).await;
            open.push("foreign:1", foreign, "V=1", std::slice::from_ref(&program))
                .await;
            let tail = registry::layer(&[("forged", b"to be forged")]);
            open.push("forged:1", ours, "V=forged", std::slice::from_ref(&tail))
                .await;
            let forged = digest_of(&tail);
            open.forge(&forged);
            for (name, image, why) in [
                ("unknown", "127.0.0.1:5000/none:1", "MANIFEST_UNKNOWN"),
                ("denied", "localhost:5001/escape:1", "unauthorized"),
                ("foreign", "127.0.0.1:5000/foreign:1", "s390x"),
                ("forged", "127.0.0.1:5000/forged:1", forged.as_str()),
            ] {
                node.want(&pod(name, &[("web", &["sleep"], image)]));
                let reason = format!("shows {why}");
                node.until(name, &reason, |status| waiting(status).contains(why)).await;
                node.delete(name, 0).await;
            }
            let kept = node.ctr(&["content", "list", "-q"]);
            assert!(!kept.contains(&forged), "{kept}");
            assert!(!node.ctr(&["images", "list", "-q"]).contains("forged"));

            node.want(&pod("escape", &[("web", &["sleep"], "127.0.0.1:5000/escape:1")]));
            node.until("escape", "is ready", |status| condition(status, "Ready") == "True")
                .await;
            for name in [
                outside.clone(),
                format!("{outside}-absolute"),
                format!("{outside}-link"),
            ] {
                let path = std::path::Path::new("/tmp").join(&name);
                assert!(path.symlink_metadata().is_err(), "{name} is outside of the image");
                let pid = node.process("escape", "web").await.0;
                assert!(
                    std::fs::exists(format!("/proc/{pid}/root/tmp/{name}")).unwrap(),
                    "{name}"
                );
            }
            node.delete("escape", 0).await;
            node.until_empty().await;
            node.assert_nothing_left();
        },
    );
}

#[test]
fn layers_that_unpack_to_too_much_are_refused() {
    on_stage(
        "pods::hostile_images::layers_that_unpack_to_too_much_are_refused",
        async |stage| {
            let (mut node, stage) = registry_node(stage, |images| {
                images.max_unpacked_bytes = 48 << 20;
                images.max_unpacked_files = 500;
            })
            .await;
            let open = Registry::start(&stage, 5000, false).await;
            let program = registry::program(&stage);
            let empty: Vec<String> = (0..600).map(|at| format!("file-{at}")).collect();
            let files: Vec<(&str, &[u8])> = empty.iter().map(|name| (name.as_str(), b"x".as_slice())).collect();
            let many = registry::layer(&files);
            for (name, media_type, layer, why) in [
                ("zeros", LAYER_GZIP, registry::zeros(), "images.max_unpacked_bytes"),
                ("sparse", LAYER, registry::sparse(), "images.max_unpacked_bytes"),
                ("files", LAYER, many.clone(), "images.max_unpacked_files"),
            ] {
                let blobs = [(LAYER, program.clone()), (media_type, layer.clone())];
                let diff_ids = [digest_of(&program), digest_of(&layer)];
                open.push_blobs(&format!("{name}:1"), &diff_ids, &blobs).await;
                refused(&node, name, &open.name(&format!("{name}:1")), why).await;
                let kept = node.ctr(&["content", "list", "-q"]);
                assert!(!kept.contains(&digest_of(&layer)), "{kept}");
            }
            // From an archive, too.
            let config = serde_json::json!({"rootfs": {"type": "layers", "diff_ids": [digest_of(&many)]}}).to_string();
            let names = r#"[{"Config": "c.json", "RepoTags": ["archived:1"], "Layers": ["l.tar"]}]"#;
            let files: [(&str, &[u8]); 3] = [
                ("manifest.json", names.as_bytes()),
                ("c.json", config.as_bytes()),
                ("l.tar", &many),
            ];
            std::fs::write(stage.dir.join("images/archived.tar"), registry::layer(&files)).unwrap();
            refused(&node, "archived", "archived:1", "images.max_unpacked_files").await;

            assert!(
                !node.ctr(&["snapshots", "list"]).contains("orlop-extract"),
                "half-unpacked"
            );
            // What containerd was still writing when it was stopped goes with its next collection.
            node.ctr(&["leases", "create", "--id", "collect"]);
            node.until_true("the disk is free again", |node| {
                node.ctr(&["leases", "delete", "--sync", "collect"]);
                disk_use(&stage.dir.join("c")) < 64 << 20
            })
            .await;
            node.until_empty().await;
            node.assert_nothing_left();
        },
    );
}

#[test]
fn images_that_lie_about_themselves_are_refused() {
    on_stage(
        "pods::hostile_images::images_that_lie_about_themselves_are_refused",
        async |stage| {
            let (mut node, stage) = registry_node(stage, |_| {}).await;
            let open = Registry::start(&stage, 5000, false).await;
            let program = registry::program(&stage);
            let (digest, other) = (digest_of(&program), digest_of(b"another layer"));
            let whole = [(LAYER, program.clone())];
            let deep: Vec<_> = vec![(LAYER, registry::layer(&[])); 128];
            let deep_ids: Vec<String> = deep.iter().map(|(_, layer)| digest_of(layer)).collect();
            for (name, diff_ids, blobs, why) in [
                ("diff", vec![other.clone()], &whole[..], "its configuration says"),
                ("none", vec![], &whole[..], "another number of layers"),
                (
                    "path",
                    vec!["../../x".to_owned()],
                    &whole[..],
                    "which is no sha256 digest",
                ),
                ("deep", deep_ids, &deep[..], "128 layers"),
                (
                    "kind",
                    vec![digest.clone()],
                    &[("text/html", program.clone())][..],
                    "which is no layer's",
                ),
                (
                    "torn",
                    vec![digest.clone()],
                    &[(LAYER_GZIP, program[..1000].to_vec())][..],
                    "unpacking a layer",
                ),
                (
                    "link",
                    vec![digest_of(&registry::hard_link())],
                    &[(LAYER, registry::hard_link())][..],
                    "unpacking a layer",
                ),
            ] {
                open.push_blobs(&format!("{name}:1"), &diff_ids, blobs).await;
                refused(&node, name, &open.name(&format!("{name}:1")), why).await;
            }
            let layer = |size: u64| Descriptor {
                size,
                ..registry::described(LAYER, &program)
            };
            let (config, length) = (registry::described(CONFIG, b"{}"), program.len() as u64);
            for (name, config, layer, why) in [
                ("short", config.clone(), layer(length - 1), "its manifest"),
                ("long", config.clone(), layer(length + 1), "its manifest"),
                (
                    "vast",
                    config.clone(),
                    layer(i64::MAX.unsigned_abs()),
                    "images.max_image_bytes",
                ),
                (
                    "config",
                    Descriptor {
                        size: 5 << 20,
                        ..config.clone()
                    },
                    layer(length),
                    "configuration is larger",
                ),
                (
                    "digest",
                    config.clone(),
                    Descriptor {
                        digest: "sha256:../../x".into(),
                        ..layer(1)
                    },
                    "no sha256 digest",
                ),
            ] {
                // No registry takes these: its own files are what it serves. The blobs are there.
                let there = [(LAYER, program.clone()), (CONFIG, b"{}".to_vec())];
                open.push_blobs(&format!("{name}:0"), &[], &there).await;
                open.plant(name, &Manifest::new(config, vec![layer]).to_bytes());
                refused(&node, name, &open.name(&format!("{name}:1")), why).await;
            }
            let images = node.ctr(&["images", "list", "-q"]);
            assert!(!images.contains("127.0.0.1"), "{images}");
            let snapshots = node.ctr(&["snapshots", "list"]);
            assert!(!snapshots.contains("orlop-extract"), "{snapshots}");

            // A device node is unpacked, as images may have them; nobody in the container may open it.
            let with_device = [program.clone(), registry::device(1, 11)];
            open.push("device:1", registry::platforms().0, "V=1", &with_device)
                .await;
            node.want(&pod("device", &[("web", &["sleep"], &open.name("device:1"))]));
            node.until("device", "is ready", |status| condition(status, "Ready") == "True")
                .await;
            let device = format!("/proc/{}/root/device", node.process("device", "web").await.0);
            let cgroups = node.cgroups("uid-of-device", "web").await;
            let join: String = cgroups
                .iter()
                .map(|cgroup| format!("echo $$ > {}/cgroup.procs; ", cgroup.display()))
                .collect();
            let read = |before: &str| {
                let script = format!("{before} exec 3< {device}");
                std::process::Command::new("sh").args(["-c", &script]).output().unwrap()
            };
            assert!(read("").status.success(), "outside of the container it can be opened");
            let inside = read(&join);
            let said = String::from_utf8_lossy(&inside.stderr).into_owned();
            assert!(!inside.status.success() && said.contains("not permitted"), "{said}");
            node.delete("device", 0).await;
            node.until_empty().await;
            node.assert_nothing_left();
        },
    );
}

/// Wants a pod of the image until it shows why it cannot be pulled, and deletes it.
async fn refused(node: &Node, name: &str, image: &str, why: &str) {
    node.want(&pod(name, &[("web", &["sleep"], image)]));
    let reason = format!("shows {why}");
    node.until(name, &reason, |status| waiting(status).contains(why)).await;
    node.delete(name, 0).await;
}

/// The bytes that files take below a folder.
fn disk_use(dir: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some((entry.path(), entry.path().symlink_metadata().ok()?)))
        .map(|(path, metadata)| match metadata.is_dir() {
            true => disk_use(&path),
            false => metadata.blocks() * 512,
        })
        .sum()
}
