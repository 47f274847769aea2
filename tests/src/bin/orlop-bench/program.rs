//! Many services into the kernel: all of them from nothing, one endpoint's change, and what the agent needs for it, through the
//! real control, node link and agent.
//!
//! *From nothing*: the agent is stopped, its maps, programs and its ledger's services removed, and started again; its log says
//! how long it took from the end of control's snapshot to the last write. *One change*: from the moment in which control's
//! acknowledgement of the write is back to the moment in which the new entry is read from the map, which is looked at all the time.

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use orlop_node::dataplane::bpf;
use orlop_proto::{Resource, api::v1::Object, core::v1::Service, discovery::v1::EndpointSlice};
use orlop_tests::{
    lab::{Lab, Options},
    supervisor::Request,
};
use serde_json::json;

use super::{
    cni::permille_of,
    inside, kube_proxy,
    report::{Figure, Report},
    statistics::median,
};

const PINS: &str = "/sys/fs/bpf/orlop/node1";
const AGENT: &str = "node1/agent";
const LIMIT: Duration = Duration::from_secs(120);
/// Between two looks at the map.
const LOOK: Duration = Duration::from_micros(20);
const CHANGES: u32 = 200;
/// How often, and how far apart, the agent's memory is read: over more than two readings of metrics.
const SAMPLES: u32 = 120;
const SAMPLE: Duration = Duration::from_millis(100);
/// Starts from nothing; the median counts.
const STARTS: u32 = 5;

/// Runs the benchmark; options: services (default 10 000), endpoints of each (default 10), and `--no-peer`.
pub fn run(options: &[String]) -> Result<()> {
    let numbers: Vec<&String> = options.iter().filter(|option| *option != "--no-peer").collect();
    let number = |index: usize, default: u32| {
        numbers.get(index).map_or(Ok(default), |text| {
            text.parse().with_context(|| format!("{text}: a number"))
        })
    };
    let (services, endpoints) = (number(0, 10_000)?, number(1, 10)?);
    let mut report = Report::new("program");
    let ours = measure(services, endpoints, &mut report);
    let held = report.part("Orlop", ours);
    if numbers.len() == options.len() {
        let peer = kube_proxy::program(services, endpoints, &mut report);
        report.part("kube-proxy", peer);
    }
    report.finish()?;
    ensure!(held, "our own part failed");
    Ok(())
}

fn measure(services: u32, endpoints: u32, report: &mut Report) -> Result<()> {
    // SAFETY: this process has no other thread yet.
    unsafe { std::env::set_var("ORLOP_LAB_LOG", "info,orlop_node::dataplane=debug") };
    let node = Options {
        nodes: 1,
        ..Options::default()
    };
    let lab = Lab::start("bench", &node)?;
    let begin = Instant::now();
    fill(&lab, services, endpoints)?;
    println!(
        "   {} objects created in {:.1} s",
        2 * services,
        begin.elapsed().as_secs_f64()
    );
    let map = Frontends::of(&lab)?;
    map.wait_for(&lab, services)?;
    let name = format!("{services} services x {endpoints} endpoints");
    let (mut whole, mut maps) = (Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let (all, writing) = from_nothing(&lab, services)?;
        whole.push(all);
        maps.push(writing);
    }
    println!("   from nothing, each time: {whole:.1?} ms, the maps alone {maps:.1?} ms");
    report.add(Figure::new("all services, from nothing", name.clone(), median(&whole), "ms").below(50.0));
    report.add(Figure::new("of that, writing the maps", name.clone(), median(&maps), "ms").below(5.0));
    let changes = changes(&lab, services)?;
    let chart = "one endpoint's change, from the acknowledgement to the map";
    report.add(Figure::new(chart, "p50", permille_of(&changes, 500), "ms"));
    report.add(Figure::new(chart, "p99", permille_of(&changes, 990), "ms").below(20.0));
    let memory = memory(&lab)?;
    report.add(Figure::new("the agent's memory", name.clone(), memory, "MB").below(30.0));
    lab.request(&Request::Stop(AGENT.to_owned()))?;
    let counters = inside::run(&lab, &["counters", &services.to_string(), &endpoints.to_string()])?;
    report.add(Figure::new(
        "reading all counters",
        name,
        counters.trim().parse()?,
        "ms",
    ));
    lab.finish()
}

/// Services without a selector, and their endpoints.
fn fill(lab: &Lab, services: u32, endpoints: u32) -> Result<()> {
    let mut objects: Vec<Object> = Vec::new();
    for index in 0..services {
        let service: Service = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("s{index}"), "namespace": "default"},
            "spec": {"ports": [{"port": 80, "targetPort": 8080}]}
        }))?;
        let endpoints: Vec<_> = (0..endpoints)
            .map(|number| json!({"addresses": [inside::endpoint(index, number).to_string()], "conditions": {"ready": true}}))
            .collect();
        let slice: EndpointSlice = serde_json::from_value(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": format!("s{index}-a"), "namespace": "default",
                "labels": {"kubernetes.io/service-name": format!("s{index}")}},
            "addressType": "IPv4", "endpoints": endpoints, "ports": [{"port": 8080, "protocol": "TCP"}]
        }))?;
        objects.extend([service.into_object(), slice.into_object()]);
    }
    lab.client.create_all(objects)
}

/// The node's frontends, read from here.
struct Frontends {
    map: std::os::fd::OwnedFd,
    info: bpf::MapInfo,
}

