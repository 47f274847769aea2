use orlop_proto::json::from_value;
use serde_json::{Value, json};

use super::*;

fn pod(spec: &Value) -> Pod {
    let mut pod: Pod =
        from_value(&json!({"metadata": {"name": "web", "namespace": "default"}, "spec": spec})).expect("pod");
    pod.set_defaults();
    pod
}

fn texts(errors: &[FieldError]) -> Vec<String> {
    errors.iter().map(ToString::to_string).collect()
}

fn errors(spec: &Value) -> Vec<String> {
    texts(&pod(spec).validate_create())
}

#[test]
fn defaults_are_those_of_kubernetes() {
    let pod = pod(&json!({"containers": [
        {"name": "a", "image": "a", "ports": [{"containerPort": 80}], "resources": {"limits": {"cpu": "1"}}},
        {"name": "b", "image": "registry:5000/b"},
        {"name": "c", "image": "c:1.2"},
        {"name": "d", "image": "d:latest"},
        {"name": "e", "image": "e@sha256:00"},
    ]}));
    let spec = pod.spec.as_ref().expect("spec");
    let policies: Vec<&str> = spec
        .containers
        .iter()
        .map(|one| one.image_pull_policy.as_str())
        .collect();
    assert_eq!(policies, ["Always", "Always", "IfNotPresent", "Always", "IfNotPresent"]);
    assert_eq!(
        serde_json::to_value(&spec.containers[0]).expect("json"),
        json!({
            "name": "a", "image": "a", "imagePullPolicy": "Always",
            "ports": [{"containerPort": 80, "protocol": "TCP"}],
            "resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "1"}},
        })
    );
    assert_eq!(
        (
            spec.restart_policy.as_str(),
            spec.termination_grace_period_seconds,
            spec.enable_service_links
        ),
        ("Always", Some(30), Some(true))
    );
    assert_eq!(pod.validate_create(), []);
    let mut again = pod.clone();
    again.set_defaults();
    assert_eq!(again, pod);
}

#[test]
fn containers_are_checked() {
    let long = "x".repeat(64);
    let found = errors(&json!({"containers": [
        {"name": "../a", "image": " a"},
        {"name": long, "image": ""},
        {"name": "a", "image": "a", "imagePullPolicy": "Sometimes", "ports": [
            {"containerPort": 0}, {"containerPort": 65536, "name": "web"}, {"containerPort": -1, "name": "web", "protocol": "SCTP"},
        ]},
        {"name": "a", "image": "a", "env": [{"name": ""}, {"name": "A=B"}, {"name": "C", "value": "\u{0}"}], "args": ["\u{0}"]},
    ]}));
    let fields: Vec<&str> = found
        .iter()
        .map(|error| error.split(": ").next().unwrap_or_default())
        .collect();
    assert_eq!(
        fields,
        [
            "spec.containers[0].name",
            "spec.containers[0].image",
            "spec.containers[1].name",
            "spec.containers[1].image",
            "spec.containers[2].ports[0].containerPort",
            "spec.containers[2].ports[1].containerPort",
            "spec.containers[2].ports[2].name",
            "spec.containers[2].ports[2].containerPort",
            "spec.containers[2].ports[2].protocol",
            "spec.containers[2].imagePullPolicy",
            "spec.containers[3].args[0]",
            "spec.containers[3].env[0].name",
            "spec.containers[3].env[1].name",
            "spec.containers[3].env[2].value",
            "spec.containers[3].name",
        ]
    );
    assert_eq!(errors(&json!({})), ["spec.containers: Required value"]);
}

