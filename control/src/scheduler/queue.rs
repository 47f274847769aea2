//! The pods that wait for a node. Pure: time is an argument.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use orlop_proto::Resource as _;
use tokio::time::Instant;

use super::view::PodInfo;

/// The first back-off after a failed attempt; it doubles.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
/// The longest back-off.
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// An unschedulable pod is tried again after so long even when no event spoke for it.
const UNSCHEDULABLE_FLUSH: Duration = Duration::from_secs(300);

/// Creation time in seconds, then arrival: first come, first served.
type Order = (i64, u64);

/// Pods by what they wait for: their turn (active), the end of their back-off, or an event that can help.
#[derive(Debug, Default)]
pub struct Queue {
    pods: HashMap<String, Entry>,
    active: BTreeSet<(Order, String)>,
    backoff: BTreeSet<(Instant, String)>,
    unschedulable: BTreeSet<(Instant, String)>,
    /// Those of the unschedulable that require a spread.
    spread: HashSet<String>,
    arrivals: u64,
}

#[derive(Debug)]
struct Entry {
    info: Arc<PodInfo>,
    state: State,
    order: Order,
    attempts: u32,
    last_attempt: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Active,
    Backoff(Instant),
    Unschedulable(Instant),
    /// Taken out by [`Queue::pop`]; its outcome is awaited.
    InFlight,
}

impl Queue {
    /// Takes an unbound pod in, new or changed. A pod that could not be placed is tried again when what scheduling looks
    /// at has changed.
    pub fn set(&mut self, pod: &Arc<orlop_proto::core::v1::Pod>, now: Instant) {
        if let Some(entry) = self.pods.get_mut(pod.uid()) {
            let same = entry.info.pod.spec == pod.spec && entry.info.pod.meta().labels == pod.meta().labels;
            entry.info = Arc::new(PodInfo::new(pod.clone()));
            if !same && matches!(entry.state, State::Unschedulable(_)) {
                self.wake_one(pod.uid(), now);
            }
            return;
        }
        self.arrivals += 1;
        let created = pod.meta().creation_timestamp.as_ref().map_or(0, |time| time.seconds);
        let order = (created, self.arrivals);
        self.active.insert((order, pod.uid().to_owned()));
        let entry = Entry {
            info: Arc::new(PodInfo::new(pod.clone())),
            state: State::Active,
            order,
            attempts: 0,
            last_attempt: None,
        };
        self.pods.insert(pod.uid().to_owned(), entry);
    }

    /// Forgets a pod: it is bound, deleted or ended.
    pub fn remove(&mut self, uid: &str) {
        if let Some(entry) = self.pods.remove(uid) {
            self.unlist(uid, entry.state, entry.order);
        }
    }

    /// The next pod whose turn it is. Its outcome must be told by [`Queue::remove`], [`Queue::failed`] or
    /// [`Queue::unschedulable`].
    pub fn pop(&mut self, now: Instant) -> Option<Arc<PodInfo>> {
        let (_, uid) = self.active.pop_first()?;
        let entry = self.pods.get_mut(&uid)?;
        entry.state = State::InFlight;
        entry.attempts = entry.attempts.saturating_add(1);
        entry.last_attempt = Some(now);
        Some(entry.info.clone())
    }

    /// The attempt failed for a reason that passes by itself: again after the back-off.
    pub fn failed(&mut self, uid: &str, now: Instant) {
        if let Some(entry) = self.pods.get(uid) {
            let until = now + backoff(entry.attempts);
            self.enlist(uid, State::Backoff(until));
        }
    }

    /// No node would do: again when an event can help.
    pub fn unschedulable(&mut self, uid: &str, now: Instant) {
        self.enlist(uid, State::Unschedulable(now));
    }

    /// Something changed: unschedulable pods for which `helps` says yes are tried again, when their back-off has ended.
    pub fn wake(&mut self, now: Instant, helps: impl Fn(&PodInfo) -> bool) {
        let woken: Vec<String> = self
            .unschedulable
            .iter()
            .filter(|(_, uid)| self.pods.get(uid).is_some_and(|entry| helps(&entry.info)))
            .map(|(_, uid)| uid.clone())
            .collect();
        for uid in woken {
            self.wake_one(&uid, now);
        }
    }

    /// The same for those that require a spread alone: the others are not looked at.
    pub fn wake_spread(&mut self, now: Instant, helps: impl Fn(&PodInfo) -> bool) {
        let woken: Vec<String> = self
            .spread
            .iter()
            .filter(|uid| self.pods.get(*uid).is_some_and(|entry| helps(&entry.info)))
            .cloned()
            .collect();
        for uid in woken {
            self.wake_one(&uid, now);
        }
    }

    /// Moves what has waited long enough.
    pub fn advance(&mut self, now: Instant) {
        while let Some((until, uid)) = self.backoff.first().cloned() {
            if until > now {
                break;
            }
            self.enlist(&uid, State::Active);
        }
        while let Some((since, uid)) = self.unschedulable.first().cloned() {
            if since + UNSCHEDULABLE_FLUSH > now {
                break;
            }
            self.enlist(&uid, State::Active);
        }
    }

    /// When [`Queue::advance`] has something to do next.
    pub fn next_deadline(&self) -> Option<Instant> {
        let flush = self
            .unschedulable
            .first()
            .map(|(since, _)| *since + UNSCHEDULABLE_FLUSH);
        let backoff = self.backoff.first().map(|(until, _)| *until);
        [flush, backoff].into_iter().flatten().min()
    }

    /// Whether a pod's turn has come.
    pub fn has_active(&self) -> bool {
        !self.active.is_empty()
    }

    /// The uids of all pods that wait here.
    pub fn pods(&self) -> impl Iterator<Item = &String> {
        self.pods.keys()
    }

    fn wake_one(&mut self, uid: &str, now: Instant) {
        let Some(entry) = self.pods.get(uid) else { return };
        let ready_at = entry.last_attempt.map_or(now, |last| last + backoff(entry.attempts));
        let state = if ready_at <= now {
            State::Active
        } else {
            State::Backoff(ready_at)
        };
        self.enlist(uid, state);
    }

    fn enlist(&mut self, uid: &str, state: State) {
        let Some(entry) = self.pods.get_mut(uid) else { return };
        let (old, order) = (entry.state, entry.order);
        entry.state = state;
        let is_spread = entry.info.spread.is_required();
        self.unlist(uid, old, order);
        match state {
            State::Active => {
                self.active.insert((order, uid.to_owned()));
            }
            State::Backoff(until) => {
                self.backoff.insert((until, uid.to_owned()));
            }
            State::Unschedulable(since) => {
                self.unschedulable.insert((since, uid.to_owned()));
                if is_spread {
                    self.spread.insert(uid.to_owned());
                }
            }
            State::InFlight => {}
        }
    }

    fn unlist(&mut self, uid: &str, state: State, order: Order) {
        match state {
            State::Active => {
                self.active.remove(&(order, uid.to_owned()));
            }
            State::Backoff(until) => {
                self.backoff.remove(&(until, uid.to_owned()));
            }
            State::Unschedulable(since) => {
                self.unschedulable.remove(&(since, uid.to_owned()));
                self.spread.remove(uid);
            }
            State::InFlight => {}
        }
    }
}

fn backoff(attempts: u32) -> Duration {
    FIRST_BACKOFF
        .saturating_mul(1 << attempts.saturating_sub(1).min(8))
        .min(MAX_BACKOFF)
}
