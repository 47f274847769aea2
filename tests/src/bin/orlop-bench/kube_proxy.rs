//! The peer: the real kube-proxy in nftables mode over a real API server, between a client's and a server's namespace.
//!
//! It runs in a process of its own, since that process moves into namespaces in which nothing leads out.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use orlop_tests::lab::static_binaries;
use serde_json::{Value, json};

use super::{
    affinity,
    connect::KINDS,
    netns,
    pairs::{SLICE_SECONDS, Way, compare},
    report::{Figure, Report},
    scale::{
        isolation::{self, Place},
        kubernetes::{Api, Kubernetes},
        load::{self, Until},
        process::Process,
    },
};

/// The hidden benchmark's name.
pub const NAME: &str = "kube-proxy";
const PEER: &str = "kube-proxy nftables";
const NODE: &str = "node1";
const SERVER: &str = "10.200.2.2";
const SERVER_PORT: &str = "8080";
const METRICS: &str = "127.0.0.1:10249";
const LIMIT: Duration = Duration::from_secs(180);
/// For one ratio.
const RATIO_LIMIT: Duration = Duration::from_secs(12);
const WRITERS: usize = 32;

/// Adds its ratios through ClusterIPs to its own direct, at these numbers of services.
pub fn connect(sizes: &[u32], report: &mut Report) -> Result<()> {
    let sizes: Vec<String> = sizes.iter().map(ToString::to_string).collect();
    let mut arguments = vec!["connect"];
    arguments.extend(sizes.iter().map(String::as_str));
    in_a_process(&arguments, report)
}

/// Adds what its first full sync takes, and its memory.
pub fn program(services: u32, endpoints: u32, report: &mut Report) -> Result<()> {
    in_a_process(&["program", &services.to_string(), &endpoints.to_string()], report)
}

fn in_a_process(arguments: &[&str], report: &mut Report) -> Result<()> {
    println!("== {PEER}: {}", arguments.join(" "));
    let own = std::env::current_exe().context("finding this program")?;
    let output = Command::new(own)
        .arg(NAME)
        .args(arguments)
        .stderr(Stdio::inherit())
        .output()
        .context("starting this program again")?;
    // What was measured before a failure counts.
    let text = String::from_utf8_lossy(&output.stdout);
    for line in text.lines() {
        let figure: Value =
            serde_json::from_str(line).with_context(|| format!("the peer's process printed {line:?}"))?;
        let word = |name: &str| figure[name].as_str().unwrap_or_default().to_owned();
        let unit = match figure["unit"].as_str() {
            Some("ms") => "ms",
            Some("MB") => "MB",
            _ => "ratio",
        };
        let number = |value: &Value| value.as_f64().unwrap_or_default();
        let mut told = Figure::new(word("chart"), word("name"), number(&figure["value"]), unit).of(PEER);
        if let [low, high] = figure["interval"].as_array().map_or(&[][..], Vec::as_slice) {
            told.interval = Some([number(low), number(high)]);
        }
        report.add(told);
    }
    ensure!(output.status.success(), "the peer's process: {}", output.status);
    Ok(())
}

/// The process: prints a figure a line.
pub fn main(arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (what, numbers) = words.split_first().context("connect or program")?;
    let numbers: Vec<u32> = numbers
        .iter()
        .map(|word| word.parse().with_context(|| format!("{word}: a number")))
        .collect::<Result<_>>()?;
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another TLS provider is installed"))?;
    let place = isolation::enter(NAME)?;
    let network = Network::build(&place)?;
    let runtime = tokio::runtime::Runtime::new()?;
    let kubernetes = runtime.block_on(async {
        let kubernetes = Kubernetes::start(&place).await?;
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE},
            "status": {"addresses": [{"type": "InternalIP", "address": isolation::ADDRESS}]}
        });
        kubernetes.api.create("/api/v1/nodes", &node).await?;
        anyhow::Ok(kubernetes)
    })?;
    let create = |services, endpoints| runtime.block_on(create_services(&kubernetes.api, services, endpoints));
    match (*what, &numbers[..]) {
        ("connect", sizes) => {
            let mut proxy = None;
            let mut there = 0;
            for size in sizes {
                create(there..*size, 1)?;
                there = *size;
                if proxy.is_none() {
                    proxy = Some(start_proxy(&place)?);
                }
                network.wait_for(&cluster_ip(*size - 1))?;
                network.ratios(*size)?;
            }
        }
        ("program", [services, endpoints]) => {
            create(0..*services, *endpoints)?;
            let mut proxy = start_proxy(&place)?;
            let sync = first_sync(&mut proxy)?;
            network.wait_for(&cluster_ip(*services - 1))?;
            thread::sleep(Duration::from_secs(5));
            let name = format!("{services} services x {endpoints} endpoints");
            tell("all services, from nothing", &name, sync * 1e3, "ms", None);
            tell(
                "the agent's memory",
                &name,
                megabytes(proxy.memory()?.resident),
                "MB",
                None,
            );
        }
        _ => bail!("nothing to do for {words:?}"),
    }
    Ok(())
}

