//! The OCI runtime specification of sandboxes and containers: pure functions.

use std::{collections::BTreeMap, fs, path::PathBuf};

use serde_json::{Value, json};

use super::{ContainerSpec, RuntimeError, SandboxSpec, cgroup::Cgroups};

/// The shim groups containers by this annotation: one shim for all containers of a pod.
const GROUP: &str = "io.containerd.runc.v2.group";
/// oom_score_adj of pause.
const PAUSE_OOM_SCORE: i32 = -998;
/// Nobody, for pause.
const PAUSE_USER: u32 = 65535;
/// The period of CPU quotas, microseconds.
const CPU_PERIOD: u64 = 100_000;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What containers may do by default: Docker's and containerd's list.
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];
const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// What of this machine decides the specification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// cgroup2 alone: containers get their own cgroup namespace and see it.
    pub cgroup_namespace: bool,
    /// No process may be given a lower oom_score_adj (without CAP_SYS_RESOURCE the kernel refuses that).
    pub lowest_oom_score: i32,
}

/// Who a process is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Other groups.
    pub additional_gids: Vec<u32>,
}

/// What a container finds around it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Surroundings {
    /// Who its process is.
    pub user: User,
    /// The pause process, whose namespaces it joins.
    pub pause_pid: u32,
    /// The pod's state directory.
    pub pod_dir: PathBuf,
    /// Its cgroup.
    pub cgroup: String,
}

impl Platform {
    /// Looks at this machine.
    pub fn detect(cgroups: &Cgroups) -> Self {
        const CAP_SYS_RESOURCE: u32 = 24;
        let effective = fs::read_to_string("/proc/self/status")
            .ok()
            .and_then(|text| {
                let line = text.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
                u64::from_str_radix(line.trim(), 16).ok()
            })
            .unwrap_or(0);
        let own = fs::read_to_string("/proc/self/oom_score_adj")
            .ok()
            .and_then(|text| text.trim().parse().ok());
        let may_lower = effective & (1 << CAP_SYS_RESOURCE) != 0;
        Self {
            cgroup_namespace: cgroups.is_pure_v2(),
            lowest_oom_score: if may_lower { -1000 } else { own.unwrap_or(0) },
        }
    }
}

/// The pause container.
pub fn sandbox(platform: &Platform, sandbox: &SandboxSpec, cgroup: &str) -> Value {
    let mut namespaces = vec![
        json!({"type": "pid"}),
        json!({"type": "ipc"}),
        json!({"type": "uts"}),
        json!({"type": "mount"}),
        json!({"type": "network", "path": sandbox.netns}),
    ];
    if platform.cgroup_namespace {
        namespaces.push(json!({"type": "cgroup"}));
    }
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": PAUSE_USER, "gid": PAUSE_USER},
            "args": ["/pause"],
            "env": [format!("PATH={PATH}")],
            "cwd": "/",
            "noNewPrivileges": true,
            "oomScoreAdj": PAUSE_OOM_SCORE.max(platform.lowest_oom_score),
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": sandbox.hostname,
        "mounts": mounts(platform, true),
        "annotations": {(GROUP): sandbox.id},
        "linux": {
            "cgroupsPath": cgroup,
            "namespaces": namespaces,
            "resources": {"devices": devices(), "cpu": {"shares": 2}},
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        },
    })
}

