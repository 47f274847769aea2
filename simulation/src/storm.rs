//! Control and many agents in bad weather: users work, links are cut, agents and control are killed, containers crash, the store is
//! slow and fails. Some things hold at every moment, all of it holds when the weather is fine again.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    time::Duration,
};

use orlop_control::{
    cache::ObjectKey,
    link::build_record,
    registry::{DeleteOptions, Propagation},
};
use orlop_node::{network::Network as _, runtime::Runtime as _};
use orlop_proto::{
    Resource as _,
    apps::v1::ReplicaSet,
    core::v1::{Node, Pod, Service},
    discovery::v1::EndpointSlice,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use crate::{
    adversary::Hardness,
    cluster::{Cluster, Fate},
    environment::Chance,
    machine::{Machine, start_all},
    scenarios::{replica_set, service},
    state::{State, condition, is_ready, node_name, past_faults, phase, trace},
    wire::Weather,
};

/// Apps that users create, scale and delete.
const APPS: usize = 5;
/// Replicas of an app at most.
const REPLICAS: usize = 6;
/// How often is looked at all machines.
const LOOK: Duration = Duration::from_millis(500);
/// All must be as desired by then.
const PATIENCE: Duration = Duration::from_secs(3600);

/// How large a storm is.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Machines.
    pub nodes: u8,
    /// How long it lasts.
    pub lasts: Duration,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// What did not hold.
    pub faults: Vec<String>,
    /// Of everything that was ever written: the same for the same seed.
    pub trace: u64,
    /// How many writes there were.
    pub writes: usize,
    /// What was done, in order.
    pub log: Vec<String>,
}

struct Storm {
    cluster: Cluster,
    machines: Vec<RefCell<Machine>>,
    weather: Vec<watch::Sender<Weather>>,
    began: Instant,
    /// Containers that were made to crash, by pod uid.
    crashes: RefCell<BTreeMap<String, u32>>,
    faults: RefCell<BTreeSet<String>>,
    log: RefCell<Vec<String>>,
}

/// A storm of a seed. Must be called within a `LocalSet`.
pub async fn storm(seed: u64, shape: &Shape) -> Outcome {
    let mut chance = Chance::new(seed, 0);
    let hardness = Hardness {
        failures: 100,
        trouble: 40,
        ..Hardness::default()
    };
    let cluster = Cluster::start(&Fate {
        adversary: Some((hardness, chance.seed())),
        ..Fate::default()
    });
    let (machines, weather) = start_all(shape.nodes, &cluster, Duration::from_millis(200), &mut chance);
    let storm = Rc::new(Storm {
        cluster,
        machines: machines.into_iter().map(RefCell::new).collect(),
        weather,
        began: Instant::now(),
        crashes: RefCell::default(),
        faults: RefCell::default(),
        log: RefCell::default(),
    });
    storm.run(&mut chance, shape).await
}

impl Storm {
    async fn run(self: &Rc<Self>, chance: &mut Chance, shape: &Shape) -> Outcome {
        let all_ready = |state: &State| {
            let nodes = state.all::<Node>();
            nodes.len() == self.machines.len() && nodes.iter().all(|node| condition(node, "Ready") == Some("True"))
        };
        self.cluster.until("all nodes are ready", all_ready).await;
        let watcher = Rc::clone(self);
        let watching = tokio::task::spawn_local(async move {
            loop {
                watcher.look().await;
                sleep(LOOK).await;
            }
        });
        let (mut users, mut troubles) = (Chance::new(chance.seed(), 1), Chance::new(chance.seed(), 2));
        let end = Instant::now() + shape.lasts;
        tokio::join!(
            async {
                while Instant::now() < end {
                    sleep(users.up_to(Duration::from_secs(8))).await;
                    self.use_it(&mut users).await;
                }
            },
            async {
                while Instant::now() < end {
                    sleep(troubles.up_to(Duration::from_secs(30))).await;
                    self.trouble(&mut troubles).await;
                }
            }
        );
        self.note("the storm is over");
        for weather in &self.weather {
            weather.send_replace(Weather::default());
        }
        for machine in &self.machines {
            let mut machine = machine.borrow_mut();
            if !machine.is_up() {
                machine.start();
            }
        }
        let mut faults = self.calm().await;
        watching.abort();
        faults.extend(self.faults.borrow().iter().cloned());
        faults.extend(past_faults(&self.cluster.data));
        Outcome {
            faults,
            trace: trace(&self.cluster.data),
            writes: self.cluster.data.history().len(),
            log: self.log.take(),
        }
    }

    fn note(&self, text: impl Into<String>) {
        let line = format!("{:9.3} {}", self.began.elapsed().as_secs_f64(), text.into());
        tracing::info!(line);
        self.log.borrow_mut().push(line);
    }

