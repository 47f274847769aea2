//! Metrics, held against what the kernel says elsewhere: a known amount of CPU and of bytes.

use std::{fs, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use orlop_proto::{
    Resource,
    core::v1::{Event, Pod},
    metrics::v1::PodMetrics,
};
use orlop_tests::{
    lab::{Lab, Options, output},
    workload::{client, pod, web},
};

/// Both sides are read one after the other while the machine goes on.
const TOLERANCE: f64 = 0.05;

#[test]
fn cpu_and_bytes_agree_with_the_kernel() -> Result<()> {
    let lab = Lab::start(
        "metrics",
        &Options {
            nodes: 1,
            ..Options::default()
        },
    )?;
    lab.client
        .apply(&(web("web", 1) + &client("client", "node1") + &pod("burner", "node1", &["burn", "4"])))?;
    let web = lab.wait_for_pods("app=web", 1)?.remove(0);
    let client = lab.wait_for_pod("client")?;
    let burner = lab.wait_for_pod("burner")?;
    let address = lab.cluster_ip("web")?;
    const BYTES: u64 = 40_000_000;
    lab.wait_for_answers(&client, &["get", &address, "80", "1"], std::slice::from_ref(&web))?;
    ensure!(
        lab.ask(&client, &["download", &address, "80", &BYTES.to_string()])?
            .trim()
            == format!("bytes {BYTES}")
    );
    thread::sleep(Duration::from_secs(5));

    let interface = interface_bytes(&lab, &web)?;
    ensure!(interface.1 > BYTES, "the pod's interface sent {} bytes", interface.1);
    let cgroup = cgroup_cpu(&lab, &burner)?;
    // How much it gets of a machine that others use too is not ours to say.
    ensure!(cgroup > 500_000_000, "the burner's cgroup used {cgroup} ns");
    // What control serves lags by one report.
    lab.wait("control serves the same figures", Duration::from_secs(20), || {
        let metrics = lab.client.pod_metrics("default")?;
        close(
            "bytes sent",
            of(&metrics, &web)?.network.unwrap_or_default().tx_bytes,
            interface.1,
        )?;
        close("burner's CPU", cpu(of(&metrics, &burner)?), cgroup)?;
        ensure!(
            of(&metrics, &burner)?.containers[0]
                .memory
                .unwrap_or_default()
                .usage_bytes
                > 0,
            "no memory figure"
        );
        Ok(Some(()))
    })?;
    the_maps_say_the_same(&lab, cgroup, interface.1)?;
    prometheus(&lab)?;
    let services = lab.client.service_metrics("default")?;
    let web_service = services
        .iter()
        .find(|service| service.name == "web")
        .context("no metrics of the service")?;
    ensure!(
        web_service.connections >= 2 && web_service.backends[0].connections >= 2,
        "{web_service:?}"
    );
    lost_programs_are_attached_again(&lab, &web, &client)?;
    detached_programs_count_nothing(&lab, &burner)?;
    lab.finish()
}

fn of<'a>(metrics: &'a [PodMetrics], pod: &Pod) -> Result<&'a PodMetrics> {
    metrics
        .iter()
        .find(|metrics| metrics.uid == pod.uid())
        .with_context(|| format!("no metrics of {}", pod.name()))
}

fn cpu(metrics: &PodMetrics) -> u64 {
    metrics
        .containers
        .iter()
        .map(|container| container.cpu.unwrap_or_default().usage_core_nanoseconds)
        .sum()
}

#[allow(
    clippy::cast_precision_loss,
    reason = "a ratio of byte and nanosecond counts needs no more than 53 bits"
)]
fn close(what: &str, ours: u64, kernel: u64) -> Result<()> {
    let ratio = ours as f64 / kernel as f64;
    ensure!(
        (ratio - 1.0).abs() <= TOLERANCE,
        "{what}: {ours}, the kernel says {kernel} (ratio {ratio:.3})"
    );
    Ok(())
}

/// Received and sent, as the pod's own interface counts.
fn interface_bytes(lab: &Lab, pod: &Pod) -> Result<(u64, u64)> {
    let text = output(lab.in_pod(pod, &["cat", "/proc/net/dev"])?)?;
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("eth0:"))
        .context("the pod has no eth0")?;
    let numbers: Vec<u64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    Ok((numbers[0], numbers[8]))
}

/// What the container's cgroup used, from `cpu.stat` of cgroup2.
fn cgroup_cpu(lab: &Lab, pod: &Pod) -> Result<u64> {
    let node = pod.spec.as_ref().map(|spec| spec.node_name.clone()).unwrap_or_default();
    let id = pod
        .status
        .as_ref()
        .map(|status| status.container_statuses[0].container_id.clone())
        .unwrap_or_default();
    let id = id.strip_prefix("containerd://").context("a container id")?;
    let path = orlop_tests::cgroup::hierarchies()?[0]
        .mount
        .join(lab.pod_cgroup(&node, pod.uid()))
        .join(id);
    let text = fs::read_to_string(path.join("cpu.stat")).with_context(|| path.display().to_string())?;
    let usage = text
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "))
        .context("usage_usec")?;
    Ok(usage.trim().parse::<u64>()? * 1000)
}

