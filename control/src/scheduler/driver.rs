//! The loop around the pure parts: events in, bindings out.

use std::sync::Arc;

use orlop_proto::{
    Resource as _,
    core::v1::{Node, Pod, PodCondition},
    time,
};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    decide::{Decision, Diagnosis, fits, schedule},
    queue::Queue,
    view::{ClusterView, PodInfo, is_terminal},
};
use crate::{
    cache::{Entry, Event, EventStream, Lagged, ObjectKey},
    controllers::runner::catch_up,
    events::Recorder,
    registry::{Binding, Registry, RegistryError},
};

/// Pods that are decided between two looks at the events, and bound together.
const BATCH: usize = 64;
/// Batches of bindings under way at once.
const BINDING_BATCHES: usize = 16;
/// Status writes under way at once.
const STATUS_WRITES: usize = 32;

/// Owns view and queue: one task, no locks.
pub(super) struct Driver {
    registry: Registry,
    recorder: Recorder,
    view: ClusterView,
    queue: Queue,
    /// Where the next decision begins to look.
    start: usize,
    outcomes: mpsc::UnboundedReceiver<BatchOutcome>,
    outcome_sender: mpsc::UnboundedSender<BatchOutcome>,
    batches_under_way: usize,
    status_writes: Arc<Semaphore>,
    tasks: JoinSet<()>,
}

type BatchOutcome = Vec<(Binding, Result<Pod, RegistryError>)>;

struct Streams {
    nodes: EventStream<Node>,
    pods: EventStream<Pod>,
}

impl Driver {
    pub(super) fn new(registry: Registry, recorder: Recorder) -> Self {
        let (outcome_sender, outcomes) = mpsc::unbounded_channel();
        Self {
            registry,
            recorder,
            view: ClusterView::default(),
            queue: Queue::default(),
            start: 0,
            outcomes,
            outcome_sender,
            batches_under_way: 0,
            status_writes: Arc::new(Semaphore::new(STATUS_WRITES)),
            tasks: JoinSet::new(),
        }
    }

    pub(super) async fn run(mut self, cancel: CancellationToken) {
        let mut streams = self.rebuild();
        loop {
            let deadline = self.queue.next_deadline();
            let can_decide = self.queue.has_active() && self.batches_under_way < BINDING_BATCHES;
            let result = tokio::select! {
                // Events before decisions: a decision is made on the newest view there is.
                biased;
                () = cancel.cancelled() => return,
                // Cancel-safe, all of them: streams and channels lose nothing when their future is dropped.
                Some(outcome) = self.outcomes.recv() => { self.bound(outcome); Ok(()) }
                batch = streams.nodes.next_batch(BATCH) => self.on_nodes(batch),
                batch = streams.pods.next_batch(BATCH * 8) => self.on_pods(batch),
                Some(_) = self.tasks.join_next() => Ok(()),
                () = tokio::task::yield_now(), if can_decide => { self.decide(); Ok(()) }
                () = sleep_until(deadline), if deadline.is_some() => Ok(()),
            };
            if let Err(lagged) = result {
                tracing::warn!(%lagged, "scheduler begins anew from a snapshot");
                streams = self.rebuild();
            }
            self.queue.advance(Instant::now());
        }
    }

    /// Begins anew from the cache. Reservations whose outcome is still to come are kept.
    fn rebuild(&mut self) -> Streams {
        let cache = self.registry.cache().clone();
        let (nodes, node_events) = cache.reader::<Node>().events();
        let (pods, pod_events) = cache.reader::<Pod>().events();
        let now = Instant::now();
        let known: Vec<String> = self.view.nodes().map(|info| info.named.name.to_string()).collect();
        for name in known
            .iter()
            .filter(|name| !nodes.objects.contains_key(&ObjectKey::new("", name)))
        {
            self.view.remove_node(name);
        }
        for node in nodes.objects.peek() {
            self.view.set_node(&node);
        }
        let live: std::collections::HashSet<String> = pods.objects.peek().map(|pod| pod.uid().to_owned()).collect();
        for uid in self
            .view
            .pods()
            .filter(|uid| !live.contains(*uid))
            .map(str::to_owned)
            .collect::<Vec<_>>()
        {
            self.view.remove_pod(&uid);
        }
        for uid in self
            .queue
            .pods()
            .filter(|uid| !live.contains(uid.as_str()))
            .cloned()
            .collect::<Vec<_>>()
        {
            self.queue.remove(&uid);
        }
        for pod in pods.objects.peek() {
            self.take_pod(&pod, now);
        }
        self.queue.wake(now, |_| true);
        Streams {
            nodes: node_events,
            pods: pod_events,
        }
    }

