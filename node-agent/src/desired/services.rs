//! All services, by namespace and name.

use std::{cmp::Ordering, hash, sync::Arc};

use bytes::Bytes;
use equivalent::{Comparable, Equivalent};
use imbl::OrdSet;
use orlop_proto::node::v1 as link;

/// Service records in the order of their names, which are not kept a second time as keys: with ten thousand of them that
/// would be megabytes. A clone costs a pointer.
#[derive(Debug, Clone, Default)]
pub struct Services(OrdSet<Named>);

impl Services {
    /// The service of this name.
    #[must_use]
    pub fn get(&self, namespace: &str, name: &str) -> Option<&Arc<link::Service>> {
        self.0.get(&Name { namespace, name }).map(|named| &named.0)
    }

    /// Puts a record in; what was there by its name.
    pub fn insert(&mut self, service: Arc<link::Service>) -> Option<Arc<link::Service>> {
        self.0.insert(Named(service)).map(|named| named.0)
    }

    /// Takes the record of this name out.
    pub fn remove(&mut self, namespace: &str, name: &str) -> Option<Arc<link::Service>> {
        self.0.remove(&Name { namespace, name }).map(|named| named.0)
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<link::Service>> {
        self.0.iter().map(|named| &named.0)
    }

    /// Those of a namespace, in the order of their names.
    pub fn in_namespace<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Arc<link::Service>> {
        let from = Name { namespace, name: "" };
        self.0
            .range(from..)
            .map(|named| &named.0)
            .take_while(move |service| service.namespace == namespace)
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// None at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl PartialEq for Services {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().eq(other.iter())
    }
}

impl FromIterator<Arc<link::Service>> for Services {
    fn from_iter<T: IntoIterator<Item = Arc<link::Service>>>(services: T) -> Self {
        Self(services.into_iter().map(Named).collect())
    }
}

/// A record that is compared and hashed by its name alone.
#[derive(Debug, Clone)]
pub struct Named(pub Arc<link::Service>);

/// A service's name, to look a [`Named`] up by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name there.
    pub name: &'a str,
}

impl<'a> Name<'a> {
    /// A record's.
    #[must_use]
    pub fn of(service: &'a link::Service) -> Self {
        Self {
            namespace: &service.namespace,
            name: &service.name,
        }
    }
}

impl PartialEq for Named {
    fn eq(&self, other: &Self) -> bool {
        Name::of(&self.0) == Name::of(&other.0)
    }
}

impl Eq for Named {}

impl PartialOrd for Named {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Named {
    fn cmp(&self, other: &Self) -> Ordering {
        Name::of(&self.0).cmp(&Name::of(&other.0))
    }
}

impl hash::Hash for Named {
    fn hash<H: hash::Hasher>(&self, state: &mut H) {
        Name::of(&self.0).hash(state);
    }
}

impl Equivalent<Named> for Name<'_> {
    fn equivalent(&self, named: &Named) -> bool {
        *self == Name::of(&named.0)
    }
}

impl Comparable<Named> for Name<'_> {
    fn compare(&self, named: &Named) -> Ordering {
        self.cmp(&Name::of(&named.0))
    }
}

/// A record as it is to be kept: its bytes are slices of the message that it came in, which would stay in memory as a whole for as
/// long as one of them does, and its lists have room for more than there is.
#[must_use]
pub fn kept(mut service: link::Service) -> Arc<link::Service> {
    for address in &mut service.addresses {
        *address = Bytes::copy_from_slice(address);
    }
    for port in &mut service.ports {
        port.backends_v4 = Bytes::copy_from_slice(&port.backends_v4);
        port.name.shrink_to_fit();
    }
    service.addresses.shrink_to_fit();
    service.ports.shrink_to_fit();
    Arc::new(service)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(namespace: &str, name: &str, uid: &str) -> Arc<link::Service> {
        Arc::new(link::Service {
            namespace: namespace.into(),
            name: name.into(),
            uid: uid.into(),
            ..link::Service::default()
        })
    }

    #[test]
    fn a_service_is_found_by_its_name_and_replaced_as_a_whole() {
        let mut services = Services::default();
        assert!(services.insert(service("b", "web", "1")).is_none());
        services.insert(service("a", "web", "2"));
        services.insert(service("b", "db", "3"));
        let before = services.clone();
        assert_eq!(services.insert(service("b", "web", "4")).unwrap().uid, "1");
        assert_eq!(services.get("b", "web").unwrap().uid, "4");
        assert_ne!(services, before);
        let uids = |services: &Services| services.iter().map(|service| service.uid.clone()).collect::<Vec<_>>();
        assert_eq!(uids(&services), ["2", "3", "4"]);
        assert_eq!(uids(&before), ["2", "3", "1"]);
        let of_b: Vec<_> = services
            .in_namespace("b")
            .map(|service| service.name.as_str())
            .collect();
        assert_eq!(of_b, ["db", "web"]);
        assert_eq!(services.in_namespace("ab").count(), 0);
        assert_eq!(services.remove("a", "web").unwrap().uid, "2");
        assert!(services.remove("a", "web").is_none() && services.get("a", "web").is_none());
        assert_eq!(services.len(), 2);
    }

    #[test]
    fn a_kept_record_holds_nothing_but_itself() {
        let message = Bytes::from(vec![7; 1 << 20]);
        let mut ports = Vec::with_capacity(4);
        ports.push(link::ServicePort {
            backends_v4: message.slice(8..16),
            ..link::ServicePort::default()
        });
        let record = link::Service {
            addresses: vec![message.slice(0..4)],
            ports,
            ..link::Service::default()
        };
        let kept = kept(record.clone());
        assert_eq!(*kept, record);
        drop(record);
        assert!(message.is_unique(), "the message is free");
        assert_eq!(kept.ports.capacity(), 1);
    }
}
