use std::sync::Arc;

use orlop_proto::core::v1::{Container, PodSpec, PodStatus};

use super::*;
use crate::runtime::{Exit, ObservedSandbox};

mod simulation;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

fn make_pod(uid: &str, policy: &str, names: &[&str]) -> Pod {
    let containers = names.iter().map(|name| Container {
        name: (*name).into(),
        image: "i".into(),
        ..Default::default()
    });
    let spec = PodSpec {
        containers: containers.collect(),
        restart_policy: policy.into(),
        termination_grace_period_seconds: Some(30),
        ..Default::default()
    };
    let mut pod = Pod {
        spec: Some(spec),
        ..Default::default()
    };
    let meta = pod.meta_mut();
    (meta.namespace, meta.name, meta.uid) = ("default".into(), format!("pod-{uid}"), uid.into());
    pod
}

fn deleted(mut pod: Pod, grace: i64) -> Pod {
    let meta = pod.meta_mut();
    meta.deletion_timestamp = Some(prost_types::Timestamp { seconds: 1, nanos: 0 });
    meta.deletion_grace_period_seconds = Some(grace);
    pod
}

fn running(second: i64) -> ProcessState {
    ProcessState::Running {
        pid: 7,
        started_at: at(second),
    }
}

fn exited(code: i32, started: i64, finished: i64) -> ProcessState {
    ProcessState::Exited(Exit {
        code,
        reason: "Error".into(),
        message: String::new(),
        started_at: at(started),
        finished_at: at(finished),
    })
}

fn container(name: &str, restart_count: u32, backoff_ms: Option<u64>, state: ProcessState) -> ObservedContainer {
    ObservedContainer {
        id: format!("{name}-{restart_count}"),
        sandbox_id: "s0".into(),
        name: name.into(),
        restart_count,
        backoff_ms,
        image: "i".into(),
        image_id: "d".into(),
        grace_seconds: 30,
        state,
    }
}

fn sandbox(id: &str, attempt: u32, state: ProcessState) -> ObservedSandbox {
    let addresses = vec!["10.244.0.2".parse().unwrap()];
    ObservedSandbox {
        id: id.into(),
        attempt,
        state,
        addresses,
        host_interface: "veth0".into(),
    }
}

fn found(pod: &Pod, sandboxes: Vec<ObservedSandbox>, containers: Vec<ObservedContainer>) -> ObservedPod {
    let networks = sandboxes.iter().map(|sandbox| sandbox.id.clone()).collect();
    ObservedPod {
        id: pod_id(pod),
        sandboxes,
        containers,
        networks,
        remains: true,
    }
}

/// The plan of one pod, as names of actions, and when to wake (seconds).
fn planned(pod: &Pod, found: Option<ObservedPod>, progress: &Progress, now: Timestamp) -> (Vec<String>, Option<i64>) {
    let mut desired = Desired {
        complete: true,
        ..Desired::default()
    };
    desired.pods.insert(pod.uid().to_owned(), Arc::new(pod.clone()));
    let observed = Observed {
        pods: found.map(|found| (pod.uid().to_owned(), found)).into_iter().collect(),
    };
    let settings = Settings::default();
    let context = Context {
        desired: &desired,
        progress,
        settings: &settings,
        now,
    };
    let plan = plan(context, &observed).remove(pod.uid()).unwrap();
    (
        plan.actions.iter().map(name).collect(),
        plan.wake_at.map(|time| time.as_second() - at(0).as_second()),
    )
}

fn name(action: &Action) -> String {
    match action {
        Action::CreateSandbox { attempt, .. } => format!("create {attempt}"),
        Action::Attach { sandbox_id, .. } => format!("attach {sandbox_id}"),
        Action::StartContainer(start) => {
            format!("start {} {} {:?}", start.name, start.restart_count, start.backoff_ms)
        }
        Action::Terminate { id } => format!("term {id}"),
        Action::Kill { id } => format!("kill {id}"),
        Action::RemoveContainer { id } => format!("remove {id}"),
        Action::RemoveSandbox { id } => format!("remove sandbox {id}"),
        Action::RemoveNetwork { id } => format!("remove network {id}"),
        Action::RemovePod => "remove pod".to_owned(),
    }
}

fn attached() -> Progress {
    Progress {
        attached: BTreeSet::from(["s0".to_owned()]),
        ..Progress::default()
    }
}

