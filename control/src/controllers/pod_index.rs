//! Pods by label and by controller, for those who ask often and want few.
//!
//! Every question first takes in what happened since the last one, so that an answer is as fresh as a snapshot taken at the
//! same moment: who waited for its own writes in the cache finds them here.

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    hash::{DefaultHasher, Hasher as _},
    sync::{Arc, Mutex, PoisonError},
};

use orlop_proto::{Resource as _, core::v1::Pod};

use super::pods;
use crate::{
    cache::{Event, EventStream, ObjectKey, Reader},
    model::selector::Selector,
};

/// A label in a namespace, or a namespace, or an owner, as a hash: whatever is found by it is compared with the question again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LabelKey(u64);

impl LabelKey {
    /// Of a label.
    pub fn of_label(namespace: &str, key: &str, value: &str) -> Self {
        Self::hash((0_u8, namespace, key, value))
    }

    /// Of a namespace.
    pub fn of_namespace(namespace: &str) -> Self {
        Self::hash((1_u8, namespace))
    }

    fn of_owner(uid: &str) -> Self {
        Self::hash((2_u8, uid))
    }

    fn hash(of: impl std::hash::Hash) -> Self {
        let mut hasher = DefaultHasher::new();
        of.hash(&mut hasher);
        Self(hasher.finish())
    }
}

/// The index. Shared by the controllers.
pub struct PodIndex {
    reader: Reader<Pod>,
    state: Mutex<State>,
}

struct State {
    /// `None` before the first question, and after events were missed.
    events: Option<EventStream<Pod>>,
    pods: Pods,
}

impl PodIndex {
    /// Over the cache's pods.
    pub fn new(reader: Reader<Pod>) -> Self {
        let state = State {
            events: None,
            pods: Pods::default(),
        };
        Self {
            reader,
            state: Mutex::new(state),
        }
    }

    /// The pods of a namespace that a selector selects.
    pub fn selected(&self, namespace: &str, selector: &Selector) -> Vec<Arc<Pod>> {
        let keys = self.ask(|pods| pods.candidates(&pods.all, namespace, selector));
        self.pods(keys, |pod| selector.matches(&pod.meta().labels))
    }

    /// The pods that concern an owner: those that it controls, and those without a controller that its selector selects.
    pub fn of_owner(&self, namespace: &str, uid: &str, selector: &Selector) -> Vec<Arc<Pod>> {
        let keys = self.ask(|pods| {
            let mut found = pods.candidates(&pods.orphans, namespace, selector);
            let own = pods.owned.get(&LabelKey::of_owner(uid)).into_iter().flatten();
            found.extend(own.filter_map(|id| pods.get(*id)).cloned());
            found
        });
        self.pods(keys, |pod| match pods::controller(pod) {
            Some(owner) => owner.uid == uid && pod.namespace() == namespace,
            None => selector.matches(&pod.meta().labels),
        })
    }

    /// The pods with these keys, as far as they are there and are what was asked for: the cache may be ahead of the index.
    fn pods(&self, keys: Vec<ObjectKey>, wanted: impl Fn(&Pod) -> bool) -> Vec<Arc<Pod>> {
        let found = keys.iter().filter_map(|key| self.reader.get(&key.namespace, &key.name));
        found.filter(|pod| wanted(pod)).collect()
    }

    fn ask<R>(&self, question: impl FnOnce(&Pods) -> R) -> R {
        // A panic under the lock would leave a half-made change: the next one begins anew.
        let mut state = self.state.lock().unwrap_or_else(|poisoned: PoisonError<_>| {
            let mut state = poisoned.into_inner();
            state.events = None;
            state
        });
        state.catch_up(&self.reader);
        question(&state.pods)
    }
}

impl State {
    fn catch_up(&mut self, reader: &Reader<Pod>) {
        if let Some(events) = &mut self.events
            && let Ok(entries) = events.take_ready()
        {
            for entry in entries {
                match entry.event() {
                    Event::Added(pod) => self.pods.set(None, &pod),
                    Event::Modified { old, new } => self.pods.set(Some(&old), &new),
                    Event::Deleted(pod) => self.pods.remove(&pod),
                }
            }
            return;
        }
        let (snapshot, events) = reader.events();
        self.pods = Pods::default();
        snapshot.objects.peek().for_each(|pod| self.pods.set(None, &pod));
        self.events = Some(events);
    }
}

