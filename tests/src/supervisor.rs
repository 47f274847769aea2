//! The supervisor: to a lab what systemd is to a host. It holds the members' namespaces and the listening sockets, starts the
//! services, restarts what dies, and takes commands on a socket in the lab's folder.

mod commands;
pub(crate) mod configuration;
mod network;
mod reboot;
mod service;

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener},
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

pub use commands::{Request, Response, ServiceStatus, send};
pub use network::lost;

use crate::{
    cgroup,
    layout::{
        API_PORT, ETCD_ADDRESS, ETCD_MEMBER, MAX_CONTROLS, Member, Members, Spec, StoreEngine, control_address,
        control_name, node_address,
    },
    registry,
};
use service::{Service, Supervised};

/// The lab's lock: a name in the abstract socket space of the machine's own network namespace, gone with its process.
pub struct Lock {
    _socket: UnixListener,
}

impl Lock {
    /// Takes the lock of a lab; `None` when a living process has it.
    pub fn take(id: &str) -> Result<Option<Self>> {
        let address = SocketAddr::from_abstract_name(format!("orlop-lab-{id}")).context("naming the lock")?;
        match UnixListener::bind_addr(&address) {
            Ok(socket) => Ok(Some(Self { _socket: socket })),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Ok(None),
            Err(error) => Err(error).context("taking the lab's lock"),
        }
    }
}

/// Removes what labs left whose supervisor is gone. A living lab is never touched.
pub fn sweep() -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for id in cgroup::labs()? {
        if let Some(_lock) = Lock::take(&id)? {
            cgroup::remove(&id).with_context(|| format!("removing what lab {id} left"))?;
            removed.push(id);
        }
    }
    Ok(removed)
}

/// A running lab, from the inside.
pub struct Supervisor {
    spec: Spec,
    members: Members,
    services: Vec<Arc<Supervised>>,
    holders: Vec<Child>,
    /// Kept open so that the services' sockets outlive them.
    _listeners: Vec<OwnedFd>,
    _lock: Lock,
}

/// Brings a lab up, serves commands until it is told to shut down (or until `tied` and stdin ends), and takes it down.
pub fn supervise(directory: &Path, tied: bool) -> Result<()> {
    let spec = Spec::read(directory)?;
    let Some(lock) = Lock::take(&spec.id)? else {
        bail!("lab {} is already up", spec.id)
    };
    cgroup::remove(&spec.id)?;
    let id = spec.id.clone();
    let outcome = run(spec, lock, tied);
    let removed = cgroup::remove(&id);
    outcome.and(removed)
}

fn run(spec: Spec, lock: Lock, tied: bool) -> Result<()> {
    // Before anything else, so that a test that dies while the lab comes up leaves nothing.
    let (sender, requests) = std::sync::mpsc::channel();
    commands::listen(&spec.directory, sender.clone())?;
    if tied {
        thread::spawn(move || {
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            let _ = sender.send((Request::Shutdown, None));
        });
    }
    let mut supervisor = Supervisor::build(spec, lock)?;
    let outcome = supervisor.start();
    match outcome {
        Ok(()) => {
            say("up");
            for (request, reply) in requests {
                let shutdown = matches!(request, Request::Shutdown);
                let response = supervisor.handle(request);
                if let (Some(reply), false) = (&reply, shutdown) {
                    let _ = reply.send(response);
                }
                if shutdown {
                    supervisor.stop();
                    if let Some(reply) = reply {
                        let _ = reply.send(Response::Done);
                        // The answer has to leave before the process does.
                        thread::sleep(Duration::from_millis(50));
                    }
                    break;
                }
            }
        }
        Err(error) => {
            say(&format!("failed {error:#}"));
            supervisor.stop();
            return Err(error);
        }
    }
    Ok(())
}

