//! Services.

use std::{borrow::Cow, collections::HashSet, net::Ipv4Addr};

use orlop_proto::{
    IntOrString,
    core::v1::{LoadBalancerStatus, Service, ServicePort, ServiceSpec, ServiceStatus},
};
use prost_types::value::Kind;

use super::{
    FieldError, Model,
    error::{Errors, Json, Path},
    meta, names,
    pod::{PROTOCOLS, fill},
};

/// The clusterIP of a headless service.
const NONE: &str = "None";

impl Model for Service {
    fn set_defaults(&mut self) {
        let spec = self.spec.get_or_insert_default();
        fill(&mut spec.r#type, "ClusterIP");
        fill(&mut spec.session_affinity, "None");
        fill(&mut spec.ip_family_policy, "SingleStack");
        fill(&mut spec.internal_traffic_policy, "Cluster");
        if spec.ip_families.is_empty() {
            spec.ip_families.push("IPv4".to_owned());
        }
        if spec.cluster_ips.is_empty() && !spec.cluster_ip.is_empty() {
            spec.cluster_ips.push(spec.cluster_ip.clone());
        }
        for port in &mut spec.ports {
            fill(&mut port.protocol, "TCP");
            port.target_port
                .get_or_insert_with(|| IntOrString::Int(port.port).into());
        }
    }

    fn reset_status(&mut self) {
        self.status = Some(ServiceStatus {
            load_balancer: Some(LoadBalancerStatus {}),
        });
    }

    fn validate_create(&self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate(&mut errors, self, names::dns1035_label);
        validate_spec(&mut errors, self.spec.as_ref());
        errors.into_found()
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate_update(&mut errors, self, old);
        validate_spec(&mut errors, self.spec.as_ref());
        let (path, empty) = (Path::root("spec"), ServiceSpec::default());
        let (new, old) = (
            self.spec.as_ref().unwrap_or(&empty),
            old.spec.as_ref().unwrap_or(&empty),
        );
        if !old.cluster_ip.is_empty() {
            errors.immutable(&path.child("clusterIP"), &new.cluster_ip, &old.cluster_ip);
        }
        if !old.ip_families.is_empty() {
            errors.immutable(&path.child("ipFamilies"), &new.ip_families, &old.ip_families);
        }
        errors.into_found()
    }

    fn validate_status_update(&self, old: &Self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate_update(&mut errors, self, old);
        errors.into_found()
    }

    fn selectable_field(&self, name: &str) -> Option<Cow<'_, str>> {
        let spec = |field: fn(&ServiceSpec) -> &String| Some(self.spec.as_ref().map_or("", |spec| field(spec)).into());
        match name {
            "spec.clusterIP" => spec(|spec| &spec.cluster_ip),
            "spec.type" => spec(|spec| &spec.r#type),
            _ => super::selectable_meta(self, name),
        }
    }
}

fn validate_spec(errors: &mut Errors, spec: Option<&ServiceSpec>) {
    let path = Path::root("spec");
    let Some(spec) = spec else {
        return errors.required(&path, "");
    };
    ports(errors, &path.child("ports"), spec);
    meta::labels(errors, &path.child("selector"), &spec.selector);
    errors.one_of(&path.child("type"), &spec.r#type, &["ClusterIP"]);
    errors.one_of(&path.child("sessionAffinity"), &spec.session_affinity, &["None"]);
    errors.one_of(&path.child("ipFamilyPolicy"), &spec.ip_family_policy, &["SingleStack"]);
    errors.one_of(
        &path.child("internalTrafficPolicy"),
        &spec.internal_traffic_policy,
        &["Cluster"],
    );
    let families = path.child("ipFamilies");
    if spec.ip_families.len() > 1 {
        errors.too_many(&families, spec.ip_families.len(), 1);
    }
    for (index, family) in spec.ip_families.iter().enumerate() {
        errors.one_of(&families.index(index), family, &["IPv4"]);
    }
    cluster_ip(errors, &path, spec);
}

fn cluster_ip(errors: &mut Errors, path: &Path<'_>, spec: &ServiceSpec) {
    let address = |errors: &mut Errors, path: &Path<'_>, text: &String| {
        if text != NONE && text.parse::<Ipv4Addr>().is_err() {
            errors.invalid(
                path,
                text,
                "must be empty, 'None', or a valid IPv4 address, (e.g. 10.9.8.7)",
            );
        }
    };
    if !spec.cluster_ip.is_empty() {
        address(errors, &path.child("clusterIP"), &spec.cluster_ip);
    }
    let list = path.child("clusterIPs");
    match spec.cluster_ips.as_slice() {
        [] => {}
        [first] if *first == spec.cluster_ip => {}
        [first] => {
            address(errors, &list.index(0), first);
            let detail = "first value must match `clusterIP`";
            errors.invalid(&list, &Json(&spec.cluster_ips), detail);
        }
        more => errors.too_many(&list, more.len(), 1),
    }
}

fn ports(errors: &mut Errors, path: &Path<'_>, spec: &ServiceSpec) {
    if spec.ports.is_empty() && spec.cluster_ip != NONE {
        errors.required(path, "");
    }
    let (mut known, mut taken) = (HashSet::new(), HashSet::new());
    for (index, port) in spec.ports.iter().enumerate() {
        let path = path.index(index);
        if !port.name.is_empty() {
            errors.syntax(&path.child("name"), &port.name, names::dns1123_label);
            if !known.insert(&port.name) {
                errors.duplicate(&path.child("name"), &port.name);
            }
        } else if spec.ports.len() > 1 {
            errors.required(&path.child("name"), "");
        }
        errors.one_of(&path.child("protocol"), &port.protocol, &PROTOCOLS);
        errors.port(&path.child("port"), port.port);
        target_port(errors, &path.child("targetPort"), port);
        if !taken.insert((port.port, &port.protocol)) {
            errors.duplicate(&path, &format!("{}/{}", port.port, port.protocol));
        }
    }
}

fn target_port(errors: &mut Errors, path: &Path<'_>, port: &ServicePort) {
    let Some(value) = &port.target_port else {
        return errors.required(path, "");
    };
    match IntOrString::from_value(value) {
        Some(IntOrString::Int(number)) => errors.port(path, number),
        Some(IntOrString::String(name)) => errors.syntax(path, &name, names::port_name),
        None => {
            let shown = match value.kind {
                Some(Kind::NumberValue(number)) => serde_json::json!(number),
                Some(Kind::BoolValue(flag)) => serde_json::json!(flag),
                Some(Kind::StructValue(_)) => serde_json::json!({}),
                Some(Kind::ListValue(_)) => serde_json::json!([]),
                _ => serde_json::Value::Null,
            };
            errors.invalid(path, &Json(&shown), "must be an integer of 32 bits or a string");
        }
    }
}

#[cfg(test)]
mod tests {
    use orlop_proto::{json::from_value, meta::v1::ObjectMeta};
    use serde_json::json;

