//! What the node says of itself: capacity, conditions, addresses, and what runs on it.

use std::{collections::BTreeMap, fs, io, net::IpAddr, path::Path, sync::Arc, time::Duration};

use orlop_proto::{
    core::v1::{NodeAddress, NodeCondition, NodeStatus, NodeSystemInfo},
    quantity::{Quantity, format_memory},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Config, ConfigError},
    dataplane::Dataplane,
    link::Reports,
    network::Network,
    runtime::Runtime,
};

/// How often the node looks at itself, and while it is not ready.
const PERIOD: Duration = Duration::from_secs(5);
const PERIOD_NOT_READY: Duration = Duration::from_millis(300);
/// A status that did not change is repeated after this time.
const REPEAT: Duration = Duration::from_secs(300);
/// Less available memory than this is pressure (as the kubelet has it).
const MEMORY_PRESSURE: u64 = 100 << 20;
/// More processes than this part of what the kernel takes is pressure, in percent.
const PID_PRESSURE_PERCENT: u64 = 90;

/// What the status is made from.
pub struct Sources {
    /// Why the ledger cannot be written.
    pub ledger: watch::Receiver<Option<String>>,
    /// The containers.
    pub runtime: Arc<dyn Runtime>,
    /// The pods' network.
    pub network: Arc<dyn Network>,
    /// The kernel's programs.
    pub dataplane: Arc<dyn Dataplane>,
}

/// What the machine is found to be. Pure input of [`status`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    /// Online CPUs.
    pub cpus: u64,
    /// Bytes.
    pub memory_total: u64,
    /// Bytes that can be had without swapping.
    pub memory_available: u64,
    /// Bytes of the file system with the agent's data.
    pub disk_total: u64,
    /// Bytes free there.
    pub disk_free: u64,
    /// Processes and threads.
    pub pids: u64,
    /// How many the kernel takes.
    pub pids_max: u64,
    /// Kernel, operating system, runtime, agent.
    pub info: NodeSystemInfo,
}

/// How the parts of the node do: `Err` says what is wrong.
#[derive(Debug, Clone)]
pub struct Health {
    /// The ledger.
    pub ledger: Result<(), String>,
    /// The container runtime; its version.
    pub runtime: Result<String, String>,
    /// The network.
    pub network: Result<(), String>,
    /// The dataplane.
    pub dataplane: Result<(), String>,
}

