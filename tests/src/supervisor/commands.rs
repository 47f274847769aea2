//! The supervisor's commands: one JSON request and one JSON answer a connection, on `lab.sock` in the lab's folder.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::mpsc::{self, Sender},
    thread,
};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Supervisor, network};
use crate::layout::Way;

/// What the supervisor can be asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// All services.
    Status,
    /// Ends a service ("node1/agent") and keeps it ended.
    Stop(String),
    /// Kills a service, and keeps it ended.
    Kill(String),
    /// Starts a stopped service.
    Start(String),
    /// Sends a signal to a service's process; the supervisor restarts what dies.
    Signal(String, i32),
    /// Pulls (false) or plugs a member's cable.
    Link(String, bool),
    /// Loses everything that goes one way on a member's cable; `None`: nothing is lost any more.
    Lose(String, Option<Way>),
    /// Ends a service and starts another program in its place, with the same arguments: as an upgrade on a host does.
    Replace(String, PathBuf),
    /// Switches a member off and on: its folders stay, all else is new.
    Reboot(String),
    /// Takes the lab down.
    Shutdown,
}

/// The supervisor's answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// It is done.
    Done,
    /// It is not, and why.
    Failed(String),
    /// To [`Request::Status`].
    Services(Vec<ServiceStatus>),
}

/// A service as the supervisor sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// "node1/agent".
    pub name: String,
    /// Its process, while it runs.
    pub pid: Option<i32>,
    /// How often it was started.
    pub starts: u32,
    /// How it last ended; empty when it never did.
    pub last_exit: String,
}

/// A request and where its answer goes.
pub type Incoming = (Request, Option<Sender<Response>>);

/// Asks a lab's supervisor.
pub fn send(directory: &Path, request: &Request) -> Result<Response> {
    let (_folder, path) = short_path(directory)?;
    let mut stream = UnixStream::connect(&path).context("the lab's supervisor does not answer: is the lab up?")?;
    stream.write_all(&serde_json::to_vec(request)?)?;
    stream.write_all(b"\n")?;
    let mut line = String::new();
    BufReader::new(stream)
        .read_line(&mut line)
        .context("reading the supervisor's answer")?;
    match serde_json::from_str(&line).context("the supervisor's answer is not JSON")? {
        Response::Failed(reason) => bail!("{reason}"),
        response => Ok(response),
    }
}

/// Takes requests in a thread and hands them to the supervisor's loop.
pub(super) fn listen(directory: &Path, requests: Sender<Incoming>) -> Result<()> {
    let (folder, path) = short_path(directory)?;
    let _ = fs::remove_file(directory.join("lab.sock"));
    let listener = UnixListener::bind(&path).context("listening for commands")?;
    thread::spawn(move || {
        let _folder = folder;
        for stream in listener.incoming().flatten() {
            let requests = requests.clone();
            thread::spawn(move || {
                if let Err(error) = serve(stream, &requests) {
                    eprintln!("command: {error:#}");
                }
            });
        }
    });
    Ok(())
}

fn serve(mut stream: UnixStream, requests: &Sender<Incoming>) -> Result<()> {
    let mut line = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut line)?;
    let response = match serde_json::from_str(&line) {
        Ok(request) => {
            let (sender, receiver) = mpsc::channel();
            requests.send((request, Some(sender)))?;
            receiver.recv().context("the supervisor is ending")?
        }
        Err(error) => Response::Failed(format!("not a request: {error}")),
    };
    stream.write_all(&serde_json::to_vec(&response)?)?;
    stream.write_all(b"\n")?;
    Ok(())
}

/// A socket's path is limited to 107 bytes, a repository's is not: so go by a descriptor of the folder.
fn short_path(directory: &Path) -> Result<(File, PathBuf)> {
    let folder = File::open(directory).with_context(|| format!("opening {}: is the lab up?", directory.display()))?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/lab.sock", folder.as_raw_fd()));
    Ok((folder, path))
}

impl Supervisor {
    pub(super) fn handle(&mut self, request: Request) -> Response {
        let outcome = match request {
            Request::Status => {
                let services = self.services.iter().map(|service| {
                    let (pid, starts, last_exit) = service.status();
                    ServiceStatus {
                        name: service.full_name(),
                        pid,
                        starts,
                        last_exit,
                    }
                });
                return Response::Services(services.collect());
            }
            Request::Stop(name) => self.service(&name).map(super::Supervised::stop),
            Request::Kill(name) => self.service(&name).and_then(super::Supervised::kill),
            Request::Start(name) => self.service(&name).map(super::Supervised::resume),
            Request::Signal(name, signal) => self.service(&name).and_then(|service| service.signal(signal)),
            Request::Link(member, up) => network::set_link(&self.members, &member, up),
            Request::Lose(member, way) => network::lose(&self.members, &member, way),
            Request::Replace(name, program) => self.service(&name).map(|service| service.replace(program)),
            Request::Reboot(member) => self.reboot(&member),
            Request::Shutdown => Ok(()),
        };
        outcome.map_or_else(|error| Response::Failed(format!("{error:#}")), |()| Response::Done)
    }

    fn service(&self, name: &str) -> Result<&super::Supervised> {
        let found = self.services.iter().find(|service| service.full_name() == name);
        found
            .map(|service| &**service)
            .with_context(|| format!("no service {name}"))
    }
}
