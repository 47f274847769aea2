//! Pods on real parts: containerd, runc, the CNI plugin, the logger, driven by the reconciler.
//!
//! Each test runs itself again inside namespaces of its own (mount, network without a way out, pid), so that whatever happens to it
//! all its processes end with it. Needs root; it fails without.

mod pods {
    pub mod node;
    pub mod registry;
    pub mod stage;
}

use std::time::Duration;

use orlop_node::runtime::registry::{RegistrySettings, Secret};
use pods::{
    node::{Node, pod},
    registry::{self, Registry},
    stage::{Stage, on_stage},
};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";

#[test]
fn a_pod_lives_through_restarts_of_agent_and_containerd() {
    on_stage("a_pod_lives_through_restarts_of_agent_and_containerd", async |stage| {
        let mut node = Node::start(stage).await;
        let web = pod(
            "web",
            &[
                ("web", &["tick", "50"], "fixture:1"),
                ("crash", &["exit", "3"], "fixture:1"),
            ],
        );
        node.want(&web);
        let status = node.until("web", "runs and restarts", |status| {
            let crash = &status.container_statuses[0];
            running(status, "web") && crash.restart_count >= 2 && crash.last_state.is_some()
        });
        let status = status.await;
        let ended = status.container_statuses[0]
            .last_state
            .clone()
            .unwrap()
            .terminated
            .unwrap();
        assert_eq!((ended.exit_code, ended.reason.as_str()), (3, "Error"));
        assert_eq!(status.phase, "Running");
        assert!(status.pod_ip.starts_with("10.244.9."), "{}", status.pod_ip);
        let backing_off = node
            .until("web", "backs off", |status| {
                let state = status.container_statuses[0].state.clone().unwrap();
                state
                    .waiting
                    .is_some_and(|waiting| waiting.reason == "CrashLoopBackOff")
            })
            .await;
        assert_eq!(condition(&backing_off, "Ready"), "False");
        assert_eq!(node.shims(), 1, "all containers of a pod are in one shim");
        let before = node.process("web", "web").await;
        let restarts = node.status("web").container_statuses[0].restart_count;
        let lines = node.log_lines("web", "web");
        assert!(
            lines.iter().all(|line| line.split(' ').nth(1) == Some("stdout")),
            "{lines:?}"
        );

        node.stop_agent().await;
        let written = node.log_lines("web", "web").len();
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(
            node.log_lines("web", "web").len() > written,
            "the log goes on without an agent"
        );
        node.start_agent(false);
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(
            node.process("web", "web").await,
            before,
            "what control has not spoken of is left alone"
        );
        node.complete();
        let after = node.until("web", "is adopted", |status| running(status, "web")).await;
        assert_eq!(node.process("web", "web").await, before, "same pid, same start");
        assert!(
            after.container_statuses[0].restart_count >= restarts,
            "the count survives"
        );

        node.kill_containerd();
        tokio::time::sleep(Duration::from_millis(200)).await;
        node.start_containerd();
        let written = node.log_lines("web", "web").len();
        node.until_true("the log goes on", |node| {
            node.log_lines("web", "web").len() > written + 3
        })
        .await;
        assert_eq!(
            node.process("web", "web").await,
            before,
            "same pid, same start after containerd's restart"
        );

        node.unwant("web");
        node.until_empty().await;
        node.assert_nothing_left();
    });
}

#[test]
fn a_dead_sandbox_is_replaced_and_deletion_keeps_its_grace() {
    on_stage(
        "a_dead_sandbox_is_replaced_and_deletion_keeps_its_grace",
        async |stage| {
            let mut node = Node::start(stage).await;
            node.want(&pod("web", &[("web", &["sleep"], "fixture:1")]));
            let first = node
                .until("web", "is ready", |status| condition(status, "Ready") == "True")
                .await;
            assert_eq!(condition(&first, "PodReadyToStartContainers"), "True");
            let pause = node.pause_pid("web").await;
            node.kill(pause);
            let second = node
                .until("web", "has a new sandbox", |status| {
                    condition(status, "Ready") == "True" && status.container_statuses[0].restart_count == 1
                })
                .await;
            assert_ne!(node.pause_pid("web").await, pause);
            assert!(!second.pod_ip.is_empty());
            assert_eq!(
                second.container_statuses[0]
                    .last_state
                    .clone()
                    .unwrap()
                    .terminated
                    .unwrap()
                    .exit_code,
                137
            );

            let pid = node.process("web", "web").await.0;
            node.kill(pid);
            node.until("web", "is restarted", |status| {
                condition(status, "Ready") == "True" && status.container_statuses[0].restart_count == 2
            })
            .await;

            let deleted = node.delete("web", 30).await;
            assert!(
                deleted < Duration::from_secs(10),
                "SIGTERM ends it long before its grace: {deleted:?}"
            );
            node.until_empty().await;
            node.assert_nothing_left();
        },
    );
}

