//! Takes the node's counting programs away and puts them back, one kind at a time, so that what each costs can be measured.

use std::{fs, io::BufRead, thread, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use orlop_node::dataplane::{
    EbpfDataplane, PodInterface,
    bpf::{self, Target},
    kernel::pod_links,
};

/// The program that counts CPU time.
const SCHED_SWITCH: &str = "sched_switch";
/// BPF_TRACE_RAW_TP.
const TRACE_RAW_TP: u32 = 23;
/// A link that has lost its last pin is detached by the kernel in the background.
const DETACHED: Duration = Duration::from_millis(30);

/// For every line on stdin (`traffic on`, `traffic off`, `cpu on`, `cpu off`) does that, and prints a line.
pub fn run() -> Result<()> {
    let dataplane = super::dataplane()?;
    let pods = pods(&dataplane)?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["traffic", "on"] => pods.iter().try_for_each(|pod| dataplane.attach_pod_now(pod))?,
            ["traffic", "off"] => pods.iter().try_for_each(|pod| dataplane.detach_pod_now(&pod.pod_uid))?,
            ["cpu", "on"] => cpu_on(&dataplane)?,
            ["cpu", "off"] => cpu_off(&dataplane)?,
            _ => bail!("{line:?} is nothing to switch"),
        }
        thread::sleep(DETACHED);
        println!("{line}");
    }
    Ok(())
}

fn cpu_on(dataplane: &EbpfDataplane) -> Result<()> {
    let kernel = dataplane.kernel();
    let path = kernel.pins.link(SCHED_SWITCH);
    if !path.exists() {
        let link = bpf::create_link(kernel.program(SCHED_SWITCH), 0, TRACE_RAW_TP).context("attaching sched_switch")?;
        bpf::pin(&link, &path).with_context(|| format!("pinning {}", path.display()))?;
    }
    Ok(())
}

fn cpu_off(dataplane: &EbpfDataplane) -> Result<()> {
    let path = dataplane.kernel().pins.link(SCHED_SWITCH);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("unpinning {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// The pods that have programs at their interfaces.
fn pods(dataplane: &EbpfDataplane) -> Result<Vec<PodInterface>> {
    let mut pods = Vec::new();
    for (name, path) in pod_links(&dataplane.kernel().pins) {
        let Some(uid) = name.strip_suffix("_ingress") else {
            continue;
        };
        let link = bpf::open_pinned(&path).with_context(|| format!("opening {}", path.display()))?;
        if let Target::Interface(index @ 1..) = bpf::link_info(&link)?.target {
            let interface = nix::net::if_::if_indextoname(index).with_context(|| format!("interface {index}"))?;
            pods.push(PodInterface {
                pod_uid: uid.to_owned(),
                host_interface: interface.to_string_lossy().into_owned(),
            });
        }
    }
    ensure!(
        !pods.is_empty(),
        "no pod has programs at its interface (before Linux 6.6 they are no links)"
    );
    Ok(pods)
}