    fn on_nodes(&mut self, batch: Result<Vec<Arc<Entry<Node>>>, Lagged>) -> Result<(), Lagged> {
        let now = Instant::now();
        for entry in batch? {
            match &entry.event() {
                Event::Deleted(node) => {
                    self.view.remove_node(node.name());
                    self.queue.wake_spread(now, |_| true);
                }
                Event::Added(node) | Event::Modified { new: node, .. } => {
                    let is_first = self.view.order().is_empty();
                    if self.view.set_node(node) {
                        self.wake_for(node.name(), now);
                        // A domain of others may be the one with the fewest pods now.
                        self.queue.wake_spread(now, |_| true);
                    }
                    if is_first {
                        // "No nodes" is no longer why.
                        self.queue.wake(now, |_| true);
                    }
                }
            }
        }
        Ok(())
    }

    fn on_pods(&mut self, batch: Result<Vec<Arc<Entry<Pod>>>, Lagged>) -> Result<(), Lagged> {
        let now = Instant::now();
        for entry in batch? {
            match &entry.event() {
                Event::Deleted(pod) => {
                    self.queue.remove(pod.uid());
                    if let Some(node) = self.view.remove_pod(pod.uid()) {
                        self.wake_for(&node, now);
                    }
                }
                Event::Added(pod) | Event::Modified { new: pod, .. } => self.take_pod(pod, now),
            }
        }
        self.wake_for_spread(now);
        Ok(())
    }

    fn take_pod(&mut self, pod: &Arc<Pod>, now: Instant) {
        let bound = pod.spec.as_ref().is_some_and(|spec| !spec.node_name.is_empty());
        if bound {
            self.queue.remove(pod.uid());
            if let Some(node) = self.view.set_pod(pod) {
                self.wake_for(&node, now);
            }
        } else if pod.is_deleting() || is_terminal(pod) {
            self.queue.remove(pod.uid());
            if let Some(node) = self.view.release(pod.uid()) {
                self.wake_for(&node, now);
            }
        } else {
            self.queue.set(pod, now);
        }
    }

    /// Something became better on a node: pods that fit there now get their turn.
    fn wake_for(&mut self, node: &str, now: Instant) {
        if let Some(info) = self.view.node(node) {
            self.queue.wake(now, |pod| {
                pod.pod.spec.as_ref().is_some_and(|spec| fits(info, pod, spec).is_ok())
            });
        }
    }

    /// Pods came or went: those that had to wait for a better spread of such pods get their turn.
    fn wake_for_spread(&mut self, now: Instant) {
        let changed = self.view.take_changed_pods();
        if !changed.is_empty() {
            self.queue
                .wake_spread(now, |pod| changed.iter().any(|pods| pod.spread.counts(pods)));
        }
    }

    /// Decides the next pods and sends their bindings off. Pods that have no place count as well: between two batches of them it is
    /// looked at what else has happened.
    fn decide(&mut self) {
        let now = Instant::now();
        let mut bindings = Vec::new();
        for _ in 0..BATCH {
            let Some(pod) = self.queue.pop(now) else { break };
            self.view.keep_for(&pod);
            let scheduled = schedule(&self.view, &pod, self.start);
            self.start = scheduled.next_start;
            match scheduled.decision {
                Decision::Bind(node) => {
                    self.view.reserve(&pod, &node);
                    bindings.push(Binding {
                        pod: ObjectKey::of(&*pod.pod),
                        uid: pod.pod.uid().to_owned(),
                        node: node.to_string(),
                    });
                }
                Decision::Unschedulable(diagnosis) => {
                    self.queue.unschedulable(pod.pod.uid(), now);
                    self.report_unschedulable(&pod, &diagnosis);
                }
            }
        }
        if bindings.is_empty() {
            return;
        }
        self.wake_for_spread(now);
        self.batches_under_way += 1;
        let registry = self.registry.clone();
        let sender = self.outcome_sender.clone();
        self.tasks.spawn(async move {
            let results = registry.bind_pods(bindings.clone()).await;
            // A binding whose answer was lost may have happened: its reservation stays until the cache can tell. Else its room
            // would be given to another pod as well.
            if results
                .iter()
                .any(|result| matches!(result, Err(RegistryError::Store(_))))
            {
                catch_up(registry.cache()).await;
            }
            // The receiver lives in the driver: nobody is left to tell when it is gone.
            let _ = sender.send(bindings.into_iter().zip(results).collect());
        });
    }