/// A container of a pod.
pub fn container(platform: &Platform, container: &ContainerSpec, around: &Surroundings) -> Result<Value, RuntimeError> {
    let mut mounts = mounts(platform, false);
    for (name, target) in [
        ("hosts", "/etc/hosts"),
        ("hostname", "/etc/hostname"),
        ("resolv.conf", "/etc/resolv.conf"),
    ] {
        mounts.push(json!({
            "destination": target, "type": "bind", "source": around.pod_dir.join(name),
            "options": ["rbind", "rprivate", "rw"],
        }));
    }
    mounts.push(json!({
        "destination": "/dev/shm", "type": "bind", "source": around.pod_dir.join("shm"),
        "options": ["rbind", "rprivate", "nosuid", "noexec", "nodev"],
    }));
    let mut namespaces = vec![json!({"type": "pid"}), json!({"type": "mount"})];
    for (kind, file) in [("network", "net"), ("ipc", "ipc"), ("uts", "uts")] {
        namespaces.push(json!({"type": kind, "path": format!("/proc/{}/ns/{file}", around.pause_pid)}));
    }
    if platform.cgroup_namespace {
        namespaces.push(json!({"type": "cgroup"}));
    }
    let limits = &container.resources;
    let mut cpu = json!({"shares": limits.cpu_shares.max(2)});
    if let Some(quota) = limits.cpu_quota {
        cpu["quota"] = json!(quota);
        cpu["period"] = json!(CPU_PERIOD);
    }
    let mut resources = json!({"devices": devices(), "cpu": cpu});
    if let Some(limit) = limits.memory_limit {
        resources["memory"] = json!({"limit": limit});
    }
    let cwd = [&container.working_dir, &container.image.config.working_dir]
        .into_iter()
        .find(|dir| !dir.is_empty());
    Ok(json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {
                "uid": around.user.uid, "gid": around.user.gid, "additionalGids": around.user.additional_gids,
            },
            "args": arguments(container)?,
            "env": environment(container),
            "cwd": cwd.map_or("/", String::as_str),
            "capabilities": {
                "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
            },
            "noNewPrivileges": false,
            "oomScoreAdj": limits.oom_score_adj.max(platform.lowest_oom_score),
        },
        "root": {"path": "rootfs", "readonly": false},
        "mounts": mounts,
        "annotations": {(GROUP): container.sandbox_id},
        "linux": {
            "cgroupsPath": around.cgroup,
            "namespaces": namespaces,
            "resources": resources,
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        },
    }))
}

/// Kubernetes' rule: `command` replaces entrypoint and cmd, `args` alone replaces cmd.
fn arguments(container: &ContainerSpec) -> Result<Vec<String>, RuntimeError> {
    let image = &container.image.config;
    let (command, args) = match (container.command.is_empty(), container.args.is_empty()) {
        (true, true) => (&image.entrypoint, &image.cmd),
        (true, false) => (&image.entrypoint, &container.args),
        (false, _) => (&container.command, &container.args),
    };
    let arguments: Vec<String> = command.iter().chain(args).cloned().collect();
    if arguments.is_empty() {
        return Err(RuntimeError::InvalidSpec(
            "no command specified, neither by the pod nor by the image".to_owned(),
        ));
    }
    Ok(arguments)
}

/// The image's variables, then the pod's; of a name the last counts, at the place of its first.
fn environment(container: &ContainerSpec) -> Vec<String> {
    let mut order: Vec<&str> = Vec::new();
    let mut values: BTreeMap<&str, &str> = BTreeMap::new();
    let image = container
        .image
        .config
        .env
        .iter()
        .filter_map(|variable| variable.split_once('='));
    let given = container
        .env
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()));
    let always = [("PATH", PATH), ("HOSTNAME", container.hostname.as_str())];
    for (name, value) in always.into_iter().chain(image).chain(given) {
        if values.insert(name, value).is_none() {
            order.push(name);
        }
    }
    order
        .into_iter()
        .map(|name| format!("{name}={}", values[name]))
        .collect()
}

fn mounts(platform: &Platform, sandbox: bool) -> Vec<Value> {
    let mut mounts = vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]}),
        json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
            "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs",
            "options": ["nosuid", "noexec", "nodev", "ro"]}),
    ];
    if !sandbox && platform.cgroup_namespace {
        mounts.push(
            json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}),
        );
    }
    mounts
}

