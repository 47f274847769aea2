//! Endpoint slices.

use std::{
    borrow::Cow,
    net::{IpAddr, Ipv4Addr},
};

use orlop_proto::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};

use super::{
    FieldError, Model,
    error::{Errors, Path},
    meta, names,
    pod::PROTOCOLS,
};

const ENDPOINTS_MAX: usize = 1000;
const PORTS_MAX: usize = 100;
const LOOPBACK: &str = "may not be in the loopback range (127.0.0.0/8, ::1/128)";
const LINK_LOCAL: &str = "may not be in the link-local range (169.254.0.0/16, fe80::/10)";

impl Model for EndpointSlice {
    fn set_defaults(&mut self) {
        for port in &mut self.ports {
            port.name.get_or_insert_default();
            port.protocol.get_or_insert_with(|| "TCP".to_owned());
        }
    }

    fn reset_status(&mut self) {}

    fn validate_create(&self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate(&mut errors, self, names::dns1123_subdomain);
        validate_body(&mut errors, self);
        errors.into_found()
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate_update(&mut errors, self, old);
        validate_body(&mut errors, self);
        errors.immutable(&Path::root("addressType"), &self.address_type, &old.address_type);
        errors.into_found()
    }

    fn validate_status_update(&self, _old: &Self) -> Vec<FieldError> {
        vec![FieldError::forbidden("status", "this kind has no status")]
    }

    fn selectable_field(&self, name: &str) -> Option<Cow<'_, str>> {
        super::selectable_meta(self, name)
    }
}

fn validate_body(errors: &mut Errors, slice: &EndpointSlice) {
    errors.one_of(&Path::root("addressType"), &slice.address_type, &["IPv4"]);
    let path = Path::root("endpoints");
    if slice.endpoints.len() > ENDPOINTS_MAX {
        return errors.too_many(&path, slice.endpoints.len(), ENDPOINTS_MAX);
    }
    for (index, one) in slice.endpoints.iter().enumerate() {
        endpoint(errors, &path.index(index), one);
    }
    ports(errors, &Path::root("ports"), &slice.ports);
}

fn endpoint(errors: &mut Errors, path: &Path<'_>, endpoint: &Endpoint) {
    let addresses = path.child("addresses");
    match endpoint.addresses.as_slice() {
        [] => errors.required(&addresses, "must contain at least 1 address"),
        [address] => {
            if let Err(detail) = endpoint_address(address) {
                errors.invalid(&addresses.index(0), address, detail);
            }
        }
        more => errors.too_many(&addresses, more.len(), 1),
    }
    if !endpoint.hostname.is_empty() {
        errors.syntax(&path.child("hostname"), &endpoint.hostname, names::dns1123_label);
    }
    if !endpoint.node_name.is_empty() {
        errors.syntax(&path.child("nodeName"), &endpoint.node_name, names::dns1123_subdomain);
    }
}

/// Whether an address is one machine's on the network: none that means the sender's own machine or its wire, and none of many.
///
/// # Errors
/// What is wrong with it.
pub fn unicast_address(address: IpAddr) -> Result<(), &'static str> {
    match address {
        IpAddr::V4(address) => unicast4(address),
        IpAddr::V6(address) if address.is_unspecified() => Err("may not be unspecified (::)"),
        IpAddr::V6(address) if address.is_loopback() => Err(LOOPBACK),
        IpAddr::V6(address) if address.is_unicast_link_local() => Err(LINK_LOCAL),
        IpAddr::V6(address) if address.is_multicast() => Err("may not be in the multicast range (ff00::/8)"),
        IpAddr::V6(address) if address.to_ipv4_mapped().is_some() => Err("may not be an IPv4 address in IPv6"),
        IpAddr::V6(_) => Ok(()),
    }
}