/// A line of progress for whoever started the supervisor; it may no longer listen.
fn say(line: &str) {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

impl Supervisor {
    fn build(spec: Spec, lock: Lock) -> Result<Self> {
        fs::create_dir_all(spec.directory.join("logs")).context("making the folder of logs")?;
        let members = Members {
            supervisor: i32::try_from(std::process::id())?,
            ..Members::default()
        };
        Ok(Self {
            spec,
            members,
            services: Vec::new(),
            holders: Vec::new(),
            _listeners: Vec::new(),
            _lock: lock,
        })
    }

    fn start(&mut self) -> Result<()> {
        say("namespaces");
        self.make_member("switch", None)?;
        if self.spec.store == StoreEngine::Etcd {
            self.make_member(ETCD_MEMBER, Some(ETCD_ADDRESS))?;
        }
        for index in 1..=self.spec.controls {
            self.make_member(&control_name(index), Some(control_address(index)))?;
        }
        for index in 1..=self.spec.nodes {
            self.make_member(&format!("node{index}"), Some(node_address(index)))?;
        }
        if self.spec.registry {
            self.make_member(registry::MEMBER, Some(registry::ADDRESS))?;
        }
        network::build(&self.members)?;
        if self.spec.registry {
            registry::prepare(&self.spec)?;
            for service in configuration::registries(&self.spec) {
                self.add(service)?;
            }
        }
        self.start_control()?;
        say("nodes");
        let token = configuration::join_token(&self.members)?;
        for name in self.spec.node_names() {
            let member = self.members.get(&name)?;
            let address = member.address.context("a node has an address")?;
            configuration::install_programs(&self.spec, &name, &self.spec.binaries)?;
            configuration::install_plugin(&self.spec, &name, member.pid)?;
            configuration::write_node(&self.spec, &name, address, &token)?;
            self.add(configuration::containerd(&self.spec, &name)?)?;
            self.add(configuration::agent(&self.spec, &name)?)?;
        }
        self.write_members()
    }

    fn write_members(&self) -> Result<()> {
        let text = serde_json::to_vec_pretty(&self.members)?;
        fs::write(self.spec.directory.join("members.json"), text).context("writing members.json")
    }

    fn make_member(&mut self, name: &str, address: Option<std::net::Ipv4Addr>) -> Result<()> {
        let (holder, pid) = self.hold(name)?;
        self.holders.push(holder);
        self.members.members.push(Member {
            name: name.to_owned(),
            address,
            pid,
        });
        Ok(())
    }

    /// Starts a process that makes a member's namespaces and holds them.
    fn hold(&self, name: &str) -> Result<(Child, i32)> {
        let cgroup_path = self.spec.cgroup(name);
        cgroup::create(&cgroup_path)?;
        let log = File::create(self.spec.directory.join(format!("logs/{name}-holder.log")))?;
        let mut holder = Command::new(std::env::current_exe()?)
            .args(["hold", name, &cgroup_path])
            .arg(&self.spec.orlop)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log.try_clone()?)
            .spawn()
            .with_context(|| format!("starting the holder of {name}"))?;
        let mut line = String::new();
        BufReader::new(holder.stdout.take().context("the holder has a stdout")?).read_line(&mut line)?;
        let pid = i32::try_from(holder.id())?;
        if line.trim() != "ready" {
            let _ = holder.kill();
            let _ = holder.wait();
            let reason =
                fs::read_to_string(self.spec.directory.join(format!("logs/{name}-holder.log"))).unwrap_or_default();
            bail!("the namespaces of {name} could not be made: {}", reason.trim());
        }
        Ok((holder, pid))
    }

    fn start_control(&mut self) -> Result<()> {
        say("control");
        let outside = TcpListener::bind(("127.0.0.1", self.spec.api_port))
            .with_context(|| format!("listening on 127.0.0.1:{}: is another lab up?", self.spec.api_port))?;
        self.members.api_port = outside.local_addr()?.port();
        if self.spec.controls > 1 && self.spec.store == StoreEngine::Embedded {
            bail!("several control replicas share an etcd: the embedded store has one process");
        }
        if !(1..=MAX_CONTROLS).contains(&self.spec.controls) {
            bail!(
                "{} control replicas: there can be 1 to {MAX_CONTROLS}",
                self.spec.controls
            );
        }
        if self.spec.store == StoreEngine::Etcd {
            for member in configuration::etcd(&self.spec)? {
                self.add(member)?;
            }
        }
        let mut outside = Some(OwnedFd::from(outside));
        for index in 1..=self.spec.controls {
            self.start_replica(index, outside.take())?;
        }
        Ok(())
    }

    /// One control replica. The first makes the CA; the others are given it, as operators do.
    fn start_replica(&mut self, index: u16, outside: Option<OwnedFd>) -> Result<()> {
        let name = control_name(index);
        let inside = network::listen_in(self.members.get(&name)?.pid, control_address(index), API_PORT)?;
        configuration::write_control(&self.spec, index)?;
        let mut service = configuration::control(&self.spec, &name)?;
        for listener in outside.into_iter().chain([inside]) {
            service.listeners.push(service::duplicated(&listener)?);
            self._listeners.push(listener);
        }
        self.add(service)?;
        let deadline = Instant::now() + Duration::from_secs(60);
        configuration::wait_for_control(&self.members, &name, deadline).with_context(|| {
            let path = self.spec.directory.join(format!("logs/{name}-control.log"));
            let log = fs::read_to_string(path).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(5).collect();
            format!(
                "{name} did not come up; its log ends: {}",
                tail.into_iter().rev().collect::<Vec<_>>().join(" | ")
            )
        })
    }

    fn add(&mut self, service: Service) -> Result<()> {
        let holder = self.members.get(&service.member)?.pid;
        let supervised = Supervised::start(service, holder, self.spec.directory.join("logs"))?;
        self.services.push(supervised);
        Ok(())
    }

    /// Stops the services in the reverse order of their start, then lets the namespaces go.
    fn stop(&mut self) {
        for service in self.services.iter().rev() {
            service.stop();
        }
        // Containers and whatever was started by hand inside the lab; the namespaces' holders die with them.
        if let Err(error) = cgroup::remove(&self.spec.id) {
            eprintln!("{error:#}");
        }
        for holder in &mut self.holders {
            let _ = holder.kill();
            let _ = holder.wait();
        }
        let _ = fs::remove_file(self.spec.directory.join("lab.sock"));
    }
}
