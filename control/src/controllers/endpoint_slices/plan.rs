//! What a service's slices should become, with as few writes as can be. Pure.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use orlop_proto::{
    IntOrString, Resource as _,
    core::v1::{ObjectReference, Pod, Service, ServicePort},
    discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    meta::v1::{ObjectMeta, OwnerReference},
};

use crate::{controllers::pods, model::endpoint_address};

/// Endpoints in a slice at most (Kubernetes' default).
pub const SLICE_MAX: usize = 100;
/// Names a slice's service.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Names who writes a slice.
pub const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// We, by Kubernetes' name.
pub const MANAGER: &str = "endpointslice-controller.k8s.io";
/// On slices of services without an address.
const HEADLESS: &str = "service.kubernetes.io/headless";

/// A write.
#[derive(Debug, Clone, PartialEq)]
pub enum SliceWrite {
    /// A new slice.
    Create(EndpointSlice),
    /// A changed one, with the resourceVersion that was read.
    Update(EndpointSlice),
    /// One too many.
    Delete(Arc<EndpointSlice>),
}

/// The ports that a slice's endpoints serve: (name, protocol, port), in the service's order.
type Ports = Vec<(String, String, i32)>;

/// Whether a pod's change is one that slices show.
pub fn matters(old: &Pod, new: &Pod) -> bool {
    let view = |pod: &Pod| {
        (
            pods::is_ready(pod),
            pod.is_deleting(),
            crate::scheduler::is_terminal(pod),
        )
    };
    view(old) != view(new)
        || address(old) != address(new)
        || old.meta().labels != new.meta().labels
        || pods::node_name(old) != pods::node_name(new)
}

/// Compares a service's selected pods with its slices.
pub fn plan<'a>(
    service: &Service,
    selected: impl Iterator<Item = &'a Arc<Pod>>,
    existing: &[Arc<EndpointSlice>],
) -> Vec<SliceWrite> {
    let mut wanted: BTreeMap<Ports, BTreeMap<String, Endpoint>> = BTreeMap::new();
    for pod in selected {
        if let Some(endpoint) = endpoint(service, pod) {
            wanted
                .entry(ports(service, pod))
                .or_default()
                .insert(pod.uid().to_owned(), endpoint);
        }
    }
    let mut drafts: Vec<Draft> = existing.iter().map(Draft::of).collect();
    for draft in &mut drafts {
        draft.keep_wanted(wanted.get_mut(&draft.ports));
    }
    for (ports, endpoints) in wanted {
        place(&mut drafts, &ports, endpoints.into_values().collect());
    }
    writes(service, drafts)
}

/// A slice as it will be.
struct Draft {
    old: Option<Arc<EndpointSlice>>,
    ports: Ports,
    endpoints: Vec<Endpoint>,
    changed: bool,
}

impl Draft {
    fn of(slice: &Arc<EndpointSlice>) -> Self {
        let port = |port: &EndpointPort| {
            (
                port.name.clone().unwrap_or_default(),
                port.protocol.clone().unwrap_or_default(),
                port.port.unwrap_or_default(),
            )
        };
        Self {
            ports: slice.ports.iter().map(port).collect(),
            endpoints: slice.endpoints.clone(),
            changed: false,
            old: Some(slice.clone()),
        }
    }

    /// Keeps the endpoints that are wanted, as they are wanted, in their places; takes them out of `wanted`.
    fn keep_wanted(&mut self, mut wanted: Option<&mut BTreeMap<String, Endpoint>>) {
        let before = std::mem::take(&mut self.endpoints);
        for old in before {
            let uid = old.target_ref.as_ref().map_or("", |target| target.uid.as_str());
            match wanted.as_mut().and_then(|wanted| wanted.remove(uid)) {
                Some(new) => {
                    self.changed |= new != old;
                    self.endpoints.push(new);
                }
                None => self.changed = true,
            }
        }
    }

    fn room(&self) -> usize {
        SLICE_MAX.saturating_sub(self.endpoints.len())
    }
}

/// Puts new endpoints where that costs least: slices that are written anyway, one slice that has room for all, new ones.
fn place(drafts: &mut Vec<Draft>, ports: &Ports, mut new: Vec<Endpoint>) {
    for draft in drafts.iter_mut().filter(|draft| draft.changed && draft.ports == *ports) {
        let count = draft.room().min(new.len());
        draft.endpoints.extend(new.drain(..count));
    }
    while new.len() >= SLICE_MAX {
        let endpoints = new.drain(..SLICE_MAX).collect();
        drafts.push(Draft {
            old: None,
            ports: ports.clone(),
            endpoints,
            changed: true,
        });
    }
    if new.is_empty() {
        return;
    }
    // The fullest one that has room keeps slices few.
    let fitting = drafts
        .iter_mut()
        .filter(|draft| draft.ports == *ports && draft.room() >= new.len());
    match fitting.max_by_key(|draft| draft.endpoints.len()) {
        Some(draft) => {
            draft.endpoints.extend(new);
            draft.changed = true;
        }
        None => drafts.push(Draft {
            old: None,
            ports: ports.clone(),
            endpoints: new,
            changed: true,
        }),
    }
}