impl Frontends {
    fn of(lab: &Lab) -> Result<Self> {
        let holder = lab.members.get("node1")?.pid;
        let pin = PathBuf::from(format!("/proc/{holder}/root{PINS}")).join(orlop_ebpf_abi::FRONTENDS);
        let map = bpf::open_pinned(&pin).with_context(|| format!("opening {}", pin.display()))?;
        let info = bpf::map_info(&map)?;
        Ok(Self { map, info })
    }

    fn wait_for(&self, lab: &Lab, services: u32) -> Result<()> {
        lab.wait(&format!("{services} services are in the map"), LIMIT, || {
            let mut count = 0;
            bpf::for_each(&self.map, &self.info, |_key, _value| {
                count += 1;
                true
            })?;
            Ok((count >= services).then_some(()))
        })
    }

    fn read(&self, key: &[u8]) -> Result<Vec<u8>> {
        let mut value = vec![0; self.info.value_size as usize];
        let found = bpf::lookup(&self.map, key, &mut value)?;
        ensure!(found, "the service is not in the map");
        Ok(value)
    }
}

/// Milliseconds from the snapshot to the maps, and of writing the maps.
fn from_nothing(lab: &Lab, services: u32) -> Result<(f64, f64)> {
    lab.request(&Request::Stop(AGENT.to_owned()))?;
    let holder = lab.members.get("node1")?.pid;
    let pins = format!("/proc/{holder}/root{PINS}");
    fs::remove_dir_all(&pins).with_context(|| format!("removing {pins}"))?;
    let ledger = lab.spec.member_directory("node1").join("data").join("ledger");
    for name in ["services", "services.behind"] {
        let _not_there = fs::remove_file(ledger.join(name));
    }
    let log = lab.spec.directory.join("logs").join("node1-agent.log");
    let before = fs::read_to_string(&log)?.len();
    lab.request(&Request::Start(AGENT.to_owned()))?;
    lab.wait("the agent has written all services", LIMIT, || {
        let text = fs::read_to_string(&log)?;
        let mut writing = None;
        for line in text[before..].lines() {
            if line.contains("maps written") && field(line, "frontends").is_some_and(|count| count >= services.into()) {
                writing = field(line, "writing_us");
            }
            if line.contains("all services are in the maps")
                && let (Some(writing), Some(all)) = (writing, field(line, "microseconds"))
            {
                return Ok(Some((all / 1e3, writing / 1e3)));
            }
        }
        Ok(None)
    })
}

/// `name=NUMBER` in a line of the log.
fn field(line: &str, name: &str) -> Option<f64> {
    let (_, rest) = line.split_once(&format!("{name}="))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// Milliseconds of changes, one at a time.
fn changes(lab: &Lab, services: u32) -> Result<Vec<f64>> {
    let map = Frontends::of(lab)?;
    map.wait_for(lab, services)?;
    let mut milliseconds = Vec::new();
    for number in 0..CHANGES {
        let index = number * 37 % services;
        let address: std::net::Ipv4Addr = lab.cluster_ip(&format!("s{index}"))?.parse()?;
        let [a, b, c, d] = address.octets();
        let port = 80_u16.to_ne_bytes();
        let key = [a, b, c, d, port[0], port[1], 6, 0];
        let mut slice: EndpointSlice = lab
            .client
            .get("default", &format!("s{index}-a"))?
            .with_context(|| format!("no slice s{index}-a"))?;
        let endpoint = slice.endpoints.first_mut().context("a slice without endpoints")?;
        endpoint.addresses = vec![format!("10.150.{}.{}", number / 250, 1 + number % 250)];
        let before = map.read(&key)?;
        lab.client.update(slice)?;
        let acknowledged = Instant::now();
        let mut seen = map.read(&key)? != before;
        while !seen {
            ensure!(acknowledged.elapsed() < LIMIT, "a change of s{index} is not in the map");
            thread::sleep(LOOK);
            seen = map.read(&key)? != before;
        }
        milliseconds.push(acknowledged.elapsed().as_secs_f64() * 1e3);
    }
    Ok(milliseconds)
}

/// Megabytes that are resident when the ledger is written, at most: metrics are read every few seconds.
fn memory(lab: &Lab) -> Result<f64> {
    let ledger = lab.spec.member_directory("node1").join("data").join("ledger");
    lab.wait("the ledger is written", LIMIT, || {
        let written = ledger.join("services").is_file() && !ledger.join("services.behind").exists();
        Ok(written.then_some(()))
    })?;
    let pid = lab.service(AGENT)?.pid.context("the agent does not run")?;
    let process = procfs::process::Process::new(pid)?;
    let megabytes =
        |kibibytes: Option<u64>| f64::from(u32::try_from(kibibytes.unwrap_or(0)).unwrap_or(u32::MAX)) / 1024.0;
    let mut most: f64 = 0.0;
    for _ in 0..SAMPLES {
        most = most.max(megabytes(process.status()?.vmrss));
        thread::sleep(SAMPLE);
    }
    let status = process.status()?;
    println!(
        "   the agent's memory: at most ever {:.1} MB, of the last: {:.1} MB anonymous, {:.1} MB of files (its program, the arena)",
        megabytes(status.vmhwm),
        megabytes(status.rssanon),
        megabytes(status.rssfile)
    );
    Ok(most)
}
