//! A node of one test: containerd, the reconciler, and what control would say.

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use jiff::Timestamp;
use orlop_node::{
    config::Config,
    dataplane::{Counters, Dataplane, DataplaneError, PodInterface, ServiceChanges},
    desired::Desired,
    network::{self, CniNetwork, Network as _},
    reconciler::{self, Inputs, PodUpdate, Settings},
    runtime::{
        Observed, ProcessState, Runtime,
        cgroup::Cgroups,
        containerd::{Containerd, Options},
        garbage,
    },
};
use orlop_proto::{
    Resource as _,
    core::v1::{Container, Pod, PodSpec, PodStatus},
    node::v1 as link,
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::stage::Stage;

/// Everything that a test waits for comes within this time.
const PATIENCE: Duration = Duration::from_secs(60);

/// A node.
pub struct Node {
    stage: Stage,
    config: Config,
    containerd: Child,
    desired: watch::Sender<Arc<Desired>>,
    updates: Arc<Mutex<Vec<PodUpdate>>>,
    hooks: Arc<Hooks>,
    agent: Option<Agent>,
}

struct Agent {
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    runtime: Arc<Containerd>,
    network: Arc<CniNetwork>,
}

/// Stands for the eBPF dataplane, which has its own tests: remembers which pods have hooks.
#[derive(Default)]
struct Hooks(Mutex<BTreeSet<String>>);

#[async_trait]
impl Dataplane for Hooks {
    async fn apply(&self, _: ServiceChanges) -> Result<(), DataplaneError> {
        Ok(())
    }
    async fn attach_pod(&self, interface: PodInterface) -> Result<(), DataplaneError> {
        let device = PathBuf::from("/proc/sys/net/ipv4/conf").join(&interface.host_interface);
        assert!(
            device.exists(),
            "{} is not an interface of the node",
            interface.host_interface
        );
        self.0.lock().unwrap().insert(interface.pod_uid);
        Ok(())
    }
    async fn detach_pod(&self, pod_uid: &str) -> Result<(), DataplaneError> {
        self.0.lock().unwrap().remove(pod_uid);
        Ok(())
    }
    async fn read_counters(&self) -> Result<Counters, DataplaneError> {
        Ok(Counters::default())
    }
    fn serves(&self) -> bool {
        false
    }
    fn health(&self) -> Result<(), String> {
        Ok(())
    }
}

/// A pod of containers (name, arguments, image), restarted always.
pub fn pod(name: &str, containers: &[(&str, &[&str], &str)]) -> Pod {
    let containers = containers.iter().map(|(name, args, image)| Container {
        name: (*name).into(),
        image: (*image).into(),
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        ..Container::default()
    });
    let spec = PodSpec {
        containers: containers.collect(),
        restart_policy: "Always".into(),
        termination_grace_period_seconds: Some(30),
        ..PodSpec::default()
    };
    let mut pod = Pod {
        spec: Some(spec),
        ..Pod::default()
    };
    let meta = pod.meta_mut();
    (meta.namespace, meta.name, meta.uid) = ("default".into(), name.into(), format!("uid-of-{name}"));
    pod
}

impl Node {
    /// Starts containerd and the agent; control has not said all yet, so the snapshot is complete from the beginning.
    pub async fn start(stage: Stage) -> Self {
        Self::start_with(stage, |_| {}).await
    }

    /// The same with something changed in its configuration.
    pub async fn start_with(stage: Stage, change: impl FnOnce(&mut Config)) -> Self {
        // As the agent's main does.
        rustls::crypto::ring::default_provider().install_default().unwrap();
        let ran = |program: &str, arguments: &[&str]| {
            assert!(
                Command::new(program).args(arguments).status().unwrap().success(),
                "{program} {arguments:?}"
            );
        };
        ran("mount", &["-t", "tmpfs", "run", "/run"]);
        ran("ip", &["link", "set", "lo", "up"]);
        fs::write(stage.dir.join("boot_id"), "first").unwrap();
        let images = stage.dir.join("images");
        write_image(&stage, &images);
        let mut config = Config {
            node_name: "n1".into(),
            data_dir: stage.dir.join("data"),
            run_dir: "/run/orlop".into(),
            containerd_socket: "/run/c.sock".into(),
            cni_conf_dir: stage.dir.join("cni"),
            cni_bin_dirs: vec![stage.cni_bin_dir.clone()],
            image_dirs: vec![images],
            log_dir: stage.dir.join("logs"),
            pause_binary: stage.pause.clone(),
            logger_binary: env!("CARGO_BIN_EXE_orlop-logger").into(),
            ..Config::default()
        };
        change(&mut config);
        let containerd = spawn_containerd(&stage);
        let (desired, _) = watch::channel(Arc::new(Desired::default()));
        let mut node = Self {
            stage,
            config,
            containerd,
            desired,
            updates: Arc::default(),
            hooks: Arc::default(),
            agent: None,
        };
        node.start_agent(true);
        node
    }

    /// Starts the agent; with `complete` control's snapshot is there already, else it knows nothing of pods yet.
    pub fn start_agent(&mut self, complete: bool) {
        let options = Options {
            cgroup_parent: self.stage.cgroup(),
            ..Options::from_config(&self.config)
        };
        let runtime = Arc::new(Containerd::new(options).unwrap());
        let network = Arc::new(CniNetwork::new(network::Settings {
            boot_id_file: self.stage.dir.join("boot_id"),
            ..network::Settings::new(&self.config)
        }));
        let (sender, mut receiver) = mpsc::channel::<PodUpdate>(16);
        let known = self.desired.borrow().clone();
        let first = if complete {
            Desired {
                complete,
                ..(*known).clone()
            }
        } else {
            Desired::default()
        };
        let (handed, receive) = watch::channel(Arc::new(first));
        self.desired = handed;
        if !complete {
            // What control will say, once it speaks.
            KNOWN.lock().unwrap().replace(known);
        }
        let updates = self.updates.clone();
        tokio::spawn(async move {
            while let Some(update) = receiver.recv().await {
                updates.lock().unwrap().push(update);
            }
        });
        // Nobody listens: pods do not mind.
        let (events, _) = mpsc::channel(1);
        let inputs = Inputs {
            desired: receive,
            runtime: runtime.clone(),
            network: network.clone(),
            dataplane: self.hooks.clone(),
            updates: sender,
            events,
            settings: Settings {
                host_addresses: vec!["127.0.0.1".parse().unwrap()],
                backoff_initial: Duration::from_millis(500),
                backoff_max: Duration::from_secs(4),
                ..Settings::default()
            },
        };
        let stop = CancellationToken::new();
        let gc = self.config.images.gc.clone();
        tokio::spawn(garbage::run(runtime.clone(), inputs.desired.clone(), gc, stop.clone()));
        let task = tokio::spawn({
            let (stop, network) = (stop.clone(), network.clone());
            async move {
                let ranges = link::Welcome {
                    pod_cidrs: vec!["10.244.9.0/24".into()],
                    cluster_pod_cidr: "10.244.0.0/16".into(),
                    service_cidr: "10.96.0.0/12".into(),
                };
                network
                    .configure(&ranges, &Default::default(), network::Stale::Removed)
                    .await
                    .unwrap();
                reconciler::run(inputs, stop).await;
            }
        });
        self.agent = Some(Agent {
            stop,
            task,
            runtime,
            network,
        });
    }

    /// Control's snapshot arrives.
    pub fn complete(&self) {
        if let Some(known) = KNOWN.lock().unwrap().take() {
            self.desired.send_replace(Arc::new(Desired {
                complete: true,
                ..(*known).clone()
            }));
        }
    }

    pub async fn stop_agent(&mut self) {
        let agent = self.agent.take().unwrap();
        agent.stop.cancel();
        agent.task.await.unwrap();
        self.updates.lock().unwrap().clear();
    }

    pub fn kill_containerd(&mut self) {
        self.containerd.kill().unwrap();
        self.containerd.wait().unwrap();
    }

    /// Starts it again, and waits until it answers.
    pub fn start_containerd(&mut self) {
        self.containerd = spawn_containerd(&self.stage);
        let begin = Instant::now();
        while let Err(error) = std::os::unix::net::UnixStream::connect("/run/c.sock") {
            assert!(begin.elapsed() < PATIENCE, "containerd does not come back: {error}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The machine is switched off and on: processes, `/run`, interfaces and cgroups are gone, what is on disk stays.
    pub async fn reboot(&mut self) {
        self.stop_agent().await;
        self.kill_containerd();
        let own = std::process::id();
        let pids = fs::read_dir("/proc")
            .unwrap()
            .filter_map(|dir| dir.unwrap().file_name().to_str()?.parse().ok());
        for pid in pids.filter(|pid: &u32| *pid != own && *pid != 1) {
            let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
            // It may have ended meanwhile.
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let under_run = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(1))
            .filter(|path| path.starts_with("/run"));
        for path in under_run.collect::<Vec<_>>().into_iter().rev() {
            rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH).unwrap();
        }
        rustix::mount::mount("run", "/run", "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
        Cgroups::detect().unwrap().remove(&self.stage.cgroup()).unwrap();
        fs::write(self.stage.dir.join("boot_id"), "another").unwrap();
        self.start_containerd();
        self.start_agent(true);
    }

    /// Control wants this pod.
    pub fn want(&self, pod: &Pod) {
        let pod = Arc::new(pod.clone());
        self.desired.send_modify(|desired| {
            Arc::make_mut(desired).pods.insert(pod.uid().to_owned(), pod.clone());
        });
    }

    /// Control does not name this pod any more.
    pub fn unwant(&self, name: &str) {
        self.desired.send_modify(|desired| {
            Arc::make_mut(desired).pods.remove(&format!("uid-of-{name}"));
        });
    }

    /// Deletes the pod and waits until the agent says that it is gone; returns how long that took.
    pub async fn delete(&self, name: &str, grace: i64) -> Duration {
        let begin = Instant::now();
        let uid = format!("uid-of-{name}");
        let mut pod = (*self.desired.borrow().pods[&uid]).clone();
        let meta = pod.meta_mut();
        let seconds = Timestamp::now().as_second() + grace;
        meta.deletion_timestamp = Some(prost_types::Timestamp { seconds, nanos: 0 });
        meta.deletion_grace_period_seconds = Some(grace);
        self.want(&pod);
        self.until_true(&format!("{name} is gone"), |node| {
            node.updates
                .lock()
                .unwrap()
                .iter()
                .any(|update| update.uid == uid && update.gone)
        })
        .await;
        self.unwant(name);
        begin.elapsed()
    }

    /// The status that was last reported.
    pub fn status(&self, name: &str) -> PodStatus {
        let updates = self.updates.lock().unwrap();
        updates
            .iter()
            .rev()
            .find(|update| update.name == name)
            .map(|update| update.status.clone())
            .unwrap_or_default()
    }

    /// Waits until a status that was reported since is as wanted.
    pub async fn until(&self, name: &str, what: &str, wanted: impl Fn(&PodStatus) -> bool) -> PodStatus {
        let begin = Instant::now();
        let mut seen = 0;
        loop {
            let all = self.updates.lock().unwrap().clone();
            let mine = all
                .iter()
                .skip(seen)
                .filter(|update| update.name == name && !update.gone);
            if let Some(found) = mine.map(|update| &update.status).find(|status| wanted(status)) {
                return found.clone();
            }
            seen = all.len();
            assert!(
                begin.elapsed() < PATIENCE,
                "{name}: {what}: not within {PATIENCE:?}: {:#?}",
                self.status(name)
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn until_true(&self, what: &str, wanted: impl Fn(&Self) -> bool) {
        let begin = Instant::now();
        while !wanted(self) {
            assert!(begin.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn until_empty(&self) {
        let begin = Instant::now();
        loop {
            let observed = self.observed().await;
            if observed.pods.is_empty() {
                return;
            }
            assert!(begin.elapsed() < PATIENCE, "still there: {observed:#?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What exists, as soon as containerd says it: it may just be starting.
    async fn observed(&self) -> Observed {
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

    /// How many shims there are.
    pub fn shims(&self) -> usize {
        commands()
            .iter()
            .filter(|command| command.contains("containerd-shim"))
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

/// What control knew before the agent was started without it.
static KNOWN: Mutex<Option<Arc<Desired>>> = Mutex::new(None);

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

/// The configuration in the version that is the series' own: 3 with names of its own from 2.0 on.
fn spawn_containerd(stage: &Stage) -> Child {
    let config = stage.dir.join("containerd.toml");
    let (version, cri) = if stage.containerd == 1 {
        (2, "\"io.containerd.grpc.v1.cri\"")
    } else {
        (
            3,
            "\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.runtime\", \"io.containerd.cri.v1.images\"",
        )
    };
    let text = format!(
        "version = {version}\nroot = \"{dir}/c\"\nstate = \"/run/c\"\ndisabled_plugins = [{cri}]\n\
         [grpc]\naddress = \"/run/c.sock\"\n[debug]\nlevel = \"warn\"\n",
        dir = stage.dir.display()
    );
    fs::write(&config, text).unwrap();
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(stage.dir.join("containerd.log"))
        .unwrap();
    Command::new("containerd")
        .arg("--config")
        .arg(config)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// The fixture's program as a docker-archive.
fn write_image(stage: &Stage, dir: &std::path::Path) {
    use sha2::Digest as _;
    let tar_of = |files: &[(&str, &[u8], u32)]| {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, bytes, mode) in files {
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(*mode);
            builder.append_data(&mut header, name, *bytes).unwrap();
        }
        builder.into_inner().unwrap()
    };
    let program = fs::read(&stage.fixture).unwrap();
    let layer = tar_of(&[("fixture", &program, 0o755)]);
    let config = |stop_signal: &str| {
        serde_json::json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux",
            "config": {"Entrypoint": ["/fixture"], "Cmd": ["sleep"], "StopSignal": stop_signal},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", hex::encode(sha2::Sha256::digest(&layer)))]},
        })
        .to_string()
    };
    let manifest = serde_json::json!([
        {"Config": "c.json", "RepoTags": ["fixture:1"], "Layers": ["l.tar"]},
        {"Config": "kill.json", "RepoTags": ["fixture:kill"], "Layers": ["l.tar"]},
    ])
    .to_string();
    let archive = tar_of(&[
        ("l.tar", &layer, 0o644),
        ("c.json", config("").as_bytes(), 0o644),
        ("kill.json", config("SIGKILL").as_bytes(), 0o644),
        ("manifest.json", manifest.as_bytes(), 0o644),
    ]);
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("fixture.tar"), archive).unwrap();
}