#[test]
fn a_container_is_asked_to_end_by_its_images_stop_signal() {
    on_stage("a_container_is_asked_to_end_by_its_images_stop_signal", async |stage| {
        let mut node = Node::start(stage).await;
        for (name, image, wanted) in [
            ("term", "fixture:1", (0, "Completed")),
            ("kill", "fixture:kill", (137, "Error")),
        ] {
            node.want(&pod(name, &[("main", &["sleep"], image)]));
            node.until(name, "is ready", |status| condition(status, "Ready") == "True")
                .await;
            node.delete(name, 30).await;
            let status = node.status(name);
            let ended = status.container_statuses[0].state.clone().unwrap().terminated.unwrap();
            assert_eq!((ended.exit_code, ended.reason.as_str()), wanted, "{name}");
        }
        node.until_empty().await;
        node.assert_nothing_left();
    });
}

#[test]
fn a_killed_shim_costs_its_own_pod_alone() {
    on_stage("a_killed_shim_costs_its_own_pod_alone", async |stage| {
        let mut node = Node::start(stage).await;
        let ready = |status: &orlop_proto::core::v1::PodStatus| condition(status, "Ready") == "True";
        for name in ["hit", "other"] {
            node.want(&pod(
                name,
                &[("web", &["sleep"], "fixture:1"), ("tick", &["tick", "50"], "fixture:1")],
            ));
            node.until(name, "is ready", ready).await;
        }
        let (hit, other) = (node.process("hit", "web").await, node.process("other", "web").await);
        let pause = node.pause_pid("hit").await;
        node.kill(node.parent(pause));
        let restarted = |status: &orlop_proto::core::v1::PodStatus| {
            ready(status)
                && status
                    .container_statuses
                    .iter()
                    .all(|container| container.restart_count == 1)
        };
        let status = node.until("hit", "runs again", restarted).await;
        let lost = status.container_statuses[0]
            .last_state
            .clone()
            .unwrap()
            .terminated
            .unwrap();
        assert_eq!((lost.exit_code, lost.reason.as_str()), (137, "ContainerStatusUnknown"));
        node.until_true("what the shim ran is gone", |node| {
            !node.exists(hit.0) && !node.exists(pause)
        })
        .await;
        assert_eq!(node.process("other", "web").await, other);
        for name in ["hit", "other"] {
            node.delete(name, 5).await;
        }
        node.until_empty().await;
        node.assert_nothing_left();
    });
}

#[test]
fn after_a_reboot_pods_run_again_without_control() {
    on_stage("after_a_reboot_pods_run_again_without_control", async |stage| {
        let mut node = Node::start(stage).await;
        node.want(&pod(
            "web",
            &[("web", &["tick", "50"], "fixture:1"), ("side", &["sleep"], "fixture:1")],
        ));
        let ready = |status: &orlop_proto::core::v1::PodStatus| condition(status, "Ready") == "True";
        node.until("web", "is ready", ready).await;
        let pid = node.process("web", "web").await.0;
        let shared = format!("/proc/{pid}/root/dev/shm/left");
        std::fs::write(&shared, "x").unwrap();
        let side = node.process("web", "side").await.0;
        assert!(
            std::fs::exists(format!("/proc/{side}/root/dev/shm/left")).unwrap(),
            "/dev/shm is the pod's"
        );
        node.reboot().await;
        let status = node
            .until("web", "runs again", |status| {
                ready(status)
                    && status
                        .container_statuses
                        .iter()
                        .all(|container| container.restart_count == 1)
            })
            .await;
        assert!(!status.pod_ip.is_empty());
        node.delete("web", 5).await;
        node.until_empty().await;
        node.assert_nothing_left();
    });
}

