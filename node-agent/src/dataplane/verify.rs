//! Compares what should be with what is: services with the maps, the maps that attached programs use with the pins, the
//! links with the programs. Reads only, so another process (`orlop-node verify`) can do it beside a running agent.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::{self, Display},
    net::Ipv4Addr,
    sync::Arc,
};

use nix::net::if_::if_nametoindex;
use orlop_ebpf_abi::{self as abi, FrontendKey, SlotState};
use orlop_proto::node::v1 as link;

use super::{
    Attachment, Config, DataplaneError, PodInterface,
    arena::Arena,
    bpf::{self, Target},
    failed,
    kernel::{self, Hook, Kernel, PROGRAMS, Pins, interface_programs},
    layout::MAPS,
    planner, tables,
};

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Frontends compared.
    pub frontends: usize,
    /// Backends compared.
    pub backends: usize,
    /// Links and their programs looked at.
    pub links: usize,
    /// Pods' interfaces looked at.
    pub pods: usize,
    /// Slots of the arena that are in use.
    pub slots: usize,
    /// What is not as it should be, a line each. Empty: all is well.
    pub differences: Vec<String>,
}

impl Report {
    /// Is all well?
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.differences.is_empty()
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for difference in &self.differences {
            writeln!(f, "{difference}")?;
        }
        write!(
            f,
            "{} frontends, {} backends, {} slots in use, {} links, {} pods: {} differences",
            self.frontends,
            self.backends,
            self.slots,
            self.links,
            self.pods,
            self.differences.len()
        )
    }
}

/// Compares the kernel's state of an instance with these services (all of them) and the interfaces of the pods that run, which are
/// in this thread's network namespace.
///
/// # Errors
/// Something cannot be read at all.
pub fn verify(
    config: &Config,
    services: &[Arc<link::Service>],
    pods: &[PodInterface],
) -> Result<Report, DataplaneError> {
    let pins = Pins::new(config);
    let maps = kernel::open_maps(&pins)?;
    let mut report = Report::default();
    for spec in MAPS.iter().filter(|spec| !maps.contains_key(spec.name)) {
        report.differences.push(format!("map {} is not pinned", spec.name));
    }
    let ids: HashMap<String, u32> = maps.values().map(|map| (map.info.name.clone(), map.info.id)).collect();
    let root = match &config.cgroup_root {
        Some(root) => root.clone(),
        None => kernel::find_cgroup2().map_err(|error| failed("find cgroup2", error))?,
    };
    let root = super::cgroup_id(&root).map_err(|error| failed("read cgroup2's root", error))?;
    check_links(&pins, &ids, root, &mut report)?;
    check_pods(&pins, pods, &mut report);
    if let (Some(frontends), Some(arena)) = (maps.get(abi::FRONTENDS), maps.get(abi::ARENA)) {
        let (found, foreign) = tables::read(frontends).map_err(|error| failed("read the frontends", error))?;
        report.differences.extend(
            foreign
                .iter()
                .map(|key| format!("a frontend whose key makes no sense: {key:?}")),
        );
        let arena = Arena::map(&arena.fd, arena.info.max_entries).map_err(|error| failed("map the arena", error))?;
        compare(services, &found, &arena, &mut report);
    }
    Ok(report)
}

type Backends = Vec<([u8; 4], u16, SlotState)>;

fn compare(
    services: &[Arc<link::Service>],
    found: &[(FrontendKey, abi::Frontend)],
    arena: &Arena,
    report: &mut Report,
) {
    let mut wanted: BTreeMap<FrontendKey, (&link::Service, Backends)> = BTreeMap::new();
    let mut sorted: Vec<_> = services.iter().collect();
    sorted.sort_by_key(|service| (&service.namespace, &service.name));
    for service in sorted {
        for key in planner::records::frontends_of(service) {
            wanted
                .entry(key)
                .or_insert_with(|| (service, planner::records::backends_of(service, &key)));
        }
    }
    let (adopted, wrong) = planner::Planner::adopt(
        planner::Limits {
            frontends: u32::MAX,
            slots: arena.slots(),
        },
        found,
        |index| arena.read(index),
    );
    for key in wrong {
        report
            .differences
            .push(format!("{}: its entry or slots are damaged", show(&key)));
        wanted.remove(&key);
    }
    for (key, entry) in adopted.entries() {
        report.frontends += 1;
        let have: Backends = entry
            .backends
            .iter()
            .map(|backend| (backend.address, backend.port, backend.state))
            .collect();
        match wanted.remove(key) {
            None => report.differences.push(format!("{}: no service has it", show(key))),
            Some((service, want)) => {
                report.backends += want.len();
                if want != have {
                    report.differences.push(format!(
                        "{} of {}/{}: backends are {}, not {}",
                        show(key),
                        service.namespace,
                        service.name,
                        list(&have),
                        list(&want)
                    ));
                }
            }
        }
    }
    for (key, (service, _)) in wanted {
        report.differences.push(format!(
            "{} of {}/{}: missing",
            show(&key),
            service.namespace,
            service.name
        ));
    }
    report.slots = adopted.entries().map(|(_, entry)| entry.backends.len()).sum();
    let stray: usize = adopted
        .free_ranges()
        .map(|(base, length)| {
            (base..base + length)
                .filter(|index| arena.read(*index).is_none_or(|slot| slot != abi::Slot::FREE))
                .count()
        })
        .sum();
    if stray > 0 {
        // Just after a change this is as it should be: the old range stays until no program can be in it.
        report
            .differences
            .push(format!("{stray} slots are filled and no frontend refers to them"));
    }
}

