//! Pods through the whole system, from the request to all of them ready, against containerd's own time for the same containers
//! on the same node: what a pod costs beyond that.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use orlop_proto::core::v1::Pod;
use orlop_tests::{
    lab::{Lab, Options, pod_is_ready},
    workload::pod,
};

use super::{
    inside,
    report::{Figure, Report},
    statistics::median,
};

/// As many as the agent starts at once.
const PARALLEL: &str = "8";
const LIMIT: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(20);

/// Runs the benchmark; options: pods (default 100), rounds (default 3).
pub fn run(options: &[String]) -> Result<()> {
    let number = |index: usize, default: u32| {
        options.get(index).map_or(Ok(default), |text| {
            text.parse().with_context(|| format!("{text}: a number"))
        })
    };
    let (pods, rounds) = (number(0, 100)?, number(1, 3)?);
    let mut report = Report::new("start");
    let node = Options {
        nodes: 1,
        ..Options::default()
    };
    let lab = Lab::start("bench", &node)?;
    // Its images are there afterwards, and its containers are the models of those that containerd makes alone.
    lab.client.apply(&pod(inside::MODEL, "node1", &["sleep"]))?;
    lab.wait_for_pod(inside::MODEL)?;
    let (mut whole, mut alone) = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        let ours = system(&lab, pods)?;
        let count = pods.to_string();
        let socket = "/run/containerd/containerd.sock";
        let theirs = inside::run(&lab, &["containerd", socket, &count, PARALLEL])?;
        let theirs: f64 = theirs.trim().parse().context("what containerd alone took")?;
        println!("   round {round}: {pods} pods in {ours:.2} s, containerd alone {theirs:.2} s");
        whole.push(ours * 1e3 / f64::from(pods));
        alone.push(theirs * 1e3 / f64::from(pods));
    }
    lab.finish()?;
    let beyond: Vec<f64> = whole.iter().zip(&alone).map(|(whole, alone)| whole - alone).collect();
    let name = format!("{pods} pods at once");
    let chart = "time a pod";
    report.add(Figure::new(chart, name.clone(), median(&whole), "ms"));
    report.add(Figure::new(chart, name.clone(), median(&alone), "ms").of("containerd alone"));
    report.add(Figure::new("beyond containerd's own time", name, median(&beyond), "ms").below(100.0));
    report.finish()
}

/// Seconds until all are ready; they are gone again afterwards.
fn system(lab: &Lab, count: u32) -> Result<f64> {
    let names: Vec<String> = (0..count).map(|index| format!("pod{index}")).collect();
    let manifest: String = names.iter().map(|name| pod(name, "node1", &["sleep"])).collect();
    let begin = Instant::now();
    lab.client.apply(&manifest)?;
    let wanted = names.len() + 1;
    poll(&format!("{count} pods are ready"), || {
        let pods: Vec<Pod> = lab.client.list("default", "")?;
        Ok(pods.iter().filter(|pod| pod_is_ready(pod)).count() == wanted)
    })?;
    let seconds = begin.elapsed().as_secs_f64();
    for name in &names {
        // With no time at all their objects would go before their containers.
        lab.client.delete("pods", "default", name, Some(1))?;
    }
    poll("the pods are gone", || {
        Ok(lab.client.list::<Pod>("default", "")?.len() == 1)
    })?;
    Ok(seconds)
}

fn poll(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + LIMIT;
    while !done()? {
        anyhow::ensure!(Instant::now() < end, "waited {LIMIT:?} in vain until {what}");
        std::thread::sleep(POLL);
    }
    Ok(())
}
