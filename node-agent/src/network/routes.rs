//! Which routes the node should have: pure.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

use super::{NetworkError, kernel::Target};
use crate::desired::Routes;

/// The routes that the node should have; what is unusable is an error of its own and stops no other.
pub fn wanted_routes(own: &[IpNet], cluster: &str, routes: &Routes) -> (BTreeMap<IpNet, Target>, Vec<NetworkError>) {
    let mut errors = Vec::new();
    let mut wanted = BTreeMap::new();
    let cluster = match cluster.parse::<IpNet>() {
        Ok(net) => Some(net.trunc()),
        Err(_) if cluster.is_empty() => None,
        Err(_) => {
            errors.push(NetworkError::Invalid(format!(
                "the cluster's pod range {cluster:?} is not a range"
            )));
            None
        }
    };
    wanted.extend(cluster.map(|net| (net, Target::Unreachable)));
    for (node, route) in routes {
        let mut refuse = |why: String| errors.push(NetworkError::Invalid(format!("route of node {node}: {why}")));
        let Ok(address) = route.node_address.parse::<IpAddr>() else {
            refuse(format!("{:?} is not an address", route.node_address));
            continue;
        };
        let ranges = match parse_ranges(&route.pod_cidrs) {
            Ok(ranges) => ranges,
            Err(error) => {
                refuse(error.to_string());
                continue;
            }
        };
        for net in ranges {
            let same_family = |other: &IpNet| other.addr().is_ipv4() == net.addr().is_ipv4();
            if address.is_ipv4() != net.addr().is_ipv4() {
                refuse(format!("{net} cannot be reached through {address}"));
            } else if own.iter().any(|mine| mine.contains(&net) || net.contains(mine)) {
                refuse(format!("{net} overlaps this node's own range"));
            } else if cluster
                .as_ref()
                .is_some_and(|cluster| same_family(cluster) && !cluster.contains(&net))
            {
                refuse(format!("{net} is outside the cluster's pod range"));
            } else {
                wanted.insert(net, Target::Via(address));
            }
        }
    }
    (wanted, errors)
}

/// Ranges as control writes them. None may be everything.
pub fn parse_ranges(texts: &[String]) -> Result<Vec<IpNet>, NetworkError> {
    let parse = |text: &String| {
        let net = text
            .parse::<IpNet>()
            .ok()
            .filter(|net| net.prefix_len() > 0)
            .map(|net| net.trunc());
        net.ok_or_else(|| NetworkError::Invalid(format!("{text:?} is not a pod range")))
    };
    texts.iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use orlop_proto::node::v1 as link;

    use super::*;

    fn route(address: &str, ranges: &[&str]) -> Arc<link::Route> {
        Arc::new(link::Route {
            node_name: "n".into(),
            node_address: address.into(),
            pod_cidrs: ranges.iter().map(|r| (*r).to_owned()).collect(),
        })
    }

    #[test]
    fn routes_that_would_harm_are_refused_alone() {
        let own = parse_ranges(&["10.244.1.0/24".into()]).unwrap();
        let routes: Routes = [
            ("good", route("192.0.2.2", &["10.244.2.0/24"])),
            ("mine", route("192.0.2.3", &["10.244.1.0/25"])),
            ("outside", route("192.0.2.4", &["8.8.8.0/24"])),
            ("everything", route("192.0.2.5", &["0.0.0.0/0"])),
            ("nowhere", route("none", &["10.244.3.0/24"])),
            ("other family", route("2001:db8::1", &["10.244.4.0/24"])),
        ]
        .into_iter()
        .map(|(name, route)| (Arc::from(name), route))
        .collect();
        let (wanted, errors) = wanted_routes(&own, "10.244.0.0/16", &routes);
        assert_eq!(errors.len(), 5, "{errors:?}");
        let via = Target::Via("192.0.2.2".parse().unwrap());
        let expected: BTreeMap<IpNet, Target> = [
            ("10.244.0.0/16".parse().unwrap(), Target::Unreachable),
            ("10.244.2.0/24".parse().unwrap(), via),
        ]
        .into();
        assert_eq!(wanted, expected);
    }
}