type Places = HashMap<LabelKey, BTreeSet<u32>>;

/// Pods have small numbers, so that the sets are small. The pods themselves are the cache's.
#[derive(Default)]
struct Pods {
    ids: HashMap<ObjectKey, u32>,
    keys: Vec<Option<ObjectKey>>,
    free: Vec<u32>,
    all: Places,
    orphans: Places,
    owned: Places,
}

impl Pods {
    fn get(&self, id: u32) -> Option<&ObjectKey> {
        self.keys.get(id as usize)?.as_ref()
    }

    fn set(&mut self, old: Option<&Pod>, pod: &Pod) {
        let id = match self.ids.entry(ObjectKey::of(pod)) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(new) => {
                let next = u32::try_from(self.keys.len()).unwrap_or(u32::MAX);
                let id = self.free.pop().unwrap_or(next);
                if id == next {
                    self.keys.push(None);
                }
                self.keys[id as usize] = Some(new.key().clone());
                *new.insert(id)
            }
        };
        if let Some(old) = old {
            // Most changes are of the status.
            if old.meta().labels == pod.meta().labels && owner(old) == owner(pod) {
                return;
            }
            self.unlink(id, old);
        }
        let keys = keys(pod);
        let link = |places: &mut Places, keys: &[LabelKey]| {
            for key in keys {
                places.entry(*key).or_default().insert(id);
            }
        };
        link(&mut self.all, &keys);
        match owner(pod) {
            Some(uid) => link(&mut self.owned, &[LabelKey::of_owner(uid)]),
            None => link(&mut self.orphans, &keys),
        }
    }

    fn remove(&mut self, pod: &Pod) {
        if let Some(id) = self.ids.remove(&ObjectKey::of(pod)) {
            self.keys[id as usize] = None;
            self.unlink(id, pod);
            self.free.push(id);
        }
    }

    fn unlink(&mut self, id: u32, pod: &Pod) {
        let keys = keys(pod);
        let unlink = |places: &mut Places, keys: &[LabelKey]| {
            for key in keys {
                if let Some(ids) = places.get_mut(key) {
                    ids.remove(&id);
                    if ids.is_empty() {
                        places.remove(key);
                    }
                }
            }
        };
        unlink(&mut self.all, &keys);
        match owner(pod) {
            Some(uid) => unlink(&mut self.owned, &[LabelKey::of_owner(uid)]),
            None => unlink(&mut self.orphans, &keys),
        }
    }

    /// Those with the rarest of the labels that the selector requires; the namespace's when it requires none.
    fn candidates(&self, places: &Places, namespace: &str, selector: &Selector) -> Vec<ObjectKey> {
        if selector.is_nothing() {
            return Vec::new();
        }
        let empty = BTreeSet::new();
        let at = |key: LabelKey| places.get(&key).unwrap_or(&empty);
        let rarest = selector
            .required_labels()
            .map(|(key, value)| at(LabelKey::of_label(namespace, key, value)))
            .min_by_key(|ids| ids.len())
            .unwrap_or_else(|| at(LabelKey::of_namespace(namespace)));
        let keys = rarest.iter().filter_map(|id| self.get(*id));
        keys.filter(|key| *key.namespace == *namespace).cloned().collect()
    }
}

fn owner(pod: &Pod) -> Option<&str> {
    pods::controller(pod).map(|owner| owner.uid.as_str())
}

fn keys(pod: &Pod) -> Vec<LabelKey> {
    let namespace = pod.namespace();
    let labels = pod.meta().labels.iter();
    labels
        .map(|(key, value)| LabelKey::of_label(namespace, key, value))
        .chain([LabelKey::of_namespace(namespace)])
        .collect()
}

#[cfg(test)]
mod tests;