#[test]
fn a_pod_is_started_step_by_step() {
    let pod = make_pod("u", "Always", &["a", "b"]);
    assert_eq!(planned(&pod, None, &Progress::default(), at(0)).0, ["create 0"]);
    let up = found(&pod, vec![sandbox("s0", 0, running(0))], vec![]);
    assert_eq!(
        planned(&pod, Some(up.clone()), &attached(), at(0)).0,
        ["start a 0 None", "start b 0 None"]
    );
    assert_eq!(
        planned(&pod, Some(up), &Progress::default(), at(0)).0,
        ["attach s0", "start a 0 None", "start b 0 None"],
        "an adopted sandbox gets its hooks"
    );
    let half = found(
        &pod,
        vec![sandbox("s0", 0, running(0))],
        vec![container("a", 0, None, ProcessState::Created)],
    );
    assert_eq!(
        planned(&pod, Some(half), &attached(), at(0)).0,
        ["remove a-0", "start a 0 None", "start b 0 None"],
        "a start that was cut off counts for nothing"
    );
}

/// Policy, exit code, last back-off, ran for, asked after, actions, wake.
type Restart = (
    &'static str,
    i32,
    Option<u64>,
    i64,
    i64,
    &'static [&'static str],
    Option<i64>,
);

#[test]
fn restarts_follow_policy_and_back_off() {
    let cases: &[Restart] = &[
        ("Always", 0, None, 5, 5, &["start a 1 Some(0)"], None),
        ("Always", 1, Some(0), 5, 5, &[], Some(15)),
        ("Always", 1, Some(0), 5, 15, &["start a 1 Some(10000)"], None),
        ("Always", 1, Some(10_000), 5, 20, &[], Some(25)),
        ("Always", 1, Some(200_000), 5, 5, &[], Some(305)),
        ("Always", 1, Some(300_000), 600, 600, &["start a 1 Some(0)"], None),
        ("OnFailure", 1, None, 5, 5, &["start a 1 Some(0)"], None),
        ("OnFailure", 0, None, 5, 5, &["remove sandbox s0"], None),
        ("Never", 1, None, 5, 5, &["remove sandbox s0"], None),
    ];
    for (policy, code, backoff, ran, asked, actions, wake) in cases {
        let pod = make_pod("u", policy, &["a"]);
        let ended = container("a", 0, *backoff, exited(*code, 0, *ran));
        let state = found(&pod, vec![sandbox("s0", 0, running(0))], vec![ended]);
        let (made, wakes) = planned(&pod, Some(state), &attached(), at(*asked));
        assert_eq!(
            (made.as_slice(), wakes),
            (actions.map_strings().as_slice(), *wake),
            "{policy} {code} {backoff:?}"
        );
    }
}

trait MapStrings {
    fn map_strings(&self) -> Vec<String>;
}

impl MapStrings for &[&str] {
    fn map_strings(&self) -> Vec<String> {
        self.iter().map(|text| (*text).to_owned()).collect()
    }
}

fn observed(pod: &Pod, container: ObservedContainer) -> Observed {
    let found = found(pod, vec![sandbox("s0", 0, running(0))], vec![container]);
    Observed {
        pods: BTreeMap::from([(pod.uid().to_owned(), found)]),
    }
}

#[test]
fn the_back_off_lasts_as_long_as_it_should_whatever_the_clock_is_set_to() {
    let pod = make_pod("u", "Always", &["a"]);
    let ended = observed(&pod, container("a", 1, Some(0), exited(1, 0, 20)));
    for step in [-10_000, -3, 3, 10_000] {
        let mut progress = attached();
        progress.see(&observed(&pod, container("a", 1, Some(0), running(0))), at(19));
        // Set while it ended: the runtime's time may be of before or of after.
        progress.shift(SignedDuration::from_secs(step));
        progress.see(&ended, at(21 + step));
        let state = || Some(ended.pods[pod.uid()].clone());
        let (actions, wake) = planned(&pod, state(), &progress, at(22 + step));
        let wake = wake.expect("it waits");
        assert!(
            actions.is_empty() && (29 + step..=31 + step).contains(&wake),
            "{step} {actions:?} {wake}"
        );
        // Set while it waits.
        progress.shift(SignedDuration::from_secs(-step));
        progress.see(&ended, at(23));
        let (actions, wake) = planned(&pod, state(), &progress, at(23));
        assert!(
            actions.is_empty() && (29..=31).contains(&wake.unwrap()),
            "{step} {actions:?} {wake:?}"
        );
        assert_eq!(
            planned(&pod, state(), &progress, at(31)),
            (vec!["start a 2 Some(10000)".to_owned()], None),
            "{step}"
        );
    }
}