    use super::*;

    fn service(spec: &serde_json::Value) -> Service {
        let mut service: Service = from_value(&json!({"spec": spec})).expect("service");
        service.metadata = Some(ObjectMeta {
            name: "web".to_owned(),
            namespace: "default".to_owned(),
            ..ObjectMeta::default()
        });
        service.set_defaults();
        service
    }

    fn errors(spec: &serde_json::Value) -> Vec<String> {
        service(spec)
            .validate_create()
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn defaults_are_those_of_kubernetes() {
        let service = service(&json!({"selector": {"app": "web"}, "ports": [{"port": 80}], "clusterIP": "10.96.0.7"}));
        assert_eq!(
            serde_json::to_value(&service.spec).expect("json"),
            json!({
                "selector": {"app": "web"},
                "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}],
                "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"],
                "type": "ClusterIP", "sessionAffinity": "None", "ipFamilies": ["IPv4"],
                "ipFamilyPolicy": "SingleStack", "internalTrafficPolicy": "Cluster",
            })
        );
        assert!(service.validate_create().is_empty());
        let mut again = service.clone();
        again.set_defaults();
        assert_eq!(again, service);
    }

    #[test]
    fn all_that_is_wrong_is_said() {
        let spec = json!({
            "type": "NodePort", "sessionAffinity": "ClientIP", "clusterIP": "10.96.0.300", "ipFamilies": ["IPv6"],
            "ports": [
                {"name": "a", "port": 0, "targetPort": "NOT"},
                {"name": "a", "port": 80, "protocol": "SCTP", "targetPort": 65536},
                {"port": 80, "protocol": "SCTP"},
            ],
        });
        let expected = [
            "spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive",
            "spec.ports[0].targetPort: Invalid value: \"NOT\": must contain only alpha-numeric characters (a-z, 0-9), and \
             hyphens (-)",
            "spec.ports[1].name: Duplicate value: \"a\"",
            "spec.ports[1].protocol: Unsupported value: \"SCTP\": supported values: \"TCP\", \"UDP\"",
            "spec.ports[1].targetPort: Invalid value: 65536: must be between 1 and 65535, inclusive",
            "spec.ports[2].name: Required value",
            "spec.ports[2].protocol: Unsupported value: \"SCTP\": supported values: \"TCP\", \"UDP\"",
            "spec.ports[2]: Duplicate value: \"80/SCTP\"",
            "spec.type: Unsupported value: \"NodePort\": supported values: \"ClusterIP\"",
            "spec.sessionAffinity: Unsupported value: \"ClientIP\": supported values: \"None\"",
            "spec.ipFamilies[0]: Unsupported value: \"IPv6\": supported values: \"IPv4\"",
            "spec.clusterIP: Invalid value: \"10.96.0.300\": must be empty, 'None', or a valid IPv4 address, (e.g. 10.9.8.7)",
        ];
        assert_eq!(errors(&spec), expected);
        let mut odd = service(&json!({"ports": [{"port": 80}]}));
        let ports = &mut odd.spec.get_or_insert_default().ports;
        ports[0].target_port = Some(prost_types::Value {
            kind: Some(Kind::NumberValue(1.5)),
        });
        assert_eq!(
            odd.validate_create()[0].to_string(),
            "spec.ports[0].targetPort: Invalid value: 1.5: must be an integer of 32 bits or a string"
        );
        assert_eq!(errors(&json!({})), ["spec.ports: Required value"]);
        assert_eq!(errors(&json!({"clusterIP": "None"})), Vec::<String>::new());
    }

    #[test]
    fn an_address_stays() {
        let old = service(&json!({"ports": [{"port": 80}], "clusterIP": "10.96.0.7"}));
        let new = service(&json!({"ports": [{"port": 81}], "clusterIP": "10.96.0.8"}));
        let errors: Vec<String> = new.validate_update(&old).iter().map(ToString::to_string).collect();
        assert_eq!(
            errors,
            ["spec.clusterIP: Invalid value: \"10.96.0.8\": field is immutable"]
        );
        assert!(
            service(&json!({"ports": [{"port": 81}], "clusterIP": "10.96.0.7"}))
                .validate_update(&old)
                .is_empty()
        );
    }
}
