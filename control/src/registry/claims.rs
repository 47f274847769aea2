//! Addresses of services and ranges of nodes.
//!
//! A claim is a record of its own (`clusterips/ADDRESS`, `podcidrs/RANGE`) that is written and removed in the transaction of the
//! object that holds it. The store refuses the second claim, whoever makes it.
//!
//! Ranges of one length are equal or apart, so their claims are all that it takes. Ranges of several lengths may overlap: a record
//! has the lengths in use, and every claim of a range depends on it. One that brings a new length announces that first, which fails
//! all that did not know of it; and while there are several, each claim looks at all nodes' ranges and changes the record's
//! revision, so that of two which did not see each other one fails and looks again.

use std::{
    collections::{BTreeSet, HashSet},
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use ipnet::{IpNet, Ipv4Net};
use orlop_proto::{
    Resource as _,
    core::v1::{Node, Service},
};
use rand::Rng as _;

use super::{
    FieldError, Registered, Registry, RegistryError,
    write::{Committed, conflict, field, invalid, revision_of, step_aside},
};
use crate::{
    cache::ObjectKey,
    store::{Expected, Key, Operation, Revision, StoreError, Write},
};

const CLUSTER_IPS: &str = "clusterips";
const POD_CIDRS: &str = "podcidrs";
/// The record of the prefix lengths that nodes' ranges have.
const POD_CIDR_LENGTHS: &str = "podcidrlengths";
/// Addresses that are tried at random before all claims are read.
const RANDOM_ATTEMPTS: usize = 4;
const ATTEMPTS: usize = 64;
/// How long the cache may take to have what the store has.
const CATCH_UP: Duration = Duration::from_secs(1);
/// Host number of the `kubernetes` service's address.
const KUBERNETES_HOST: u32 = 1;
/// Host number of the DNS service's address.
const DNS_HOST: u32 = 10;

/// Who named the address of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Chosen {
    /// The user, or there is none.
    Given,
    /// The server: when it is taken, another will do.
    ByServer,
}

pub(super) fn cluster_ip_key(address: &str) -> Key {
    Key::internal(CLUSTER_IPS, address)
}

pub(super) fn pod_cidr_key(range: &str) -> Key {
    // One range of IPv6 has many spellings, and one claim.
    let range = range
        .parse()
        .map_or_else(|_| range.to_owned(), |range: IpNet| range.to_string());
    // A slash would be another level of the key.
    Key::internal(POD_CIDRS, &range.replace('/', "-"))
}

/// The range of a claim; `None` of what is none.
fn range_of(claim: &Key) -> Option<IpNet> {
    let range = claim.as_str().strip_prefix(POD_CIDRS)?.strip_prefix('/')?;
    range.replace('-', "/").parse().ok()
}

/// The record for ranges of the same family.
fn lengths_key(range: &IpNet) -> Key {
    let family = match range {
        IpNet::V4(_) => "ipv4",
        IpNet::V6(_) => "ipv6",
    };
    Key::internal(POD_CIDR_LENGTHS, family)
}

fn lengths_text(lengths: &BTreeSet<u8>) -> String {
    let texts: Vec<String> = lengths.iter().map(u8::to_string).collect();
    texts.join(" ")
}

fn lengths_of(value: &[u8]) -> BTreeSet<u8> {
    let text = String::from_utf8_lossy(value);
    text.split_whitespace()
        .filter_map(|length| length.parse().ok())
        .collect()
}

/// What to tell who asked for what another has.
pub(super) fn taken(claim: &Key) -> Vec<FieldError> {
    if claim.as_str().starts_with(CLUSTER_IPS) {
        vec![field("spec.clusterIP", "provided IP is already allocated")]
    } else {
        vec![field("spec.podCIDRs", "the range is already given to another node")]
    }
}

pub(super) fn overlaps(range: &IpNet, other: &IpNet, holder: &str) -> String {
    format!("{range} overlaps {other} of nodes/{holder}")
}

fn give(node: &mut Node, range: Ipv4Net) {
    let spec = node.spec.get_or_insert_default();
    spec.pod_cidr = range.to_string();
    spec.pod_cidrs = vec![spec.pod_cidr.clone()];
}

