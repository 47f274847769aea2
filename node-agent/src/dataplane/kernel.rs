//! Loads, pins, adopts and attaches: what makes the programs and maps outlive the agent.
//!
//! Below `BPFFS/orlop/INSTANCE`: the maps by name; the links as `NAME_link`, those of pods as `pods/UID_ingress` and
//! `pods/UID_egress`; and `programs/ID/NAME`, where ID stands for the object and the node's cgroup. At start:
//!
//! 1. Pinned maps are checked (see [`super::layout`]). One that should hold more is replaced by a larger copy. None is ever made smaller.
//! 2. If the programs of this very object are pinned and use these very maps, they stay as they are: a restarted agent
//!    loads nothing, and program ids stay the same. Otherwise the object is loaded, and its programs pinned.
//! 3. Every link's program is compared, and replaced atomically where it differs. Connections go on all the while.
//!
//! The order makes each step repeatable: an agent that is killed in between does the rest at its next start.

mod load;
mod pins;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

pub use pins::{Pins, pod_links};

use super::{
    Config, DataplaneError,
    bpf::{self, MapInfo, Target},
    failed,
    layout::MAPS,
    object,
};

/// A program and where it is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProgramSpec {
    /// Its name, which is its pin's too.
    pub name: &'static str,
    /// What it is for.
    pub hook: Hook,
}

/// Where a program is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// The root of cgroup2; the number is BPF_CGROUP_...
    Cgroup(u32),
    /// The tracepoint `sched_switch`.
    SchedSwitch,
    /// A pod's host interface; the number is BPF_TCX_...
    Interface(u32),
}

/// BPF_TRACE_RAW_TP.
const TRACE_RAW_TP: u32 = 23;

/// All programs.
pub static PROGRAMS: &[ProgramSpec] = &[
    ProgramSpec {
        name: "connect4",
        hook: Hook::Cgroup(10),
    },
    ProgramSpec {
        name: "connect6",
        hook: Hook::Cgroup(11),
    },
    ProgramSpec {
        name: "sendmsg4",
        hook: Hook::Cgroup(14),
    },
    ProgramSpec {
        name: "sendmsg6",
        hook: Hook::Cgroup(15),
    },
    ProgramSpec {
        name: "recvmsg4",
        hook: Hook::Cgroup(19),
    },
    ProgramSpec {
        name: "recvmsg6",
        hook: Hook::Cgroup(20),
    },
    ProgramSpec {
        name: "getpeername4",
        hook: Hook::Cgroup(29),
    },
    ProgramSpec {
        name: "getpeername6",
        hook: Hook::Cgroup(30),
    },
    ProgramSpec {
        name: "sock_release",
        hook: Hook::Cgroup(34),
    },
    ProgramSpec {
        name: "sched_switch",
        hook: Hook::SchedSwitch,
    },
    ProgramSpec {
        name: "pod_ingress",
        hook: Hook::Interface(46),
    },
    ProgramSpec {
        name: "pod_egress",
        hook: Hook::Interface(47),
    },
];

/// An open map with its info.
#[derive(Debug)]
pub struct Map {
    /// The descriptor.
    pub fd: OwnedFd,
    /// What the kernel says of it.
    pub info: MapInfo,
}

/// The loaded and attached dataplane.
#[derive(Debug)]
pub struct Kernel {
    /// Where things are pinned.
    pub pins: Pins,
    /// Root of cgroup2 as this process sees it.
    pub cgroup_root: PathBuf,
    /// `/orlop/INSTANCE` below it.
    pub node_cgroup: PathBuf,
    maps: HashMap<&'static str, Map>,
    programs: HashMap<&'static str, OwnedFd>,
    programs_directory: PathBuf,
}

impl Kernel {
    /// Brings programs and maps to where they should be; see the module.
    ///
    /// # Errors
    /// A pinned map has another layout, the verifier refuses a program, the kernel lacks something.
    pub fn start(config: &Config) -> Result<Self, DataplaneError> {
        let pins = Pins::new(config);
        for directory in [pins.pods(), pins.programs()] {
            fs::create_dir_all(&directory).map_err(|error| failed(format!("make {}", directory.display()), error))?;
        }
        let cgroup_root = match &config.cgroup_root {
            Some(root) => root.clone(),
            None => find_cgroup2().map_err(|error| failed("find cgroup2 in /proc/self/mountinfo", error))?,
        };
        let node_cgroup = cgroup_root.join("orlop").join(&config.instance);
        fs::create_dir_all(&node_cgroup).map_err(|error| failed(format!("make {}", node_cgroup.display()), error))?;
        let node_cgroup_id = super::cgroup_id(&node_cgroup).map_err(|error| failed("read the node's cgroup", error))?;

        let mut hasher = DefaultHasher::new();
        (object::ID, node_cgroup_id).hash(&mut hasher);
        let programs_directory = pins.programs().join(format!("{:016x}", hasher.finish()));

        let found = open_maps(&pins)?;
        let growing = growing(&found, config);
        let adopted = if growing.is_empty() {
            adopt_programs(&programs_directory, &found)
        } else {
            None
        };
        let programs = match adopted {
            Some(programs) => programs,
            None => {
                let programs = load::load(config, &pins, &programs_directory, node_cgroup_id, &found, &growing)?;
                // The kernel's BTF took tens of megabytes, which are not needed again.
                crate::memory::give_back();
                programs
            }
        };
        let kernel = Self {
            maps: HashMap::new(),
            programs_directory: programs_directory.clone(),
            programs,
            cgroup_root,
            node_cgroup,
            pins,
        };
        kernel.attach_all()?;
        kernel.finish_growing(&growing)?;
        kernel.remove_other_programs(&programs_directory);
        let maps = open_maps(&kernel.pins)?;
        Ok(Self { maps, ..kernel })
    }