/// Whether traffic for a service may be sent to an address: to none that means the sender's own machine or its wire.
///
/// # Errors
/// What is wrong with it.
pub fn endpoint_address(text: &str) -> Result<Ipv4Addr, &'static str> {
    let Ok(address) = text.parse::<Ipv4Addr>() else {
        return Err("must be a valid IPv4 address");
    };
    unicast4(address).map(|()| address)
}

fn unicast4(address: Ipv4Addr) -> Result<(), &'static str> {
    if address.is_unspecified() {
        Err("may not be unspecified (0.0.0.0)")
    } else if address.is_loopback() {
        Err(LOOPBACK)
    } else if address.is_link_local() {
        Err(LINK_LOCAL)
    } else if address.is_multicast() {
        Err("may not be in the multicast range (224.0.0.0/4)")
    } else if address.octets()[0] == 0 || address.octets()[0] >= 240 {
        Err("may not be in a reserved range (0.0.0.0/8, 240.0.0.0/4)")
    } else {
        Ok(())
    }
}

fn ports(errors: &mut Errors, path: &Path<'_>, ports: &[EndpointPort]) {
    if ports.len() > PORTS_MAX {
        return errors.too_many(path, ports.len(), PORTS_MAX);
    }
    for (index, port) in ports.iter().enumerate() {
        let path = path.index(index);
        let name = port.name.as_deref().unwrap_or_default();
        if ports[..index]
            .iter()
            .any(|other| other.name.as_deref().unwrap_or_default() == name)
        {
            errors.duplicate(&path.child("name"), &name);
        }
        if !name.is_empty() {
            errors.syntax(&path.child("name"), name, names::dns1123_label);
        }
        errors.one_of(
            &path.child("protocol"),
            port.protocol.as_deref().unwrap_or_default(),
            &PROTOCOLS,
        );
        match port.port {
            Some(number) => errors.port(&path.child("port"), number),
            None => errors.required(&path.child("port"), "all ports of a slice must be given"),
        }
    }
}

#[cfg(test)]
mod tests {
    use orlop_proto::json::from_value;
    use serde_json::json;

    use super::*;

    fn slice(address: &str) -> EndpointSlice {
        let mut slice: EndpointSlice = from_value(&json!({
            "metadata": {"name": "web-abc", "namespace": "default"},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [address]}],
            "ports": [{"port": 80}],
        }))
        .expect("slice");
        slice.set_defaults();
        slice
    }

    #[test]
    fn addresses_that_are_no_endpoints() {
        assert_eq!(slice("10.244.1.7").validate_create(), []);
        for bad in [
            "127.0.0.1",
            "169.254.1.1",
            "224.0.0.1",
            "239.1.1.1",
            "0.0.0.0",
            "0.1.2.3",
            "255.255.255.255",
            "::1",
            "10.0.0.01",
            "10.0.0.256",
            "",
            "a",
        ] {
            let errors = slice(bad).validate_create();
            assert_eq!(errors.len(), 1, "{bad}: {errors:?}");
            assert_eq!(errors[0].field, "endpoints[0].addresses[0]");
        }
    }

    #[test]
    fn bounds_and_ports() {
        let mut many = slice("10.244.1.7");
        many.endpoints = vec![many.endpoints[0].clone(); ENDPOINTS_MAX + 1];
        many.ports = vec![many.ports[0].clone(); 2];
        many.address_type = "FQDN".to_owned();
        let texts: Vec<String> = many
            .validate_update(&slice("10.244.1.7"))
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            texts,
            [
                "addressType: Unsupported value: \"FQDN\": supported values: \"IPv4\"",
                "endpoints: Too many: 1001: must have at most 1000 items",
                "addressType: Invalid value: \"FQDN\": field is immutable",
            ]
        );
        let mut twice = slice("10.244.1.7");
        twice.ports.push(EndpointPort {
            port: Some(0),
            ..twice.ports[0].clone()
        });
        let texts: Vec<String> = twice.validate_create().iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "ports[1].name: Duplicate value: \"\"",
                "ports[1].port: Invalid value: 0: must be between 1 and 65535, inclusive"
            ]
        );
    }
}
