//! `up`, `down` and `exec`: the demo cluster that stays.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use orlop_proto::{
    Resource,
    core::v1::{Pod, Service},
};
use orlop_tests::{
    images,
    lab::{self, Lab, output, pod_is_ready},
    layout::{Spec, StoreEngine},
    supervisor::{Lock, Request, send, sweep},
};

use crate::demo_directory;

const MANIFEST: &str = include_str!("../demo/web.yaml");
const REPLICAS: usize = 6;
const ID: &str = "demo";

/// Brings the demo up, and ends with proof that it works.
pub fn up(nodes: u16, store: StoreEngine, controls: u16, port: u16) -> Result<()> {
    let begin = Instant::now();
    if Lock::take(ID)?.is_none() {
        bail!("the demo is up already: cargo xtask down");
    }
    for id in sweep()? {
        println!("   removed what lab {id} left");
    }
    let directory = demo_directory();
    if directory.exists() {
        fs::remove_dir_all(&directory).with_context(|| format!("removing {}", directory.display()))?;
    }
    let orlop = lab::repository().join(".orlop");
    let spec = Spec {
        id: ID.to_owned(),
        directory: directory.clone(),
        orlop: orlop.clone(),
        binaries: lab::binaries()?,
        other_binaries: None,
        static_binaries: lab::static_binaries(),
        nodes,
        store,
        etcd_members: 1,
        etcd_quota: 0,
        controls,
        api_port: port,
        control_extra: String::new(),
        node_extra: String::new(),
        registry: false,
        clocks: Vec::new(),
        containerd: std::collections::BTreeMap::new(),
    };
    images::write_fixture_image(&spec.static_binaries.join("orlop-fixture"), &orlop.join("images"))?;
    spec.write()?;
    start_supervisor(&spec)?;
    let outcome = Lab::attach(&directory).and_then(|lab| {
        write_admin(&lab)?;
        lab.wait_for_nodes()?;
        println!("== the demo: six web servers behind a ClusterIP");
        let service = deploy(&lab)?;
        prove(&lab, &service)
    });
    outcome.with_context(|| {
        format!(
            "the cluster is left as it is; its logs are in {}",
            directory.join("logs").display()
        )
    })?;
    println!(
        "\nUp after {:.1} s: {controls} control, {nodes} nodes. It stays until `cargo xtask down`.",
        begin.elapsed().as_secs_f64()
    );
    println!(
        "  source .orlop/admin/env && grpcurl -cacert $ORLOP_CA -cert $ORLOP_CERT -key $ORLOP_KEY $ORLOP_ADDR list"
    );
    Ok(())
}