    fn bound(&mut self, outcome: BatchOutcome) {
        self.batches_under_way -= 1;
        let now = Instant::now();
        for (binding, result) in outcome {
            match result {
                Ok(pod) => {
                    let text = format!("Successfully assigned {} to {}", binding.pod, binding.node);
                    self.recorder.routine(&pod, "Scheduled", text);
                }
                Err(error) => {
                    tracing::debug!(pod = %binding.pod, node = binding.node, %error, "binding failed");
                    if self.is_bound(&binding) {
                        // It happened nevertheless, and its event is on the way to us.
                        continue;
                    }
                    if let Some(node) = self.view.release(&binding.uid) {
                        self.wake_for(&node, now);
                    }
                    self.queue.failed(&binding.uid, now);
                }
            }
        }
        self.wake_for_spread(now);
    }

    /// Whether the cache has the pod on a node.
    fn is_bound(&self, binding: &Binding) -> bool {
        let pods = self.registry.cache().reader::<Pod>();
        let pod = pods.get(&binding.pod.namespace, &binding.pod.name);
        pod.is_some_and(|pod| {
            pod.uid() == binding.uid && pod.spec.as_ref().is_some_and(|spec| !spec.node_name.is_empty())
        })
    }

    /// Writes why, when that is news.
    fn report_unschedulable(&mut self, info: &PodInfo, diagnosis: &Diagnosis) {
        let message = diagnosis.to_string();
        self.recorder.warning(&*info.pod, "FailedScheduling", message.clone());
        let mut probe = Pod::clone(&info.pod);
        if !set_unschedulable(&mut probe, &message) {
            return;
        }
        let registry = self.registry.clone();
        let permits = self.status_writes.clone();
        let key = ObjectKey::of(&*info.pod);
        let uid = info.pod.uid().to_owned();
        self.tasks.spawn(async move {
            let Ok(_permit) = permits.acquire().await else { return };
            let written = registry
                .modify_status(&key, |pod: &mut Pod| {
                    let bound = pod.spec.as_ref().is_some_and(|spec| !spec.node_name.is_empty());
                    pod.uid() == uid && !bound && set_unschedulable(pod, &message)
                })
                .await;
            if let Err(error) = written
                && !error.is_not_found()
            {
                tracing::debug!(pod = %key, %error, "condition PodScheduled could not be written");
            }
        });
    }
}

/// Condition PodScheduled = False, reason Unschedulable. Says whether that is news.
fn set_unschedulable(pod: &mut Pod, message: &str) -> bool {
    let status = pod.status.get_or_insert_default();
    let position = status
        .conditions
        .iter()
        .position(|condition| condition.r#type == "PodScheduled");
    let old = position.map(|position| &status.conditions[position]);
    if old.is_some_and(|old| old.status == "False" && old.reason == "Unschedulable" && old.message == message) {
        return false;
    }
    let since = match old {
        Some(old) if old.status == "False" => old.last_transition_time,
        _ => Some(time::now_seconds()),
    };
    let condition = PodCondition {
        r#type: "PodScheduled".into(),
        status: "False".into(),
        reason: "Unschedulable".into(),
        message: message.to_owned(),
        last_transition_time: since,
        last_probe_time: None,
    };
    match position {
        Some(position) => status.conditions[position] = condition,
        None => status.conditions.push(condition),
    }
    true
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
