//! A lab in the hands of a test: comes up with [`Lab::start`], goes down when it is dropped, and also when the test dies.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use orlop_proto::{
    Resource,
    core::v1::{Node, NodeCondition, Pod},
};

use crate::{
    client::Client,
    images,
    layout::{Members, Spec, StoreEngine},
    supervisor::{Lock, Request, Response, ServiceStatus, configuration, send, sweep},
};

/// How a test's lab differs from the default: three nodes, the embedded store.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many nodes.
    pub nodes: u16,
    /// Control's store.
    pub store: StoreEngine,
    /// How many members etcd has, when it is the store.
    pub etcd_members: u16,
    /// How large etcd's database may become before it takes no writes, in bytes; 0: etcd's own limit.
    pub etcd_quota: u64,
    /// How many control replicas; more than one only over etcd.
    pub controls: u16,
    /// Lines for `control.toml` (tables, or keys before them).
    pub control_extra: String,
    /// Lines for `node.toml`.
    pub node_extra: String,
    /// With registries of images, which the nodes know.
    pub registry: bool,
    /// Services ("control/control", "node1/agent") whose wall clock can be stepped with [`Lab::step_clock`].
    pub clocks: Vec<String>,
    /// Nodes that run the containerd of the 2 series, which `cargo xtask setup` unpacked beside the machine's.
    pub containerd_2: Vec<String>,
    /// Our programs in another version, which faults put in the place of ours and back.
    pub other_binaries: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: 3,
            store: StoreEngine::Embedded,
            etcd_members: 1,
            etcd_quota: 0,
            controls: 1,
            control_extra: String::new(),
            node_extra: String::new(),
            registry: false,
            clocks: Vec::new(),
            containerd_2: Vec::new(),
            other_binaries: None,
        }
    }
}

/// A running lab.
pub struct Lab {
    /// What it was made from.
    pub spec: Spec,
    /// Its members.
    pub members: Members,
    /// A connection to its control.
    pub client: Client,
    supervisor: Option<(Child, ChildStdin)>,
    passed: bool,
}