fn writes(service: &Service, mut drafts: Vec<Draft>) -> Vec<SliceWrite> {
    // An emptied slice is used again for new content: an update instead of a deletion and a creation.
    let mut emptied: Vec<Arc<EndpointSlice>> = Vec::new();
    drafts.retain(|draft| {
        if draft.endpoints.is_empty()
            && let Some(old) = &draft.old
        {
            emptied.push(old.clone());
        }
        !draft.endpoints.is_empty()
    });
    if drafts.is_empty() {
        // A service always has a slice: "no endpoints" is a statement too.
        drafts.push(Draft {
            old: None,
            ports: Vec::new(),
            endpoints: Vec::new(),
            changed: true,
        });
    }
    let mut writes = Vec::new();
    for mut draft in drafts {
        let recycled = draft.old.is_none().then(|| emptied.pop()).flatten();
        if recycled.is_some() {
            draft.old = recycled;
        }
        let slice = slice(service, &draft);
        match draft.old {
            None => writes.push(SliceWrite::Create(slice)),
            Some(old) if *old != slice => writes.push(SliceWrite::Update(slice)),
            Some(_) => {}
        }
    }
    writes.extend(emptied.into_iter().map(SliceWrite::Delete));
    writes
}

fn slice(service: &Service, draft: &Draft) -> EndpointSlice {
    let mut slice = match &draft.old {
        Some(old) => EndpointSlice::clone(old),
        None => EndpointSlice {
            metadata: Some(ObjectMeta {
                generate_name: format!("{}-", service.name()),
                namespace: service.namespace().to_owned(),
                owner_references: vec![OwnerReference {
                    api_version: "v1".into(),
                    kind: "Service".into(),
                    name: service.name().to_owned(),
                    uid: service.uid().to_owned(),
                    controller: Some(true),
                    block_owner_deletion: Some(true),
                }],
                ..ObjectMeta::default()
            }),
            address_type: "IPv4".into(),
            ..EndpointSlice::default()
        },
    };
    slice.endpoints.clone_from(&draft.endpoints);
    slice.ports = draft
        .ports
        .iter()
        .map(|(name, protocol, port)| EndpointPort {
            name: Some(name.clone()),
            protocol: Some(protocol.clone()),
            port: Some(*port),
        })
        .collect();
    let mut labels = service.meta().labels.clone();
    labels.insert(SERVICE_NAME.into(), service.name().to_owned());
    labels.insert(MANAGED_BY.into(), MANAGER.into());
    labels.remove(HEADLESS);
    if service.spec.as_ref().is_some_and(|spec| spec.cluster_ip == "None") {
        labels.insert(HEADLESS.into(), String::new());
    }
    slice.meta_mut().labels = labels;
    slice
}

/// The address that traffic for a pod is sent to: its first that a slice may have. Its node has told it: what is none must not
/// keep the others out of the slice.
fn address(pod: &Pod) -> Option<&str> {
    let status = pod.status.as_ref()?;
    let others = status.pod_ips.iter().map(|ip| ip.ip.as_str());
    std::iter::once(status.pod_ip.as_str())
        .chain(others)
        .find(|text| endpoint_address(text).is_ok())
}

/// The endpoint that a pod is; `None` when it has no address or has ended.
fn endpoint(service: &Service, pod: &Pod) -> Option<Endpoint> {
    let address = address(pod)?;
    if crate::scheduler::is_terminal(pod) || pods::node_name(pod).is_empty() {
        return None;
    }
    let published = service
        .spec
        .as_ref()
        .is_some_and(|spec| spec.publish_not_ready_addresses);
    let serving = published || pods::is_ready(pod);
    let terminating = pod.is_deleting();
    Some(Endpoint {
        addresses: vec![address.to_owned()],
        conditions: Some(EndpointConditions {
            ready: Some(published || (serving && !terminating)),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname: String::new(),
        target_ref: Some(ObjectReference {
            kind: "Pod".into(),
            namespace: pod.namespace().to_owned(),
            name: pod.name().to_owned(),
            uid: pod.uid().to_owned(),
            ..ObjectReference::default()
        }),
        node_name: pods::node_name(pod).to_owned(),
    })
}

/// The service's ports as this pod has them; a named port that the pod lacks is left out.
fn ports(service: &Service, pod: &Pod) -> Ports {
    let ports = service.spec.iter().flat_map(|spec| &spec.ports);
    ports
        .filter_map(|port| {
            let number = target_port(port, pod)?;
            Some((port.name.clone(), protocol(&port.protocol).to_owned(), number))
        })
        .collect()
}

fn target_port(port: &ServicePort, pod: &Pod) -> Option<i32> {
    match port.target_port.as_ref().and_then(IntOrString::from_value) {
        Some(IntOrString::Int(0)) | None => Some(port.port),
        Some(IntOrString::Int(number)) => Some(number),
        Some(IntOrString::String(name)) => {
            let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
            containers
                .flat_map(|container| &container.ports)
                .find(|found| found.name == name && protocol(&found.protocol) == protocol(&port.protocol))
                .map(|found| found.container_port)
        }
    }
}

fn protocol(text: &str) -> &str {
    if text.is_empty() { "TCP" } else { text }
}

/// How many endpoints a set of slices has by address; for tests and counters.
pub fn addresses(slices: &[Arc<EndpointSlice>]) -> HashMap<String, usize> {
    let mut counts = HashMap::new();
    for endpoint in slices.iter().flat_map(|slice| &slice.endpoints) {
        for address in &endpoint.addresses {
            *counts.entry(address.clone()).or_default() += 1;
        }
    }
    counts
}

#[cfg(test)]
mod tests;
