//! What is in the store: as text in which everything that chance decides is left out, and what must hold of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
};

use orlop_control::store::{Change, Store as _, memory::MemoryStore};
use orlop_proto::{
    Resource, ResourceKind,
    api::v1::Object,
    apps::v1::ReplicaSet,
    core::v1::{Node, Pod, Service},
    discovery::v1::EndpointSlice,
};
use serde_json::Value;

/// All objects and claims at one moment.
pub struct State {
    objects: Vec<(ResourceKind, Object)>,
    /// Key and value of records that are no objects.
    claims: BTreeMap<String, String>,
}

impl State {
    /// As it is now.
    ///
    /// # Panics
    /// When a stored object cannot be read.
    pub async fn read(data: &MemoryStore) -> Self {
        let listing = data.list("").await.expect("the data are there");
        let (mut objects, mut claims) = (Vec::new(), BTreeMap::new());
        for record in listing.records {
            let key = record.key.as_str();
            match ResourceKind::by_resource(key.split('/').next().unwrap_or_default()) {
                Some(kind) => {
                    let object = Object::decode_as(kind, &record.value).expect("what is stored can be read");
                    objects.push((kind, object));
                }
                None => {
                    claims.insert(key.to_owned(), String::from_utf8_lossy(&record.value).into_owned());
                }
            }
        }
        Self { objects, claims }
    }

    /// All objects of a kind.
    pub fn all<T: Resource>(&self) -> Vec<T> {
        let of_kind = self
            .objects
            .iter()
            .filter(|(kind, _)| kind.resource == T::KIND.resource);
        of_kind
            .filter_map(|(_, object)| T::from_object(object.clone()))
            .collect()
    }

    /// One object.
    pub fn get<T: Resource>(&self, name: &str) -> Option<T> {
        self.all::<T>().into_iter().find(|object| object.name() == name)
    }

    /// Pods with label `app` that are ready and not being deleted.
    pub fn ready(&self, app: &str) -> Vec<Pod> {
        let pods = self.all::<Pod>().into_iter();
        pods.filter(|pod| pod.meta().labels.get("app").is_some_and(|label| label == app))
            .filter(|pod| is_ready(pod) && !pod.is_deleting())
            .collect()
    }

    /// All that must be the same however it came to be, in order: no names, addresses and nodes that chance chose, no uids, versions
    /// and times, no Events and Leases.
    pub fn normal(&self) -> Vec<String> {
        let told = |kind: &ResourceKind| matches!(kind.resource, "events" | "leases");
        let objects = self
            .objects
            .iter()
            .filter(|(kind, _)| !told(kind))
            .map(|(kind, object)| {
                let mut value = object.to_value().expect("an object is JSON");
                let generated = object.meta().map(|meta| meta.generate_name.clone()).unwrap_or_default();
                if !generated.is_empty() {
                    value["metadata"]["name"] = Value::String(format!("{generated}*"));
                }
                // Of others it tells how many steps led there.
                if !matches!(kind.kind, "ReplicaSet" | "ReplicationController" | "Service") {
                    value["metadata"]["generation"] = Value::Null;
                }
                blur(&mut value);
                format!("{} {value}", kind.resource)
            });
        let claims = self.claims.keys().map(|key| {
            let resource = key.split('/').next().unwrap_or_default();
            format!("{resource}/*")
        });
        let mut normal: Vec<String> = objects.chain(claims).collect();
        normal.sort();
        normal
    }

    /// For people.
    pub fn describe(&self) -> String {
        self.normal().join("\n")
    }

