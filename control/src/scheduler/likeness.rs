//! What pods have in common: the namespace, the labels and the controller by which they are counted.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use orlop_proto::{Resource as _, core::v1::Pod};

use crate::{controllers::pod_index::LabelKey, model::selector::Selector};

/// Pods that should stand apart from each other: those of one owner, or ownerless ones with equal labels.
pub type Group = u64;

/// The group that a pod belongs to.
pub fn group(pod: &Pod) -> Option<Group> {
    let meta = pod.meta();
    let mut hasher = DefaultHasher::new();
    if let Some(owner) = controller(pod) {
        owner.hash(&mut hasher);
    } else if meta.labels.is_empty() {
        return None;
    } else {
        (&meta.namespace, &meta.labels).hash(&mut hasher);
    }
    Some(hasher.finish())
}

fn controller(pod: &Pod) -> Option<&str> {
    let owners = &pod.meta().owner_references;
    let owner = owners.iter().find(|owner| owner.controller == Some(true))?;
    Some(&owner.uid)
}

/// Which pods are counted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Counted {
    /// Those of a group.
    Group(Group),
    /// Those of a namespace that a selector selects.
    Selected(Arc<str>, Arc<Selector>),
}

/// What pods of one class have in common.
#[derive(Debug, PartialEq, Eq)]
pub struct Likeness {
    namespace: String,
    labels: BTreeMap<String, String>,
    controller: Option<String>,
    pub(super) group: Option<Group>,
}

impl Likeness {
    /// Whether pods like this are counted.
    pub fn is_counted(&self, by: &Counted) -> bool {
        match by {
            Counted::Group(group) => self.group == Some(*group),
            Counted::Selected(namespace, selector) => self.namespace == **namespace && selector.matches(&self.labels),
        }
    }

    /// Of a pod.
    pub fn of(pod: &Pod) -> Self {
        let meta = pod.meta();
        Self {
            namespace: meta.namespace.clone(),
            labels: meta.labels.clone(),
            controller: controller(pod).map(str::to_owned),
            group: group(pod),
        }
    }

    /// Whether the pod is like this.
    pub fn is_of(&self, pod: &Pod) -> bool {
        let meta = pod.meta();
        self.namespace == meta.namespace && self.labels == meta.labels && self.controller.as_deref() == controller(pod)
    }

    /// Equal for pods that are alike.
    pub fn hash_of(pod: &Pod) -> u64 {
        let meta = pod.meta();
        let mut hasher = DefaultHasher::new();
        (&meta.namespace, &meta.labels, controller(pod)).hash(&mut hasher);
        hasher.finish()
    }

    /// Where questions for classes may find it.
    pub fn places(&self) -> impl Iterator<Item = LabelKey> + '_ {
        let namespace = &self.namespace;
        self.labels
            .iter()
            .map(|(key, value)| LabelKey::of_label(namespace, key, value))
            .chain(std::iter::once(LabelKey::of_namespace(namespace)))
    }
}
