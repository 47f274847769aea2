//! What the node has to say to control, kept until control has it.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use orlop_proto::{
    core::v1::{Event, NodeStatus},
    metrics::v1 as metrics,
    node::v1::{self as link, NodeMessage, node_message::Message},
};
use tokio::sync::{Notify, mpsc, watch};

use crate::{desired::Desired, reconciler::PodUpdate};

/// Events wait for control in a queue of this length; the oldest is dropped when it is full.
const EVENTS: usize = 256;

/// A handle to the queue of reports; clones share it. For a pod, for the node and for metrics only the latest counts.
#[derive(Debug, Clone, Default)]
pub struct Reports {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    sequence: u64,
    node: Option<Pending<NodeStatus>>,
    pods: BTreeMap<String, Pending<PodUpdate>>,
    events: VecDeque<Event>,
    metrics: Option<metrics::NodeReport>,
    /// The end mark of the node's own snapshot is still to be sent in this session.
    end_mark: bool,
}

/// A report that is sent again in every session until it is acknowledged, and kept after that as the latest word.
#[derive(Debug)]
struct Pending<T> {
    latest: T,
    /// The sequence number that it was sent with in this session and that is not acknowledged.
    sent: Option<u64>,
    /// `latest` has not been sent in this session.
    dirty: bool,
}

impl<T> Pending<T> {
    fn new(latest: T) -> Self {
        Self {
            latest,
            sent: None,
            dirty: true,
        }
    }
}

/// Queues what the reconciler says of its pods until it ends, and forgets pods that control does not name any more: one that had ended
/// is deleted without waiting for this node's word, and nobody acknowledges that it is gone.
pub async fn carry(
    mut updates: mpsc::Receiver<PodUpdate>,
    mut desired: watch::Receiver<Arc<Desired>>,
    reports: Reports,
) {
    // What it holds at the beginning counts, too.
    desired.mark_changed();
    loop {
        tokio::select! {
            biased;
            // Both are cancel-safe: a version and a message are only taken by the branch that is chosen.
            Ok(()) = desired.changed() => {
                let named = desired.borrow_and_update().clone();
                reports.forget(|uid| !named.pods.contains_key(uid));
            }
            update = updates.recv() => {
                let Some(update) = update else { return };
                if desired.borrow().pods.contains_key(&update.uid) {
                    reports.pod(update);
                }
            }
        }
    }
}

impl Reports {
    /// Drops what is known of pods.
    fn forget(&self, gone: impl Fn(&str) -> bool) {
        self.queue().pods.retain(|uid, _| !gone(uid));
    }

    /// Queues a pod's status, in place of an earlier one.
    pub fn pod(&self, update: PodUpdate) {
        let mut queue = self.queue();
        match queue.pods.get_mut(&update.uid) {
            Some(pending) if pending.latest == update => return,
            Some(pending) => {
                pending.latest = update;
                pending.dirty = true;
            }
            None => {
                queue.pods.insert(update.uid.clone(), Pending::new(update));
            }
        }
        drop(queue);
        self.shared.changed.notify_one();
    }

    /// Queues the node's status, in place of an earlier one.
    pub fn node(&self, status: NodeStatus) {
        let mut queue = self.queue();
        match &mut queue.node {
            Some(pending) => {
                pending.latest = status;
                pending.dirty = true;
            }
            none => *none = Some(Pending::new(status)),
        }
        drop(queue);
        self.shared.changed.notify_one();
    }

    /// Queues an event: best effort. One that waits already is counted up.
    pub fn event(&self, event: Event) {
        let mut queue = self.queue();
        if let Some(waiting) = queue.events.iter_mut().find(|waiting| is_same(waiting, &event)) {
            waiting.count = waiting.count.saturating_add(event.count);
            waiting.last_timestamp = event.last_timestamp;
            return;
        }
        if queue.events.len() == EVENTS {
            queue.events.pop_front();
        }
        queue.events.push_back(event);
        drop(queue);
        self.shared.changed.notify_one();
    }

    /// Queues the latest metrics: best effort.
    pub fn metrics(&self, report: metrics::NodeReport) {
        self.queue().metrics = Some(report);
        self.shared.changed.notify_one();
    }

