//! Pods by domain.

use std::collections::BTreeMap;

use super::node_sets::{ByNumber, Domain};

/// How many pods of a selection are in each domain of one topology of a set.
#[derive(Debug, Clone)]
pub struct Tally {
    /// The set, as [`super::counts::Counts`] knows it.
    pub(super) set: u64,
    /// Which of the set's topologies.
    pub(super) topology: usize,
    pods: ByNumber<Domain, u32>,
    /// How many domains have so many pods.
    domains: BTreeMap<u32, usize>,
}

impl Tally {
    /// Without pods.
    pub fn new(set: u64, topology: usize) -> Self {
        Self {
            set,
            topology,
            pods: ByNumber::default(),
            domains: BTreeMap::new(),
        }
    }

    /// The pods in a domain.
    pub fn pods(&self, domain: Domain) -> u32 {
        self.pods.get(&domain).copied().unwrap_or(0)
    }

    /// The pods in the domain that has the fewest, of so many domains.
    pub fn fewest(&self, domains: usize) -> u32 {
        if self.pods.len() < domains {
            return 0;
        }
        self.domains.keys().next().copied().unwrap_or(0)
    }

    /// So many more, or fewer, in a domain.
    pub fn shift(&mut self, domain: Domain, pods: u32, is_more: bool) {
        let old = self.pods(domain);
        let new = if is_more { old + pods } else { old.saturating_sub(pods) };
        if let Some(domains) = self.domains.get_mut(&old).filter(|_| old > 0) {
            *domains -= 1;
            if *domains == 0 {
                self.domains.remove(&old);
            }
        }
        if new > 0 {
            *self.domains.entry(new).or_default() += 1;
            self.pods.insert(domain, new);
        } else {
            self.pods.remove(&domain);
        }
    }
}