/// Ranges that are being given: many nodes join at once, and each takes another.
pub(super) type BeingGiven = Arc<Mutex<HashSet<Ipv4Net>>>;

/// A range that is being given, until it is in the cache or it was in vain.
struct Giving {
    range: Ipv4Net,
    all: BeingGiven,
}

impl Giving {
    /// `None` when another is being given it.
    fn begin(all: &BeingGiven, range: Ipv4Net) -> Option<Self> {
        let is_new = all.lock().unwrap_or_else(PoisonError::into_inner).insert(range);
        is_new.then(|| Self {
            range,
            all: all.clone(),
        })
    }
}

impl Drop for Giving {
    fn drop(&mut self) {
        self.all
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.range);
    }
}

impl Registry {
    /// Writes a new node, with a pod range (`spec.podCIDR`).
    pub async fn create_node(&self, node: Node) -> Result<Node, RegistryError> {
        let name = node.name().to_owned();
        if let Ok(giving) = self.free_pod_cidr(&[]).await {
            let mut with_range = node.clone();
            give(&mut with_range, giving.range);
            match self.create(with_range).await {
                // Somebody else has taken the range, or there is none.
                Err(RegistryError::Invalid { .. }) => {}
                Err(error) => return Err(error),
                Ok(node) => {
                    self.cache.wait_for(revision_of(&node)).await;
                    return Ok(node);
                }
            }
        }
        self.create(node).await?;
        self.assign_pod_cidr(&name).await
    }

    /// Gives a node its pod range unless it has one. A range is free when no other node's overlaps it.
    pub async fn assign_pod_cidr(&self, node: &str) -> Result<Node, RegistryError> {
        let key = ObjectKey::new("", node);
        // Ranges with claims that no node shows: the node's record may be damaged.
        let mut refused = Vec::new();
        for _ in 0..ATTEMPTS {
            let old: Node = self.read(&key).await?;
            if old.spec.as_ref().is_some_and(|spec| !spec.pod_cidr.is_empty()) {
                return Ok(old);
            }
            let giving = self.free_pod_cidr(&refused).await?;
            let mut new = old.clone();
            give(&mut new, giving.range);
            match self.put(&old, new).await {
                Ok(Some(stored)) => {
                    // Others look for theirs in the cache.
                    self.cache.wait_for(revision_of(&stored)).await;
                    return Ok(stored);
                }
                // Somebody else wrote the node.
                Ok(None) => {}
                // Another node has the range.
                Err(RegistryError::Invalid { .. }) => refused.push(giving.range),
                Err(error) => return Err(error),
            }
        }
        Err(conflict::<Node>(&key, "no attempt to give it a range succeeded"))
    }

    async fn free_pod_cidr(&self, refused: &[Ipv4Net]) -> Result<Giving, RegistryError> {
        let given = self.given_ranges().await?.into_iter();
        let mut taken: Vec<Ipv4Net> = given
            .filter_map(|(range, _)| match range {
                IpNet::V4(range) => Some(range),
                IpNet::V6(_) => None,
            })
            .collect();
        taken.extend(refused);
        taken.sort_unstable();
        let prefix = self.config.pod_cidr_prefix;
        let others: Vec<Ipv4Net> = taken
            .iter()
            .filter(|range| range.prefix_len() != prefix)
            .copied()
            .collect();
        let overlaps = |range: &Ipv4Net| {
            others
                .iter()
                .any(|other| other.contains(range) || range.contains(other))
        };
        let subnets = self.config.pod_cidr.subnets(prefix).map_err(|_| {
            RegistryError::Exhausted(format!(
                "{} has no part with prefix length {prefix}",
                self.config.pod_cidr
            ))
        })?;
        let mut free = subnets.filter(|range| taken.binary_search(range).is_err() && !overlaps(range));
        free.find_map(|range| Giving::begin(&self.giving, range))
            .ok_or_else(|| {
                RegistryError::Exhausted(format!(
                    "no range of length {prefix} is free in {}",
                    self.config.pod_cidr
                ))
            })
    }