#[test]
fn twenty_pods_start_at_once() {
    on_stage("twenty_pods_start_at_once", async |stage| {
        let mut node = Node::start(stage).await;
        let names: Vec<String> = (0..20).map(|at| format!("p{at}")).collect();
        let begin = std::time::Instant::now();
        for name in &names {
            node.want(&pod(name, &[("web", &["sleep"], "fixture:1")]));
        }
        let mut addresses = std::collections::BTreeSet::new();
        for name in &names {
            let status = node
                .until(name, "is ready", |status| condition(status, "Ready") == "True")
                .await;
            addresses.insert(status.pod_ip);
        }
        println!("{} ms a pod", begin.elapsed().as_millis() / 20);
        assert_eq!(addresses.len(), 20, "no address is given twice");
        assert_eq!(node.shims(), 20);
        for name in &names {
            node.unwant(name);
        }
        node.until_empty().await;
        node.assert_nothing_left();
    });
}

#[test]
fn ends_and_errors_show_in_the_status() {
    on_stage("ends_and_errors_show_in_the_status", async |stage| {
        let mut node = Node::start(stage).await;
        let never = |name: &str, code: &str| {
            let mut pod = pod(name, &[("main", &["exit", code], "fixture:1")]);
            pod.spec.get_or_insert_default().restart_policy = "Never".into();
            pod
        };
        node.want(&never("good", "0"));
        node.want(&never("bad", "7"));
        node.want(&pod("missing", &[("main", &[], "nowhere:1")]));
        node.want(&pod("invalid", &[("main", &[], "NOT/valid")]));
        let mut local = pod("local", &[("main", &[], "elsewhere:1")]);
        local.spec.get_or_insert_default().containers[0].image_pull_policy = "Never".into();
        node.want(&local);
        let mut program = pod("program", &[("main", &[], "fixture:1")]);
        let container = &mut program.spec.get_or_insert_default().containers[0];
        container.command = vec!["/no/such/program".into()];
        node.want(&program);
        let good = node
            .until("good", "succeeds", |status| status.phase == "Succeeded")
            .await;
        let ended = good.container_statuses[0].state.clone().unwrap().terminated.unwrap();
        assert_eq!((ended.exit_code, ended.reason.as_str()), (0, "Completed"));
        let bad = node.until("bad", "fails", |status| status.phase == "Failed").await;
        assert_eq!(
            bad.container_statuses[0]
                .state
                .clone()
                .unwrap()
                .terminated
                .unwrap()
                .exit_code,
            7
        );
        let waits = |reasons: &'static [&'static str]| {
            move |status: &orlop_proto::core::v1::PodStatus| {
                let state = status.container_statuses[0].state.clone().unwrap_or_default();
                status.phase == "Pending"
                    && state
                        .waiting
                        .is_some_and(|waiting| reasons.contains(&waiting.reason.as_str()))
            }
        };
        node.until("missing", "cannot be pulled", waits(&["ErrImagePull"]))
            .await;
        node.until("missing", "backs off", waits(&["ImagePullBackOff"])).await;
        node.until("invalid", "has an invalid image", waits(&["InvalidImageName"]))
            .await;
        node.until("local", "is never pulled", waits(&["ErrImageNeverPull"]))
            .await;
        node.until("program", "cannot be started", |status| {
            let container = &status.container_statuses[0];
            let of = |state: &Option<orlop_proto::core::v1::ContainerState>| {
                state
                    .clone()
                    .and_then(|state| state.terminated)
                    .is_some_and(|ended| ended.reason == "StartError")
            };
            of(&container.state) || of(&container.last_state)
        })
        .await;
        node.until_true("ended pods give their network back", |node| node.namespaces() == 4)
            .await;
        for name in ["good", "bad", "missing", "invalid", "local", "program"] {
            node.delete(name, 0).await;
        }
        node.until_empty().await;
        node.assert_nothing_left();
    });
}

