//! Loads the object: its maps over the pinned ones, its programs to be pinned.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use aya::{
    Btf, EbpfLoader,
    programs::{Program, ProgramError},
};
use orlop_ebpf_abi as abi;

use super::{
    super::{
        Config, DataplaneError, bpf, btf, failed,
        layout::{self, MAPS},
        object,
    },
    Map, PROGRAMS, Pins, remove_if_there,
};

/// Loads the object over the pinned maps, makes those that are missing or too small, and pins the programs.
pub(super) fn load(
    config: &Config,
    pins: &Pins,
    directory: &Path,
    node_cgroup_id: u64,
    found: &HashMap<&'static str, Map>,
    growing: &BTreeMap<&'static str, u32>,
) -> Result<HashMap<&'static str, OwnedFd>, DataplaneError> {
    let offsets = btf::kernel_offsets().map_err(|error| failed("read the kernel's BTF", error))?;
    let kernel_btf = Btf::from_sys_fs().map_err(|error| failed("read the kernel's BTF", error))?;
    let mut loader = EbpfLoader::new();
    loader
        .btf(Some(&kernel_btf))
        .override_global("NODE_CGROUP", &node_cgroup_id, true);
    for (global, offset) in &offsets {
        loader.override_global(global, offset, true);
    }
    // Of the map that the programs will use; none is made smaller.
    let sockets = found.get(abi::SOCKETS).map_or(0, |map| map.info.max_entries);
    let sockets_mask = sockets.max(layout::sockets(&config.sizes)) - 1;
    loader.override_global("SOCKETS_MASK", &sockets_mask, true);
    for spec in MAPS {
        let grows = growing.contains_key(spec.name);
        let path = if grows {
            pins.new_map(spec.name)
        } else {
            pins.map(spec.name)
        };
        if grows {
            remove_if_there(&path).map_err(|error| failed(format!("unpin {}", path.display()), error))?;
        }
        loader.map_pin_path(spec.name, path);
        if let Some(entries) = spec.entries {
            // Only said of maps that are made; one that is opened keeps what it has.
            loader.map_max_entries(spec.name, entries(&config.sizes));
        }
    }
    let mut object = loader
        .load(object::OBJECT)
        .map_err(|error| failed("load the kernel programs' maps", error))?;
    for name in growing.keys() {
        copy(name, &found[name], &pins.new_map(name)).map_err(|error| failed(format!("copy {name}"), error))?;
    }

    // Pinned in a directory of another name first: the right name means all of them are there.
    let unfinished = directory.with_file_name("unfinished");
    for stale in [unfinished.as_path(), directory] {
        match fs::remove_dir_all(stale) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed(format!("unpin {}", stale.display()), error));
            }
            _ => {}
        }
    }
    fs::create_dir(&unfinished).map_err(|error| failed(format!("make {}", unfinished.display()), error))?;
    let mut programs = HashMap::new();
    for spec in PROGRAMS {
        let program = object
            .program_mut(spec.name)
            .ok_or_else(|| failed(format!("find program {}", spec.name), "it is not in the object"))?;
        load_program(program, &kernel_btf).map_err(|error| failed(format!("load program {}", spec.name), error))?;
        let fd = program
            .fd()
            .map_err(|error| failed(format!("open program {}", spec.name), error))?;
        let fd = fd
            .as_fd()
            .try_clone_to_owned()
            .map_err(|error| failed("copy a descriptor", error))?;
        bpf::pin(&fd, &unfinished.join(spec.name))
            .map_err(|error| failed(format!("pin program {}", spec.name), error))?;
        programs.insert(spec.name, fd);
    }
    fs::rename(&unfinished, directory).map_err(|error| failed(format!("make {}", directory.display()), error))?;
    Ok(programs)
}

fn load_program(program: &mut Program, btf: &Btf) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::BtfTracePoint(program) => program.load("sched_switch", btf),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// Copies all entries into a larger map. What programs count meanwhile in the old one is lost.
fn copy(name: &str, from: &Map, to: &Path) -> io::Result<()> {
    let to = bpf::open_pinned(to)?;
    let sockets_mask = bpf::map_info(&to)?.max_entries.saturating_sub(1);
    let (mut keys, mut values, mut count) = (Vec::new(), Vec::new(), 0);
    bpf::for_each(&from.fd, &from.info, |key, value| {
        if value.iter().any(|byte| *byte != 0) {
            match value.first_chunk().map(|cookie| u64::from_ne_bytes(*cookie)) {
                // The key is the lower bits of the cookie: now some more of them.
                Some(cookie) if name == abi::SOCKETS => {
                    let place = u32::try_from(cookie & u64::from(sockets_mask)).unwrap_or(0);
                    keys.extend_from_slice(&place.to_ne_bytes());
                }
                _ => keys.extend_from_slice(key),
            }
            values.extend_from_slice(value);
            count += 1;
        }
        true
    })?;
    bpf::update_batch(to, &keys, &values, count)
}