#[test]
fn resources_are_checked() {
    let resources =
        |resources: Value| errors(&json!({"containers": [{"name": "a", "image": "a", "resources": resources}]}));
    assert_eq!(
        resources(json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1000m"}})),
        Vec::<String>::new()
    );
    let found = resources(json!({
        "limits": {"cpu": "500m", "memory": "x"},
        "requests": {"cpu": "0.6", "ephemeral-storage": "-1", "example.com/gpu": "1"},
    }));
    let path = "spec.containers[0].resources";
    assert_eq!(
        found,
        [
            format!(
                "{path}.limits[memory]: Invalid value: \"x\": {}",
                orlop_proto::quantity::QuantityError
            ),
            format!("{path}.requests[ephemeral-storage]: Invalid value: \"-1\": must be greater than or equal to 0"),
            format!(
                "{path}.requests[example.com/gpu]: Unsupported value: \"example.com/gpu\": supported values: \"cpu\", \
                 \"ephemeral-storage\", \"memory\""
            ),
            format!(
                "{path}.requests[memory]: Invalid value: \"x\": {}",
                orlop_proto::quantity::QuantityError
            ),
            format!("{path}.requests[cpu]: Invalid value: \"0.6\": must be less than or equal to cpu limit of 500m"),
        ]
    );
}

#[test]
fn scheduling_is_checked() {
    let found = errors(&json!({
        "containers": [{"name": "a", "image": "a:1"}],
        "nodeName": "../etc", "hostname": "a.b", "nodeSelector": {"a": "b c"}, "terminationGracePeriodSeconds": -1,
        "restartPolicy": "Perhaps",
        "affinity": {"nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{
                "matchExpressions": [
                    {"key": "a", "operator": "In"}, {"key": "a", "operator": "Exists", "values": ["x"]},
                    {"key": "a", "operator": "Gt", "values": ["x"]}, {"key": "", "operator": "Near"},
                ],
                "matchFields": [{"key": "spec.x", "operator": "In", "values": ["a"]}],
            }]},
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 101, "preference": {}}],
        }},
        "tolerations": [
            {"operator": "Equal"}, {"key": "a", "operator": "Exists", "value": "b"}, {"key": "a", "operator": "Like"},
            {"key": "a", "effect": "NoSchedule", "tolerationSeconds": 1}, {"key": "a", "effect": "No"}, {"operator": "Exists"},
        ],
    }));
    let fields: Vec<&str> = found
        .iter()
        .map(|error| error.split(": ").next().unwrap_or_default())
        .collect();
    let terms = "spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0]";
    assert_eq!(
        fields,
        [
            "spec.restartPolicy",
            "spec.terminationGracePeriodSeconds",
            "spec.nodeSelector[a]",
            "spec.nodeName",
            "spec.hostname",
            &format!("{terms}.matchExpressions[0].values"),
            &format!("{terms}.matchExpressions[1].values"),
            &format!("{terms}.matchExpressions[2].values[0]"),
            &format!("{terms}.matchExpressions[3].operator"),
            &format!("{terms}.matchExpressions[3].key"),
            &format!("{terms}.matchFields[0].key"),
            "spec.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution[0].weight",
            "spec.tolerations[0].operator",
            "spec.tolerations[1].operator",
            "spec.tolerations[2].operator",
            "spec.tolerations[3].effect",
            "spec.tolerations[4].effect",
        ]
    );
}

#[test]
fn what_may_change() {
    let old = pod(&json!({"containers": [{"name": "a", "image": "a:1"}], "tolerations": [{"key": "a"}]}));
    let image =
        pod(&json!({"containers": [{"name": "a", "image": "a:2"}], "tolerations": [{"key": "a"}, {"key": "b"}]}));
    assert_eq!(image.validate_update(&old), []);
    let fewer = pod(&json!({"containers": [{"name": "a", "image": "a:1"}]}));
    assert_eq!(fewer.validate_update(&old)[0].field, "spec.tolerations");
    let moved =
        pod(&json!({"nodeName": "n", "containers": [{"name": "a", "image": "a:1"}], "tolerations": [{"key": "a"}]}));
    assert!(
        texts(&moved.validate_update(&old))[0].starts_with("spec: Forbidden: pod updates may not change fields other")
    );
    let more = pod(&json!({"containers": [{"name": "a", "image": "a:1"}, {"name": "b", "image": "b"}]}));
    assert_eq!(
        texts(&more.validate_update(&old)),
        ["spec.containers: Forbidden: pod updates may not add or remove containers"]
    );
}

#[test]
fn quality_of_service() {
    let class = |resources: Value| {
        qos_class(
            pod(&json!({"containers": [{"name": "a", "image": "a", "resources": resources}]}))
                .spec
                .as_ref()
                .expect("spec"),
        )
    };
    assert_eq!(class(json!({})), "BestEffort");
    assert_eq!(class(json!({"requests": {"cpu": "0"}})), "BestEffort");
    assert_eq!(class(json!({"requests": {"cpu": "1"}})), "Burstable");
    assert_eq!(class(json!({"limits": {"cpu": "1"}})), "Burstable");
    assert_eq!(class(json!({"limits": {"cpu": "1", "memory": "1Gi"}})), "Guaranteed");
    assert_eq!(
        class(json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1000m"}})),
        "Guaranteed"
    );
    assert_eq!(
        class(json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1m"}})),
        "Burstable"
    );
}

#[test]
fn statuses_are_checked() {
    let old = pod(&json!({"containers": [{"name": "a", "image": "a:1"}]}));
    let with = |status: Value| {
        let status = serde_json::from_value(status).expect("status");
        texts(
            &Pod {
                status: Some(status),
                ..old.clone()
            }
            .validate_status_update(&old),
        )
    };
    assert_eq!(
        with(
            json!({"phase": "Running", "podIP": "10.244.1.7", "podIPs": [{"ip": "10.244.1.7"}],
            "conditions": [{"type": "Ready", "status": "True"}]})
        ),
        Vec::<String>::new()
    );
    assert_eq!(
        with(json!({"phase": "Lost", "podIP": "x", "conditions": [{"type": "Ready", "status": "No"}]})).len(),
        3
    );
}

#[test]
fn host_names_fit() {
    let mut pod = pod(&json!({"containers": []}));
    assert_eq!(host_name(&pod), "web");
    pod.meta_mut().name = format!("{}-b", "a".repeat(62));
    assert_eq!(host_name(&pod), "a".repeat(62));
    "own".clone_into(&mut pod.spec.as_mut().expect("spec").hostname);
    assert_eq!(host_name(&pod), "own");
}
