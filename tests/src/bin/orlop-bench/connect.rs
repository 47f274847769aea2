//! What a ClusterIP costs: connect+request+response, request+response, and bulk through it, against the pod's own address
//! from a client whose cgroup has no programs; and the real kube-proxy's ratio to its own direct beside.
//!
//! The tables are filled by the agent's own dataplane, in a process inside the node, from as many services as are asked for:
//! the agent is stopped meanwhile, for it would sweep what control does not know. Programs, maps and pins are the agent's.

use std::{cell::RefCell, fs, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use orlop_node::dataplane::bpf;
use orlop_proto::{Resource, core::v1::Pod};
use orlop_tests::{
    cgroup,
    lab::{Lab, Options, output},
    supervisor::Request,
    workload::client,
};

use super::{
    affinity, inside, kube_proxy,
    pairs::{Compared, SLICE_SECONDS, Way, compare},
    report::{Figure, Report},
};

const PORT: &str = "9000";
/// For one ratio.
const LIMIT: Duration = Duration::from_secs(20);
/// A lookup that costs the same however many there are may still find its entry in a farther cache.
const FLAT: f64 = 1.25;
/// Direct against direct may differ from one by this.
const TOLERANCE: f64 = 0.01;
const PROGRAM_CONNECTS: &str = "20000";

/// What is measured, and what it has to reach.
pub const KINDS: [(&str, f64); 3] = [("crr", 0.97), ("rr", 0.99), ("bulk", 0.99)];

/// The programs that count, by the words of [`inside::Switch`].
const COUNTERS: [(&str, &str); 2] = [("traffic", "bytes and packets"), ("cpu", "CPU time")];

/// The lab with a server and a client, the agent and control stopped.
struct Stage {
    lab: Lab,
    client: Pod,
    direct: String,
    service: String,
    /// Where clients and the server run.
    cpu: usize,
}

/// Runs the benchmark; options are the numbers of services (default 10, 10 000 and 100 000), and `--no-peer`.
pub fn run(options: &[String]) -> Result<()> {
    let numbers: Vec<&String> = options.iter().filter(|option| *option != "--no-peer").collect();
    let mut sizes = Vec::new();
    for option in &numbers {
        sizes.push(
            option
                .parse::<u32>()
                .with_context(|| format!("{option}: a number of services, or --no-peer"))?,
        );
    }
    if sizes.is_empty() {
        sizes = vec![10, 10_000, 100_000];
    }
    let mut report = Report::new("connect");
    let ours = Stage::start().and_then(|stage| {
        stage.check_method(&mut report)?;
        let mut times = Vec::new();
        for size in &sizes {
            times.push(stage.measure(*size, &mut report)?);
            // What comes later takes minutes, and may fail.
            report.save()?;
        }
        is_flat(&sizes, &times, &mut report);
        stage.measure_counters(&mut report)?;
        stage.lab.finish()
    });
    let held = report.part("Orlop", ours);
    if numbers.len() == options.len() {
        // Without a bar: as many as make sense there.
        let sizes: Vec<u32> = sizes.into_iter().filter(|size| *size <= 10_000).collect();
        let peer = kube_proxy::connect(&sizes, &mut report);
        report.part("kube-proxy", peer);
    }
    report.finish()?;
    ensure!(held, "our own part failed");
    Ok(())
}

/// How the program's time grows from the fewest services to the most.
fn is_flat(sizes: &[u32], times: &[f64], report: &mut Report) {
    let mut measured: Vec<_> = sizes.iter().zip(times).collect();
    measured.sort_by_key(|(size, _)| **size);
    if let [(few, at_few), .., (many, at_many)] = measured[..] {
        let name = format!("{many} services / {few}");
        report.add(Figure::new("program time in connect(2), flat", name, at_many / at_few, "ratio").below(FLAT));
    }
}

impl Stage {
    fn start() -> Result<Self> {
        let lab = Lab::start(
            "bench",
            &Options {
                nodes: 1,
                ..Options::default()
            },
        )?;
        lab.client.apply(&(server() + &client("client", "node1")))?;
        let server = lab.wait_for_pods("app=echo", 1)?.remove(0);
        let client = lab.wait_for_pod("client")?;
        let direct = server
            .status
            .as_ref()
            .map(|status| status.pod_ip.clone())
            .unwrap_or_default();
        let service = lab.cluster_ip("echo")?;
        lab.wait("the service answers", Duration::from_secs(10), || {
            output(lab.fixture(&client, &["rr", &service, PORT, "0.01"])?).map(Some)
        })?;
        lab.request(&Request::Stop("node1/agent".to_owned()))?;
        lab.request(&Request::Stop("control/control".to_owned()))?;
        let cpu = affinity::chosen()?;
        pin_pod(&lab, &server, cpu)?;
        Ok(Self {
            lab,
            client,
            direct,
            service,
            cpu,
        })
    }

    /// Direct against direct: the method is right when that gives one.
    fn check_method(&self, report: &mut Report) -> Result<()> {
        println!("== the method");
        for (kind, _) in KINDS {
            let direct = || Way::of(|| self.slices(false, kind, &self.direct));
            let compared = self.compare(direct(), direct())?;
            report.add(Figure::ratio("the method: direct / direct", kind, compared.ratio).one_within(TOLERANCE));
        }
        Ok(())
    }

    fn compare<'a>(&self, through: Way<'a>, direct: Way<'a>) -> Result<Compared> {
        let compared = compare(through, direct, self.cpu, LIMIT)?;
        println!("   {} pairs, direct {:.0} a second", compared.pairs, compared.direct);
        Ok(compared)
    }

    /// With so many services; the time of the program in connect(2).
    fn measure(&self, size: u32, report: &mut Report) -> Result<f64> {
        let filled = inside::run(
            &self.lab,
            &["fill", &size.to_string(), &self.service, &self.direct, PORT],
        )?;
        println!("== {size} services ({})", filled.trim());
        let name = format!("{size} services");
        for (kind, bar) in KINDS {
            let compared = self.compare(
                Way::of(|| self.slices(true, kind, &self.service)),
                Way::of(|| self.slices(false, kind, &self.direct)),
            )?;
            report.add(
                Figure::ratio(
                    format!("{kind} through a ClusterIP / direct"),
                    name.clone(),
                    compared.ratio,
                )
                .at_least(bar),
            );
        }
        let [connect, close] = self.program_time()?;
        report.add(Figure::new("program time in connect(2)", name.clone(), connect, "ns").below(500.0));
        report.add(Figure::new("program time in close(2)", name, close, "ns"));
        Ok(connect)
    }

    fn slices(&self, programs: bool, kind: &str, address: &str) -> Result<Command> {
        let arguments = ["slices", kind, address, PORT, SLICE_SECONDS];
        if programs {
            self.lab.fixture(&self.client, &arguments)
        } else {
            self.lab.fixture_outside(&self.client, &arguments)
        }
    }

    /// Nanoseconds that the programs of connect and close run for, by the kernel's own statistics, in a slice of its own: the
    /// statistics cost time themselves.
    fn program_time(&self) -> Result<[f64; 2]> {
        // Ends with the descriptor, so with this process at the latest.
        let _statistics = bpf::enable_run_time_statistics().context("switching the kernel's program statistics on")?;
        self.program_time_counted()
    }

    /// What the programs that only count cost a packet: they are at every pod's interface and every switch of tasks, on both sides
    /// of the other ratios. Each kind is taken away and put back between slices.
    fn measure_counters(&self, report: &mut Report) -> Result<()> {
        println!("== the counting programs");
        let switch = RefCell::new(inside::Switch::start(&self.lab)?);
        for (word, what) in COUNTERS {
            for kind in ["rr", "bulk"] {
                let way = |how: &str| {
                    let (switch, what) = (&switch, format!("{word} {how}"));
                    Way {
                        client: Box::new(move || self.slices(true, kind, &self.service)),
                        before: Box::new(move || switch.borrow_mut().set(&what)),
                    }
                };
                let compared = self.compare(way("on"), way("off"))?;
                report.add(Figure::ratio(
                    format!("{kind} with a counting program / without it"),
                    what,
                    compared.ratio,
                ));
            }
            switch.borrow_mut().set(&format!("{word} on"))?;
        }
        Ok(())
    }

    fn program_time_counted(&self) -> Result<[f64; 2]> {
        const PROGRAMS: [&str; 2] = ["connect4", "sock_release"];
        let connects = ["connect", &self.service, PORT, PROGRAM_CONNECTS];
        output(self.lab.fixture(&self.client, &connects)?)?;
        let mut before = [(0.0, 0.0); 2];
        for (counters, program) in before.iter_mut().zip(PROGRAMS) {
            *counters = self.counters(program)?;
        }
        output(self.lab.fixture(&self.client, &connects)?)?;
        let mut nanoseconds = [0.0; 2];
        for ((each, program), (time, count)) in nanoseconds.iter_mut().zip(PROGRAMS).zip(before) {
            let (later_time, later_count) = self.counters(program)?;
            ensure!(later_count > count, "{program} did not run on {}", self.client.name());
            *each = (later_time - time) / (later_count - count);
        }
        Ok(nanoseconds)
    }

    /// Nanoseconds and runs of a program so far.
    fn counters(&self, program: &str) -> Result<(f64, f64)> {
        let pin = format!("/sys/fs/bpf/orlop/node1/{program}_link");
        let link = ["bpftool", "-j", "link", "show", "pinned", &pin];
        let link: serde_json::Value = serde_json::from_str(&output(self.lab.on_node("node1", &link)?)?)?;
        let id = link["prog_id"].to_string();
        let show = ["bpftool", "-j", "prog", "show", "id", &id];
        let program: serde_json::Value = serde_json::from_str(&output(self.lab.on_node("node1", &show)?)?)?;
        let field = |name: &str| program[name].as_f64().unwrap_or(0.0);
        Ok((field("run_time_ns"), field("run_cnt")))
    }
}

