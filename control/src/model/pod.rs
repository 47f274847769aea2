//! Pods and the templates that pods are made from.

use std::{borrow::Cow, collections::HashSet};

use orlop_proto::{
    Resource,
    core::v1::{Container, ContainerPort, EnvVar, Pod, PodSpec, PodStatus, PodTemplateSpec},
    quantity::Quantity,
};

use super::{
    FieldError, Model,
    error::{Errors, Path},
    meta, names, node_affinity, pod_update, resources, taints, topology_spread,
};

/// The grace period of a pod that names none, in seconds.
const GRACE_SECONDS: i64 = 30;
const PULL_POLICIES: [&str; 3] = ["Always", "IfNotPresent", "Never"];
const RESTART_POLICIES: [&str; 3] = ["Always", "OnFailure", "Never"];
/// The protocols that services and pods can use.
pub(super) const PROTOCOLS: [&str; 2] = ["TCP", "UDP"];
const NUL: &str = "must not contain a NUL character";

impl Model for Pod {
    fn set_defaults(&mut self) {
        set_spec_defaults(self.spec.get_or_insert_default());
    }

    fn reset_status(&mut self) {
        let qos_class = self.spec.as_ref().map(qos_class).unwrap_or_default().to_owned();
        self.status = Some(PodStatus {
            phase: "Pending".to_owned(),
            qos_class,
            ..PodStatus::default()
        });
    }

    fn validate_create(&self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate(&mut errors, self, names::dns1123_subdomain);
        match &self.spec {
            Some(spec) => validate_spec(&mut errors, &Path::root("spec"), spec),
            None => errors.required(&Path::root("spec"), ""),
        }
        errors.into_found()
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate_update(&mut errors, self, old);
        pod_update::validate(&mut errors, self, old);
        errors.into_found()
    }

    fn validate_status_update(&self, old: &Self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate_update(&mut errors, self, old);
        if let Some(status) = &self.status {
            pod_update::validate_status(&mut errors, &Path::root("status"), status);
        }
        errors.into_found()
    }

    fn selectable_field(&self, name: &str) -> Option<Cow<'_, str>> {
        let spec = |field: fn(&PodSpec) -> &String| Some(self.spec.as_ref().map_or("", |spec| field(spec)).into());
        let status =
            |field: fn(&PodStatus) -> &String| Some(self.status.as_ref().map_or("", |status| field(status)).into());
        match name {
            "spec.nodeName" => spec(|spec| &spec.node_name),
            "spec.restartPolicy" => spec(|spec| &spec.restart_policy),
            "status.phase" => status(|status| &status.phase),
            "status.podIP" => status(|status| &status.pod_ip),
            _ => super::selectable_meta(self, name),
        }
    }
}