    /// How many pod reports control has not acknowledged.
    pub fn unacknowledged(&self) -> usize {
        self.queue()
            .pods
            .values()
            .filter(|pod| pod.dirty || pod.sent.is_some())
            .count()
    }

    /// A session begins: everything is sent again, the node's status and the pods' first, then the end mark.
    pub(super) fn begin_session(&self) {
        let mut queue = self.queue();
        let queue = &mut *queue;
        if let Some(node) = &mut queue.node {
            node.dirty = true;
            node.sent = None;
        }
        for pod in queue.pods.values_mut() {
            pod.dirty = true;
            pod.sent = None;
        }
        queue.end_mark = true;
    }

    /// The next message to send, if there is one. A pod has at most one report under way.
    pub(super) fn next(&self) -> Option<NodeMessage> {
        let mut queue = self.queue();
        let queue = &mut *queue;
        let message = next_node(queue)
            .or_else(|| next_pod(queue))
            .or_else(|| std::mem::take(&mut queue.end_mark).then_some(Message::SnapshotEnd(link::SnapshotEnd {})));
        let message = message
            .or_else(|| {
                queue
                    .events
                    .pop_front()
                    .map(|event| Message::Event(link::EventReport { event: Some(event) }))
            })
            .or_else(|| queue.metrics.take().map(Message::Metrics));
        message.map(|message| NodeMessage { message: Some(message) })
    }

    /// Control has dealt with every report up to this one.
    pub(super) fn acknowledged(&self, sequence: u64) {
        let mut queue = self.queue();
        let reached = |sent: Option<u64>| sent.is_some_and(|sent| sent <= sequence);
        if let Some(node) = &mut queue.node
            && reached(node.sent)
        {
            node.sent = None;
        }
        queue.pods.retain(|_, pod| {
            if reached(pod.sent) {
                pod.sent = None;
                // The last word on this pod has arrived.
                return !pod.latest.gone || pod.dirty;
            }
            true
        });
        drop(queue);
        // A pod that changed while its report was under way can be sent now.
        self.shared.changed.notify_one();
    }