/// Puts all processes of a pod on one CPU.
fn pin_pod(lab: &Lab, pod: &Pod, cpu: usize) -> Result<()> {
    let root = cgroup::hierarchies()?[0].mount.join(lab.pod_cgroup("node1", pod.uid()));
    let mut pinned = 0;
    for entry in fs::read_dir(&root)
        .with_context(|| format!("reading {}", root.display()))?
        .flatten()
    {
        let processes = fs::read_to_string(entry.path().join("cgroup.procs")).unwrap_or_default();
        for process in processes.lines() {
            affinity::pin(process.parse()?, cpu)?;
            pinned += 1;
        }
    }
    ensure!(pinned > 0, "pod {} has no process", pod.name());
    Ok(())
}

fn server() -> String {
    "apiVersion: apps/v1\nkind: ReplicaSet\nmetadata: {name: echo, namespace: default}\n\
     spec:\n  replicas: 1\n  selector: {matchLabels: {app: echo}}\n  template:\n    metadata: {labels: {app: echo}}\n\
     \x20   spec:\n      containers:\n      - {name: echo, image: \"orlop.dev/fixture:1\", args: [echo, \"9000\"]}\n\
     ---\napiVersion: v1\nkind: Service\nmetadata: {name: echo, namespace: default}\nspec:\n  selector: {app: echo}\n\
     \x20 ports: [{port: 9000}]\n"
        .to_owned()
}