/// Guaranteed, Burstable or BestEffort: by the requests and limits for CPU and memory.
pub fn qos_class(spec: &PodSpec) -> &'static str {
    let positive = |text: &String| text.parse::<Quantity>().ok().filter(|quantity| !quantity.is_zero());
    let (mut any, mut guaranteed) = (false, true);
    for container in &spec.containers {
        for name in ["cpu", "memory"] {
            let resources = container.resources.as_ref();
            let request = resources.and_then(|one| one.requests.get(name)).and_then(positive);
            let limit = resources.and_then(|one| one.limits.get(name)).and_then(positive);
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && request.is_none_or(|request| Some(request) == limit);
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// Defaults of a template.
pub(super) fn set_template_defaults(template: &mut PodTemplateSpec) {
    set_spec_defaults(template.spec.get_or_insert_default());
}

fn set_spec_defaults(spec: &mut PodSpec) {
    fill(&mut spec.restart_policy, "Always");
    spec.termination_grace_period_seconds.get_or_insert(GRACE_SECONDS);
    spec.enable_service_links.get_or_insert(true);
    for container in &mut spec.containers {
        let policy = if pulls_always(&container.image) {
            "Always"
        } else {
            "IfNotPresent"
        };
        fill(&mut container.image_pull_policy, policy);
        for port in &mut container.ports {
            fill(&mut port.protocol, "TCP");
        }
        resources::set_defaults(container.resources.get_or_insert_default());
    }
}

/// Gives an empty text its default.
pub(super) fn fill(text: &mut String, default: &str) {
    if text.is_empty() {
        default.clone_into(text);
    }
}

/// Whether the image has the tag `latest`, or neither tag nor digest.
fn pulls_always(image: &str) -> bool {
    if image.contains('@') {
        return false;
    }
    let last = image.rsplit('/').next().unwrap_or(image);
    last.split_once(':').is_none_or(|(_, tag)| tag == "latest")
}

/// A template of a controller, whose pods must always be restarted.
pub(super) fn validate_template(errors: &mut Errors, path: &Path<'_>, template: &PodTemplateSpec) {
    if let Some(template_meta) = &template.metadata {
        let path = path.child("metadata");
        meta::labels(errors, &path.child("labels"), &template_meta.labels);
        meta::annotations(errors, &path.child("annotations"), &template_meta.annotations);
        meta::finalizers(errors, &path.child("finalizers"), &template_meta.finalizers);
    }
    let path = path.child("spec");
    let Some(spec) = &template.spec else {
        return errors.required(&path, "");
    };
    validate_spec(errors, &path, spec);
    if spec.restart_policy != "Always" && RESTART_POLICIES.contains(&spec.restart_policy.as_str()) {
        errors.unsupported(&path.child("restartPolicy"), &spec.restart_policy, &["Always"]);
    }
}

fn validate_spec(errors: &mut Errors, path: &Path<'_>, spec: &PodSpec) {
    let containers = path.child("containers");
    if spec.containers.is_empty() {
        errors.required(&containers, "");
    }
    let mut names = HashSet::new();
    for (index, one) in spec.containers.iter().enumerate() {
        let path = containers.index(index);
        container(errors, &path, one);
        if !names.insert(&one.name) {
            errors.duplicate(&path.child("name"), &one.name);
        }
    }
    errors.one_of(&path.child("restartPolicy"), &spec.restart_policy, &RESTART_POLICIES);
    if let Some(seconds) = spec.termination_grace_period_seconds {
        let path = path.child("terminationGracePeriodSeconds");
        errors.not_negative(&path, seconds);
        if seconds > i64::from(i32::MAX) {
            errors.invalid(&path, &seconds, "must be less than or equal to 2147483647");
        }
    }
    meta::labels(errors, &path.child("nodeSelector"), &spec.node_selector);
    if !spec.node_name.is_empty() {
        errors.syntax(&path.child("nodeName"), &spec.node_name, names::dns1123_subdomain);
    }
    if !spec.hostname.is_empty() {
        errors.syntax(&path.child("hostname"), &spec.hostname, names::dns1123_label);
    }
    if let Some(affinity) = &spec.affinity {
        node_affinity::validate(errors, &path.child("affinity"), affinity);
    }
    taints::tolerations(errors, &path.child("tolerations"), &spec.tolerations);
    let path = path.child("topologySpreadConstraints");
    topology_spread::validate(errors, &path, &spec.topology_spread_constraints);
}

fn container(errors: &mut Errors, path: &Path<'_>, container: &Container) {
    let name = path.child("name");
    if container.name.is_empty() {
        errors.required(&name, "");
    } else {
        errors.syntax(&name, &container.name, names::dns1123_label);
    }
    image(errors, &path.child("image"), &container.image);
    for (field, texts) in [("command", &container.command), ("args", &container.args)] {
        let path = path.child(field);
        for (index, text) in texts.iter().enumerate().filter(|(_, text)| text.contains('\0')) {
            errors.invalid(&path.index(index), text, NUL);
        }
    }
    if container.working_dir.contains('\0') {
        errors.invalid(&path.child("workingDir"), &container.working_dir, NUL);
    }
    ports(errors, &path.child("ports"), &container.ports);
    env(errors, &path.child("env"), &container.env);
    if let Some(requirements) = &container.resources {
        resources::requirements(errors, &path.child("resources"), requirements);
    }
    errors.one_of(
        &path.child("imagePullPolicy"),
        &container.image_pull_policy,
        &PULL_POLICIES,
    );
}

/// An image must be named; what the name means is found out when it is pulled.
pub(super) fn image(errors: &mut Errors, path: &Path<'_>, image: &str) {
    if image.is_empty() {
        errors.required(path, "");
    } else if image.trim() != image {
        errors.invalid(path, &image, "must not have leading or trailing whitespace");
    } else if image.chars().any(char::is_control) {
        errors.invalid(path, &image, "must not contain control characters");
    }
}

fn ports(errors: &mut Errors, path: &Path<'_>, ports: &[ContainerPort]) {
    let mut known = HashSet::new();
    for (index, port) in ports.iter().enumerate() {
        let path = path.index(index);
        if !port.name.is_empty() {
            errors.syntax(&path.child("name"), &port.name, names::port_name);
            if !known.insert(&port.name) {
                errors.duplicate(&path.child("name"), &port.name);
            }
        }
        if port.container_port == 0 {
            errors.required(&path.child("containerPort"), "");
        } else {
            errors.port(&path.child("containerPort"), port.container_port);
        }
        errors.one_of(&path.child("protocol"), &port.protocol, &PROTOCOLS);
    }
}

fn env(errors: &mut Errors, path: &Path<'_>, env: &[EnvVar]) {
    for (index, variable) in env.iter().enumerate() {
        let path = path.index(index);
        if variable.name.is_empty() {
            errors.required(&path.child("name"), "");
        } else {
            errors.syntax(&path.child("name"), &variable.name, names::env_name);
        }
        if variable.value.contains('\0') {
            errors.invalid(&path.child("value"), &variable.value, NUL);
        }
    }
}

/// The pod's host name: its own, or its name cut to what a label can be.
pub fn host_name(pod: &Pod) -> &str {
    let own = pod.spec.as_ref().map_or("", |spec| spec.hostname.as_str());
    if !own.is_empty() {
        return own;
    }
    let name = pod.name();
    let cut = name.get(..names::LABEL_MAX).unwrap_or(name);
    cut.trim_end_matches(['-', '.'])
}

#[cfg(test)]
mod tests;
