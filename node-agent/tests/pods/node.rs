//! A node of one test: containerd, the reconciler, and what control would say.

mod inspect;

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    process::{Child, Command},
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
        stage.write_image(&images);
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
        let containerd = stage.spawn_containerd();
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
        self.containerd = self.stage.spawn_containerd();
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
}

/// What control knew before the agent was started without it.
static KNOWN: Mutex<Option<Arc<Desired>>> = Mutex::new(None);