    /// One of [`MAPS`].
    #[must_use]
    pub fn map(&self, name: &str) -> &Map {
        &self.maps[name]
    }

    /// One of [`PROGRAMS`].
    #[must_use]
    pub fn program(&self, name: &str) -> &OwnedFd {
        &self.programs[name]
    }

    /// Where one of [`PROGRAMS`] is pinned.
    #[must_use]
    pub fn program_pin(&self, name: &str) -> PathBuf {
        self.programs_directory.join(name)
    }

    /// Attaches a program to an interface of this thread's network namespace, or finds it attached. `true`: newly attached.
    ///
    /// # Errors
    /// The kernel's.
    pub fn attach_interface(&self, uid: &str, program: &str, hook: u32, index: u32) -> Result<bool, DataplaneError> {
        self.ensure_link(
            &self.pins.pod_link(uid, program),
            program,
            Target::Interface(index),
            || bpf::create_link(self.program(program), index, hook),
        )
    }

    /// Attaches all programs that are attached once, or finds them attached; the pods' links get our programs.
    pub(super) fn attach_all(&self) -> Result<(), DataplaneError> {
        let root = fs::File::open(&self.cgroup_root)
            .map_err(|error| failed(format!("open {}", self.cgroup_root.display()), error))?;
        let root_id = super::cgroup_id(&self.cgroup_root).map_err(|error| failed("read cgroup2's root", error))?;
        for spec in PROGRAMS {
            match spec.hook {
                Hook::Cgroup(attach_type) => {
                    self.ensure_link(&self.pins.link(spec.name), spec.name, Target::Cgroup(root_id), || {
                        bpf::create_link(self.program(spec.name), root.as_raw_fd().unsigned_abs(), attach_type)
                    })?;
                }
                Hook::SchedSwitch => {
                    self.ensure_link(&self.pins.link(spec.name), spec.name, Target::Tracing, || {
                        bpf::create_link(self.program(spec.name), 0, TRACE_RAW_TP)
                    })?;
                }
                Hook::Interface(_) => self.update_pod_links(spec.name)?,
            }
        }
        Ok(())
    }

    /// The pods' links get the program of this object; a link whose interface is gone goes.
    fn update_pod_links(&self, program: &str) -> Result<(), DataplaneError> {
        let wanted = bpf::program_info(self.program(program))
            .map_err(|error| failed("read a program", error))?
            .id;
        let suffix = program.strip_prefix("pod").unwrap_or(program);
        for (name, path) in pod_links(&self.pins).filter(|(name, _)| name.ends_with(suffix)) {
            let link = bpf::open_pinned(&path).map_err(|error| failed(format!("open link {name}"), error))?;
            let info = bpf::link_info(&link).map_err(|error| failed(format!("read link {name}"), error))?;
            if info.target == Target::Interface(0) {
                fs::remove_file(&path).map_err(|error| failed(format!("unpin {name}"), error))?;
            } else if info.program != wanted {
                bpf::update_link(&link, self.program(program))
                    .map_err(|error| failed(format!("replace the program of {name}"), error))?;
            }
        }
        Ok(())
    }

    /// Keeps, updates or makes the link pinned at `path`. `true`: it was made.
    fn ensure_link(
        &self,
        path: &Path,
        program: &str,
        target: Target,
        create: impl Fn() -> io::Result<OwnedFd>,
    ) -> Result<bool, DataplaneError> {
        let name = path.display();
        let program = self.program(program);
        let wanted = bpf::program_info(program)
            .map_err(|error| failed(format!("read the program of {name}"), error))?
            .id;
        let pinned = bpf::open_pinned(path).ok();
        if let Some(link) = &pinned {
            let info = bpf::link_info(link).map_err(|error| failed(format!("read link {name}"), error))?;
            if info.target == target && info.program == wanted {
                return Ok(false);
            }
            // A tracepoint's link cannot be given another program; for a moment both run, which the programs bear.
            if info.target == target && target != Target::Tracing {
                bpf::update_link(link, program)
                    .map_err(|error| failed(format!("replace the program of link {name}"), error))?;
                return Ok(false);
            }
        }
        let link = create().map_err(|error| failed(format!("attach {name}"), error))?;
        let fresh = self.pins.root.join("new_link");
        remove_if_there(&fresh).map_err(|error| failed(format!("unpin {}", fresh.display()), error))?;
        bpf::pin(&link, &fresh).map_err(|error| failed(format!("pin link {name}"), error))?;
        fs::rename(&fresh, path).map_err(|error| failed(format!("pin link {name}"), error))?;
        Ok(true)
    }

