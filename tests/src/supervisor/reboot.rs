//! A machine that is switched off and on: its state folders stay, and everything else is new.

use std::fs;

use anyhow::{Context, Result};

use super::{Supervisor, configuration, network};
use crate::{cgroup, namespaces::run_tool};

impl Supervisor {
    /// Ends all processes of a member at once, with them its namespaces, mounts, pins and cgroups; then makes them anew, with a
    /// boot id of their own, and starts the member's services.
    pub(super) fn reboot(&mut self, name: &str) -> Result<()> {
        let index = self.members.members.iter().position(|member| member.name == name);
        let index = index.with_context(|| format!("no member {name}"))?;
        let services: Vec<_> = self
            .services
            .iter()
            .filter(|one| one.member() == name)
            .cloned()
            .collect();
        for service in &services {
            service.forbid();
        }
        cgroup::remove(&format!("{}/{name}", self.spec.id))?;
        let _ = self.holders[index].wait();
        for service in &services {
            service.stop();
        }
        network::uncable(&self.members, name);
        let (holder, pid) = self.hold(name)?;
        self.holders[index] = holder;
        self.members.members[index].pid = pid;
        let member = self.members.members[index].clone();
        network::cable(&self.members, &member)?;
        let boot_id = self.spec.member_directory(name).join("boot_id");
        fs::write(&boot_id, format!("{}\n", uuid::Uuid::new_v4())).context("writing a boot id")?;
        run_tool(
            "nsenter",
            &[
                &format!("--mount=/proc/{pid}/ns/mnt"),
                "mount",
                "--bind",
                &boot_id.display().to_string(),
                "/proc/sys/kernel/random/boot_id",
            ],
        )?;
        configuration::install_plugin(&self.spec, name, pid)?;
        self.write_members()?;
        for service in &services {
            service.resume_in(pid);
        }
        Ok(())
    }
}