    /// What must hold whenever nothing is under way; empty when all of it does.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = self.claim_faults();
        let uids: BTreeSet<&str> = self
            .objects
            .iter()
            .filter_map(|(_, object)| object.meta())
            .map(|meta| meta.uid.as_str())
            .collect();
        for (kind, object) in &self.objects {
            let Some(meta) = object.meta() else { continue };
            for owner in &meta.owner_references {
                if !uids.contains(owner.uid.as_str()) {
                    faults.push(format!(
                        "{}/{} is an orphan of {}",
                        kind.resource, meta.name, owner.name
                    ));
                }
            }
            if meta.deletion_timestamp.is_some() {
                faults.push(format!("{}/{} is still being deleted", kind.resource, meta.name));
            }
        }
        for set in self.all::<ReplicaSet>() {
            let owned = self.all::<Pod>().into_iter().filter(|pod| {
                let owners = &pod.meta().owner_references;
                owners.iter().any(|owner| owner.uid == set.uid()) && !matches!(phase(pod), "Succeeded" | "Failed")
            });
            let (wanted, there) = (set.spec.as_ref().and_then(|spec| spec.replicas), owned.count());
            if wanted != i32::try_from(there).ok() {
                faults.push(format!("{} wants {wanted:?} pods and has {there}", set.name()));
            }
            let observed = set.status.as_ref().map(|status| status.observed_generation);
            if observed != Some(set.meta().generation) {
                faults.push(format!("{} observed {observed:?}", set.name()));
            }
        }
        faults.extend(self.endpoint_faults());
        faults
    }

    /// Every address and range has one claim, and every claim a holder.
    fn claim_faults(&self) -> Vec<String> {
        let services = self.all::<Service>().into_iter().filter_map(|service| {
            let address = service.spec.as_ref()?.cluster_ip.clone();
            let holder = format!("services/{}/{}", service.namespace(), service.name());
            (!address.is_empty() && address != "None").then(|| (format!("clusterips/{address}"), holder))
        });
        let nodes = self.all::<Node>().into_iter().filter_map(|node| {
            let range = node.spec.as_ref()?.pod_cidr.replace('/', "-");
            (!range.is_empty()).then(|| (format!("podcidrs/{range}"), format!("nodes/{}", node.name())))
        });
        let mut faults = Vec::new();
        let mut held = BTreeMap::new();
        for (claim, holder) in services.chain(nodes) {
            if let Some(other) = held.insert(claim.clone(), holder.clone()) {
                faults.push(format!("{claim} is held by {holder} and {other}"));
            }
        }
        let claims = self
            .claims
            .iter()
            .filter(|(key, _)| key.starts_with("clusterips/") || key.starts_with("podcidrs/"));
        let claimed: BTreeMap<String, String> = claims.map(|(key, holder)| (key.clone(), holder.clone())).collect();
        if claimed != held {
            faults.push(format!("claims {claimed:?} of what is held: {held:?}"));
        }
        faults
    }

    /// The ready endpoints of a service with a selector are the ready pods that it selects.
    fn endpoint_faults(&self) -> Vec<String> {
        let (slices, pods) = (self.all::<EndpointSlice>(), self.all::<Pod>());
        let mut faults = Vec::new();
        for service in self.all::<Service>() {
            let Some(selector) = service
                .spec
                .as_ref()
                .map(|spec| &spec.selector)
                .filter(|one| !one.is_empty())
            else {
                continue;
            };
            let chosen = |pod: &&Pod| {
                let labels = &pod.meta().labels;
                pod.namespace() == service.namespace()
                    && selector.iter().all(|(key, value)| labels.get(key) == Some(value))
            };
            let wanted: BTreeSet<String> = pods
                .iter()
                .filter(chosen)
                .filter(|pod| is_ready(pod) && !pod.is_deleting())
                .map(|pod| pod.status.clone().unwrap_or_default().pod_ip)
                .collect();
            let own = slices.iter().filter(|slice| {
                let label = slice.meta().labels.get("kubernetes.io/service-name");
                slice.namespace() == service.namespace() && label.is_some_and(|name| name == service.name())
            });
            let listed: Vec<String> = own
                .flat_map(|slice| &slice.endpoints)
                .filter(|endpoint| {
                    endpoint
                        .conditions
                        .is_some_and(|conditions| conditions.ready == Some(true))
                })
                .flat_map(|endpoint| endpoint.addresses.clone())
                .collect();
            if listed.len() != wanted.len() || listed.iter().cloned().collect::<BTreeSet<_>>() != wanted {
                faults.push(format!("{} has endpoints {listed:?} of {wanted:?}", service.name()));
            }
        }
        faults
    }
}

/// What must have held at every moment of a history; empty when all of it did.
pub fn past_faults(data: &MemoryStore) -> Vec<String> {
    let mut past = Past::default();
    for change in data.history().into_iter().flat_map(|set| set.changes) {
        match &change {
            Change::Put { record, .. } => past.put(record.key.as_str(), &record.value),
            Change::Delete { key, .. } => past.delete(key.as_str()),
        }
    }
    past.faults
}

/// Of everything that was ever written, in its order.
pub fn trace(data: &MemoryStore) -> u64 {
    let mut trace = DefaultHasher::new();
    for set in data.history() {
        set.revision.hash(&mut trace);
        for change in set.changes {
            match change {
                Change::Put { record, .. } => (record.key, Some(record.value)),
                Change::Delete { key, .. } => (key, None),
            }
            .hash(&mut trace);
        }
    }
    trace.finish()
}

