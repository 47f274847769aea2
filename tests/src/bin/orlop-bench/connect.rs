//! What a ClusterIP costs: connect+request+response, request+response, and bulk through it, against the pod's own address
//! from a client whose cgroup has no programs.

use std::{fmt::Write, fs, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use orlop_proto::{Resource, core::v1::Pod};
use orlop_tests::{
    lab::{Lab, Options, output},
    workload::client,
};

use super::{
    report::{Figure, Report},
    statistics::{Ratio, bootstrap},
};

/// Pairs before the interval is looked at for the first time, and at most.
const PAIRS: (usize, usize) = (40, 200);
/// An interval narrower than this is good enough.
const WIDTH: f64 = 0.01;
const SLICE_SECONDS: &str = "0.1";
const PORT: &str = "9000";
const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Runs the benchmark; options are the numbers of services (default 1 and 1000).
pub fn run(options: &[String]) -> Result<()> {
    let sizes: Vec<u32> = if options.is_empty() {
        vec![1, 1000]
    } else {
        options
            .iter()
            .map(|option| {
                option
                    .parse()
                    .with_context(|| format!("{option}: a number of services"))
            })
            .collect::<Result<_>>()?
    };
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
        slice(&lab, &client, true, "rr", &service, "0.01").map(Some)
    })?;
    let mut report = Report::new("connect");
    let mut others = 1;
    for size in sizes {
        while others < size {
            let upper = size.min(others + 2000);
            lab.client
                .apply_slowly(&more_services(others..upper), Duration::from_secs(300))?;
            others = upper;
        }
        wait_for_frontends(&lab, size)?;
        println!("== {size} services");
        for (kind, bar) in [("crr", 0.97), ("rr", 0.99), ("bulk", 0.99)] {
            let ratio = compare(&lab, &client, kind, &direct, &service)?;
            report.add(
                Figure::ratio(
                    format!("{kind} through ClusterIP / direct"),
                    format!("{size} services"),
                    ratio,
                )
                .at_least(bar),
            );
        }
        let added = program_time(&lab, &client, &service)?;
        report.add(Figure::new("program time in connect(2)", format!("{size} services"), added, "ns").below(500.0));
    }
    lab.finish()?;
    report.finish()
}

fn server() -> String {
    "apiVersion: apps/v1\nkind: ReplicaSet\nmetadata: {name: echo, namespace: default}\n\
     spec:\n  replicas: 1\n  selector: {matchLabels: {app: echo}}\n  template:\n    metadata: {labels: {app: echo}}\n\
     \x20   spec:\n      containers:\n      - {name: echo, image: \"orlop.dev/fixture:1\", args: [echo, \"9000\"]}\n\
     ---\napiVersion: v1\nkind: Service\nmetadata: {name: echo, namespace: default}\nspec:\n  selector: {app: echo}\n\
     \x20 ports: [{port: 9000}]\n"
        .to_owned()
}

/// Services with the same backend: they fill the tables.
fn more_services(range: std::ops::Range<u32>) -> String {
    let mut manifest = String::new();
    for index in range {
        let _ = write!(
            manifest,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: other{index}, namespace: default}}\n\
             spec: {{selector: {{app: echo}}, ports: [{{port: 9000}}]}}\n"
        );
    }
    manifest
}

fn wait_for_frontends(lab: &Lab, size: u32) -> Result<()> {
    let dump = [
        "bpftool",
        "-j",
        "map",
        "dump",
        "pinned",
        "/sys/fs/bpf/orlop/node1/svc4_v1",
    ];
    lab.wait(
        &format!("{size} services are in the maps"),
        Duration::from_secs(120),
        || {
            let entries: Vec<serde_json::Value> = serde_json::from_str(&output(lab.on_node("node1", &dump)?)?)?;
            Ok((entries.len() >= usize::try_from(size)?).then_some(()))
        },
    )
}

/// One slice: operations (or bytes) a second.
fn slice(lab: &Lab, client: &Pod, programs: bool, kind: &str, address: &str, seconds: &str) -> Result<f64> {
    let arguments = [kind, address, PORT, seconds];
    let command = if programs {
        lab.fixture(client, &arguments)?
    } else {
        lab.fixture_outside(client, &arguments)?
    };
    let text = output(command)?;
    let words: Vec<&str> = text.split_whitespace().collect();
    let ["count", count, "seconds", seconds, ..] = words[..] else {
        bail!("the client printed {text}")
    };
    Ok(count.parse::<f64>()? / seconds.parse::<f64>()?)
}

/// Pairs of slices, each pair in the other order than the one before, until the interval is narrow.
fn compare(lab: &Lab, client: &Pod, kind: &str, direct: &str, service: &str) -> Result<Ratio> {
    let mut ratios = Vec::new();
    loop {
        let through = |()| slice(lab, client, true, kind, service, SLICE_SECONDS);
        let past = |()| slice(lab, client, false, kind, direct, SLICE_SECONDS);
        let (ours, theirs) = if ratios.len() % 2 == 0 {
            let ours = through(())?;
            (ours, past(())?)
        } else {
            let theirs = past(())?;
            (through(())?, theirs)
        };
        ensure!(theirs > 0.0, "a slice without operations");
        ratios.push(ours / theirs);
        if ratios.len() >= PAIRS.0 {
            let ratio = bootstrap(&ratios);
            if ratio.high - ratio.low < WIDTH || ratios.len() >= PAIRS.1 {
                return Ok(ratio);
            }
        }
    }
}

/// Nanoseconds that the connect program runs for, by the kernel's own statistics, in a slice of its own.
fn program_time(lab: &Lab, client: &Pod, service: &str) -> Result<f64> {
    let before = fs::read_to_string(STATS).context("reading bpf_stats_enabled")?;
    fs::write(STATS, "1").context("switching the kernel's program statistics on")?;
    let measured = program_time_counted(lab, client, service);
    fs::write(STATS, before.trim()).context("switching the kernel's program statistics back")?;
    measured
}

fn program_time_counted(lab: &Lab, client: &Pod, service: &str) -> Result<f64> {
    let counters = || -> Result<(f64, f64)> {
        let link = [
            "bpftool",
            "-j",
            "link",
            "show",
            "pinned",
            "/sys/fs/bpf/orlop/node1/connect4_link",
        ];
        let link: serde_json::Value = serde_json::from_str(&output(lab.on_node("node1", &link)?)?)?;
        let id = link["prog_id"].to_string();
        let program = output(lab.on_node("node1", &["bpftool", "-j", "prog", "show", "id", &id])?)?;
        let program: serde_json::Value = serde_json::from_str(&program)?;
        Ok((
            program["run_time_ns"].as_f64().unwrap_or(0.0),
            program["run_cnt"].as_f64().unwrap_or(0.0),
        ))
    };
    let (time, count) = counters()?;
    output(lab.fixture(client, &["connect", service, PORT, "20000"])?)?;
    let (later_time, later_count) = counters()?;
    ensure!(later_count > count, "connect4 did not run on {}", client.name());
    Ok((later_time - time) / (later_count - count))
}