#[test]
fn an_agent_that_starts_goes_by_the_recorded_end_but_not_into_the_future() {
    let pod = make_pod("u", "Always", &["a"]);
    // The clock was set back while there was no agent.
    for (ended, now, wake) in [(20, 22, 30), (10_000, 20, 30)] {
        let ended = observed(&pod, container("a", 0, Some(0), exited(1, ended - 5, ended)));
        let mut progress = attached();
        for later in 0..3 {
            progress.see(&ended, at(now + later));
            let state = ended.pods[pod.uid()].clone();
            assert_eq!(
                planned(&pod, Some(state), &progress, at(now + later)),
                (Vec::new(), Some(wake))
            );
        }
    }
}

#[test]
fn a_clock_that_was_set_ahead_makes_no_long_run_of_a_crash() {
    let pod = make_pod("u", "Always", &["a"]);
    let mut progress = attached();
    progress.see(&observed(&pod, container("a", 3, Some(40_000), running(0))), at(1));
    progress.shift(SignedDuration::from_hours(1));
    let ended = observed(&pod, container("a", 3, Some(40_000), exited(1, 0, 3602)));
    progress.see(&ended, at(3602));
    let (actions, wake) = planned(&pod, Some(ended.pods[pod.uid()].clone()), &progress, at(3602));
    assert_eq!((actions, wake), (Vec::new(), Some(3682)), "80 s");
}

#[test]
fn only_the_last_exit_is_kept_beside_the_latest_start() {
    let pod = make_pod("u", "Always", &["a"]);
    let starts = (0..4).map(|n| container("a", n, Some(0), if n == 3 { running(0) } else { exited(1, 0, 1) }));
    let state = found(&pod, vec![sandbox("s0", 0, running(0))], starts.collect());
    assert_eq!(
        planned(&pod, Some(state), &attached(), at(5)).0,
        ["remove a-1", "remove a-0"]
    );
}

#[test]
fn a_dead_sandbox_is_replaced_after_its_containers_were_killed() {
    let pod = make_pod("u", "Always", &["a"]);
    let dead = || sandbox("s0", 2, exited(137, 0, 1));
    let alive = found(&pod, vec![dead()], vec![container("a", 0, None, running(0))]);
    assert_eq!(planned(&pod, Some(alive), &attached(), at(5)).0, ["kill a-0"]);
    let ended = found(&pod, vec![dead()], vec![container("a", 0, None, exited(137, 0, 6))]);
    assert_eq!(
        planned(&pod, Some(ended), &attached(), at(6)).0,
        ["remove sandbox s0", "create 3"]
    );
    let unknown = found(&pod, vec![sandbox("s0", 0, ProcessState::Unknown)], vec![]);
    assert_eq!(
        planned(&pod, Some(unknown), &attached(), at(6)),
        (vec![], None),
        "a hung shim concludes nothing"
    );
}

#[test]
fn a_deletion_asks_waits_kills_and_removes() {
    let pod = deleted(make_pod("u", "Always", &["a"]), 30);
    let up = || {
        found(
            &pod,
            vec![sandbox("s0", 0, running(0))],
            vec![container("a", 0, None, running(0))],
        )
    };
    assert_eq!(planned(&pod, Some(up()), &attached(), at(0)).0, ["term a-0"]);
    let mut progress = attached();
    progress.stops.insert(
        "a-0".into(),
        Stop {
            asked_at: at(0),
            killed_at: None,
        },
    );
    assert_eq!(planned(&pod, Some(up()), &progress, at(10)), (vec![], Some(30)));
    assert_eq!(planned(&pod, Some(up()), &progress, at(30)).0, ["kill a-0"]);
    let shorter = deleted(make_pod("u", "Always", &["a"]), 5);
    assert_eq!(
        planned(&shorter, Some(up()), &progress, at(10)).0,
        ["kill a-0"],
        "a second deletion shortens the grace"
    );
    let at_once = deleted(make_pod("u", "Always", &["a"]), 0);
    assert_eq!(planned(&at_once, Some(up()), &attached(), at(0)).0, ["kill a-0"]);
    let down = found(
        &pod,
        vec![sandbox("s0", 0, running(0))],
        vec![container("a", 0, None, exited(0, 0, 3))],
    );
    assert_eq!(
        planned(&pod, Some(down), &progress, at(3)).0,
        ["remove a-0", "remove sandbox s0", "remove pod"],
        "nothing is started again"
    );
    assert_eq!(planned(&pod, None, &progress, at(3)).0, Vec::<String>::new());
}