#[test]
fn variables_limits_and_files_reach_the_container() {
    on_stage("variables_limits_and_files_reach_the_container", async |stage| {
        let mut node = Node::start(stage).await;
        let mut web = pod("web", &[("web", &["env"], "fixture:1")]);
        let container = &mut web.spec.get_or_insert_default().containers[0];
        let variable = |name: &str, value: &str| orlop_proto::core::v1::EnvVar {
            name: name.into(),
            value: value.into(),
        };
        container.env = vec![variable("A", "1"), variable("B", "$(A)-$$(A)")];
        let limits = [("cpu", "500m"), ("memory", "32Mi")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        container.resources.get_or_insert_default().limits = limits.into();
        node.want(&web);
        node.until("web", "is ready", |status| condition(status, "Ready") == "True")
            .await;
        node.until_true("it printed its variables", |node| {
            let log = node.log_lines("web", "web").join("\n");
            log.contains("B=1-$(A)") && log.contains("HOSTNAME=web")
        })
        .await;
        let pid = node.process("web", "web").await.0;
        let root = format!("/proc/{pid}/root/etc");
        let status = node.status("web");
        let hosts = std::fs::read_to_string(format!("{root}/hosts")).unwrap();
        assert!(hosts.contains(&format!("{}\tweb", status.pod_ip)), "{hosts}");
        assert_eq!(std::fs::read_to_string(format!("{root}/hostname")).unwrap(), "web\n");
        assert_eq!(
            node.cgroup_file("web", "web", &["memory.limit_in_bytes", "memory.max"])
                .await,
            "33554432"
        );
        let quota = node.cgroup_file("web", "web", &["cpu.cfs_quota_us", "cpu.max"]).await;
        assert!(quota == "50000" || quota == "50000 100000", "{quota}");
        node.delete("web", 5).await;
        node.until_empty().await;
        node.assert_nothing_left();
    });
}

#[test]
fn images_come_from_a_registry() {
    on_stage("images_come_from_a_registry", async |stage| {
        let (mut node, stage) = registry_node(stage).await;
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
        let layer = orlop_node::runtime::image_source::digest_of(&program);
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
fn hostile_and_refused_images_show_why_and_leave_nothing() {
    on_stage("hostile_and_refused_images_show_why_and_leave_nothing", async |stage| {
        let (mut node, stage) = registry_node(stage).await;
        let open = Registry::start(&stage, 5000, false).await;
        let _guarded = Registry::start(&stage, 5001, true).await;
        let program = registry::program(&stage);
        let (ours, foreign) = registry::platforms();
        let outside = format!("orlop-escape-{}", std::process::id());
        let up = "../".repeat(12);
        let escape = registry::layer(&[
            (&format!("{up}tmp/{outside}"), b"x"),
            ("root", b""),
            (&format!("root/tmp/{outside}-link"), b"x"),
        ]);
        open.push("escape:1", ours, "V=1", &[program.clone(), escape]).await;
        open.push("foreign:1", foreign, "V=1", std::slice::from_ref(&program))
            .await;
        let tail = registry::layer(&[("forged", b"to be forged")]);
        open.push("forged:1", ours, "V=forged", std::slice::from_ref(&tail))
            .await;
        let forged = orlop_node::runtime::image_source::digest_of(&tail);
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
        for name in [outside.clone(), format!("{outside}-link")] {
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
    });
}

/// A node that knows the registries of these tests, and their stage.
async fn registry_node(stage: Stage) -> (Node, Stage) {
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
    (Node::start_with(stage.clone(), registries).await, stage)
}

/// Why the container waits.
fn waiting(status: &orlop_proto::core::v1::PodStatus) -> String {
    let state = status.container_statuses.first().and_then(|one| one.state.clone());
    let waiting = state.and_then(|state| state.waiting).unwrap_or_default();
    match waiting.reason.as_str() {
        "ErrImagePull" | "ImagePullBackOff" => waiting.message,
        _ => String::new(),
    }
}

fn running(status: &orlop_proto::core::v1::PodStatus, name: &str) -> bool {
    let container = status
        .container_statuses
        .iter()
        .find(|container| container.name == name);
    container
        .and_then(|container| container.state.clone())
        .is_some_and(|state| state.running.is_some())
}

fn condition(status: &orlop_proto::core::v1::PodStatus, kind: &str) -> String {
    let found = status.conditions.iter().find(|condition| condition.r#type == kind);
    found.map(|condition| condition.status.clone()).unwrap_or_default()
}