/// Takes the demo down; nothing of it stays but the images in `.orlop`.
pub fn down() -> Result<()> {
    let directory = demo_directory();
    if Lock::take(ID)?.is_none() {
        send(&directory, &Request::Shutdown).context("the demo's supervisor lives but does not answer")?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while Lock::take(ID)?.is_none() {
            if Instant::now() > deadline {
                bail!(
                    "the demo's supervisor does not end; its log is {}",
                    directory.join("logs/supervisor.log").display()
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        println!("the cluster is down");
    }
    for folder in [directory, lab::repository().join(".orlop").join("admin")] {
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
        }
    }
    Ok(())
}

/// Becomes a command inside a node or a pod of the demo.
pub fn exec(node: &str, pod: Option<&str>, command: &[String]) -> Result<()> {
    let lab = Lab::attach(&demo_directory())?;
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    let mut command = match pod {
        None => lab.on_node(node, &words)?,
        Some(pod) => {
            let (namespace, name) = pod
                .split_once('/')
                .with_context(|| format!("{pod}: a pod is NAMESPACE/NAME"))?;
            let pod: Pod = lab
                .client
                .get(namespace, name)?
                .with_context(|| format!("there is no pod {pod}"))?;
            let bound = pod
                .spec
                .as_ref()
                .map(|spec| spec.node_name.as_str())
                .unwrap_or_default();
            if bound != node {
                bail!(
                    "pod {namespace}/{name} runs on {}, not on {node}",
                    if bound.is_empty() { "no node yet" } else { bound }
                );
            }
            lab.in_pod(&pod, &words)?
        }
    };
    Err(command.exec()).context("running orlop-lab enter")
}

fn start_supervisor(spec: &Spec) -> Result<()> {
    let logs = spec.directory.join("logs");
    fs::create_dir_all(&logs).context("making the folder of logs")?;
    let mut supervisor = Command::new(spec.binaries.join("orlop-lab"));
    supervisor
        .arg("supervise")
        .arg(&spec.directory)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    // A session of its own: it outlives this command and its terminal.
    supervisor
        .stderr(File::create(logs.join("supervisor.log"))?)
        .process_group(0);
    let mut child = supervisor.spawn().context("starting the supervisor")?;
    lab::wait_until_up(&mut child, |step| println!("   {step}"))
}

/// `.orlop/admin`: what grpcurl and other clients need.
fn write_admin(lab: &Lab) -> Result<()> {
    let admin = lab.spec.orlop.join("admin");
    fs::create_dir_all(&admin).context("making .orlop/admin")?;
    let pki = lab.spec.member_directory("control").join("data").join("pki");
    for name in ["ca.crt", "admin.crt", "admin.key"] {
        fs::copy(pki.join(name), admin.join(name)).with_context(|| format!("copying {name} of control"))?;
    }
    let text = format!(
        "export PATH=\"{}:$PATH\"\nexport ORLOP_ADDR=127.0.0.1:{}\nexport ORLOP_CA={}\nexport ORLOP_CERT={}\nexport ORLOP_KEY={}\n",
        lab.spec.orlop.join("tools").join("bin").display(),
        lab.members.api_port,
        admin.join("ca.crt").display(),
        admin.join("admin.crt").display(),
        admin.join("admin.key").display(),
    );
    fs::write(admin.join("env"), text).context("writing .orlop/admin/env")
}

fn deploy(lab: &Lab) -> Result<Service> {
    for result in lab.client.apply(MANIFEST)? {
        println!("   {}/{} {}", result.resource, result.name, result.action);
    }
    lab.wait("all pods of the demo are ready", Duration::from_secs(90), || {
        let pods: Vec<Pod> = lab.client.list("default", "")?;
        Ok((pods.iter().filter(|pod| pod_is_ready(pod)).count() == REPLICAS + 1).then_some(()))
    })?;
    for pod in lab.client.list::<Pod>("default", "app=web")? {
        let node = pod.spec.as_ref().map(|spec| spec.node_name.clone()).unwrap_or_default();
        let address = pod
            .status
            .as_ref()
            .map(|status| status.pod_ip.clone())
            .unwrap_or_default();
        println!("   {:<12} {node:<8} {address}", pod.name());
    }
    lab.client.get("default", "web")?.context("the demo's service is gone")
}

fn prove(lab: &Lab, service: &Service) -> Result<()> {
    let address = service
        .spec
        .as_ref()
        .map(|spec| spec.cluster_ip.clone())
        .unwrap_or_default();
    let client: Pod = lab
        .client
        .get("default", "client")?
        .context("the demo's client is gone")?;
    let node = client
        .spec
        .as_ref()
        .map(|spec| spec.node_name.clone())
        .unwrap_or_default();
    println!("== twelve requests to http://{address}/ from pod default/client on {node}");
    let url = format!("http://{address}/");
    lab.wait("the client reaches the service", Duration::from_secs(10), || {
        output(lab.in_pod(&client, &["curl", "-sS", "--max-time", "2", &url])?).map(Some)
    })?;
    let mut answers = std::collections::BTreeMap::<String, u32>::new();
    for _ in 0..12 {
        let answer = output(lab.in_pod(&client, &["curl", "-sS", "--max-time", "3", &url])?)?;
        *answers.entry(answer.trim().to_owned()).or_default() += 1;
    }
    for (who, count) in &answers {
        println!("   {count:>2}  {who}");
    }
    print_maps(lab, &node)?;
    print_metrics(lab)
}

fn print_maps(lab: &Lab, node: &str) -> Result<()> {
    let pins = format!("/sys/fs/bpf/orlop/{}", node.replace('.', "_"));
    println!("== frontends on {node}: bpftool map dump pinned {pins}/svc4_v1");
    print!(
        "{}",
        output(lab.on_node(node, &["bpftool", "map", "dump", "pinned", &format!("{pins}/svc4_v1")])?)?
    );
    println!("== used slots: bpftool -j map dump pinned {pins}/arena4_v1");
    let dump = output(lab.on_node(
        node,
        &["bpftool", "-j", "map", "dump", "pinned", &format!("{pins}/arena4_v1")],
    )?)?;
    for entry in serde_json::from_str::<Vec<serde_json::Value>>(&dump).context("bpftool's JSON")? {
        let formatted = &entry["formatted"];
        if formatted["value"]["state"]
            .as_str()
            .is_some_and(|state| state != "Free")
        {
            println!("   {:>6}: {}", formatted["key"], formatted["value"]);
        }
    }
    Ok(())
}

fn print_metrics(lab: &Lab) -> Result<()> {
    let (nodes, pods) = lab.wait(
        "metrics of all nodes and pods have arrived",
        Duration::from_secs(30),
        || {
            let (nodes, pods) = (lab.client.node_metrics()?, lab.client.pod_metrics("default")?);
            Ok((nodes.len() == usize::from(lab.spec.nodes) && pods.len() > REPLICAS).then_some((nodes, pods)))
        },
    )?;
    println!(
        "== metrics\n   {:<24} {:>9} {:>12} {:>12} {:>12}",
        "NODE", "CPU", "MEMORY", "RX", "TX"
    );
    for node in nodes {
        let cpu = node.cpu.unwrap_or_default().usage_nanocores / 1_000_000;
        let memory = node.memory.unwrap_or_default().working_set_bytes >> 20;
        println!("   {:<24} {cpu:>8}m {memory:>9} Mi", node.name);
    }
    println!("   POD");
    for pod in pods {
        let cpu: u64 = pod
            .containers
            .iter()
            .map(|container| container.cpu.unwrap_or_default().usage_nanocores / 1_000_000)
            .sum();
        let memory: u64 = pod
            .containers
            .iter()
            .map(|container| container.memory.unwrap_or_default().working_set_bytes >> 10)
            .sum();
        let network = pod.network.unwrap_or_default();
        let name = format!("{}/{}", pod.namespace, pod.name);
        println!(
            "   {name:<24} {cpu:>8}m {memory:>9} Ki {:>10} B {:>10} B",
            network.rx_bytes, network.tx_bytes
        );
    }
    Ok(())
}