    /// All nodes' ranges and who has them, at least as fresh as the store at the call. The cache has them; when it is behind, the
    /// claims are read.
    async fn given_ranges(&self) -> Result<Vec<(IpNet, Arc<str>)>, RegistryError> {
        if matches!(self.cache.catch_up(CATCH_UP).await, Ok(true)) {
            return Ok(self.holdings.all(&self.cache.reader::<Node>()));
        }
        let listing = self.store.list(&format!("{POD_CIDRS}/")).await?;
        let claims = listing.records.iter().filter_map(|record| {
            let holder = String::from_utf8_lossy(&record.value);
            let name = holder.strip_prefix("nodes/").unwrap_or(&holder);
            Some((range_of(&record.key)?, name.into()))
        });
        Ok(claims.collect())
    }

    /// Fills in a service's address; for other kinds nothing. What the user gave is checked.
    pub(super) async fn choose_cluster_ip<T: Registered>(&self, object: &mut T) -> Result<Chosen, RegistryError> {
        let key = ObjectKey::of(object);
        let Some(service) = object.as_service() else {
            return Ok(Chosen::Given);
        };
        let is_kubernetes = *key.namespace == *"default" && *key.name == *"kubernetes";
        let spec = service.spec.get_or_insert_default();
        if spec.cluster_ip.is_empty() {
            // With one address family the two fields say the same.
            spec.cluster_ip = spec.cluster_ips.first().cloned().unwrap_or_default();
        }
        if spec.cluster_ip.is_empty() {
            let address = self.free_cluster_ip().await?.to_string();
            spec.cluster_ip.clone_from(&address);
            spec.cluster_ips = vec![address];
            return Ok(Chosen::ByServer);
        }
        if spec.cluster_ips.is_empty() {
            spec.cluster_ips = vec![spec.cluster_ip.clone()];
        }
        if spec.cluster_ip != "None" {
            self.check_cluster_ip(&spec.cluster_ip, is_kubernetes)
                .map_err(|message| invalid::<Service>(&key, vec![field("spec.clusterIP", message)]))?;
        }
        Ok(Chosen::Given)
    }

    /// What a transaction that makes these claims has to depend on, so that no range among them overlaps another node's. Of other
    /// claims nothing.
    ///
    /// # Errors
    /// [`RegistryError::Invalid`] when one does.
    pub(super) async fn apart<T: Registered>(
        &self,
        object: &T,
        claims: &[Key],
    ) -> Result<Option<Operation>, RegistryError> {
        // A node has one range at most: validation sees to it.
        let Some(wanted) = claims.iter().find_map(range_of) else {
            return Ok(None);
        };
        let refused = |message: String| invalid::<T>(&ObjectKey::of(object), vec![field("spec.podCIDRs", message)]);
        self.check_pod_cidr(&wanted).map_err(refused)?;
        let (lengths, revision) = self.announce_length(&wanted).await?;
        let write = if lengths.len() == 1 {
            Write::Check
        } else {
            // After the record was read: who claims a range later than this look finds it changed.
            if let Some(message) = self.overlap(&wanted, object.name()).await? {
                return Err(refused(message));
            }
            Write::Put(lengths_text(&lengths).into())
        };
        Ok(Some(Operation {
            key: lengths_key(&wanted),
            expected: Expected::Revision(revision),
            write,
        }))
    }

    /// Whether the range lies within another node's, or around it.
    async fn overlap(&self, wanted: &IpNet, node: &str) -> Result<Option<String>, RegistryError> {
        let others = self.given_ranges().await?;
        let mut others = others.iter().filter(|(_, holder)| **holder != *node);
        let found = others.find(|(other, _)| wanted != other && (wanted.contains(other) || other.contains(wanted)));
        Ok(found.map(|(other, holder)| overlaps(wanted, other, holder)))
    }

