//! What is to be seen on a node: processes, cgroups, logs, namespaces, what containerd has, and what was left.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use orlop_node::{
    network::Network as _,
    runtime::{Observed, ProcessState, Runtime, cgroup::Cgroups, containerd::Containerd},
};

use super::{Node, PATIENCE};

impl Node {
    /// What exists, as soon as containerd says it: it may just be starting.
    pub(super) async fn observed(&self) -> Observed {
        let begin = Instant::now();
        loop {
            match self.runtime().observe().await {
                Ok(observed) => return observed,
                Err(error) => assert!(begin.elapsed() < PATIENCE, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn runtime(&self) -> &Containerd {
        &self.agent.as_ref().unwrap().runtime
    }

    /// Pid and start time of a container.
    pub async fn process(&self, pod: &str, container: &str) -> (u32, Timestamp) {
        let observed = self.observed().await;
        let found = &observed.pods[&format!("uid-of-{pod}")];
        let running = found
            .containers
            .iter()
            .filter(|found| found.name == container)
            .find_map(|found| {
                let ProcessState::Running { pid, started_at } = found.state else {
                    return None;
                };
                Some((pid, started_at))
            });
        running.unwrap_or_else(|| panic!("{container} does not run: {found:#?}"))
    }

    /// Waits until a container's process has its handler of SIGTERM: the first process of a pid namespace does not get a signal
    /// that it has none for, and a started container may not have come to that yet.
    pub async fn until_it_heeds_sigterm(&self, pod: &str, container: &str) {
        let pid = self.process(pod, container).await.0;
        self.until_true("it handles SIGTERM", |_| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
            u64::from_str_radix(caught.trim(), 16).unwrap() & 1 << (libc::SIGTERM - 1) != 0
        })
        .await;
    }

    pub async fn pause_pid(&self, pod: &str) -> u32 {
        let observed = self.observed().await;
        let found = &observed.pods[&format!("uid-of-{pod}")];
        assert_eq!(found.sandboxes.len(), 1);
        let ProcessState::Running { pid, .. } = found.sandboxes[0].state else {
            panic!("{found:#?}")
        };
        pid
    }

    /// Kills a process of this test's own pid namespace.
    pub fn kill(&self, pid: u32) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }

    /// The parent of a process: of a container's, its shim.
    pub fn parent(&self, pid: u32) -> u32 {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .nth(1)
            .unwrap()
            .parse()
            .unwrap()
    }

    pub fn exists(&self, pid: u32) -> bool {
        PathBuf::from(format!("/proc/{pid}/cwd")).symlink_metadata().is_ok()
            && fs::read_link(format!("/proc/{pid}/exe")).is_ok()
    }

    /// All lines of a container's logs.
    pub fn log_lines(&self, pod: &str, container: &str) -> Vec<String> {
        let dir = self
            .config
            .log_dir
            .join(format!("default_{pod}_uid-of-{pod}"))
            .join(container);
        let mut files: Vec<PathBuf> = fs::read_dir(dir)
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        files
            .iter()
            .flat_map(|file| {
                fs::read_to_string(file)
                    .unwrap()
                    .lines()
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    /// How many shims there are; not the runs of their program that only ask one for its socket or clear up after it.
    pub fn shims(&self) -> usize {
        let is_brief = |command: &str| [" start ", " delete "].iter().any(|verb| command.ends_with(verb));
        commands()
            .iter()
            .filter(|command| command.contains("containerd-shim") && !is_brief(command))
            .count()
    }

    /// How many network namespaces are pinned.
    pub fn namespaces(&self) -> usize {
        fs::read_dir("/run/orlop/netns").map_or(0, Iterator::count)
    }

    /// The cgroups that a container is in, those of other hierarchies too.
    pub async fn cgroups(&self, uid: &str, container: &str) -> Vec<PathBuf> {
        let observed = self.observed().await;
        let mut containers = observed.pods[uid].containers.iter();
        let id = &containers.find(|found| found.name == container).unwrap().id;
        let below = format!("{}/{uid}/{id}", self.stage.cgroup());
        let cgroups = Cgroups::detect().unwrap();
        let mounts = cgroups.legacy.iter().map(|(mount, _)| mount).chain(&cgroups.unified);
        mounts.map(|mount| mount.join(below.trim_start_matches('/'))).collect()
    }

    /// The first of these files in the container's cgroup.
    pub async fn cgroup_file(&self, pod: &str, container: &str, names: &[&str]) -> String {
        let uid = format!("uid-of-{pod}");
        let dirs = self.cgroups(&uid, container).await;
        dirs.iter()
            .flat_map(|dir| names.iter().map(|name| dir.join(name)))
            .find_map(|file| fs::read_to_string(file).ok())
            .map(|text| text.trim().to_owned())
            .unwrap_or_default()
    }

    /// What containerd's own client says of our namespace.
    pub fn ctr(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("ctr");
        let ran = command
            .args(["-a", "/run/c.sock", "-n", "orlop"])
            .args(arguments)
            .output();
        String::from_utf8(ran.unwrap().stdout).unwrap()
    }

    /// No process, namespace, network, log, state, cgroup or snapshot of a pod.
    pub fn assert_nothing_left(&mut self) {
        let agent = self.agent.as_ref().unwrap();
        let networks = futures::executor::block_on(agent.network.list()).unwrap();
        assert!(networks.is_empty(), "{networks:?}");
        assert_eq!(self.namespaces(), 0);
        assert!(self.hooks.0.lock().unwrap().is_empty());
        assert_eq!(fs::read_dir(&self.config.log_dir).map_or(0, Iterator::count), 0, "logs");
        assert_eq!(fs::read_dir("/run/orlop/pods").unwrap().count(), 0, "state");
        let begin = Instant::now();
        let ours = |command: &String| {
            ["containerd-shim", "orlop-logger", "fixture", "/pause"]
                .iter()
                .any(|name| command.contains(name))
        };
        while let Some(command) = commands().into_iter().find(ours) {
            assert!(begin.elapsed() < Duration::from_secs(20), "{command} still runs");
            std::thread::sleep(Duration::from_millis(50));
        }
        let cgroups = Cgroups::detect().unwrap();
        for mount in cgroups.legacy.iter().map(|(mount, _)| mount).chain(&cgroups.unified) {
            let dir = mount.join(self.stage.cgroup().trim_start_matches('/'));
            let below = fs::read_dir(&dir).into_iter().flatten().filter_map(Result::ok);
            let left: Vec<PathBuf> = below
                .filter(|entry| entry.path().is_dir())
                .map(|entry| entry.path())
                .collect();
            assert!(left.is_empty(), "{left:?}");
        }
        let text = self.ctr(&["snapshots", "list"]);
        assert!(!text.contains("Active"), "{text}");
        self.kill_containerd();
    }
}

/// The command lines of all processes of this pid namespace.
fn commands() -> Vec<String> {
    let dirs = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    dirs.filter(|dir| {
        dir.file_name()
            .to_string_lossy()
            .bytes()
            .all(|byte| byte.is_ascii_digit())
    })
    .filter_map(|dir| fs::read(dir.path().join("cmdline")).ok())
    .map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " "))
    .filter(|command| !command.contains("--nocapture"))
    .collect()
}