fn tell(chart: &str, name: &str, value: f64, unit: &str, interval: Option<[f64; 2]>) {
    println!(
        "{}",
        json!({"chart": chart, "name": name, "value": value, "unit": unit, "interval": interval})
    );
}

fn megabytes(bytes: u64) -> f64 {
    f64::from(u32::try_from(bytes / 1024).unwrap_or(u32::MAX)) / 1024.0
}

fn cluster_ip(index: u32) -> String {
    format!("10.96.{}.{}", 100 + index / 250, 1 + index % 250)
}

/// Services of which the first and the last have the server as their one endpoint, the others nobody's addresses.
async fn create_services(api: &Api, range: std::ops::Range<u32>, endpoints: u32) -> Result<()> {
    let (api, first, end) = (api.clone(), range.start, range.end);
    let calls = usize::try_from(end - first)?;
    load::run(Until::Calls(calls), WRITERS, move |call| {
        let api = api.clone();
        async move {
            let index = first + u32::try_from(call)?;
            let name = format!("s{index}");
            let service = json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
                "spec": {"clusterIP": cluster_ip(index), "ports": [{"port": 80, "targetPort": 8080}]}
            });
            api.create("/api/v1/namespaces/default/services", &service).await?;
            let addresses = if index == 0 || index + 1 == end {
                vec![SERVER.to_owned()]
            } else {
                (0..endpoints)
                    .map(|number| format!("10.{}.{}.{}", 130 + number, index / 250, 1 + index % 250))
                    .collect()
            };
            let endpoints: Vec<Value> = addresses
                .iter()
                .map(|address| json!({"addresses": [address], "conditions": {"ready": true}}))
                .collect();
            let slice = json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {"name": format!("{name}-a"), "labels": {"kubernetes.io/service-name": name}},
                "addressType": "IPv4", "endpoints": endpoints, "ports": [{"port": 8080, "protocol": "TCP"}]
            });
            let slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
            api.create(slices, &slice).await
        }
    })
    .await?;
    Ok(())
}

fn start_proxy(place: &Place) -> Result<Process> {
    let folder = place.folder("kube-proxy")?;
    let configuration = folder.join("config.json");
    let text = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "mode": "nftables", "clusterCIDR": "10.200.0.0/16", "hostnameOverride": NODE, "metricsBindAddress": METRICS,
        "clientConnection": {"kubeconfig": place.disk.join("kubernetes/kubeconfig"), "qps": 1000, "burst": 2000},
        // Those of the machine are not ours to change.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"}
    });
    fs::write(&configuration, text.to_string())?;
    let arguments = [format!("--config={}", configuration.display())];
    Process::start(&place.peers.join("kube-proxy"), &folder, &arguments)
}

