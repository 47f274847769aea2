//! Who selects a pod, without asking all.

use std::collections::HashMap;

use orlop_proto::{Resource as _, core::v1::Pod};

use super::pod_index::LabelKey;
use crate::{cache::ObjectKey, model::selector::Selector};

/// Selectors by the first label that they require: a pod is compared only with those that begin with one of its labels, and with
/// those of its namespace that require no label.
#[derive(Debug, Default)]
pub struct SelectorIndex {
    by_label: HashMap<LabelKey, HashMap<ObjectKey, Selector>>,
    places: HashMap<ObjectKey, LabelKey>,
}

impl SelectorIndex {
    /// Takes in what an object selects now.
    pub fn set(&mut self, key: ObjectKey, selector: Selector) {
        self.remove(&key);
        if selector.is_nothing() {
            return;
        }
        let place = match selector.required_labels().next() {
            Some((label, value)) => LabelKey::of_label(&key.namespace, label, value),
            None => LabelKey::of_namespace(&key.namespace),
        };
        self.places.insert(key.clone(), place);
        self.by_label.entry(place).or_default().insert(key, selector);
    }

    /// Forgets an object.
    pub fn remove(&mut self, key: &ObjectKey) {
        if let Some(place) = self.places.remove(key)
            && let Some(selectors) = self.by_label.get_mut(&place)
        {
            selectors.remove(key);
            if selectors.is_empty() {
                self.by_label.remove(&place);
            }
        }
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.by_label.clear();
        self.places.clear();
    }

    /// The objects that select a pod.
    pub fn of<'a>(&'a self, pod: &'a Pod) -> impl Iterator<Item = &'a ObjectKey> {
        let (labels, namespace) = (&pod.meta().labels, pod.namespace());
        let keys = labels
            .iter()
            .map(move |(key, value)| LabelKey::of_label(namespace, key, value))
            .chain(std::iter::once(LabelKey::of_namespace(namespace)));
        keys.filter_map(|key| self.by_label.get(&key))
            .flatten()
            // Two labels may share a place.
            .filter(move |(key, selector)| *key.namespace == *namespace && selector.matches(labels))
            .map(|(key, _)| key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn key(namespace: &str, name: &str) -> ObjectKey {
        ObjectKey::new(namespace, name)
    }

    fn labels(list: &[(&str, &str)]) -> BTreeMap<String, String> {
        list.iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn found(index: &SelectorIndex, pod: &Pod) -> Vec<String> {
        let mut names: Vec<String> = index.of(pod).map(|key| key.name.to_string()).collect();
        names.sort();
        names
    }

    #[test]
    fn finds_those_whose_whole_selector_matches() {
        let mut index = SelectorIndex::default();
        let from = |list| Selector::from_labels(&labels(list));
        index.set(key("a", "app"), from(&[("app", "web")]));
        index.set(key("a", "both"), from(&[("app", "web"), ("tier", "front")]));
        index.set(key("a", "tier"), from(&[("tier", "front")]));
        index.set(key("a", "back"), from(&[("app", "web"), ("tier", "back")]));
        index.set(key("b", "elsewhere"), from(&[("app", "web")]));
        index.set(key("a", "none"), Selector::nothing());
        index.set(key("a", "exists"), Selector::parse("tier,app notin (db)").unwrap());
        index.set(key("b", "all"), Selector::everything());
        let mut pod = Pod::default();
        pod.meta_mut().namespace = "a".into();
        pod.meta_mut().labels = labels(&[("app", "web"), ("tier", "front"), ("x", "y")]);
        assert_eq!(found(&index, &pod), ["app", "both", "exists", "tier"]);
        index.remove(&key("a", "both"));
        index.set(key("a", "tier"), from(&[("tier", "back")]));
        assert_eq!(found(&index, &pod), ["app", "exists"]);
        pod.meta_mut().namespace = "b".into();
        assert_eq!(found(&index, &pod), ["all", "elsewhere"]);
    }
}