/// Follows the node's state and reports it, until `stop`.
pub async fn run(config: Config, address: IpAddr, sources: Sources, reports: Reports, stop: CancellationToken) {
    let mut last: Option<(NodeStatus, Instant)> = None;
    let info = system_info();
    loop {
        let ledger = sources.ledger.borrow().clone();
        let health = Health {
            ledger: ledger.map_or(Ok(()), Err),
            runtime: sources.runtime.version().await.map_err(|error| error.to_string()),
            network: sources.network.ready().await,
            dataplane: sources.dataplane.health(),
        };
        let ready = health.runtime.is_ok() && health.network.is_ok() && health.dataplane.is_ok();
        match Machine::read(&config.data_dir, &info) {
            Ok(machine) => {
                let status = status(&config, address, &machine, &health);
                let due = |(known, at): &(NodeStatus, Instant)| *known != status || at.elapsed() > REPEAT;
                if last.as_ref().is_none_or(due) {
                    reports.node(status.clone());
                    last = Some((status, Instant::now()));
                }
            }
            Err(error) => tracing::error!(%error, "the machine's state cannot be read"),
        }
        let wait = if ready { PERIOD } else { PERIOD_NOT_READY };
        tokio::select! {
            () = sleep(wait) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Whether every value of `reserved` is a quantity.
pub fn check_reserved(config: &Config) -> Result<(), ConfigError> {
    for (resource, value) in &config.reserved {
        if value.parse::<Quantity>().is_err() {
            let reason = format!("{resource}: {value:?} is not a quantity");
            return Err(ConfigError::Invalid {
                key: "reserved",
                reason,
            });
        }
    }
    Ok(())
}

/// The node's status. Times of conditions are control's to fill in.
pub fn status(config: &Config, address: IpAddr, machine: &Machine, health: &Health) -> NodeStatus {
    let capacity: BTreeMap<String, String> = [
        ("cpu", machine.cpus.to_string()),
        ("memory", format_memory(machine.memory_total)),
        ("ephemeral-storage", format_memory(machine.disk_total)),
        ("pods", config.max_pods.to_string()),
    ]
    .into_iter()
    .map(|(resource, amount)| (resource.to_owned(), amount))
    .collect();
    let allocatable = capacity.iter().map(|(resource, amount)| {
        let reserved = config.reserved.get(resource);
        (
            resource.clone(),
            reserved.map_or_else(|| amount.clone(), |reserved| less(resource, amount, reserved)),
        )
    });
    let mut info = machine.info.clone();
    info.container_runtime_version = health.runtime.clone().unwrap_or_default();
    NodeStatus {
        allocatable: allocatable.collect(),
        capacity,
        conditions: conditions(config.disk_pressure_percent, machine, health),
        addresses: [
            ("InternalIP", address.to_string()),
            ("Hostname", config.node_name.clone()),
        ]
        .into_iter()
        .map(|(kind, address)| NodeAddress {
            r#type: kind.to_owned(),
            address,
        })
        .collect(),
        node_info: Some(info),
    }
}

/// Capacity less what is reserved, never below zero.
fn less(resource: &str, amount: &str, reserved: &str) -> String {
    let (Ok(amount), Ok(reserved)) = (amount.parse::<Quantity>(), reserved.parse::<Quantity>()) else {
        return amount.to_owned();
    };
    let rest = amount.saturating_sub(reserved);
    match resource {
        _ if rest.is_negative() => "0".to_owned(),
        "cpu" => format!("{}m", rest.millis()),
        "memory" | "ephemeral-storage" => format_memory(u64::try_from(rest.units()).unwrap_or(0)),
        _ => rest.units().to_string(),
    }
}

fn conditions(disk_percent: u64, machine: &Machine, health: &Health) -> Vec<NodeCondition> {
    let problems: Vec<String> = [
        ("container runtime", health.runtime.as_ref().err()),
        ("network", health.network.as_ref().err()),
        ("dataplane", health.dataplane.as_ref().err()),
    ]
    .into_iter()
    .filter_map(|(part, problem)| Some(format!("{part}: {}", problem?)))
    .collect();
    let pressure = |kind: &str, pressed: bool, bad: (&str, &str), good: (&str, &str)| {
        let (reason, message) = if pressed { bad } else { good };
        condition(kind, pressed, reason, message)
    };
    let ready = if problems.is_empty() {
        condition("Ready", true, "AgentReady", "the agent takes pods")
    } else {
        condition("Ready", false, "AgentNotReady", &problems.join("; "))
    };
    // Pods that run are not disturbed by a ledger that cannot be written, so the node stays Ready; new ones are to go elsewhere.
    let disk = match &health.ledger {
        Err(error) => condition(
            "DiskPressure",
            true,
            "LedgerNotWritten",
            &format!("new orders are not acted on: {error}"),
        ),
        Ok(()) => pressure(
            "DiskPressure",
            machine.disk_free < machine.disk_total / 100 * disk_percent,
            ("DiskFull", &format!("less than {disk_percent} % of the disk are free")),
            ("NoDiskPressure", "the disk has free space"),
        ),
    };
    vec![
        pressure(
            "MemoryPressure",
            machine.memory_available < MEMORY_PRESSURE,
            ("InsufficientMemory", "less than 100Mi are available"),
            ("SufficientMemory", "memory is available"),
        ),
        disk,
        pressure(
            "PIDPressure",
            machine.pids > machine.pids_max / 100 * PID_PRESSURE_PERCENT,
            ("TooManyProcesses", "more than 90 % of all process ids are taken"),
            ("SufficientPIDs", "process ids are available"),
        ),
        ready,
    ]
}

fn condition(kind: &str, status: bool, reason: &str, message: &str) -> NodeCondition {
    NodeCondition {
        r#type: kind.to_owned(),
        status: if status { "True" } else { "False" }.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        ..NodeCondition::default()
    }
}

impl Machine {
    /// Reads `/proc`, `/sys` and the file system of `data_dir`. What does not change while the agent runs is given.
    pub fn read(data_dir: &Path, info: &NodeSystemInfo) -> io::Result<Self> {
        let memory = fs::read_to_string("/proc/meminfo")?;
        let disk = rustix::fs::statvfs(data_dir)?;
        let loads = fs::read_to_string("/proc/loadavg")?;
        // "0.10 0.20 0.30 2/345 6789": running and all.
        let pids = loads
            .split(' ')
            .nth(3)
            .and_then(|field| field.split('/').nth(1)?.parse().ok());
        Ok(Self {
            cpus: online_cpus(&line("/sys/devices/system/cpu/online")),
            memory_total: meminfo(&memory, "MemTotal"),
            memory_available: meminfo(&memory, "MemAvailable"),
            disk_total: disk.f_blocks * disk.f_frsize,
            disk_free: disk.f_bavail * disk.f_frsize,
            pids: pids.unwrap_or(0),
            pids_max: line("/proc/sys/kernel/pid_max").parse().unwrap_or(u64::MAX),
            info: info.clone(),
        })
    }
}

/// A figure of `/proc/meminfo` in bytes; 0 when it is not there.
#[doc(hidden)]
pub fn meminfo(text: &str, key: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let kib: Option<u64> = value.and_then(|value| value.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// How many are in a list of ranges, as the kernel writes them: `0-3,6`.
fn online_cpus(list: &str) -> u64 {
    let ranges = list.split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        Some((last + 1).saturating_sub(first))
    });
    ranges.sum()
}

/// The machine's boot id: fresh at every start.
pub fn boot_id() -> String {
    line("/proc/sys/kernel/random/boot_id")
}

/// The architecture as image configurations and node labels name it.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn system_info() -> NodeSystemInfo {
    let machine_id = line("/etc/machine-id");
    let product = line("/sys/class/dmi/id/product_uuid");
    let os = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let os_image = os
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .unwrap_or("Linux");
    NodeSystemInfo {
        system_uuid: if product.is_empty() {
            machine_id.clone()
        } else {
            product
        },
        machine_id,
        boot_id: boot_id(),
        kernel_version: rustix::system::uname().release().to_string_lossy().into_owned(),
        os_image: os_image.trim_matches('"').to_owned(),
        container_runtime_version: String::new(),
        kubelet_version: concat!("orlop-", env!("CARGO_PKG_VERSION")).to_owned(),
        kube_proxy_version: String::new(),
        operating_system: "linux".to_owned(),
        architecture: architecture().to_owned(),
    }
}

/// The first line of a file; empty when it cannot be read.
fn line(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            cpus: 4,
            memory_total: 8 << 30,
            memory_available: 4 << 30,
            disk_total: 100 << 30,
            disk_free: 50 << 30,
            pids: 100,
            pids_max: 32768,
            info: NodeSystemInfo::default(),
        }
    }

    fn healthy() -> Health {
        Health {
            ledger: Ok(()),
            runtime: Ok("containerd://1.6.20".into()),
            network: Ok(()),
            dataplane: Ok(()),
        }
    }

    fn of(status: &NodeStatus, kind: &str) -> NodeCondition {
        status
            .conditions
            .iter()
            .find(|condition| condition.r#type == kind)
            .unwrap()
            .clone()
    }

    #[test]
    fn allocatable_is_capacity_less_what_is_reserved() {
        let reserved = [
            ("cpu", "500m"),
            ("memory", "1Gi"),
            ("pods", "10"),
            ("ephemeral-storage", "200Gi"),
        ];
        let reserved = reserved.map(|(resource, value)| (resource.to_owned(), value.to_owned()));
        let config = Config {
            reserved: reserved.into(),
            node_name: "n1".into(),
            ..Config::default()
        };
        let status = status(&config, "192.0.2.1".parse().unwrap(), &machine(), &healthy());
        assert_eq!(status.capacity["cpu"], "4");
        assert_eq!(status.allocatable["cpu"], "3500m");
        let memory: Quantity = status.allocatable["memory"].parse().unwrap();
        assert_eq!(memory.units(), 7 << 30);
        assert_eq!(status.allocatable["pods"], "100");
        assert_eq!(status.allocatable["ephemeral-storage"], "0");
        assert_eq!(status.addresses[0].address, "192.0.2.1");
        assert_eq!(of(&status, "Ready").status, "True");
        assert_eq!(of(&status, "DiskPressure").status, "False");
    }

    #[test]
    fn ready_needs_every_part() {
        let config = Config::default();
        let address = "192.0.2.1".parse().unwrap();
        let health = Health {
            network: Err("no range yet".into()),
            dataplane: Err("not loaded".into()),
            ..healthy()
        };
        let ready = of(&status(&config, address, &machine(), &health), "Ready");
        assert_eq!(ready.status, "False");
        assert_eq!(ready.message, "network: no range yet; dataplane: not loaded");
        let unwritten = Health {
            ledger: Err("pods/a.tmp: No space left".into()),
            ..healthy()
        };
        let status_now = status(&config, address, &machine(), &unwritten);
        assert_eq!(of(&status_now, "DiskPressure").reason, "LedgerNotWritten");
        assert_eq!(of(&status_now, "Ready").status, "True");
        let full = Machine {
            disk_free: 1 << 30,
            memory_available: 1 << 20,
            pids: 32000,
            ..machine()
        };
        let status = status(&config, address, &full, &healthy());
        for kind in ["DiskPressure", "MemoryPressure", "PIDPressure"] {
            assert_eq!(of(&status, kind).status, "True", "{kind}");
        }
    }

    #[test]
    fn this_machine_can_be_read() {
        let machine = Machine::read(Path::new("/"), &system_info()).unwrap();
        assert!(machine.cpus > 0 && machine.memory_total > machine.memory_available && machine.disk_total > 0);
        assert!(!machine.info.boot_id.is_empty() && !machine.info.kernel_version.is_empty());
        assert!(machine.pids > 0 && machine.pids_max > machine.pids);
    }

    #[test]
    fn lists_of_cpus_are_counted() {
        assert_eq!(
            [online_cpus("0"), online_cpus("0-3,6"), online_cpus("0,2-3")],
            [1, 5, 3]
        );
    }

    #[test]
    fn reserved_amounts_are_quantities() {
        let config = Config {
            reserved: [("cpu".to_owned(), "1 core".to_owned())].into(),
            ..Config::default()
        };
        assert!(check_reserved(&config).is_err());
    }
}
