//! A set of ranges, as arithmetic on numbers: nothing here walks through a subnet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cni_plugin::ip_range::IpRange;
use ipnet::IpNet;

use crate::{
    error::{Failure, code},
    result::Ip,
};

/// Ranges of one family that one address is taken from.
#[derive(Debug)]
pub struct Pool {
    ranges: Vec<Range>,
}

#[derive(Debug)]
struct Range {
    subnet: IpNet,
    first: u128,
    last: u128,
    gateway: IpAddr,
}

impl Pool {
    /// Checks the ranges: of one family, not overlapping, start before end and within the subnet.
    pub fn new(set: &[IpRange]) -> Result<Self, Failure> {
        let ranges = set.iter().map(Range::new).collect::<Result<Vec<_>, _>>()?;
        for (index, range) in ranges.iter().enumerate() {
            if range.subnet.addr().is_ipv4() != ranges[0].subnet.addr().is_ipv4() {
                return Err(invalid(format!(
                    "{} and {} are of two families",
                    ranges[0].describe(),
                    range.describe()
                )));
            }
            if let Some(other) = ranges[..index].iter().find(|other| other.overlaps(range)) {
                return Err(invalid(format!(
                    "{} and {} overlap",
                    other.describe(),
                    range.describe()
                )));
            }
        }
        Ok(Self { ranges })
    }

    /// What the set is remembered by.
    pub fn key(&self) -> String {
        self.ranges[0].subnet.to_string()
    }

    /// For people.
    pub fn describe(&self) -> String {
        self.ranges.iter().map(Range::describe).collect::<Vec<_>>().join(", ")
    }

    /// Whether the address is one that can be given.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.range_of(ip).is_some_and(|range| range.gateway != ip)
    }

    /// Whether any of the ranges share an address.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.ranges.iter().any(|a| other.ranges.iter().any(|b| a.overlaps(b)))
    }

    /// The ranges' gateways, with the subnets' prefix lengths.
    pub fn gateways(&self) -> Vec<IpNet> {
        let gateway = |range: &Range| IpNet::new(range.gateway, range.subnet.prefix_len()).ok();
        self.ranges.iter().filter_map(gateway).collect()
    }

    /// The result's entry for an address of this pool.
    pub fn entry(&self, ip: IpAddr) -> Ip {
        let range = self.range_of(ip).unwrap_or(&self.ranges[0]);
        let address = IpNet::new(ip, range.subnet.prefix_len()).unwrap_or(range.subnet);
        Ip {
            address,
            gateway: Some(range.gateway),
            interface: None,
        }
    }

    /// The first free address after `last`, round and round. Takes as many steps as there are taken addresses in a row.
    pub fn next_free(&self, last: Option<IpAddr>, taken: impl Fn(&IpAddr) -> bool) -> Option<IpAddr> {
        let position = last.and_then(|ip| {
            let index = self.ranges.iter().position(|range| range.holds(ip))?;
            Some((index, number(ip)))
        });
        let (start, after) = position.unwrap_or((0, self.ranges[0].first.wrapping_sub(1)));
        let count = self.ranges.len();
        let current = &self.ranges[start];
        let mut spans = vec![(current, after.wrapping_add(1), current.last)];
        spans.extend(
            (1..count)
                .map(|step| &self.ranges[(start + step) % count])
                .map(|r| (r, r.first, r.last)),
        );
        if position.is_some() {
            spans.push((current, current.first, after));
        }
        spans.into_iter().find_map(|(range, first, last)| {
            let v4 = range.subnet.addr().is_ipv4();
            (first..=last)
                .map(|n| address(n, v4))
                .find(|ip| *ip != range.gateway && !taken(ip))
        })
    }

    fn range_of(&self, ip: IpAddr) -> Option<&Range> {
        self.ranges.iter().find(|range| range.holds(ip))
    }
}

impl Range {
    fn new(range: &IpRange) -> Result<Self, Failure> {
        let subnet = IpNet::new(range.subnet.ip(), range.subnet.prefix())
            .map_err(|_| invalid(format!("{} is not a subnet", range.subnet)))?
            .trunc();
        if subnet.prefix_len() + 2 > subnet.max_prefix_len() {
            return Err(invalid(format!("{subnet} is too small to give addresses from")));
        }
        let v4 = subnet.addr().is_ipv4();
        // The network's own address is nobody's; in IPv4 the last one is for broadcasts.
        let lowest = number(subnet.network()) + 1;
        let highest = number(subnet.broadcast()) - u128::from(v4);
        let bound = |value: Option<IpAddr>, key: &str, default: u128| match value {
            None => Ok(default),
            Some(ip) if ip.is_ipv4() == v4 && (lowest..=highest).contains(&number(ip)) => Ok(number(ip)),
            Some(ip) => Err(invalid(format!("{key} {ip} is not a host's address in {subnet}"))),
        };
        let first = bound(range.range_start, "rangeStart", lowest)?;
        let last = bound(range.range_end, "rangeEnd", highest)?;
        if first > last {
            return Err(invalid(format!("{subnet}: rangeStart is after rangeEnd")));
        }
        let gateway = match range.gateway {
            None => address(lowest, v4),
            Some(ip) if ip.is_ipv4() == v4 => ip,
            Some(ip) => return Err(invalid(format!("gateway {ip} is not of the family of {subnet}"))),
        };
        Ok(Self {
            subnet,
            first,
            last,
            gateway,
        })
    }

    fn describe(&self) -> String {
        let v4 = self.subnet.addr().is_ipv4();
        format!(
            "range {}-{} of {}",
            address(self.first, v4),
            address(self.last, v4),
            self.subnet
        )
    }

    fn holds(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.subnet.addr().is_ipv4() && (self.first..=self.last).contains(&number(ip))
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.subnet.addr().is_ipv4() == other.subnet.addr().is_ipv4()
            && self.first <= other.last
            && other.first <= self.last
    }
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => u128::from(ip),
    }
}

fn address(number: u128, v4: bool) -> IpAddr {
    match u32::try_from(number) {
        Ok(number) if v4 => Ipv4Addr::from(number).into(),
        _ => Ipv6Addr::from(number).into(),
    }
}

fn invalid(why: String) -> Failure {
    Failure::new(code::INVALID_CONFIG, format!("ipam.ranges: {why}"))
}
