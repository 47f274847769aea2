//! How many pods of a kind are in each domain, kept up to date by single pods and nodes.
//!
//! Pods that are alike (namespace, labels, controller) are a [`Class`], and a class knows how many of them each node has. What
//! constraints count is a [`Selection`] of classes, with a [`Tally`] for each topology. A selection is made when a pod asks for it, from
//! the classes' sums and not from pods, and then follows: a pod that comes or goes touches the tallies that its class is counted in.
//! Selections and sets of nodes that nobody has asked for lately are forgotten.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    mem,
    sync::Arc,
};

use orlop_proto::core::v1::Pod;

use super::{
    likeness::{Counted, Group, Likeness},
    node_sets::{ByNumber, NodeSet, SetKey, Slot},
    tally::Tally,
    view::NodeInfo,
};
use crate::controllers::pod_index::LabelKey;

/// Selections that are kept at most.
const SELECTIONS: usize = 512;
/// Sets of nodes that are kept at most. One has a few bytes for each node and topology; pods of one kind that each name other nodes
/// make one each.
const SETS: usize = 128;

type Id = u64;

/// A class of pods, as placed pods hold it.
pub type ClassId = Id;

#[derive(Debug, Clone)]
struct Class {
    likeness: Arc<Likeness>,
    hash: u64,
    pods: usize,
    on: ByNumber<Slot, u32>,
    /// Those that count it.
    selections: Vec<Id>,
}

#[derive(Debug, Clone)]
struct Selection {
    counted: Counted,
    classes: Vec<ClassId>,
    tallies: Vec<Tally>,
    used: u64,
}

#[derive(Debug, Clone)]
struct KeptSet {
    set: NodeSet,
    used: u64,
}

/// All of it.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    next: Id,
    clock: u64,
    classes: ByNumber<ClassId, Class>,
    by_likeness: ByNumber<u64, Vec<ClassId>>,
    by_label: HashMap<LabelKey, HashSet<ClassId>>,
    by_group: ByNumber<Group, Vec<ClassId>>,
    selections: ByNumber<Id, Selection>,
    by_counted: HashMap<Counted, Id>,
    sets: ByNumber<Id, KeptSet>,
    by_key: HashMap<SetKey, Id>,
    changed: ByNumber<ClassId, Arc<Likeness>>,
}

impl Counts {
    /// Counts a pod on a node. What it returns is for [`Counts::remove`].
    pub fn add(&mut self, pod: &Pod, slot: Slot) -> ClassId {
        let id = self.class_of(pod).unwrap_or_else(|| self.new_class(pod));
        if let Some(class) = self.classes.get_mut(&id) {
            class.pods += 1;
            *class.on.entry(slot).or_default() += 1;
        }
        self.shift(id, slot, true);
        id
    }

    /// Counts a pod no longer.
    pub fn remove(&mut self, id: ClassId, slot: Slot) {
        self.shift(id, slot, false);
        let Some(class) = self.classes.get_mut(&id) else { return };
        class.pods -= 1;
        if let Some(here) = class.on.get_mut(&slot) {
            *here -= 1;
            if *here == 0 {
                class.on.remove(&slot);
            }
        }
        if class.pods == 0 {
            self.drop_class(id);
        }
    }

    /// Whether the pod would be counted in this class.
    pub fn is_of(&self, id: ClassId, pod: &Pod) -> bool {
        self.classes.get(&id).is_some_and(|class| class.likeness.is_of(pod))
    }

    /// The classes whose counts changed since the last call.
    pub fn take_changed(&mut self) -> Vec<Arc<Likeness>> {
        mem::take(&mut self.changed).into_values().collect()
    }

    /// Takes in what a node is now, or that it is gone.
    pub fn set_node(&mut self, slot: Slot, node: Option<&NodeInfo>) {
        let Self {
            classes,
            selections,
            sets,
            ..
        } = self;
        for (id, kept) in sets {
            let Some(moved) = kept.set.set(slot, node) else {
                continue;
            };
            for selection in selections.values_mut() {
                if selection.tallies.iter().all(|tally| tally.set != *id) {
                    continue;
                }
                let pods = pods_on(classes, &selection.classes, slot);
                if pods == 0 {
                    continue;
                }
                for tally in selection.tallies.iter_mut().filter(|tally| tally.set == *id) {
                    if let Some(from) = &moved.from {
                        tally.shift(from[tally.topology], pods, false);
                    }
                    if let Some(to) = &moved.to {
                        tally.shift(to[tally.topology], pods, true);
                    }
                }
            }
        }
    }

