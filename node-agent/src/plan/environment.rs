//! Containers' variables: services', as Docker's links had them, and the pod's own with `$(VAR)` expanded.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use orlop_proto::{
    Resource as _,
    core::v1::{Container, Pod},
    node::v1 as link,
};

use crate::desired::Desired;

/// The service that every pod is told of.
const MASTER: (&str, &str) = ("default", "kubernetes");

/// With more of arguments and variables, in bytes, the kernel starts no program: three quarters of the stack that it usually
/// allows, see execve(2).
const MAX_BYTES: usize = 6 << 20;

/// The words and variables of a container take more than any kernel starts a program with. A few variables that each name the
/// one before twice get there, so nothing is put together any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "its command, arguments and variables take more than the {MAX_BYTES} bytes with which the kernel starts a program (variables \
     of the namespace's services count too: enableServiceLinks)"
)]
pub struct TooLarge;

/// A container's variables, and what `$(VAR)` in its words becomes by them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    variables: Vec<(String, String)>,
    /// By name, which one counts: the last that was set.
    by_name: HashMap<String, usize>,
    /// Bytes that may still be used.
    left: usize,
}

impl Environment {
    /// With these variables.
    pub fn new(variables: impl IntoIterator<Item = (String, String)>) -> Result<Self, TooLarge> {
        let mut environment = Self {
            variables: Vec::new(),
            by_name: HashMap::new(),
            left: MAX_BYTES,
        };
        for (name, value) in variables {
            environment.set(name, value)?;
        }
        Ok(environment)
    }

    fn set(&mut self, name: String, value: String) -> Result<(), TooLarge> {
        self.take(name.len() + value.len())?;
        self.by_name.insert(name.clone(), self.variables.len());
        self.variables.push((name, value));
        Ok(())
    }

    fn take(&mut self, bytes: usize) -> Result<(), TooLarge> {
        // Each has a zero at its end, and a pointer to it.
        self.left = self.left.checked_sub(bytes + 9).ok_or(TooLarge)?;
        Ok(())
    }

    /// The container's words with their variables expanded.
    pub fn words(&mut self, words: &[String]) -> Result<Vec<String>, TooLarge> {
        let mut expanded = Vec::with_capacity(words.len());
        for word in words {
            let word = self.expand(word)?;
            self.take(word.len())?;
            expanded.push(word);
        }
        Ok(expanded)
    }

    /// Kubernetes' expansion: `$(NAME)` of a known variable, `$$` for a `$`; everything else stays.
    pub fn expand(&self, text: &str) -> Result<String, TooLarge> {
        let mut expanded = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(at) = rest.find('$') {
            expanded.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix('$') {
                expanded.push('$');
                rest = after;
            } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
                match self.by_name.get(name) {
                    Some(index) => expanded.push_str(&self.variables[*index].1),
                    None => expanded.extend(["$(", name, ")"]),
                }
                rest = after;
            } else {
                expanded.push('$');
            }
            if expanded.len() > self.left {
                return Err(TooLarge);
            }
        }
        expanded.push_str(rest);
        Ok(expanded)
    }

    /// The variables, in the order in which they are to be set.
    pub fn into_variables(self) -> Vec<(String, String)> {
        self.variables
    }
}

/// All variables of a container: services' first, then its own.
pub fn environment(pod: &Pod, container: &Container, desired: &Desired) -> Result<Environment, TooLarge> {
    let links = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.enable_service_links)
        .unwrap_or(true);
    let mut services: BTreeMap<&str, &link::Service> = BTreeMap::new();
    if let Some(master) = desired.services.get(MASTER.0, MASTER.1) {
        services.insert(MASTER.1, master);
    }
    if links {
        // The pod's namespace may have a service of the same name: it wins, as in Kubernetes.
        services.extend(
            desired
                .services
                .in_namespace(pod.namespace())
                .map(|service| (service.name.as_str(), service.as_ref())),
        );
    }
    let mut all = Environment::new(services.values().flat_map(|service| service_variables(service)))?;
    for variable in &container.env {
        let value = all.expand(&variable.value)?;
        all.set(variable.name.clone(), value)?;
    }
    Ok(all)
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
        let known = [("A", "0"), ("A", "1"), ("B", "$(A)")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        let known = Environment::new(known).unwrap();
        for (given, wanted) in [
            ("$(A)", "1"),
            ("x$(A)y$(A)", "x1y1"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$(B)", "$(A)"),
            ("$(NONE)", "$(NONE)"),
            ("$A $ $(", "$A $ $("),
            ("$($(A))", "$($(A))"),
            ("$", "$"),
            ("", ""),
        ] {
            assert_eq!(known.expand(given).unwrap(), wanted, "{given}");
        }
    }

    /// Each variable is the one before twice: forty of them would be terabytes.
    #[test]
    fn variables_that_double_are_refused() {
        let container = |value: &dyn Fn(usize) -> String, count| Container {
            env: (0..count)
                .map(|at| EnvVar {
                    name: format!("V{at}"),
                    value: value(at),
                })
                .collect(),
            ..Container::default()
        };
        let of = |container: &Container| environment(&Pod::default(), container, &Desired::default());
        let doubling = |at: usize| format!("$(V{0})$(V{0})xxxxxxxx", at.wrapping_sub(1));
        assert_eq!(of(&container(&doubling, 10)).unwrap().into_variables().len(), 10);
        assert_eq!(of(&container(&doubling, 40)), Err(TooLarge));
        // What no variable takes alone, many do; and words count, too.
        assert_eq!(of(&container(&|_| "x".repeat(100_000), 70)), Err(TooLarge));
        let mut most = of(&container(&|_| "x".repeat(100_000), 60)).unwrap();
        let words = ["$(V0)", "$(V1)", "$(V2)"].map(str::to_owned);
        assert_eq!(most.words(&words), Err(TooLarge));
        let many = "$(V0)".repeat(200_000);
        assert_eq!(most.words(&[many]), Err(TooLarge));
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
            Arc::new(service)
        };
        let mut desired = Desired::default();
        for service in [
            service("default", "kubernetes", [10, 96, 0, 1]),
            service("shop", "my-web", [10, 96, 0, 7]),
            service("other", "web", [10, 96, 0, 8]),
        ] {
            desired.services.insert(service);
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
        let all: BTreeMap<String, String> = environment(&pod, &container, &desired)
            .unwrap()
            .into_variables()
            .into_iter()
            .collect();
        assert_eq!(all["MY_WEB_SERVICE_HOST"], "10.96.0.7");
        assert_eq!(all["MY_WEB_SERVICE_PORT"], "80");
        assert_eq!(all["MY_WEB_SERVICE_PORT_HTTP"], "80");
        assert_eq!(all["MY_WEB_PORT_80_TCP_ADDR"], "10.96.0.7");
        assert_eq!(all["KUBERNETES_SERVICE_HOST"], "10.96.0.1");
        assert_eq!(all["URL"], "tcp://10.96.0.7:80/x");
        assert_eq!(all["TWICE"], "tcp://10.96.0.7:80/xtcp://10.96.0.7:80/x");
        assert!(!all.contains_key("WEB_SERVICE_HOST"));
        pod.spec.get_or_insert_default().enable_service_links = Some(false);
        let all: BTreeMap<String, String> = environment(&pod, &container, &desired)
            .unwrap()
            .into_variables()
            .into_iter()
            .collect();
        assert!(all.contains_key("KUBERNETES_SERVICE_HOST") && !all.contains_key("MY_WEB_SERVICE_HOST"));
    }
}