/// The same, summed from the per-CPU maps as bpftool dumps them.
fn the_maps_say_the_same(lab: &Lab, cpu: u64, bytes: u64) -> Result<()> {
    let totals = |map: &str, field: &str| -> Result<Vec<u64>> {
        let path = format!("/sys/fs/bpf/orlop/node1/{map}");
        let json = output(lab.on_node("node1", &["bpftool", "-j", "map", "dump", "pinned", &path])?)?;
        let entries: Vec<serde_json::Value> = serde_json::from_str(&json)?;
        let total = |entry: &serde_json::Value| {
            let values = entry["formatted"]["values"].as_array()?;
            Some(values.iter().filter_map(|value| value["value"][field].as_u64()).sum())
        };
        Ok(entries.iter().filter_map(total).collect())
    };
    let cpu_totals = totals("cpu_v1", "nanoseconds")?;
    ensure!(
        cpu_totals
            .iter()
            .any(|total| close("CPU in the map", *total, cpu).is_ok()),
        "cpu_v1 has {cpu_totals:?}, not {cpu}"
    );
    let byte_totals = totals("net_v1", "tx_bytes")?;
    ensure!(
        byte_totals
            .iter()
            .any(|total| close("bytes in the map", *total, bytes).is_ok()),
        "net_v1 has {byte_totals:?}, not {bytes}"
    );
    Ok(())
}

fn prometheus(lab: &Lab) -> Result<()> {
    let agent = [
        "curl",
        "-sS",
        "--unix-socket",
        "/run/orlop/metrics.sock",
        "http://agent/metrics",
    ];
    let text = output(lab.on_node("node1", &agent)?)?;
    for name in [
        "container_cpu_usage_seconds_total{",
        "container_memory_working_set_bytes{",
        "node_cpu_usage_seconds_total",
    ] {
        ensure!(text.contains(name), "the agent does not serve {name}");
    }
    let pki = lab.spec.member_directory("control").join("data/pki");
    let file = |name: &str| pki.join(name).display().to_string();
    let mut curl = std::process::Command::new("curl");
    curl.args([
        "-sS",
        "--cacert",
        &file("ca.crt"),
        "--cert",
        &file("admin.crt"),
        "--key",
        &file("admin.key"),
    ]);
    curl.arg(format!("https://127.0.0.1:{}/metrics", lab.members.api_port));
    let text = output(curl)?;
    ensure!(
        text.contains("container_cpu_usage_seconds_total{") && text.contains("web"),
        "control serves {text}"
    );
    Ok(())
}

/// Somebody detaches a pod's programs, and one of the node's: the agent says so on the pod, and attaches them again.
fn lost_programs_are_attached_again(lab: &Lab, web: &Pod, client: &Pod) -> Result<()> {
    let folder = "/sys/fs/bpf/orlop/node1";
    let script = format!("rm {folder}/pods/{}_* {folder}/connect4_link", web.uid());
    output(lab.on_node("node1", &["sh", "-c", &script])?)?;
    lab.wait("an event tells of it", Duration::from_secs(60), || {
        let events: Vec<Event> = lab.client.list("default", "")?;
        let tells = |event: &Event| {
            let about = event
                .involved_object
                .as_ref()
                .is_some_and(|about| about.uid == web.uid());
            about && event.reason == "TrafficHooksLost"
        };
        Ok(events.iter().any(tells).then_some(()))
    })?;
    let config = lab
        .spec
        .member_directory("node1")
        .join("node.toml")
        .display()
        .to_string();
    let program = lab.spec.binaries.join("orlop-node").display().to_string();
    lab.wait("all is attached", Duration::from_secs(60), || {
        let said = output(lab.on_node("node1", &[&program, "--config", &config, "verify"])?)?;
        ensure!(said.contains("3 pods: 0 differences"), "{said}");
        Ok(Some(()))
    })?;
    let address = lab.cluster_ip("web")?;
    lab.wait_for_answers(client, &["get", &address, "80", "1"], std::slice::from_ref(web))
}

/// The figures come from the programs: without them nothing is counted.
fn detached_programs_count_nothing(lab: &Lab, burner: &Pod) -> Result<()> {
    lab.request(&orlop_tests::supervisor::Request::Stop("node1/agent".to_owned()))?;
    output(lab.on_node("node1", &["rm", "/sys/fs/bpf/orlop/node1/sched_switch_link"])?)?;
    let map = [
        "bpftool",
        "-j",
        "map",
        "dump",
        "pinned",
        "/sys/fs/bpf/orlop/node1/cpu_v1",
    ];
    let before = output(lab.on_node("node1", &map)?)?;
    output(lab.in_pod(
        burner,
        &["sh", "-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done"],
    )?)?;
    ensure!(
        output(lab.on_node("node1", &map)?)? == before,
        "CPU time is counted without the program"
    );
    Ok(())
}
