//! What benchmarks do inside a node, in a process of its own there: the node's own dataplane and containerd, without the agent.

mod containerd;
mod switch;

use std::{
    io::{BufRead, BufReader, Write},
    net::Ipv4Addr,
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use orlop_node::dataplane::{Config, EbpfDataplane, ServiceChanges, Sizes};
use orlop_proto::node::v1 as link;
use orlop_tests::lab::{Lab, output};

/// The hidden benchmark's name.
pub const NAME: &str = "inside";
/// The pod whose containers containerd makes again when it is measured alone.
pub const MODEL: &str = "model";

/// Runs one of [`main`]'s jobs in node1; what it printed.
pub fn run(lab: &Lab, arguments: &[&str]) -> Result<String> {
    output(command(lab, arguments)?)
}

fn command(lab: &Lab, arguments: &[&str]) -> Result<Command> {
    let own = std::env::current_exe().context("finding this program")?;
    let own = own.to_str().context("this program's path is not UTF-8")?;
    let mut words = vec![own, NAME];
    words.extend(arguments);
    lab.on_node("node1", &words)
}

/// A process in node1 that takes its counting programs away and puts them back (see `switch`). All are there when it is dropped
/// after the last one was put back.
pub struct Switch {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// What was asked for last.
    now: String,
}

impl Switch {
    /// Starts it.
    pub fn start(lab: &Lab) -> Result<Self> {
        let mut child = command(lab, &["switch"])?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting this program in node1")?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("a process without pipes")
        };
        Ok(Self {
            child,
            input,
            output: BufReader::new(output),
            now: String::new(),
        })
    }

    /// `traffic on`, `cpu off`, ...: in effect when it returns.
    pub fn set(&mut self, what: &str) -> Result<()> {
        if self.now == what {
            return Ok(());
        }
        what.clone_into(&mut self.now);
        writeln!(self.input, "{what}").context("the switch has ended")?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        ensure!(line.trim() == what, "the switch has failed at {what:?}");
        Ok(())
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// In the node.
pub fn main(arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["fill", count, service, pod, port] => fill(count.parse()?, service.parse()?, pod.parse()?, port.parse()?),
        ["counters", services, endpoints] => counters(services.parse()?, endpoints.parse()?),
        ["switch"] => switch::run(),
        ["containerd", socket, count, parallel] => containerd::run(socket, count.parse()?, parallel.parse()?),
        _ => bail!("nothing to do inside for {words:?}"),
    }
}

/// Adopts the node's programs and maps, as a restarted agent does.
fn dataplane() -> Result<EbpfDataplane> {
    let config = Config {
        bpffs: PathBuf::from("/sys/fs/bpf"),
        instance: "node1".to_owned(),
        cgroup_root: None,
        sizes: Sizes::default(),
    };
    EbpfDataplane::start(config).context("adopting the node's dataplane")
}

/// The service that is measured, and others around it, are all that the maps hold afterwards.
fn fill(count: u32, service: Ipv4Addr, pod: Ipv4Addr, port: u16) -> Result<()> {
    let dataplane = dataplane()?;
    let mut upserts = vec![record("measured", service, port, &[pod])];
    // The band above the one that control gives addresses from at first.
    let first = u32::from(Ipv4Addr::new(10, 100, 0, 0));
    for index in 1..count {
        let backends = [endpoint(index, 0)];
        upserts.push(record(&format!("s{index}"), (first + index).into(), port, &backends));
    }
    let begin = Instant::now();
    let applied = dataplane.apply_now(&ServiceChanges {
        upserts,
        complete: true,
        ..ServiceChanges::default()
    })?;
    println!(
        "{} frontends written in {:.1} ms",
        applied.frontends_written,
        begin.elapsed().as_secs_f64() * 1e3
    );
    Ok(())
}

/// Prints the milliseconds that reading every counter takes, the median.
fn counters(services: u32, endpoints: u32) -> Result<()> {
    let dataplane = dataplane()?;
    let first = u32::from(Ipv4Addr::new(10, 100, 0, 0));
    let upserts = (0..services)
        .map(|index| {
            let backends: Vec<Ipv4Addr> = (0..endpoints).map(|number| endpoint(index, number)).collect();
            record(&format!("s{index}"), (first + index).into(), 80, &backends)
        })
        .collect();
    let changes = ServiceChanges {
        upserts,
        complete: true,
        ..ServiceChanges::default()
    };
    dataplane.apply_now(&changes)?;
    let mut milliseconds = Vec::new();
    for _ in 0..20 {
        let begin = Instant::now();
        dataplane.read_counters_now()?;
        milliseconds.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    println!("{}", super::statistics::median(&milliseconds));
    Ok(())
}

/// The address of a service's endpoint; nobody is there.
pub fn endpoint(service: u32, number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 130, 0, 1)) + number * 65_536 + service % 65_000)
}

fn record(name: &str, address: Ipv4Addr, port: u16, backends: &[Ipv4Addr]) -> Arc<link::Service> {
    let ready = u8::try_from(link::BackendState::Ready as i32).unwrap_or_default();
    let packed: Vec<u8> = backends
        .iter()
        .flat_map(|backend| {
            let ([a, b, c, d], [high, low]) = (backend.octets(), port.to_be_bytes());
            [a, b, c, d, high, low, ready, 0]
        })
        .collect();
    Arc::new(link::Service {
        namespace: "default".to_owned(),
        name: name.to_owned(),
        uid: format!("uid-{name}"),
        addresses: vec![address.octets().to_vec().into()],
        ports: vec![link::ServicePort {
            name: String::new(),
            protocol: 6,
            port: port.into(),
            backends_v4: packed.into(),
        }],
    })
}
