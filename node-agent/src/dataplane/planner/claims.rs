//! Who wants to be at a frontend.

use std::sync::Arc;

use orlop_proto::node::v1 as link;

use crate::desired::services::Name;

/// The services that claim one frontend, in the order of their names: the first of them serves. Nearly always there is one.
#[derive(Debug)]
pub(super) enum Claimants {
    One(Arc<link::Service>),
    /// Two or more.
    More(Vec<Arc<link::Service>>),
}

impl Claimants {
    pub fn first(&self) -> &Arc<link::Service> {
        match self {
            Self::One(service) => service,
            Self::More(services) => &services[0],
        }
    }

    /// One more, unless a service of this name is among them.
    pub fn add(&mut self, service: &Arc<link::Service>) {
        if let Self::One(only) = self {
            if Name::of(only) == Name::of(service) {
                return;
            }
            *self = Self::More(vec![Arc::clone(only)]);
        }
        if let Self::More(services) = self
            && let Err(place) = services.binary_search_by(|known| Name::of(known).cmp(&Name::of(service)))
        {
            services.insert(place, Arc::clone(service));
        }
    }

    /// The others than the service of this name; `None` when there are none.
    pub fn without(self, name: Name<'_>) -> Option<Self> {
        match self {
            Self::One(only) => (Name::of(&only) != name).then_some(Self::One(only)),
            Self::More(mut services) => {
                services.retain(|service| Name::of(service) != name);
                match services.len() {
                    0 => None,
                    1 => services.pop().map(Self::One),
                    _ => Some(Self::More(services)),
                }
            }
        }
    }
}
