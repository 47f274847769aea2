//! Plans applied again and again to a runtime in memory, through faults, until nothing changes.

use proptest::prelude::*;

use super::*;

/// A runtime in memory, with faults: what the executor does to the real one.
#[derive(Debug, Clone, Default)]
struct World {
    observed: Observed,
    progress: Progress,
    made: u32,
    second: i64,
}

impl World {
    fn apply(&mut self, plan: &PodPlan, faults: &mut impl Iterator<Item = bool>) {
        let uid = plan.id.uid.clone();
        for action in &plan.actions {
            let subject = action.subject();
            if faults.next().unwrap_or(false) {
                let failures = self.progress.failures.entry(uid.clone()).or_default();
                let count = failures.get(&subject).map_or(0, |failure| failure.count) + 1;
                let (reason, message) = ("Fault".to_owned(), String::new());
                failures.insert(
                    subject.clone(),
                    Failure {
                        count,
                        at: at(self.second),
                        reason,
                        message,
                    },
                );
                if !matches!(subject, Subject::Container(_)) {
                    return;
                }
                continue;
            }
            if let Some(failures) = self.progress.failures.get_mut(&uid) {
                failures.remove(&subject);
            }
            self.act(&plan.id, action);
        }
    }

    fn act(&mut self, id: &PodId, action: &Action) {
        let now = at(self.second);
        let entry = self.observed.pods.entry(id.uid.clone());
        let pod = entry.or_insert_with(|| ObservedPod {
            id: id.clone(),
            sandboxes: vec![],
            containers: vec![],
            networks: vec![],
            remains: true,
        });
        match action {
            Action::CreateSandbox { attempt, .. } => {
                self.made += 1;
                let id = format!("s{}", self.made);
                pod.sandboxes.push(sandbox(
                    &id,
                    *attempt,
                    ProcessState::Running {
                        pid: 1,
                        started_at: now,
                    },
                ));
                pod.networks.push(id.clone());
                pod.remains = true;
                self.progress.attached.insert(id);
            }
            Action::Attach { sandbox_id, .. } => drop(self.progress.attached.insert(sandbox_id.clone())),
            Action::StartContainer(start) => {
                self.made += 1;
                let state = ProcessState::Running {
                    pid: self.made,
                    started_at: now,
                };
                let mut new = container(&start.name, start.restart_count, start.backoff_ms, state);
                new.id = format!("c{}", self.made);
                new.sandbox_id.clone_from(&start.sandbox_id);
                pod.containers.push(new);
            }
            Action::Terminate { id } | Action::Kill { id } => {
                let kill = matches!(action, Action::Kill { .. });
                let stop = self.progress.stops.entry(id.clone()).or_insert(Stop {
                    asked_at: now,
                    killed_at: None,
                });
                stop.killed_at = if kill { Some(now) } else { stop.killed_at };
                // Every second container does not listen to SIGTERM.
                for container in pod.containers.iter_mut().filter(|c| c.id == *id) {
                    if kill || id.ends_with(['0', '2', '4', '6', '8']) {
                        container.state = exited(if kill { 137 } else { 0 }, self.second, self.second);
                    }
                }
            }
            Action::RemoveContainer { id } => pod.containers.retain(|container| container.id != *id),
            Action::RemoveSandbox { id } => {
                pod.sandboxes.retain(|sandbox| sandbox.id != *id);
                pod.networks.retain(|network| network != id);
            }
            Action::RemoveNetwork { id } => pod.networks.retain(|network| network != id),
            Action::RemovePod => {
                assert!(
                    pod.containers.is_empty() && pod.sandboxes.is_empty(),
                    "a pod is removed last"
                );
                self.observed.pods.remove(&id.uid);
            }
        }
    }

    /// Something dies by itself.
    fn strike(&mut self, choice: usize) {
        let second = self.second;
        let mut processes: Vec<&mut ProcessState> = Vec::new();
        for pod in self.observed.pods.values_mut() {
            processes.extend(pod.sandboxes.iter_mut().map(|sandbox| &mut sandbox.state));
            processes.extend(pod.containers.iter_mut().map(|container| &mut container.state));
        }
        let count = processes.len();
        if count > 0 && matches!(processes[choice % count], ProcessState::Running { .. }) {
            *processes[choice % count] = exited(i32::from(!choice.is_multiple_of(2)), second, second);
        }
    }
}