/// Removes the folders that failed runs of the same test left; none of them is up, see `sweep`.
fn remove_earlier(labs: &Path, name: &str) -> Result<()> {
    for entry in fs::read_dir(labs).into_iter().flatten().flatten() {
        let folder = entry.file_name().to_string_lossy().into_owned();
        let number = folder.strip_prefix(name).and_then(|rest| rest.strip_prefix('-'));
        let same = number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()));
        if same && Lock::take(&folder)?.is_some() {
            fs::remove_dir_all(entry.path()).with_context(|| format!("removing {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// The repository that this program was built from.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// Where the workspace's programs are: beside this one, or one folder up (tests are in `deps`).
pub fn binaries() -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding this program")?;
    let mut folder = own.parent().context("a program is in a folder")?;
    if folder.ends_with("deps") {
        folder = folder.parent().context("deps is in a folder")?;
    }
    Ok(folder.to_path_buf())
}

/// Where `cargo xtask` puts the static programs.
pub fn static_binaries() -> PathBuf {
    repository().join(".orlop").join("static")
}

/// Which programs of containerd those nodes run.
fn containerd_2(orlop: &Path, nodes: &[String]) -> Result<BTreeMap<String, PathBuf>> {
    let programs = orlop.join("tools/containerd-2/usr/bin");
    if !nodes.is_empty() && !programs.join("containerd").is_file() {
        bail!("{} has no containerd: run cargo xtask setup", programs.display());
    }
    Ok(nodes.iter().map(|node| (node.clone(), programs.clone())).collect())
}

impl Lab {
    /// Brings up a lab. `name` tells its folder and logs apart from other tests' (lower-case letters, digits, dashes).
    pub fn start(name: &str, options: &Options) -> Result<Self> {
        sweep()?;
        let orlop = repository().join(".orlop");
        let id = format!("{name}-{}", std::process::id());
        let spec = Spec {
            directory: orlop.join("lab").join(&id),
            id,
            orlop: orlop.clone(),
            binaries: binaries()?,
            other_binaries: options.other_binaries.clone(),
            static_binaries: static_binaries(),
            nodes: options.nodes,
            store: options.store,
            etcd_members: options.etcd_members,
            etcd_quota: options.etcd_quota,
            controls: options.controls,
            api_port: 0,
            control_extra: options.control_extra.clone(),
            node_extra: options.node_extra.clone(),
            registry: options.registry,
            clocks: options.clocks.clone(),
            containerd: containerd_2(&orlop, &options.containerd_2)?,
        };
        images::write_fixture_image(&spec.static_binaries.join("orlop-fixture"), &orlop.join("images"))?;
        remove_earlier(&orlop.join("lab"), name)?;
        spec.write()?;
        let program = spec.binaries.join("orlop-lab");
        let mut child = Command::new(&program)
            .args(["supervise", "--tied"])
            .arg(&spec.directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}: cargo xtask test builds it", program.display()))?;
        let stdin = child.stdin.take().context("the supervisor has a stdin")?;
        wait_until_up(&mut child, |_| {})?;
        let members = Members::read(&spec.directory)?;
        let client = Client::connect(&members)?;
        let lab = Self {
            spec,
            members,
            client,
            supervisor: Some((child, stdin)),
            passed: false,
        };
        lab.wait_for_nodes()?;
        Ok(lab)
    }

    /// The lab that `cargo xtask up` left running.
    pub fn attach(directory: &Path) -> Result<Self> {
        let (spec, members) = (Spec::read(directory)?, Members::read(directory)?);
        let client = Client::connect(&members)?;
        Ok(Self {
            spec,
            members,
            client,
            supervisor: None,
            passed: true,
        })
    }

    /// Waits until every node is Ready and takes pods: a new node has the not-ready taint for a moment.
    pub fn wait_for_nodes(&self) -> Result<()> {
        self.wait("all nodes are Ready", Duration::from_secs(60), || {
            let nodes = self.client.list::<Node>("", "")?;
            let untainted = |node: &Node| node.spec.as_ref().is_none_or(|spec| spec.taints.is_empty());
            let ready = nodes
                .iter()
                .filter(|node| node_is_ready(node) && untainted(node))
                .count();
            Ok((ready == usize::from(self.spec.nodes)).then_some(()))
        })
    }

    /// Polls until there is an answer; errors of the question count as "not yet", and the last one is told in the end.
    pub fn wait<T>(&self, what: &str, limit: Duration, mut question: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            let last = match question() {
                Ok(Some(answer)) => return Ok(answer),
                Ok(None) => None,
                Err(error) => Some(error),
            };
            if Instant::now() > deadline {
                match last {
                    Some(error) => return Err(error.context(format!("waited {limit:?} until {what}"))),
                    None => bail!("waited {limit:?} in vain until {what}"),
                }
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Asks the supervisor.
    pub fn request(&self, request: &Request) -> Result<()> {
        send(&self.spec.directory, request).map(drop)
    }

    /// Starts a service that was stopped, and returns when its process is there.
    pub fn resume(&self, service: &str) -> Result<()> {
        let starts = self.service(service)?.starts;
        self.request(&Request::Start(service.to_owned()))?;
        self.wait(&format!("{service} is started"), Duration::from_secs(60), || {
            let now = self.service(service)?;
            Ok((now.starts > starts && now.pid.is_some()).then_some(()))
        })
    }

    /// Switches a node off and on, see [`Request::Reboot`].
    pub fn reboot(&self, node: &str) -> Result<()> {
        self.request(&Request::Reboot(node.to_owned()))
    }

    /// Steps a service's wall clock to so many seconds ahead of the machine's (behind it when negative), while it runs. The
    /// monotonic clock goes on. The service is one of [`Options::clocks`]; it sees the step within a second.
    pub fn step_clock(&self, service: &str, offset_seconds: i64) -> Result<()> {
        if !self.spec.clocks.iter().any(|known| known == service) {
            bail!("the clock of {service} cannot be stepped in this lab");
        }
        configuration::set_clock(&self.spec, service, offset_seconds)
    }

    /// All services of the lab.
    pub fn services(&self) -> Result<Vec<ServiceStatus>> {
        match send(&self.spec.directory, &Request::Status)? {
            Response::Services(services) => Ok(services),
            other => bail!("an unexpected answer: {other:?}"),
        }
    }

    /// One service, "node1/agent".
    pub fn service(&self, name: &str) -> Result<ServiceStatus> {
        self.services()?
            .into_iter()
            .find(|service| service.name == name)
            .with_context(|| format!("no service {name}"))
    }

    /// A command inside a node, as `cargo xtask exec NODE -- CMD`.
    pub fn on_node(&self, node: &str, command: &[&str]) -> Result<Command> {
        self.enter(
            node,
            &format!("{}/system/exec", self.spec.cgroup(node)),
            None,
            None,
            command,
        )
    }

    /// A command inside a pod's network and cgroup, with this machine's files, as `cargo xtask exec NODE --pod ... -- CMD`.
    pub fn in_pod(&self, pod: &Pod, command: &[&str]) -> Result<Command> {
        let node = pod
            .spec
            .as_ref()
            .map(|spec| spec.node_name.as_str())
            .unwrap_or_default();
        let cgroup = self.pod_cgroup(node, pod.uid());
        let pid = self.pod_process(node, pod.uid())?;
        self.enter(node, &format!("{cgroup}/exec"), None, Some(pid), command)
    }

    /// A command inside a pod's network, in a cgroup2 beside the nodes' own: no program of a node sees its sockets. In the v1
    /// hierarchies, where this machine has any, it is where the pod's processes are, so that the scheduler treats it as one of them.
    pub fn in_pod_outside(&self, pod: &Pod, command: &[&str]) -> Result<Command> {
        let node = pod
            .spec
            .as_ref()
            .map(|spec| spec.node_name.as_str())
            .unwrap_or_default();
        let pid = self.pod_process(node, pod.uid())?;
        let cgroup = format!("{}/exec", self.pod_cgroup(node, pod.uid()));
        // As deep as a pod's: the scheduler, and the program that counts CPU time, walk the levels.
        let outside = self.spec.cgroup("baseline/1/2/3/exec");
        self.enter(node, &cgroup, Some(&outside), Some(pid), command)
    }

    /// A pod's cgroup, relative to the hierarchies' roots as this machine sees them.
    pub fn pod_cgroup(&self, node: &str, uid: &str) -> String {
        format!("{}/orlop/{}/{uid}", self.spec.cgroup(node), node.replace('.', "_"))
    }

    /// A process of a pod: what is in its network namespace.
    pub fn pod_process(&self, node: &str, uid: &str) -> Result<i32> {
        let hierarchies = crate::cgroup::hierarchies()?;
        let root = hierarchies[0].mount.join(self.pod_cgroup(node, uid));
        for entry in fs::read_dir(&root)
            .with_context(|| format!("pod {uid} has no cgroup on {node}"))?
            .flatten()
        {
            if entry.file_name() == "exec" {
                continue;
            }
            let procs = fs::read_to_string(entry.path().join("cgroup.procs")).unwrap_or_default();
            if let Some(pid) = procs.lines().next() {
                return Ok(pid.parse()?);
            }
        }
        bail!("pod {uid} has no process on {node}")
    }

    fn enter(
        &self,
        node: &str,
        cgroup: &str,
        cgroup2: Option<&str>,
        network_of: Option<i32>,
        command: &[&str],
    ) -> Result<Command> {
        // Read anew: a reboot makes another process the holder.
        let holder = Members::read(&self.spec.directory)?.get(node)?.pid;
        let mut enter = Command::new(self.spec.binaries.join("orlop-lab"));
        enter.args(["enter", "--holder", &holder.to_string(), "--cgroup", cgroup]);
        if let Some(path) = cgroup2 {
            enter.args(["--cgroup2", path]);
        }
        if let Some(pid) = network_of {
            enter.args(["--network-of", &pid.to_string()]);
        }
        enter.arg("--").args(command);
        Ok(enter)
    }
}

impl Lab {
    /// The end of a test that passed: takes the lab down and removes its folder. Without it the folder stays, for its logs.
    pub fn finish(mut self) -> Result<()> {
        self.passed = true;
        Ok(())
    }

    fn tell_logs(&self) {
        eprintln!("the lab's folder stays: {}", self.spec.directory.display());
        for entry in fs::read_dir(self.spec.directory.join("logs"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
                eprintln!("{}: {line}", entry.file_name().display());
            }
        }
    }
}

/// How much of each log a failed test shows.
const LOG_LINES: usize = 15;

impl Drop for Lab {
    fn drop(&mut self) {
        let Some((mut child, stdin)) = self.supervisor.take() else {
            return;
        };
        drop(stdin);
        let _ = child.wait();
        if !self.passed {
            self.tell_logs();
        } else if std::env::var_os("ORLOP_KEEP_LAB").is_none() {
            let _ = fs::remove_dir_all(&self.spec.directory);
        }
    }
}

/// Reads the supervisor's progress until the lab is up.
pub fn wait_until_up(child: &mut Child, mut progress: impl FnMut(&str)) -> Result<()> {
    let stdout = child.stdout.take().context("the supervisor has a stdout")?;
    for line in BufReader::new(stdout).lines() {
        let line = line.context("reading the supervisor's progress")?;
        if line == "up" {
            return Ok(());
        }
        if let Some(reason) = line.strip_prefix("failed ") {
            bail!("the lab did not come up: {reason}");
        }
        progress(&line);
    }
    bail!("the lab's supervisor ended early")
}

impl Lab {
    /// What a node's condition is now.
    pub fn condition(&self, node: &str, kind: &str) -> Result<NodeCondition> {
        let found: Node = self.client.get("", node)?.with_context(|| format!("no node {node}"))?;
        let conditions = found.status.unwrap_or_default().conditions;
        let found = conditions.into_iter().find(|condition| condition.r#type == kind);
        found.with_context(|| format!("{node} has no condition {kind}"))
    }

    /// One of a control replica's metrics that have no labels.
    pub fn metric(&self, replica: &str, name: &str) -> Result<u64> {
        let socket = self.members.control_socket(replica)?;
        let mut curl = Command::new("curl");
        curl.args([
            "-sSf",
            "--max-time",
            "10",
            "--unix-socket",
            &socket,
            "http://control/metrics",
        ]);
        let text = output(curl)?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let value = value.with_context(|| format!("{replica} has no metric {name}"))?;
        value
            .parse()
            .with_context(|| format!("{name} of {replica} is {value:?}"))
    }

    /// A page of control, and the answer's code after it.
    pub fn page(&self, page: &str) -> Result<String> {
        let url = format!("https://127.0.0.1:{}{page}", self.members.api_port);
        let mut curl = Command::new("curl");
        curl.args(["-ksS", "--max-time", "10", "-w", " %{http_code}", &url]);
        output(curl)
    }
}

/// Whether a node's Ready condition is True.
pub fn node_is_ready(node: &Node) -> bool {
    let status = node.status.as_ref();
    status.is_some_and(|status| {
        status
            .conditions
            .iter()
            .any(|condition| condition.r#type == "Ready" && condition.status == "True")
    })
}

/// Whether a pod's Ready condition is True.
pub fn pod_is_ready(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    status.is_some_and(|status| {
        status
            .conditions
            .iter()
            .any(|condition| condition.r#type == "Ready" && condition.status == "True")
    })
}

/// What a command printed, or why it failed, with its stderr.
pub fn output(mut command: Command) -> Result<String> {
    let Output { status, stdout, stderr } = command.output().with_context(|| format!("running {command:?}"))?;
    if !status.success() {
        bail!("{command:?}: {status}: {}", String::from_utf8_lossy(&stderr).trim());
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}