/// Seconds that its first sync of everything took, as it says itself.
fn first_sync(proxy: &mut Process) -> Result<f64> {
    let end = Instant::now() + LIMIT;
    loop {
        proxy.check()?;
        ensure!(Instant::now() < end, "kube-proxy made no full sync within {LIMIT:?}");
        thread::sleep(Duration::from_millis(200));
        let page = Command::new("curl")
            .args(["-s", &format!("http://{METRICS}/metrics")])
            .output()?;
        let page = String::from_utf8_lossy(&page.stdout).into_owned();
        let metric = |name: &str| -> Option<f64> {
            let line = page.lines().find(|line| line.starts_with(name))?;
            line.rsplit(' ').next()?.parse().ok()
        };
        let full = "kubeproxy_sync_full_proxy_rules_duration_seconds";
        if let (Some(sum), Some(count)) = (metric(&format!("{full}_sum")), metric(&format!("{full}_count")))
            && count >= 1.0
        {
            return Ok(sum / count);
        }
    }
}

/// A client's and a server's namespace, routed through that of kube-proxy.
struct Network {
    client: PathBuf,
    /// Where clients and the server run.
    cpu: usize,
    _server: Process,
}

impl Network {
    fn build(place: &Place) -> Result<Self> {
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("switching forwarding on")?;
        for (number, name) in [(1, "client"), (2, "server")] {
            let path = place.memory.join(name);
            netns::pin(&path)?;
            let path = path.to_str().context("a path that is not UTF-8")?;
            let (near, gateway) = (format!("to-{name}"), format!("10.200.{number}.1"));
            let far = format!("10.200.{number}.2/24");
            ip(
                None,
                &[
                    "link", "add", &near, "type", "veth", "peer", "name", "eth0", "netns", path,
                ],
            )?;
            ip(None, &["address", "add", &format!("{gateway}/24"), "dev", &near])?;
            ip(None, &["link", "set", &near, "up"])?;
            ip(Some(path), &["link", "set", "lo", "up"])?;
            ip(Some(path), &["address", "add", &far, "dev", "eth0"])?;
            ip(Some(path), &["link", "set", "eth0", "up"])?;
            ip(Some(path), &["route", "add", "default", "via", &gateway])?;
        }
        let fixture = static_binaries().join("orlop-fixture").display().to_string();
        let server = format!("--net={}", place.memory.join("server").display());
        let arguments = [server, fixture, "echo".to_owned(), SERVER_PORT.to_owned()];
        let cpu = affinity::chosen()?;
        let folder = place.folder("server")?;
        let server = affinity::on(cpu, || Process::start(&PathBuf::from("nsenter"), &folder, &arguments))?;
        Ok(Self {
            client: place.memory.join("client"),
            cpu,
            _server: server,
        })
    }

    fn fixture(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.client.display()))
            .arg(static_binaries().join("orlop-fixture"))
            .args(arguments);
        command
    }

    /// Waits until a service answers.
    fn wait_for(&self, address: &str) -> Result<()> {
        let end = Instant::now() + LIMIT;
        loop {
            let asked = self.fixture(&["rr", address, "80", "0.01"]).output()?;
            if asked.status.success() {
                return Ok(());
            }
            let said = String::from_utf8_lossy(&asked.stderr).trim().to_owned();
            ensure!(
                Instant::now() < end,
                "{address} does not answer within {LIMIT:?}: {said}"
            );
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn ratios(&self, services: u32) -> Result<()> {
        let service = cluster_ip(services - 1);
        for (kind, _) in KINDS {
            let slices = |address, port| Ok(self.fixture(&["slices", kind, address, port, SLICE_SECONDS]));
            let through = Way::of(|| slices(&service, "80"));
            let direct = Way::of(|| slices(SERVER, SERVER_PORT));
            let ratio = compare(through, direct, self.cpu, RATIO_LIMIT)?.ratio;
            let chart = format!("{kind} through a ClusterIP / direct");
            let name = format!("{services} services");
            tell(&chart, &name, ratio.median, "ratio", Some([ratio.low, ratio.high]));
        }
        Ok(())
    }
}

fn ip(namespace: Option<&str>, arguments: &[&str]) -> Result<()> {
    let mut command = match namespace {
        Some(path) => {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net={path}")).arg("ip");
            command
        }
        None => Command::new("ip"),
    };
    let status = command.args(arguments).status().context("running ip")?;
    ensure!(status.success(), "ip {}: {status}", arguments.join(" "));
    Ok(())
}