    fn finish_growing(&self, growing: &BTreeMap<&'static str, u32>) -> Result<(), DataplaneError> {
        for name in growing.keys() {
            fs::rename(self.pins.new_map(name), self.pins.map(name))
                .map_err(|error| failed(format!("pin the larger {name}"), error))?;
        }
        Ok(())
    }

    /// Programs of earlier agents, whose links have ours now.
    fn remove_other_programs(&self, keep: &Path) {
        for entry in fs::read_dir(self.pins.programs()).into_iter().flatten().flatten() {
            if entry.path() != keep
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                tracing::warn!(path = %entry.path().display(), %error, "old programs stay pinned");
            }
        }
    }
}

/// The programs of a pod's interface, and where each is attached (BPF_TCX_...).
pub(super) fn interface_programs() -> impl Iterator<Item = (&'static str, u32)> {
    PROGRAMS.iter().filter_map(|spec| match spec.hook {
        Hook::Interface(hook) => Some((spec.name, hook)),
        _ => None,
    })
}

/// Whether a pod's link for a program is pinned, and at this interface.
pub(super) fn is_linked(pins: &Pins, uid: &str, program: &str, index: u32) -> bool {
    let info = bpf::open_pinned(&pins.pod_link(uid, program)).and_then(bpf::link_info);
    info.is_ok_and(|info| info.target == Target::Interface(index))
}

/// Removes all pins of an instance: programs are detached, counters gone.
///
/// # Errors
/// The file system's. What is not there is a success.
pub fn remove(config: &Config) -> io::Result<()> {
    match fs::remove_dir_all(Pins::new(config).root()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Opens and checks all pinned maps that are there.
pub(super) fn open_maps(pins: &Pins) -> Result<HashMap<&'static str, Map>, DataplaneError> {
    let mut maps = HashMap::new();
    for spec in MAPS {
        let fd = match bpf::open_pinned(&pins.map(spec.name)) {
            Ok(fd) => fd,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(format!("open {}", pins.map(spec.name).display()), error)),
        };
        let info = bpf::map_info(&fd).map_err(|error| failed(format!("read map {}", spec.name), error))?;
        spec.check(&info).map_err(|difference| {
            let path = pins.map(spec.name);
            failed(
                format!("open {}", path.display()),
                format!("it is not what its name says: {difference}; remove the pin, or run the version that made it"),
            )
        })?;
        maps.insert(spec.name, Map { fd, info });
    }
    Ok(maps)
}

/// Maps that should hold more than they do, and how much.
fn growing(found: &HashMap<&'static str, Map>, config: &Config) -> BTreeMap<&'static str, u32> {
    MAPS.iter()
        .filter_map(|spec| {
            let wanted = spec.entries?(&config.sizes);
            let have = found.get(spec.name)?.info.max_entries;
            if wanted < have {
                tracing::info!(map = spec.name, have, wanted, "a map is never made smaller");
            }
            (wanted > have).then_some((spec.name, wanted))
        })
        .collect()
}

/// The pinned programs, if they are all there and use the pinned maps.
fn adopt_programs(directory: &Path, maps: &HashMap<&'static str, Map>) -> Option<HashMap<&'static str, OwnedFd>> {
    if maps.len() != MAPS.len() {
        return None;
    }
    let ids: BTreeSet<u32> = maps.values().map(|map| map.info.id).collect();
    let mut programs = HashMap::new();
    for spec in PROGRAMS {
        let program = bpf::open_pinned(&directory.join(spec.name)).ok()?;
        let info = bpf::program_info(&program).ok()?;
        let of_maps = info.map_ids.iter().all(|id| ids.contains(id) || !is_ours(*id));
        if !of_maps {
            return None;
        }
        programs.insert(spec.name, program);
    }
    Some(programs)
}

/// Does this map have one of our names? Programs use anonymous ones too, for their constants.
pub(super) fn is_ours(id: u32) -> bool {
    bpf::map_by_id(id)
        .and_then(bpf::map_info)
        .is_ok_and(|info| MAPS.iter().any(|spec| spec.name.chars().take(15).eq(info.name.chars())))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The mount point of cgroup2: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` beside v1 controllers.
///
/// # Errors
/// There is none.
pub fn find_cgroup2() -> io::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let found: Vec<(&str, &str)> = mounts
        .lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let mut fields = before.split(' ').skip(3);
            after
                .starts_with("cgroup2 ")
                .then_some((fields.next()?, fields.next()?))
        })
        .collect();
    // The last one mounted covers others. In a cgroup namespace a mount from outside shows more than our own subtree: its
    // root is not `/`.
    found
        .iter()
        .rev()
        .find(|(root, _)| *root == "/")
        .or(found.last())
        .map(|(_, point)| PathBuf::from(point))
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup2 is mounted"))
}
