//! Containers' variables: services', as Docker's links had them, and the pod's own with `$(VAR)` expanded.

use std::{collections::BTreeMap, net::IpAddr};

use orlop_proto::{
    Resource as _,
    core::v1::{Container, Pod},
    node::v1 as link,
};

use crate::desired::Desired;

/// The service that every pod is told of.
const MASTER: (&str, &str) = ("default", "kubernetes");

/// All variables of a container, in the order in which they are to be set.
pub fn variables(pod: &Pod, container: &Container, desired: &Desired) -> Vec<(String, String)> {
    let links = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.enable_service_links)
        .unwrap_or(true);
    let mut services: BTreeMap<&str, &link::Service> = BTreeMap::new();
    if let Some(master) = desired.services.get(&(MASTER.0.to_owned(), MASTER.1.to_owned())) {
        services.insert(MASTER.1, master);
    }
    if links {
        // The pod's namespace may have a service of the same name: it wins, as in Kubernetes.
        services.extend(
            desired
                .services_in(pod.namespace())
                .map(|service| (service.name.as_str(), service.as_ref())),
        );
    }
    let mut all: Vec<(String, String)> = services
        .values()
        .flat_map(|service| service_variables(service))
        .collect();
    for variable in &container.env {
        let value = expand(&variable.value, &all);
        all.push((variable.name.clone(), value));
    }
    all
}

/// Kubernetes' expansion: `$(NAME)` of a known variable, `$$` for a `$`; everything else stays.
pub fn expand(text: &str, variables: &[(String, String)]) -> String {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            expanded.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            // The last one set counts.
            match variables.iter().rev().find(|(known, _)| known == name) {
                Some((_, value)) => expanded.push_str(value),
                None => expanded.push_str(&format!("$({name})")),
            }
            rest = after;
        } else {
            expanded.push('$');
        }
    }
    expanded.push_str(rest);
    expanded
}

fn service_variables(service: &link::Service) -> Vec<(String, String)> {
    let Some(address) = service.addresses.first().and_then(|bytes| address(bytes)) else {
        return Vec::new();
    };
    let Some(first) = service.ports.first() else {
        return Vec::new();
    };
    let name = service.name.to_ascii_uppercase().replace('-', "_");
    let mut all = vec![
        (format!("{name}_SERVICE_HOST"), address.to_string()),
        (format!("{name}_SERVICE_PORT"), first.port.to_string()),
    ];
    for port in service.ports.iter().filter(|port| !port.name.is_empty()) {
        let port_name = port.name.to_ascii_uppercase().replace('-', "_");
        all.push((format!("{name}_SERVICE_PORT_{port_name}"), port.port.to_string()));
    }
    let host = match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    };
    for (at, port) in service.ports.iter().enumerate() {
        let protocol = if port.protocol == 17 { "udp" } else { "tcp" };
        let url = format!("{protocol}://{host}:{}", port.port);
        if at == 0 {
            all.push((format!("{name}_PORT"), url.clone()));
        }
        let prefix = format!("{name}_PORT_{}_{}", port.port, protocol.to_ascii_uppercase());
        all.push((prefix.clone(), url));
        all.push((format!("{prefix}_PROTO"), protocol.to_owned()));
        all.push((format!("{prefix}_PORT"), port.port.to_string()));
        all.push((format!("{prefix}_ADDR"), address.to_string()));
    }
    all
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use orlop_proto::core::v1::{EnvVar, PodSpec};

    use super::*;

    #[test]
    fn expansion_is_kubernetes() {
        let known = [("A".to_owned(), "1".to_owned()), ("B".to_owned(), "$(A)".to_owned())];
        for (given, wanted) in [
            ("$(A)", "1"),
            ("x$(A)y$(A)", "x1y1"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$(B)", "$(A)"),
            ("$(NONE)", "$(NONE)"),
            ("$A $ $(", "$A $ $("),
            ("$", "$"),
            ("", ""),
        ] {
            assert_eq!(expand(given, &known), wanted, "{given}");
        }
    }

    #[test]
    fn services_of_the_namespace_and_kubernetes_are_linked() {
        let service = |namespace: &str, name: &str, address: [u8; 4]| {
            let port = link::ServicePort {
                name: "http".into(),
                protocol: 6,
                port: 80,
                ..Default::default()
            };
            let service = link::Service {
                namespace: namespace.into(),
                name: name.into(),
                addresses: vec![address.to_vec().into()],
                ports: vec![port],
                ..Default::default()
            };
            ((namespace.to_owned(), name.to_owned()), Arc::new(service))
        };
        let mut desired = Desired::default();
        for (key, value) in [
            service("default", "kubernetes", [10, 96, 0, 1]),
            service("shop", "my-web", [10, 96, 0, 7]),
            service("other", "web", [10, 96, 0, 8]),
        ] {
            insert(&mut desired, key, value);
        }
        let mut pod = Pod {
            spec: Some(PodSpec::default()),
            ..Pod::default()
        };
        pod.meta_mut().namespace = "shop".into();
        let env = |name: &str, value: &str| EnvVar {
            name: name.into(),
            value: value.into(),
        };
        let container = Container {
            env: vec![env("URL", "$(MY_WEB_PORT)/x"), env("TWICE", "$(URL)$(URL)")],
            ..Default::default()
        };
        let all: BTreeMap<String, String> = variables(&pod, &container, &desired).into_iter().collect();
        assert_eq!(all["MY_WEB_SERVICE_HOST"], "10.96.0.7");
        assert_eq!(all["MY_WEB_SERVICE_PORT"], "80");
        assert_eq!(all["MY_WEB_SERVICE_PORT_HTTP"], "80");
        assert_eq!(all["MY_WEB_PORT_80_TCP_ADDR"], "10.96.0.7");
        assert_eq!(all["KUBERNETES_SERVICE_HOST"], "10.96.0.1");
        assert_eq!(all["URL"], "tcp://10.96.0.7:80/x");
        assert_eq!(all["TWICE"], "tcp://10.96.0.7:80/xtcp://10.96.0.7:80/x");
        assert!(!all.contains_key("WEB_SERVICE_HOST"));
        pod.spec.get_or_insert_default().enable_service_links = Some(false);
        let all: BTreeMap<String, String> = variables(&pod, &container, &desired).into_iter().collect();
        assert!(all.contains_key("KUBERNETES_SERVICE_HOST") && !all.contains_key("MY_WEB_SERVICE_HOST"));
    }

    fn insert(desired: &mut Desired, key: (String, String), value: Arc<link::Service>) {
        desired.services.insert(key, value);
    }
}