/// The devices that Docker and containerd allow; all others are denied.
fn devices() -> Vec<Value> {
    let mut rules = vec![json!({"allow": false, "access": "rwm"})];
    for (major, minor) in [(1, 3), (1, 8), (1, 7), (5, 0), (1, 5), (1, 9), (5, 1), (5, 2)] {
        rules.push(json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm"}));
    }
    rules.push(json!({"allow": true, "type": "c", "major": 136, "access": "rwm"}));
    rules
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{Image, ImageConfig, PodId, Resources};

    fn spec() -> ContainerSpec {
        let config = ImageConfig {
            entrypoint: vec!["/web".into()],
            cmd: vec!["serve".into()],
            env: vec!["A=image".into(), "B=image".into()],
            ..ImageConfig::default()
        };
        ContainerSpec {
            pod: PodId {
                namespace: "default".into(),
                name: "web".into(),
                uid: "u1".into(),
            },
            sandbox_id: "s1".into(),
            id: "c1".into(),
            name: "web".into(),
            hostname: "web".into(),
            restart_count: 0,
            backoff_ms: None,
            image: Image {
                name: "i".into(),
                id: "d".into(),
                digest: "d".into(),
                chain_id: "c".into(),
                config,
            },
            image_reference: "web".into(),
            command: Vec::new(),
            args: Vec::new(),
            working_dir: String::new(),
            env: vec![("B".into(), "pod".into()), ("C".into(), String::new())],
            resources: Resources::default(),
            grace_seconds: 30,
        }
    }

    fn made(spec: &ContainerSpec) -> Value {
        let platform = Platform {
            cgroup_namespace: false,
            lowest_oom_score: -1000,
        };
        let around = Surroundings {
            user: User::default(),
            pause_pid: 7,
            pod_dir: "/run/orlop/pods/u1".into(),
            cgroup: "/orlop/n1/u1/c1".into(),
        };
        container(&platform, spec, &around).unwrap()
    }

    #[test]
    fn command_and_args_replace_the_images_as_kubernetes_says() {
        for (command, args, wanted) in [
            (vec![], vec![], vec!["/web", "serve"]),
            (vec![], vec!["x"], vec!["/web", "x"]),
            (vec!["/c"], vec![], vec!["/c"]),
            (vec!["/c"], vec!["x"], vec!["/c", "x"]),
        ] {
            let own = |words: Vec<&str>| words.into_iter().map(str::to_owned).collect::<Vec<_>>();
            let spec = ContainerSpec {
                command: own(command),
                args: own(args),
                ..spec()
            };
            assert_eq!(made(&spec)["process"]["args"], json!(wanted));
        }
        let mut empty = spec();
        empty.image.config = ImageConfig::default();
        assert!(matches!(arguments(&empty), Err(RuntimeError::InvalidSpec(_))));
    }

    #[test]
    fn the_pods_variables_win() {
        let env = made(&spec())["process"]["env"].clone();
        assert_eq!(
            env,
            json!([format!("PATH={PATH}"), "HOSTNAME=web", "A=image", "B=pod", "C="])
        );
    }

    #[test]
    fn limits_namespaces_and_group_are_there() {
        let resources = Resources {
            cpu_shares: 512,
            cpu_quota: Some(50_000),
            memory_limit: Some(1 << 20),
            oom_score_adj: 5,
        };
        let made = made(&ContainerSpec { resources, ..spec() });
        assert_eq!(
            made["linux"]["resources"]["cpu"],
            json!({"shares": 512, "quota": 50_000, "period": 100_000})
        );
        assert_eq!(made["linux"]["resources"]["memory"]["limit"], 1 << 20);
        assert_eq!(made["linux"]["cgroupsPath"], "/orlop/n1/u1/c1");
        assert_eq!(made["annotations"][GROUP], "s1");
        let namespaces = made["linux"]["namespaces"].as_array().unwrap();
        assert!(namespaces.contains(&json!({"type": "network", "path": "/proc/7/ns/net"})));
        assert!(made.get("hostname").is_none(), "the uts namespace is the sandbox's");
        assert_eq!(made["process"]["oomScoreAdj"], 5);
    }
}