#[test]
fn what_control_does_not_name_stays_until_it_has_said_all() {
    let pod = make_pod("u", "Always", &["a"]);
    let state = found(
        &pod,
        vec![sandbox("s0", 0, running(0))],
        vec![container("a", 0, None, running(0))],
    );
    let observed = Observed {
        pods: BTreeMap::from([("u".to_owned(), state)]),
    };
    let (progress, settings) = (attached(), Settings::default());
    let mut desired = Desired::default();
    let context = Context {
        desired: &desired,
        progress: &progress,
        settings: &settings,
        now: at(0),
    };
    assert!(plan(context, &observed).is_empty());
    desired.complete = true;
    let context = Context {
        desired: &desired,
        progress: &progress,
        settings: &settings,
        now: at(0),
    };
    let plans = plan(context, &observed);
    assert_eq!(plans["u"].actions, [Action::Terminate { id: "a-0".into() }]);
    assert!(!plans["u"].gone);
}

#[test]
fn statuses_use_the_kubelets_words() {
    let settings = Settings {
        host_addresses: vec!["192.0.2.1".parse().unwrap()],
        ..Settings::default()
    };
    let desired = Desired::default();
    let pod = make_pod("u", "Always", &["a"]);
    let progress = Progress::default();
    let status = |pod: &Pod, state: Option<&ObservedPod>, previous: &PodStatus, now: i64| {
        let context = Context {
            desired: &desired,
            progress: &progress,
            settings: &settings,
            now: at(now),
        };
        status::pod_status(context, pod, state, previous)
    };
    let empty = PodStatus::default();
    let pending = status(&pod, None, &empty, 0);
    assert_eq!(pending.phase, "Pending");
    let waiting = pending.container_statuses[0].state.clone().unwrap().waiting.unwrap();
    assert_eq!(waiting.reason, "ContainerCreating");
    let up = found(
        &pod,
        vec![sandbox("s0", 0, running(0))],
        vec![container("a", 0, None, running(0))],
    );
    let ready = status(&pod, Some(&up), &pending, 5);
    assert_eq!(
        (ready.phase.as_str(), ready.pod_ip.as_str(), ready.host_ip.as_str()),
        ("Running", "10.244.0.2", "192.0.2.1")
    );
    assert_eq!(
        (ready.qos_class.as_str(), ready.start_time),
        ("BestEffort", pending.start_time)
    );
    let of = |status: &PodStatus, kind: &str| status.conditions.iter().find(|c| c.r#type == kind).unwrap().clone();
    assert_eq!(of(&ready, "Ready").status, "True");
    assert_eq!(
        of(&ready, "PodScheduled").last_transition_time,
        of(&pending, "PodScheduled").last_transition_time
    );
    assert_ne!(
        of(&ready, "Ready").last_transition_time,
        of(&pending, "Ready").last_transition_time
    );
    assert_eq!(
        status(&pod, Some(&up), &ready, 50),
        ready,
        "nothing new, nothing to report"
    );

    let crashed = container("a", 1, Some(0), exited(3, 10, 11));
    let down = found(&pod, vec![sandbox("s0", 0, running(0))], vec![crashed]);
    let backing_off = status(&pod, Some(&down), &ready, 12);
    assert_eq!(backing_off.phase, "Running");
    assert_eq!(of(&backing_off, "Ready").reason, "ContainersNotReady");
    let container_status = &backing_off.container_statuses[0];
    assert_eq!(container_status.restart_count, 1);
    assert_eq!(
        container_status.state.clone().unwrap().waiting.unwrap().reason,
        "CrashLoopBackOff"
    );
    assert_eq!(
        container_status
            .last_state
            .clone()
            .unwrap()
            .terminated
            .unwrap()
            .exit_code,
        3
    );

    let once = make_pod("u", "Never", &["a"]);
    for (code, phase) in [(0, "Succeeded"), (1, "Failed")] {
        let ended = found(&once, vec![], vec![container("a", 0, None, exited(code, 10, 11))]);
        let ended = status(&once, Some(&ended), &ready, 12);
        assert_eq!((ended.phase.as_str(), ended.pod_ip.as_str()), (phase, "10.244.0.2"));
        assert_eq!(of(&ended, "Ready").status, "False");
    }
    let gone = status(&deleted(pod.clone(), 0), None, &ready, 20);
    assert!(!gone.container_statuses[0].ready, "removed containers are not ready");
}
