//! The programs at the pods' interfaces: attached, taken off, found again after a restart, looked after.

use std::io;

use nix::net::if_::{if_indextoname, if_nametoindex};
use orlop_ebpf_abi as abi;

use super::{EbpfDataplane, Inner};
use crate::dataplane::{
    Attachment, DataplaneError, PodInterface,
    bpf::{self, Target},
    clsact, counters, failed,
    kernel::{self, interface_programs},
    verify,
};

/// What is attached for a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hooks {
    /// Its interface.
    pub index: u32,
    /// In which way.
    pub attachment: Attachment,
}

impl EbpfDataplane {
    /// [`Dataplane::attach_pod`], in this thread and its network namespace.
    ///
    /// [`Dataplane::attach_pod`]: crate::dataplane::Dataplane::attach_pod
    ///
    /// # Errors
    /// As there.
    pub fn attach_pod_now(&self, pod: &PodInterface) -> Result<(), DataplaneError> {
        self.attach_pod_with(pod, Attachment::best())
    }

    /// The same, in a given way.
    ///
    /// # Errors
    /// As there.
    pub fn attach_pod_with(&self, pod: &PodInterface, attachment: Attachment) -> Result<(), DataplaneError> {
        let inner = &*self.inner;
        let name = &pod.host_interface;
        let index = if_nametoindex(name.as_str())
            .map_err(|error| failed(format!("find interface {name}"), io::Error::from(error)))?;
        let mut state = inner.lock();
        let map = inner.kernel.map(abi::TRAFFIC);
        if state.pods.get(&pod.pod_uid).is_none_or(|hooks| hooks.index != index) {
            let zeros = vec![0; bpf::value_bytes(&map.info).map_err(|error| failed("count CPUs", error))?];
            // What is there is this pod's, from an earlier life that left no link: counters go with a pod's interface.
            bpf::add(&map.fd, &index.to_ne_bytes(), &zeros)
                .map_err(|error| failed(format!("make counters for {name}"), error))?;
        }
        for (program, hook) in interface_programs() {
            match attachment {
                Attachment::Tcx => {
                    inner.kernel.attach_interface(&pod.pod_uid, program, hook, index)?;
                }
                Attachment::Clsact => clsact::attach(&inner.kernel.program_pin(program), program, name)
                    .map_err(|error| failed(format!("attach {program} to {name}"), error))?,
            }
        }
        state.pods.insert(pod.pod_uid.clone(), Hooks { index, attachment });
        Ok(())
    }

    /// [`Dataplane::detach_pod`], in this thread.
    ///
    /// [`Dataplane::detach_pod`]: crate::dataplane::Dataplane::detach_pod
    ///
    /// # Errors
    /// As there.
    pub fn detach_pod_now(&self, uid: &str) -> Result<(), DataplaneError> {
        let inner = &*self.inner;
        let mut state = inner.lock();
        for (spec, _) in interface_programs() {
            let path = inner.kernel.pins.pod_link(uid, spec);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed(format!("unpin {}", path.display()), error));
                }
                _ => {}
            }
        }
        let index = state.pods.remove(uid).map(|hooks| hooks.index);
        if let Some(interface) = index.and_then(|index| if_indextoname(index).ok())
            && let Ok(interface) = interface.into_string()
        {
            for (program, _) in interface_programs() {
                clsact::detach(program, &interface)
                    .map_err(|error| failed(format!("detach {program} from {interface}"), error))?;
            }
        }
        if let Some(index) = index
            && !state.pods.values().any(|other| other.index == index)
        {
            bpf::delete(&inner.kernel.map(abi::TRAFFIC).fd, &index.to_ne_bytes())
                .map_err(|error| failed("delete the pod's counters", error))?;
        }
        Ok(())
    }

    /// [`Dataplane::repair`], in this thread and its network namespace.
    ///
    /// [`Dataplane::repair`]: crate::dataplane::Dataplane::repair
    ///
    /// # Errors
    /// As there.
    pub fn repair_now(&self) -> Result<Vec<String>, DataplaneError> {
        let inner = &*self.inner;
        let state = inner.lock();
        if let Err(lost) = verify::health(&inner.kernel) {
            tracing::warn!(lost, "somebody detached a program of the node: it is attached again");
            inner.kernel.attach_all()?;
        }
        let lost = |(uid, hooks): &(&String, &Hooks)| {
            let at = |program: &str| kernel::is_linked(&inner.kernel.pins, uid, program, hooks.index);
            // An interface that is gone needs no programs, and a filter of clsact has no link to ask.
            hooks.attachment == Attachment::Tcx
                && if_indextoname(hooks.index).is_ok()
                && !interface_programs().all(|(program, _)| at(program))
        };
        Ok(state.pods.iter().filter(lost).map(|(uid, _)| uid.clone()).collect())
    }

    /// The interfaces that have programs, as far as they are there.
    pub(super) fn pod_interfaces(&self) -> Vec<PodInterface> {
        let state = self.inner.lock();
        let linked = state
            .pods
            .iter()
            .filter(|(_, hooks)| hooks.attachment == Attachment::Tcx);
        let known = linked.filter_map(|(uid, hooks)| {
            let name = if_indextoname(hooks.index).ok()?.into_string().ok()?;
            Some(PodInterface {
                pod_uid: uid.clone(),
                host_interface: name,
            })
        });
        known.collect()
    }
}

impl Inner {
    /// Which pods' interfaces have links from before; counters are deleted when their interface is gone. (Without tcx there
    /// are no links to tell whose they are: the pod's next attaching takes them.)
    pub(super) fn adopt_pods(&self) -> Result<(), DataplaneError> {
        let mut state = self.lock();
        for (name, path) in kernel::pod_links(&self.kernel.pins) {
            let info = bpf::open_pinned(&path)
                .and_then(bpf::link_info)
                .map_err(|error| failed(format!("read link {name}"), error))?;
            let uid = name.rsplit_once('_').map(|(uid, _)| uid);
            if let (Some(uid), Target::Interface(index @ 1..)) = (uid, info.target) {
                let attachment = Attachment::Tcx;
                state.pods.insert(uid.to_owned(), Hooks { index, attachment });
            }
        }
        let map = self.kernel.map(abi::TRAFFIC);
        let known = counters::traffic(map).map_err(|error| failed("read counters of traffic", error))?;
        for index in known.keys().filter(|index| {
            !state.pods.values().any(|of_pod| of_pod.index == **index) && if_indextoname(**index).is_err()
        }) {
            bpf::delete(&map.fd, &index.to_ne_bytes()).map_err(|error| failed("delete counters", error))?;
        }
        Ok(())
    }
}