    /// The lengths in use, that of `wanted` among them, and the revision of their record.
    async fn announce_length(&self, wanted: &IpNet) -> Result<(BTreeSet<u8>, Revision), RegistryError> {
        let key = lengths_key(wanted);
        for attempt in 0..ATTEMPTS {
            step_aside(attempt).await;
            let (known, expected) = match self.store.get(&key).await {
                Ok(Some(record)) => {
                    let known = lengths_of(&record.value);
                    if known.contains(&wanted.prefix_len()) {
                        return Ok((known, record.revision));
                    }
                    (known, Expected::Revision(record.revision))
                }
                Ok(None) => (BTreeSet::new(), Expected::Absent),
                Err(StoreError::Damaged { .. }) => (BTreeSet::new(), Expected::Any),
                Err(error) => return Err(error.into()),
            };
            // Ranges that were given before there was such a record count, too.
            let given = self.given_ranges().await?;
            let given = given.iter().map(|(range, _)| range).chain([wanted]);
            let of_family = given.filter(|range| lengths_key(range) == key);
            let lengths: BTreeSet<u8> = of_family.map(IpNet::prefix_len).chain(known).collect();
            let announce = Operation {
                key: key.clone(),
                expected,
                write: Write::Put(lengths_text(&lengths).into()),
            };
            if let Committed::At(revision) = self.commit(vec![announce]).await? {
                return Ok((lengths, revision));
            }
        }
        Err(conflict::<Node>(
            &ObjectKey::new("", ""),
            "others kept changing the lengths of pod ranges; try again",
        ))
    }

    pub(super) fn check_cluster_ip(&self, text: &str, is_kubernetes: bool) -> Result<(), String> {
        let range = self.config.service_cidr;
        // What is no address was found by the validation of the fields.
        let Ok(address) = text.parse::<Ipv4Addr>() else {
            return Ok(());
        };
        let usable = range.contains(&address) && address != range.network() && address != range.broadcast();
        if !usable {
            return Err(format!(
                "the provided IP ({address}) is not in the valid range. The range of valid IPs is {range}"
            ));
        }
        if address == host(range, KUBERNETES_HOST) && !is_kubernetes {
            return Err("provided IP is already allocated".to_owned());
        }
        Ok(())
    }

    /// The address of the `kubernetes` service.
    pub fn kubernetes_address(&self) -> Ipv4Addr {
        host(self.config.service_cidr, KUBERNETES_HOST)
    }

    /// An address that nobody holds: at random above the band that Kubernetes leaves to given ones, then anywhere.
    async fn free_cluster_ip(&self) -> Result<Ipv4Addr, RegistryError> {
        let range = self.config.service_cidr;
        let last = u32::from(range.broadcast()) - u32::from(range.network());
        let first_dynamic = band(range).min(last);
        if first_dynamic < last {
            for _ in 0..RANDOM_ATTEMPTS {
                let candidate = host(range, rand::rng().random_range(first_dynamic..last));
                let free = match self.store.get(&cluster_ip_key(&candidate.to_string())).await {
                    Ok(record) => record.is_none(),
                    // A claim that cannot be read may be somebody's.
                    Err(StoreError::Damaged { .. }) => false,
                    Err(error) => return Err(error.into()),
                };
                if free && !is_reserved(range, candidate) {
                    return Ok(candidate);
                }
            }
        }
        let listing = self.store.list(&format!("{CLUSTER_IPS}/")).await?;
        let addresses = listing
            .records
            .iter()
            .filter_map(|record| record.key.as_str().split('/').nth(1)?.parse().ok());
        let taken: HashSet<Ipv4Addr> = addresses.collect();
        let hosts = (first_dynamic..last).chain(1..first_dynamic);
        let mut free = hosts
            .map(|number| host(range, number))
            .filter(|at| !taken.contains(at) && !is_reserved(range, *at));
        free.next()
            .ok_or_else(|| RegistryError::Exhausted(format!("no service address is free in {range}")))
    }
}

fn host(range: Ipv4Net, number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(range.network()).saturating_add(number))
}

/// Addresses that are never chosen, only given.
fn is_reserved(range: Ipv4Net, address: Ipv4Addr) -> bool {
    address == host(range, KUBERNETES_HOST) || address == host(range, DNS_HOST)
}

/// Addresses at the beginning of the range that are left to those who name theirs: between 16 and 256, a sixteenth of the range.
fn band(range: Ipv4Net) -> u32 {
    let size = u64::from(u32::from(range.broadcast()) - u32::from(range.network())) + 1;
    if size <= 16 {
        1
    } else {
        u32::try_from((size / 16).clamp(16, 256)).unwrap_or(256)
    }
}