    /// Something that a user does.
    async fn use_it(&self, chance: &mut Chance) {
        let name = format!("app{}", chance.below(APPS));
        let key = ObjectKey::new("default", &name);
        let replicas = i32::try_from(chance.below(REPLICAS + 1)).unwrap_or_default();
        let there = self.cluster.state().await;
        let (set, served) = (there.get::<ReplicaSet>(&name), there.get::<Service>(&name));
        match chance.below(10) {
            0 if set.is_some() => {
                let propagation = if chance.once_in(2) {
                    Propagation::Foreground
                } else {
                    Propagation::Background
                };
                self.note(format!("{name} is deleted, {propagation:?}"));
                let options = DeleteOptions {
                    propagation,
                    ..DeleteOptions::default()
                };
                self.cluster.delete::<ReplicaSet>(&key, &options).await;
            }
            1 if served.is_some() => {
                self.note(format!("service {name} is deleted"));
                self.cluster.delete::<Service>(&key, &DeleteOptions::default()).await;
            }
            2 | 3 => {
                let pods = there.all::<Pod>();
                if let Some(pod) = pods.get(chance.below(pods.len())) {
                    self.note(format!("pod {} is deleted", pod.name()));
                    self.cluster
                        .delete::<Pod>(&ObjectKey::of(pod), &DeleteOptions::default())
                        .await;
                }
            }
            4..=6 if served.is_none() => {
                self.note(format!("service {name} is created"));
                self.cluster.create(service(&name)).await;
            }
            _ if set.is_none() => {
                self.note(format!("{name} is created with {replicas}"));
                self.cluster.create(replica_set(&name, replicas)).await;
            }
            _ => {
                self.note(format!("{name} is scaled to {replicas}"));
                let scale = |set: &mut ReplicaSet| set.spec.get_or_insert_default().replicas = Some(replicas);
                // It may have been deleted meanwhile.
                let _gone = self
                    .cluster
                    .call(async |registry| {
                        registry
                            .modify(&key, move |set: &mut ReplicaSet| {
                                scale(set);
                                true
                            })
                            .await
                    })
                    .await;
            }
        }
    }

    /// Something that goes wrong.
    async fn trouble(self: &Rc<Self>, chance: &mut Chance) {
        let number = chance.below(self.machines.len());
        let machine = &self.machines[number];
        let name = machine.borrow().name.clone();
        match chance.below(8) {
            0 | 1 => {
                let weather = match chance.below(3) {
                    0 => Weather {
                        up_is_cut: true,
                        down_is_cut: false,
                    },
                    1 => Weather {
                        up_is_cut: false,
                        down_is_cut: true,
                    },
                    _ => Weather {
                        up_is_cut: true,
                        down_is_cut: true,
                    },
                };
                let lasts = chance.up_to(Duration::from_secs(120));
                self.note(format!("{name}: {weather:?} for {lasts:?}"));
                self.weather[number].send_replace(weather);
                let storm = Rc::clone(self);
                tokio::task::spawn_local(async move {
                    sleep(lasts).await;
                    storm.weather[number].send_replace(Weather::default());
                });
            }
            2 => {
                self.note(format!("{name}: its connection breaks"));
                machine.borrow().wire.cut();
            }
            3 | 4 => {
                let lasts = chance.up_to(Duration::from_secs(90));
                self.note(format!("{name}: its agent is killed, another starts in {lasts:?}"));
                machine.borrow_mut().kill();
                let storm = Rc::clone(self);
                tokio::task::spawn_local(async move {
                    sleep(lasts).await;
                    let mut machine = storm.machines[number].borrow_mut();
                    if !machine.is_up() {
                        machine.start();
                    }
                });
            }
            5 => {
                self.note("control is killed");
                self.cluster.kill_control();
            }
            6 => {
                self.note(format!("{name}: its maps fail"));
                machine.borrow().dataplane.fail_next(chance.below(5) as u64);
            }
            _ => {
                let runtime = machine.borrow().runtime.clone();
                let observed = runtime.observe().await.unwrap_or_default();
                let pods: Vec<&String> = observed.pods.keys().collect();
                if let Some(uid) = pods.get(chance.below(pods.len()))
                    && runtime.crash(uid, 1)
                {
                    self.note(format!("{name}: a container of {uid} crashes"));
                    *self.crashes.borrow_mut().entry((*uid).clone()).or_default() += 1;
                }
            }
        }
    }

    /// What must hold at every moment.
    async fn look(&self) {
        let (mut homes, mut addresses) = (BTreeMap::new(), BTreeMap::new());
        for machine in &self.machines {
            let (name, runtime, network) = {
                let machine = machine.borrow();
                (machine.name.clone(), machine.runtime.clone(), machine.network.clone())
            };
            let fault = |text: String| {
                self.faults.borrow_mut().insert(text);
            };
            for (uid, pod) in runtime.observe().await.unwrap_or_default().pods {
                if let Some(other) = homes.insert(uid.clone(), name.clone()) {
                    fault(format!("{} runs on {other} and {name}", pod.id.name));
                }
                let allowed = self.crashes.borrow().get(&uid).copied().unwrap_or_default();
                let restarts = pod.containers.iter().map(|container| container.restart_count).max();
                if restarts.is_some_and(|restarts| u64::from(restarts) > u64::from(allowed)) {
                    fault(format!(
                        "{} on {name} was restarted {restarts:?} times after {allowed} crashes",
                        pod.id.name
                    ));
                }
                if pod.sandboxes.iter().any(|sandbox| sandbox.attempt > 0) {
                    fault(format!("{} on {name} got another sandbox", pod.id.name));
                }
            }
            for attachment in network.list().await.unwrap_or_default() {
                for address in attachment.status.iter().flat_map(|status| &status.addresses) {
                    if let Some(other) = addresses.insert(*address, attachment.sandbox_id.clone()) {
                        fault(format!("{address} is held by {other} and {}", attachment.sandbox_id));
                    }
                }
            }
        }
    }