/// Checks what must hold of every plan, whatever the state.
fn check(desired: &Desired, world: &World, plans: &BTreeMap<String, PodPlan>) {
    for (uid, plan) in plans {
        let pod = desired.pods.get(uid);
        let found = world.observed.pods.get(uid);
        let lives = pod.is_some_and(|pod| !pod.is_deleting());
        let running = found.and_then(super::super::live::running);
        for action in &plan.actions {
            match action {
                Action::CreateSandbox { .. } => assert!(lives && running.is_none(), "never two sandboxes"),
                Action::StartContainer(start) => {
                    assert!(lives);
                    let twice = found.unwrap().containers.iter().any(|container| {
                        container.name == start.name && matches!(container.state, ProcessState::Running { .. })
                    });
                    assert!(!twice, "a container runs once");
                    assert_eq!(running.unwrap().id, start.sandbox_id);
                }
                Action::Terminate { id } | Action::Kill { id } if lives => {
                    let container = found
                        .unwrap()
                        .containers
                        .iter()
                        .find(|container| container.id == *id)
                        .unwrap();
                    assert!(
                        running.is_none_or(|sandbox| sandbox.id != container.sandbox_id),
                        "what is wanted is killed"
                    );
                }
                Action::RemoveSandbox { id } if lives => {
                    let ended = outcome(pod.unwrap(), found).is_some();
                    assert!(
                        ended || running.is_none_or(|sandbox| sandbox.id != *id),
                        "what is wanted is removed"
                    );
                }
                Action::RemovePod => assert!(!lives),
                _ => {}
            }
        }
    }
}

fn settle(desired: &Desired, world: &mut World, rounds: u32, faults: &mut impl Iterator<Item = bool>) -> bool {
    let settings = Settings::default();
    for _ in 0..rounds {
        let progress = world.progress.clone();
        let context = Context {
            desired,
            progress: &progress,
            settings: &settings,
            now: at(world.second),
        };
        let plans = plan(context, &world.observed);
        check(desired, world, &plans);
        let idle = plans.values().all(|plan| plan.actions.is_empty());
        let wake = plans.values().filter_map(|plan| plan.wake_at).min();
        for plan in plans.values() {
            world.apply(plan, faults);
        }
        match (idle, wake) {
            (true, None) => return true,
            (true, Some(wake)) => world.second = world.second.max(wake.as_second() - at(0).as_second() + 1),
            _ => world.second += 1,
        }
    }
    false
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn repeated_plans_converge_from_any_state_and_through_faults(
        policies in proptest::collection::vec(0..3_usize, 1..4),
        strikes in proptest::collection::vec((0..40_usize, 1..6_u32), 0..12),
        faults in proptest::collection::vec(proptest::bool::weighted(0.3), 0..40),
        deletes in 0..4_usize,
        forgets in any::<bool>(),
    ) {
        let mut desired = Desired { complete: true, ..Desired::default() };
        for (at, policy) in policies.iter().enumerate() {
            let uid = format!("u{at}");
            let pod = make_pod(&uid, ["Always", "OnFailure", "Never"][*policy], &["a", "b"]);
            desired.pods.insert(uid, Arc::new(pod));
        }
        let mut world = World::default();
        let mut faults = faults.into_iter();
        for (victim, rounds) in strikes {
            settle(&desired, &mut world, rounds, &mut faults);
            world.strike(victim);
        }
        if forgets {
            // A restart of the agent.
            world.progress = Progress::default();
        }
        prop_assert!(settle(&desired, &mut world, 400, &mut faults), "{world:#?}");
        for (uid, pod) in &desired.pods {
            let found = world.observed.pods.get(uid);
            if outcome(pod, found).is_some() {
                prop_assert!(found.unwrap().sandboxes.is_empty() && found.unwrap().networks.is_empty());
                continue;
            }
            let found = found.unwrap();
            prop_assert_eq!(found.sandboxes.len(), 1);
            for name in ["a", "b"] {
                let latest = newest(found, name).unwrap();
                let runs = matches!(latest.state, ProcessState::Running { .. });
                let done = matches!(&latest.state, ProcessState::Exited(exit) if exit.code == 0 || pod.spec.as_ref().unwrap().restart_policy == "Never");
                prop_assert!(runs || done, "{latest:?}");
            }
        }
        // Then some are deleted, the others are no longer named: nothing stays.
        let uids: Vec<String> = desired.pods.keys().cloned().collect();
        for (at, uid) in uids.iter().enumerate() {
            let pod = (*desired.pods[uid]).clone();
            if at < deletes {
                desired.pods.insert(uid.clone(), Arc::new(deleted(pod, 3)));
            } else {
                desired.pods.remove(uid);
            }
        }
        prop_assert!(settle(&desired, &mut world, 400, &mut faults), "{world:#?}");
        prop_assert!(world.observed.pods.is_empty(), "{world:#?}");
        let settings = Settings::default();
        let context = Context { desired: &desired, progress: &world.progress, settings: &settings, now: at(world.second) };
        prop_assert!(plan(context, &world.observed).values().all(|plan| plan.gone));
    }
}