#[derive(Default)]
struct Past {
    faults: Vec<String>,
    /// Where each pod, by uid, was bound to.
    bound: BTreeMap<String, String>,
    /// Who holds which claim.
    holders: BTreeMap<String, String>,
    /// The pods that count, by key, with the uid of the set that owns them.
    active: BTreeMap<String, String>,
    /// The most replicas that each set, by uid, was ever to have.
    most: BTreeMap<String, usize>,
}

impl Past {
    fn put(&mut self, key: &str, value: &[u8]) {
        match key.split('/').next().unwrap_or_default() {
            "clusterips" | "podcidrs" => {
                let holder = String::from_utf8_lossy(value).into_owned();
                if let Some(earlier) = self.holders.insert(key.to_owned(), holder.clone())
                    && earlier != holder
                {
                    let text = format!("{key} went from {earlier} to {holder} without being free");
                    self.faults.push(text);
                }
            }
            "replicasets" => {
                if let Some(set) = decoded::<ReplicaSet>(value) {
                    let wanted = set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
                    let most = self.most.entry(set.uid().to_owned()).or_default();
                    *most = (*most).max(usize::try_from(wanted).unwrap_or_default());
                }
            }
            "pods" => {
                if let Some(pod) = decoded::<Pod>(value) {
                    self.pod(key, &pod);
                }
            }
            _ => {}
        }
    }

    fn pod(&mut self, key: &str, pod: &Pod) {
        let node = node_name(pod).to_owned();
        if let Some(earlier) = self.bound.insert(pod.uid().to_owned(), node.clone())
            && !earlier.is_empty()
            && earlier != node
        {
            let text = format!("{key} was bound to {earlier}, then to {node:?}");
            self.faults.push(text);
        }
        let owner = pod
            .meta()
            .owner_references
            .iter()
            .find(|owner| owner.controller == Some(true));
        let counts = !pod.is_deleting() && !matches!(phase(pod), "Succeeded" | "Failed");
        match owner.filter(|_| counts) {
            Some(owner) => {
                let is_new = self.active.insert(key.to_owned(), owner.uid.clone()).is_none();
                let there = self.active.values().filter(|uid| **uid == owner.uid).count();
                if let Some(most) = self.most.get(&owner.uid).filter(|most| is_new && there > **most) {
                    let text = format!(
                        "{key} is number {there} of {}, which was to have {most} at most",
                        owner.name
                    );
                    self.faults.push(text);
                }
            }
            None => drop(self.active.remove(key)),
        }
    }

    fn delete(&mut self, key: &str) {
        self.holders.remove(key);
        self.active.remove(key);
    }
}

fn decoded<T: Resource>(value: &[u8]) -> Option<T> {
    Object::decode_as(T::KIND, value).ok().and_then(T::from_object)
}

/// Leaves out what chance decides.
fn blur(value: &mut Value) {
    const DECIDED_BY_CHANCE: [&str; 19] = [
        "uid",
        "resourceVersion",
        "creationTimestamp",
        "deletionTimestamp",
        "lastTransitionTime",
        "lastHeartbeatTime",
        "lastUpdateTime",
        "startTime",
        "timeAdded",
        "clusterIP",
        "clusterIPs",
        "podCIDR",
        "podCIDRs",
        "podIP",
        "podIPs",
        "nodeName",
        "addresses",
        "targetRef",
        "endpoints.kubernetes.io/last-change-trigger-time",
    ];
    match value {
        Value::Object(fields) => {
            for (name, field) in fields.iter_mut() {
                if DECIDED_BY_CHANCE.contains(&name.as_str()) {
                    *field = Value::String("*".to_owned());
                } else {
                    blur(field);
                }
            }
        }
        Value::Array(items) => {
            items.iter_mut().for_each(blur);
            items.sort_by_key(ToString::to_string);
        }
        _ => {}
    }
}

/// Status of a node's condition.
pub fn condition<'a>(node: &'a Node, kind: &str) -> Option<&'a str> {
    let conditions = node.status.iter().flat_map(|status| &status.conditions);
    let mut found = conditions.filter(|condition| condition.r#type == kind);
    found.next().map(|condition| condition.status.as_str())
}

/// Whether the pod's condition Ready holds.
pub fn is_ready(pod: &Pod) -> bool {
    let mut conditions = pod.status.iter().flat_map(|status| &status.conditions);
    conditions.any(|condition| condition.r#type == "Ready" && condition.status == "True")
}

/// Where the pod is bound to; empty when nowhere.
pub fn node_name(pod: &Pod) -> &str {
    pod.spec.as_ref().map_or("", |spec| spec.node_name.as_str())
}

/// The pod's phase.
pub fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().map_or("", |status| status.phase.as_str())
}