    /// Waits for something new. Cancel-safe.
    pub(super) async fn changed(&self) {
        self.shared.changed.notified().await;
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // The queue is consistent between any two statements that can panic.
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether they say the same of the same object.
fn is_same(one: &Event, other: &Event) -> bool {
    one.reason == other.reason
        && one.message == other.message
        && one.r#type == other.r#type
        && one.involved_object == other.involved_object
}

fn next_node(queue: &mut Queue) -> Option<Message> {
    let node = queue.node.as_mut().filter(|node| node.dirty && node.sent.is_none())?;
    queue.sequence += 1;
    node.sent = Some(queue.sequence);
    node.dirty = false;
    Some(Message::Node(link::NodeReport {
        sequence: queue.sequence,
        status: Some(node.latest.clone()),
    }))
}

fn next_pod(queue: &mut Queue) -> Option<Message> {
    let pod = queue.pods.values_mut().find(|pod| pod.dirty && pod.sent.is_none())?;
    queue.sequence += 1;
    pod.sent = Some(queue.sequence);
    pod.dirty = false;
    let PodUpdate {
        namespace,
        name,
        uid,
        status,
        gone,
    } = pod.latest.clone();
    let sequence = queue.sequence;
    Some(Message::Pod(link::PodReport {
        sequence,
        namespace,
        name,
        uid,
        status: Some(status),
        gone,
    }))
}

#[cfg(test)]
mod tests {
    use orlop_proto::core::v1::PodStatus;

    use super::*;

    fn update(uid: &str, phase: &str, gone: bool) -> PodUpdate {
        let status = PodStatus {
            phase: phase.into(),
            ..Default::default()
        };
        PodUpdate {
            namespace: "default".into(),
            name: uid.into(),
            uid: uid.into(),
            status,
            gone,
        }
    }

    fn drain(reports: &Reports) -> Vec<String> {
        std::iter::from_fn(|| reports.next())
            .map(|message| match message.message.unwrap() {
                Message::Pod(pod) => {
                    format!(
                        "{} {} {}{}",
                        pod.sequence,
                        pod.uid,
                        pod.status.unwrap().phase,
                        if pod.gone { " gone" } else { "" }
                    )
                }
                Message::Node(node) => format!("{} node", node.sequence),
                Message::SnapshotEnd(_) => "end".into(),
                Message::Event(_) => "event".into(),
                Message::Metrics(_) => "metrics".into(),
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn only_the_latest_is_sent_and_one_at_a_time() {
        let reports = Reports::default();
        reports.begin_session();
        reports.pod(update("a", "Pending", false));
        reports.pod(update("a", "Running", false));
        reports.node(NodeStatus::default());
        reports.metrics(metrics::NodeReport::default());
        reports.metrics(metrics::NodeReport::default());
        assert_eq!(drain(&reports), ["1 node", "2 a Running", "end", "metrics"]);
        reports.pod(update("a", "Failed", false));
        assert!(drain(&reports).is_empty(), "the first report is under way");
        reports.acknowledged(1);
        assert!(drain(&reports).is_empty());
        reports.acknowledged(2);
        assert_eq!(drain(&reports), ["3 a Failed"]);
        assert_eq!(reports.unacknowledged(), 1);
        reports.acknowledged(3);
        assert_eq!(reports.unacknowledged(), 0);
        reports.pod(update("a", "Failed", false));
        assert!(drain(&reports).is_empty(), "nothing new");
    }

    #[test]
    fn a_new_session_repeats_the_latest_word_of_every_pod() {
        let reports = Reports::default();
        reports.begin_session();
        reports.pod(update("a", "Running", false));
        reports.pod(update("b", "Running", true));
        assert_eq!(drain(&reports), ["1 a Running", "2 b Running gone", "end"]);
        reports.acknowledged(1);
        reports.begin_session();
        assert_eq!(drain(&reports), ["3 a Running", "4 b Running gone", "end"]);
        reports.acknowledged(4);
        reports.begin_session();
        assert_eq!(
            drain(&reports),
            ["5 a Running", "end"],
            "what is gone and acknowledged is forgotten"
        );
    }

    #[tokio::test]
    async fn a_pod_that_control_does_not_name_any_more_is_forgotten() {
        let reports = Reports::default();
        let mut named = Desired::default();
        named.pods.insert("a".into(), Arc::default());
        named.pods.insert("b".into(), Arc::default());
        let (control, desired) = watch::channel(Arc::new(named.clone()));
        let after = |updates: Vec<PodUpdate>| {
            let (reports, desired) = (reports.clone(), desired.clone());
            async move {
                let (sender, receiver) = mpsc::channel(8);
                for update in updates {
                    sender.send(update).await.unwrap();
                }
                drop(sender);
                carry(receiver, desired, reports.clone()).await;
                reports.begin_session();
                drain(&reports)
            }
        };
        let first = vec![update("a", "Succeeded", false), update("b", "Running", false)];
        assert_eq!(after(first).await, ["1 a Succeeded", "2 b Running", "end"]);
        named.pods.remove("a");
        control.send_replace(Arc::new(named));
        // The reconciler may still speak of it once.
        let late = vec![update("a", "Failed", false)];
        assert_eq!(after(late).await, ["3 b Running", "end"]);
    }

    #[test]
    fn events_are_bounded() {
        let reports = Reports::default();
        for number in 0..EVENTS + 10 {
            let message = number.to_string();
            reports.event(Event {
                message,
                ..Event::default()
            });
        }
        assert_eq!(drain(&reports).len(), EVENTS);
    }

    #[test]
    fn equal_events_that_wait_are_one() {
        let reports = Reports::default();
        let event = |seconds| Event {
            reason: "BackOff".into(),
            count: 1,
            first_timestamp: Some(prost_types::Timestamp { seconds, nanos: 0 }),
            last_timestamp: Some(prost_types::Timestamp { seconds, nanos: 0 }),
            ..Event::default()
        };
        reports.event(event(1));
        reports.event(event(2));
        reports.event(Event {
            message: "other".into(),
            ..event(3)
        });
        let messages: Vec<NodeMessage> = std::iter::from_fn(|| reports.next()).collect();
        assert_eq!(messages.len(), 2);
        let folded = Event {
            last_timestamp: event(2).last_timestamp,
            count: 2,
            ..event(1)
        };
        assert_eq!(
            messages[0].message,
            Some(Message::Event(link::EventReport { event: Some(folded) }))
        );
    }
}