fn check_links(pins: &Pins, ids: &HashMap<String, u32>, root: u64, report: &mut Report) -> Result<(), DataplaneError> {
    let own = PROGRAMS.iter().filter(|spec| !matches!(spec.hook, Hook::Interface(_)));
    let own = own.map(|spec| (spec.name.to_owned(), pins.link(spec.name), Some(spec.hook)));
    for (name, path, hook) in own.chain(kernel::pod_links(pins).map(|(name, path)| (name, path, None))) {
        let Ok(link) = bpf::open_pinned(&path) else {
            report.differences.push(format!("link {name} is not pinned"));
            continue;
        };
        report.links += 1;
        let info = bpf::link_info(&link).map_err(|error| failed(format!("read link {name}"), error))?;
        match (hook, info.target) {
            (Some(Hook::Cgroup(_)), Target::Cgroup(id)) if id != root => {
                report
                    .differences
                    .push(format!("link {name} is at cgroup {id}, not at the root {root}"));
            }
            (None, Target::Interface(0)) => {
                report
                    .differences
                    .push(format!("link {name} is detached, or its interface is gone"));
            }
            _ => {}
        }
        let program = bpf::program_by_id(info.program)
            .and_then(bpf::program_info)
            .map_err(|error| failed(format!("read the program of link {name}"), error))?;
        for id in program.map_ids {
            let Ok(map) = bpf::map_by_id(id).and_then(bpf::map_info) else {
                continue;
            };
            if let Some(pinned) = ids.get(&map.name)
                && *pinned != id
            {
                report.differences.push(format!(
                    "program {} of link {name} uses map {} {id}; {pinned} is pinned",
                    info.program, map.name
                ));
            }
        }
    }
    Ok(())
}

/// Each pod's interface has its programs. Before Linux 6.6 there are no links to tell.
fn check_pods(pins: &Pins, pods: &[PodInterface], report: &mut Report) {
    if Attachment::best() != Attachment::Tcx {
        return;
    }
    for pod in pods {
        let (uid, name) = (&pod.pod_uid, &pod.host_interface);
        // One that is being taken down has none.
        let Ok(index) = if_nametoindex(name.as_str()) else {
            continue;
        };
        report.pods += 1;
        for (program, _) in interface_programs() {
            if !kernel::is_linked(pins, uid, program, index) {
                let difference = format!("pod {uid}: {program} is not attached to its interface {name}");
                report.differences.push(difference);
            }
        }
    }
}

/// Are programs attached where they should be? For the node's condition: cheap.
pub(super) fn health(kernel: &Kernel) -> Result<(), String> {
    for spec in PROGRAMS.iter().filter(|spec| !matches!(spec.hook, Hook::Interface(_))) {
        let link = bpf::open_pinned(&kernel.pins.link(spec.name))
            .map_err(|error| format!("the link of {} cannot be opened: {error}", spec.name))?;
        let info = bpf::link_info(link).map_err(|error| format!("the link of {}: {error}", spec.name))?;
        if info.target == Target::Cgroup(0) {
            return Err(format!("{} is attached to a cgroup that is gone", spec.name));
        }
    }
    Ok(())
}

fn show(key: &FrontendKey) -> String {
    format!("{}:{} {:?}", Ipv4Addr::from(key.address), key.port, key.protocol)
}

fn list(backends: &Backends) -> String {
    let lines: Vec<_> = backends
        .iter()
        .map(|(address, port, state)| format!("{}:{port} {state:?}", Ipv4Addr::from(*address)))
        .collect();
    format!("[{}]", lines.join(", "))
}
