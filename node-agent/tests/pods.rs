//! Pods on real parts: containerd, runc, the CNI plugin, the logger, driven by the reconciler.
//!
//! Each test runs itself again inside namespaces of its own (mount, network without a way out, pid), so that whatever happens to it
//! all its processes end with it. Needs root; it fails without.

mod pods {
    pub mod flood;
    pub mod hostile_images;
    pub mod images;
    pub mod node;
    pub mod registry;
    pub mod stage;
}

use std::time::Duration;

use pods::{
    node::{Node, pod},
    stage::on_stage,
};

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

            node.until_it_heeds_sigterm("web", "web").await;
            node.delete("web", 30).await;
            let ended = node.status("web").container_statuses[0].state.clone().unwrap();
            let ended = ended.terminated.unwrap();
            assert_eq!(
                (ended.exit_code, ended.reason.as_str()),
                (0, "Completed"),
                "SIGTERM ends it, not SIGKILL"
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
            node.until_it_heeds_sigterm(name, "main").await;
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
        // Each variable is the one before twice: the last would be some terabytes.
        let mut bomb = pod("bomb", &[("main", &[], "fixture:1")]);
        bomb.spec.get_or_insert_default().containers[0].env = (0..40)
            .map(|at: u32| orlop_proto::core::v1::EnvVar {
                name: format!("V{at}"),
                value: format!("$(V{0})$(V{0})xxxxxxxx", at.saturating_sub(1)),
            })
            .collect();
        node.want(&bomb);
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
        node.until("bomb", "is not put together", waits(&["CreateContainerConfigError"]))
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
        node.until_true("ended pods give their network back", |node| node.namespaces() == 5)
            .await;
        for name in ["good", "bad", "missing", "invalid", "local", "program", "bomb"] {
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
fn a_container_over_its_memory_limit_is_oom_killed() {
    on_stage("a_container_over_its_memory_limit_is_oom_killed", async |stage| {
        let mut node = Node::start(stage).await;
        let eats = |name: &str, megabytes: &str, policy: &str| {
            let mut pod = pod(name, &[("main", &["eat", megabytes], "fixture:1")]);
            let spec = pod.spec.get_or_insert_default();
            spec.restart_policy = policy.into();
            let limits = [("memory".to_owned(), "32Mi".to_owned())];
            spec.containers[0].resources.get_or_insert_default().limits = limits.into();
            pod
        };
        node.want(&eats("once", "200", "Never"));
        node.want(&eats("again", "200", "Always"));
        node.want(&eats("modest", "4", "Always"));
        let killed = |state: &Option<orlop_proto::core::v1::ContainerState>| {
            let ended = state.clone().and_then(|state| state.terminated);
            ended.is_some_and(|ended| (ended.exit_code, ended.reason.as_str()) == (137, "OOMKilled"))
        };
        let once = node.until("once", "fails", |status| status.phase == "Failed").await;
        assert!(killed(&once.container_statuses[0].state), "{once:?}");
        assert_eq!(once.container_statuses[0].restart_count, 0);
        let again = node
            .until("again", "is restarted twice", |status| {
                status.container_statuses[0].restart_count >= 2 && status.container_statuses[0].last_state.is_some()
            })
            .await;
        assert!(killed(&again.container_statuses[0].last_state), "{again:?}");
        assert_eq!(again.phase, "Running");
        // A kill that memory has nothing to do with is none of these.
        node.until("modest", "runs", |status| running(status, "main")).await;
        node.until_true("it took its memory", |node| {
            node.log_lines("modest", "main")
                .iter()
                .any(|line| line.contains("took 4 MB"))
        })
        .await;
        let pid = node.process("modest", "main").await.0;
        node.kill(pid);
        let modest = node
            .until("modest", "is restarted", |status| {
                status.container_statuses[0].restart_count == 1 && running(status, "main")
            })
            .await;
        let ended = modest.container_statuses[0]
            .last_state
            .clone()
            .unwrap()
            .terminated
            .unwrap();
        assert_eq!((ended.exit_code, ended.reason.as_str()), (137, "Error"));
        for name in ["once", "again", "modest"] {
            node.delete(name, 0).await;
        }
        node.until_empty().await;
        node.assert_nothing_left();
    });
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