    /// Keeps a set of nodes from now on.
    pub fn keep_set<'a>(&mut self, key: &SetKey, nodes: impl Iterator<Item = (Slot, &'a NodeInfo)>) {
        self.set_id(key, nodes);
    }

    /// Keeps a tally from now on.
    pub fn keep_tally<'a>(
        &mut self,
        counted: &Counted,
        key: &SetKey,
        topology: usize,
        nodes: impl Iterator<Item = (Slot, &'a NodeInfo)>,
    ) {
        let set = self.set_id(key, nodes);
        self.clock += 1;
        let clock = self.clock;
        let id = match self.by_counted.get(counted) {
            Some(id) => *id,
            None => self.new_selection(counted),
        };
        let Some(selection) = self.selections.get_mut(&id) else {
            return;
        };
        selection.used = clock;
        let is_kept = |tally: &Tally| tally.set == set && tally.topology == topology;
        if selection.tallies.iter().any(is_kept) {
            return;
        }
        let Some(kept) = self.sets.get(&set) else { return };
        let tally = tally(&self.classes, &selection.classes, &kept.set, set, topology);
        selection.tallies.push(tally);
    }

    /// How many sets and tallies are kept.
    #[cfg(test)]
    pub fn kept(&self) -> (usize, usize) {
        let tallies = self.selections.values().map(|selection| selection.tallies.len());
        (self.sets.len(), tallies.sum())
    }

    /// A set of nodes: the kept one, or one that is made now.
    pub fn set<'a>(&'a self, key: &SetKey, nodes: impl Iterator<Item = (Slot, &'a NodeInfo)>) -> Cow<'a, NodeSet> {
        match self.by_key.get(key).and_then(|id| self.sets.get(id)) {
            Some(kept) => Cow::Borrowed(&kept.set),
            None => Cow::Owned(NodeSet::new(key.clone(), nodes)),
        }
    }

    /// A tally: the kept one, or one that is made now. `set` is the one of `key`.
    pub fn tally<'a>(&'a self, counted: &Counted, key: &SetKey, set: &NodeSet, topology: usize) -> Cow<'a, Tally> {
        let id = self.by_key.get(key).copied();
        let selection = self.by_counted.get(counted).and_then(|id| self.selections.get(id));
        let kept = selection.and_then(|one| {
            one.tallies
                .iter()
                .find(|tally| Some(tally.set) == id && tally.topology == topology)
        });
        match kept {
            Some(tally) => Cow::Borrowed(tally),
            None => Cow::Owned(tally(&self.classes, &self.classes_of(counted), set, Id::MAX, topology)),
        }
    }

    fn shift(&mut self, id: ClassId, slot: Slot, is_more: bool) {
        let Some(class) = self.classes.get(&id) else { return };
        self.changed.entry(id).or_insert_with(|| class.likeness.clone());
        for selection in &class.selections {
            let Some(selection) = self.selections.get_mut(selection) else {
                continue;
            };
            for tally in &mut selection.tallies {
                let kept = self.sets.get(&tally.set);
                if let Some(domain) = kept.and_then(|kept| kept.set.counted(slot, tally.topology)) {
                    tally.shift(domain, 1, is_more);
                }
            }
        }
    }

    fn class_of(&self, pod: &Pod) -> Option<ClassId> {
        let ids = self.by_likeness.get(&Likeness::hash_of(pod))?;
        ids.iter().copied().find(|id| self.is_of(*id, pod))
    }

    fn new_class(&mut self, pod: &Pod) -> ClassId {
        let id = self.new_id();
        let likeness = Arc::new(Likeness::of(pod));
        let hash = Likeness::hash_of(pod);
        self.by_likeness.entry(hash).or_default().push(id);
        for place in likeness.places() {
            self.by_label.entry(place).or_default().insert(id);
        }
        if let Some(group) = likeness.group {
            self.by_group.entry(group).or_default().push(id);
        }
        let mut selections = Vec::new();
        for (selection, one) in &mut self.selections {
            if likeness.is_counted(&one.counted) {
                one.classes.push(id);
                selections.push(*selection);
            }
        }
        let class = Class {
            likeness,
            hash,
            pods: 0,
            on: ByNumber::default(),
            selections,
        };
        self.classes.insert(id, class);
        id
    }

    fn drop_class(&mut self, id: ClassId) {
        let Some(class) = self.classes.remove(&id) else { return };
        for place in class.likeness.places() {
            if let Some(ids) = self.by_label.get_mut(&place) {
                ids.remove(&id);
                if ids.is_empty() {
                    self.by_label.remove(&place);
                }
            }
        }
        let group = class.likeness.group;
        for (map, key) in [(&mut self.by_likeness, Some(class.hash)), (&mut self.by_group, group)] {
            if let Some(key) = key
                && let Some(ids) = map.get_mut(&key)
            {
                ids.retain(|other| *other != id);
                if ids.is_empty() {
                    map.remove(&key);
                }
            }
        }
        for selection in class.selections {
            if let Some(selection) = self.selections.get_mut(&selection) {
                selection.classes.retain(|other| *other != id);
            }
        }
    }

    /// Found by their rarest label, or by their group.
    fn classes_of(&self, counted: &Counted) -> Vec<ClassId> {
        let is_counted = |id: &ClassId| {
            self.classes
                .get(id)
                .is_some_and(|class| class.likeness.is_counted(counted))
        };
        match counted {
            Counted::Group(group) => self.by_group.get(group).cloned().unwrap_or_default(),
            Counted::Selected(namespace, selector) => {
                let none = HashSet::new();
                let places = selector
                    .required_labels()
                    .map(|(key, value)| LabelKey::of_label(namespace, key, value))
                    .chain(std::iter::once(LabelKey::of_namespace(namespace)));
                let rarest = places
                    .map(|place| self.by_label.get(&place).unwrap_or(&none))
                    .min_by_key(|ids| ids.len());
                rarest.into_iter().flatten().copied().filter(is_counted).collect()
            }
        }
    }

    fn new_selection(&mut self, counted: &Counted) -> Id {
        if self.selections.len() >= SELECTIONS {
            self.forget_selections();
        }
        let id = self.new_id();
        let classes = self.classes_of(counted);
        for class in &classes {
            if let Some(class) = self.classes.get_mut(class) {
                class.selections.push(id);
            }
        }
        let selection = Selection {
            counted: counted.clone(),
            classes,
            tallies: Vec::new(),
            used: self.clock,
        };
        self.selections.insert(id, selection);
        self.by_counted.insert(counted.clone(), id);
        id
    }

    /// Forgets the quarter that was asked for longest ago.
    fn forget_selections(&mut self) {
        let ids = oldest(self.selections.iter().map(|(id, one)| (one.used, *id)), SELECTIONS / 4);
        for id in ids {
            let Some(selection) = self.selections.remove(&id) else {
                continue;
            };
            self.by_counted.remove(&selection.counted);
            for class in &selection.classes {
                if let Some(class) = self.classes.get_mut(class) {
                    class.selections.retain(|other| *other != id);
                }
            }
        }
    }

    /// Forgets the quarter that was asked for longest ago, and what was tallied by it.
    fn forget_sets(&mut self) {
        for id in oldest(self.sets.iter().map(|(id, kept)| (kept.used, *id)), SETS / 4) {
            self.sets.remove(&id);
        }
        let sets = &self.sets;
        self.by_key.retain(|_, id| sets.contains_key(id));
        for selection in self.selections.values_mut() {
            selection.tallies.retain(|tally| sets.contains_key(&tally.set));
        }
    }

    fn set_id<'a>(&mut self, key: &SetKey, nodes: impl Iterator<Item = (Slot, &'a NodeInfo)>) -> Id {
        self.clock += 1;
        if let Some(id) = self.by_key.get(key) {
            if let Some(kept) = self.sets.get_mut(id) {
                kept.used = self.clock;
            }
            return *id;
        }
        if self.sets.len() >= SETS {
            self.forget_sets();
        }
        let id = self.new_id();
        let kept = KeptSet {
            set: NodeSet::new(key.clone(), nodes),
            used: self.clock,
        };
        self.sets.insert(id, kept);
        self.by_key.insert(key.clone(), id);
        id
    }

    fn new_id(&mut self) -> Id {
        self.next += 1;
        self.next
    }
}

fn oldest(used: impl Iterator<Item = (u64, Id)>, count: usize) -> Vec<Id> {
    let mut all: Vec<(u64, Id)> = used.collect();
    all.sort_unstable();
    all.into_iter().take(count).map(|(_, id)| id).collect()
}

fn pods_on(classes: &ByNumber<ClassId, Class>, ids: &[ClassId], slot: Slot) -> u32 {
    ids.iter()
        .filter_map(|id| classes.get(id)?.on.get(&slot))
        .copied()
        .sum()
}

fn tally(classes: &ByNumber<ClassId, Class>, ids: &[ClassId], nodes: &NodeSet, set: Id, topology: usize) -> Tally {
    let mut tally = Tally::new(set, topology);
    for (slot, pods) in ids.iter().filter_map(|id| classes.get(id)).flat_map(|class| &class.on) {
        if let Some(domain) = nodes.counted(*slot, topology) {
            tally.shift(domain, *pods, true);
        }
    }
    tally
}
