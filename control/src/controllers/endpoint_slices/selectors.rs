//! Which services select a pod, without asking all of them.

use std::collections::{BTreeMap, HashMap};

use orlop_proto::{
    Resource as _,
    core::v1::{Pod, Service},
};

use crate::cache::ObjectKey;

/// A label in a namespace.
type Label = (String, String, String);

/// Services by the first label of their selector: a pod is compared only with those that begin with one of its labels.
#[derive(Debug, Default)]
pub struct SelectorIndex {
    by_label: HashMap<Label, HashMap<ObjectKey, BTreeMap<String, String>>>,
}

impl SelectorIndex {
    /// Takes a service in.
    pub fn insert(&mut self, service: &Service) {
        if let Some((label, selector)) = entry(service) {
            self.by_label
                .entry(label)
                .or_default()
                .insert(ObjectKey::of(service), selector.clone());
        }
    }

    /// Forgets a service, as it was.
    pub fn remove(&mut self, service: &Service) {
        if let Some((label, _)) = entry(service)
            && let Some(services) = self.by_label.get_mut(&label)
        {
            services.remove(&ObjectKey::of(service));
            if services.is_empty() {
                self.by_label.remove(&label);
            }
        }
    }

    /// The services that select a pod.
    pub fn of<'a>(&'a self, pod: &'a Pod) -> impl Iterator<Item = &'a ObjectKey> {
        let labels = &pod.meta().labels;
        labels
            .iter()
            .filter_map(|(key, value)| {
                self.by_label
                    .get(&(pod.namespace().to_owned(), key.clone(), value.clone()))
            })
            .flatten()
            .filter(|(_, selector)| selector.iter().all(|(key, value)| labels.get(key) == Some(value)))
            .map(|(key, _)| key)
    }
}

fn entry(service: &Service) -> Option<(Label, &BTreeMap<String, String>)> {
    let selector = &service.spec.as_ref()?.selector;
    let (key, value) = selector.first_key_value()?;
    Some(((service.namespace().to_owned(), key.clone(), value.clone()), selector))
}

#[cfg(test)]
mod tests {
    use super::*;
    use orlop_proto::core::v1::ServiceSpec;

    fn labels(list: &[(&str, &str)]) -> BTreeMap<String, String> {
        list.iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn service(name: &str, namespace: &str, selector: &[(&str, &str)]) -> Service {
        let mut service = Service {
            spec: Some(ServiceSpec {
                selector: labels(selector),
                ..ServiceSpec::default()
            }),
            ..Service::default()
        };
        service.meta_mut().name = name.into();
        service.meta_mut().namespace = namespace.into();
        service
    }

    #[test]
    fn finds_those_whose_whole_selector_matches() {
        let mut index = SelectorIndex::default();
        let both = service("both", "a", &[("app", "web"), ("tier", "front")]);
        index.insert(&service("app", "a", &[("app", "web")]));
        index.insert(&both);
        index.insert(&service("tier", "a", &[("tier", "front")]));
        index.insert(&service("back", "a", &[("app", "web"), ("tier", "back")]));
        index.insert(&service("elsewhere", "b", &[("app", "web")]));
        index.insert(&service("none", "a", &[]));
        let mut pod = Pod::default();
        pod.meta_mut().namespace = "a".into();
        pod.meta_mut().labels = labels(&[("app", "web"), ("tier", "front"), ("x", "y")]);
        let found = |index: &SelectorIndex| {
            let mut names: Vec<String> = index.of(&pod).map(|key| key.name.to_string()).collect();
            names.sort();
            names
        };
        assert_eq!(found(&index), ["app", "both", "tier"]);
        index.remove(&both);
        assert_eq!(found(&index), ["app", "tier"]);
    }
}