    /// Waits until all is as desired, and stays so for a while; what is not in the end.
    async fn calm(&self) -> Vec<String> {
        let end = Instant::now() + PATIENCE;
        let mut calm_since = None;
        loop {
            let state = self.cluster.state().await;
            let mut faults = state.faults();
            faults.extend(self.machine_faults(&state).await);
            faults.extend(status_faults(&state));
            if faults.is_empty() {
                let since = *calm_since.get_or_insert_with(Instant::now);
                if since.elapsed() > Duration::from_secs(60) {
                    return faults;
                }
            } else {
                calm_since = None;
            }
            if Instant::now() > end {
                return faults;
            }
            sleep(Duration::from_secs(5)).await;
        }
    }

    /// What runs on the machines that should not, and what does not that should.
    async fn machine_faults(&self, state: &State) -> Vec<String> {
        let mut faults = Vec::new();
        let pods = state.all::<Pod>();
        let slices = state.all::<EndpointSlice>();
        for machine in &self.machines {
            let (name, runtime, dataplane, network) = {
                let machine = machine.borrow();
                let parts = (
                    machine.runtime.clone(),
                    machine.dataplane.clone(),
                    machine.network.clone(),
                );
                (machine.name.clone(), parts.0, parts.1, parts.2)
            };
            let here = pods
                .iter()
                .filter(|pod| node_name(pod) == name && !matches!(phase(pod), "Succeeded" | "Failed"));
            let wanted: BTreeSet<String> = here.map(|pod| pod.uid().to_owned()).collect();
            let found: BTreeSet<String> = runtime.observe().await.unwrap_or_default().pods.into_keys().collect();
            if wanted != found || runtime.containers() != wanted.len() {
                faults.push(format!(
                    "{name} runs {} containers of {found:?} and not {wanted:?}",
                    runtime.containers()
                ));
            }
            let attached = network.list().await.unwrap_or_default().len();
            if attached != wanted.len() {
                faults.push(format!("{name} has {attached} networks for {} pods", wanted.len()));
            }
            if network.routes().len() + 1 != self.machines.len() {
                faults.push(format!("{name} has {} routes", network.routes().len()));
            }
            let mut in_force = dataplane.services();
            for service in state.all::<Service>() {
                let id = (service.namespace().to_owned(), service.name().to_owned());
                let own = slices.iter().filter(|slice| {
                    let label = slice.meta().labels.get("kubernetes.io/service-name");
                    slice.namespace() == service.namespace() && label.is_some_and(|name| name == service.name())
                });
                let expected = build_record(&service, own);
                match in_force.remove(&id) {
                    Some(record) if *record == expected => {}
                    other => faults.push(format!("{name} has {other:?} and not {expected:?}")),
                }
            }
            if !in_force.is_empty() {
                faults.push(format!("{name} has services that are none: {:?}", in_force.keys()));
            }
        }
        faults
    }
}

/// Everything is ready, and says so.
fn status_faults(state: &State) -> Vec<String> {
    let mut faults = Vec::new();
    for node in state.all::<Node>() {
        let tainted = node.spec.as_ref().is_some_and(|spec| !spec.taints.is_empty());
        if tainted || condition(&node, "Ready") != Some("True") {
            faults.push(format!("{} is not ready", node.name()));
        }
    }
    for set in state.all::<ReplicaSet>() {
        let wanted = set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
        let status = set.status.clone().unwrap_or_default();
        if (status.replicas, status.ready_replicas, status.available_replicas) != (wanted, wanted, wanted) {
            faults.push(format!("{} wants {wanted} and says {status:?}", set.name()));
        }
        if i32::try_from(state.ready(set.name()).len()) != Ok(wanted) {
            faults.push(format!(
                "{} wants {wanted} and has {} ready",
                set.name(),
                state.ready(set.name()).len()
            ));
        }
    }
    if !faults.is_empty() {
        // Not faults by themselves: where to look.
        let waiting = state.all::<Pod>();
        let waiting = waiting.iter().filter(|pod| !is_ready(pod));
        faults.extend(waiting.map(|pod| {
            let (name, node) = (pod.name(), node_name(pod));
            format!("pod {name} on {node:?} is not ready: {:?}", pod.status)
        }));
    }
    faults
}
