//! ADD and DEL of our plugin with its own address management beside the reference plugins bridge + host-local: the whole call, as
//! a runtime sees it, one at a time and many at once, in turn.
//!
//! All of it happens in a network and mount namespace of the benchmark's own: a host with two bridges and no way out.

mod limit;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use orlop_tests::lab::binaries;
use serde_json::json;

use super::{
    netns,
    report::{Figure, OURS, Report},
    scale::load::quantile,
};

/// Where Debian's containernetworking-plugins are.
const REFERENCE: &str = "/usr/lib/cni";
const THEIRS: &str = "bridge + host-local";
/// Who answers when no plugin is asked.
const KERNEL: &str = "the kernel";
/// Our plugin's bridge.
const BRIDGE: &str = "ours0";
const QUANTILES: [(&str, usize); 2] = [("p50", 500), ("p99", 990)];
const AT_ONCE: usize = 32;
/// The first are not counted: bridges are made, programs read from disk.
const WARM: usize = 3;
const P99_MILLISECONDS: f64 = 20.0;

/// One side: a plugin and its configuration.
struct Plugin {
    name: &'static str,
    program: PathBuf,
    configuration: String,
}

/// Milliseconds of the calls of one side.
#[derive(Default)]
struct Times {
    add: Vec<f64>,
    del: Vec<f64>,
}

/// Runs the benchmark; options: rounds one at a time (default 200), rounds of 32 at once (default 12).
pub fn run(options: &[String]) -> Result<()> {
    let number = |index: usize, default: usize| {
        options.get(index).map_or(Ok(default), |text| {
            text.parse().with_context(|| format!("{text}: a number of rounds"))
        })
    };
    let (single, many) = (number(0, 200)?, number(1, 12)?);
    let namespaces = host()?;
    let plugins = [ours()?, theirs()];
    let mut report = Report::new("cni");
    let reference = plugins[1].program.is_file();
    if !reference {
        let missing = Err(anyhow::anyhow!(
            "{} is not there: cargo xtask setup",
            plugins[1].program.display()
        ));
        report.part(THEIRS, missing);
    }
    let sides = if reference { &plugins[..] } else { &plugins[..1] };
    for (how, rounds, at_once) in [("one at a time", single, 1), ("32 at once", many, AT_ONCE)] {
        println!("== {how}, {rounds} rounds");
        let times = measure(sides, &namespaces[..at_once], rounds)?;
        tell(&mut report, how, sides, &times, at_once == 1);
    }
    let removals = limit::removals(BRIDGE, "bench0", single)?;
    for (quantile, permille) in QUANTILES {
        let chart = format!("limit: RTM_DELLINK alone, {quantile}");
        report.add(Figure::new(chart, "one at a time", permille_of(&removals, permille), "ms").of(KERNEL));
    }
    report.finish()
}

/// This process becomes a host of its own; returns the network namespaces of its containers.
fn host() -> Result<Vec<PathBuf>> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("making namespaces; this needs root")?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("making mounts private")?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755")).context("mounting /run")?;
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
    ensure!(up.success(), "ip link set lo up: {up}");
    fs::create_dir_all("/run/netns")?;
    (0..AT_ONCE)
        .map(|index| {
            let path = PathBuf::from(format!("/run/netns/bench{index}"));
            netns::pin(&path)?;
            Ok(path)
        })
        .collect()
}

fn ours() -> Result<Plugin> {
    let configuration = json!({
        "cniVersion": "1.0.0", "name": "ours", "type": "orlop-bridge", "bridge": BRIDGE, "isDefaultGateway": true,
        "ipam": {"type": "orlop", "ranges": [[{"subnet": "10.88.0.0/16"}]]}
    });
    Ok(Plugin {
        name: OURS,
        program: binaries()?.join("orlop-bridge"),
        configuration: configuration.to_string(),
    })
}

/// Both keep their leases in memory, as ours does by default.
fn theirs() -> Plugin {
    let configuration = json!({
        "cniVersion": "1.0.0", "name": "theirs", "type": "bridge", "bridge": "theirs0", "isDefaultGateway": true,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.89.0.0/16"}]], "dataDir": "/run/host-local"}
    });
    Plugin {
        name: THEIRS,
        program: Path::new(REFERENCE).join("bridge"),
        configuration: configuration.to_string(),
    }
}

/// Rounds in which each side adds all containers and deletes them again, the sides in the other order each time.
fn measure(sides: &[Plugin], namespaces: &[PathBuf], rounds: usize) -> Result<Vec<Times>> {
    let mut times: Vec<Times> = sides.iter().map(|_| Times::default()).collect();
    for round in 0..rounds + WARM {
        let mut order: Vec<usize> = (0..sides.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for side in order {
            let add = all(&sides[side], "ADD", namespaces)?;
            let del = all(&sides[side], "DEL", namespaces)?;
            if round >= WARM {
                times[side].add.extend(add);
                times[side].del.extend(del);
            }
        }
    }
    Ok(times)
}

/// One verb for every container at once: milliseconds of each.
fn all(plugin: &Plugin, verb: &str, namespaces: &[PathBuf]) -> Result<Vec<f64>> {
    thread::scope(|scope| {
        let calls: Vec<_> = namespaces
            .iter()
            .map(|namespace| scope.spawn(move || call(plugin, verb, namespace)))
            .collect();
        calls
            .into_iter()
            .map(|call| call.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?)
            .collect()
    })
}

fn call(plugin: &Plugin, verb: &str, namespace: &Path) -> Result<f64> {
    let id = namespace.file_name().unwrap_or_default();
    let begin = Instant::now();
    let mut child = Command::new(&plugin.program)
        .env_clear()
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", id)
        .env("CNI_NETNS", namespace)
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", REFERENCE)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {}", plugin.program.display()))?;
    let mut stdin = child.stdin.take().context("a plugin without stdin")?;
    stdin.write_all(plugin.configuration.as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    let milliseconds = begin.elapsed().as_secs_f64() * 1e3;
    if !output.status.success() {
        bail!(
            "{} {verb} of {}: {} {}",
            plugin.name,
            namespace.display(),
            String::from_utf8_lossy(&output.stdout).trim(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(milliseconds)
}

/// Ours has to be faster than theirs in everything, and alone below 20 ms.
fn tell(report: &mut Report, how: &str, sides: &[Plugin], times: &[Times], alone: bool) {
    for verb in ["ADD", "DEL"] {
        for (quantile, permille) in QUANTILES {
            let values: Vec<f64> = times
                .iter()
                .map(|times| permille_of(if verb == "ADD" { &times.add } else { &times.del }, permille))
                .collect();
            let mut bar = values.get(1).copied().unwrap_or(f64::INFINITY);
            if alone && quantile == "p99" {
                bar = bar.min(P99_MILLISECONDS);
            }
            for (side, value) in sides.iter().zip(&values) {
                let figure = Figure::new(format!("{verb} {quantile}"), how, *value, "ms").of(side.name);
                let judged = side.name == OURS && bar.is_finite();
                report.add(if judged { figure.below(bar) } else { figure });
            }
        }
    }
}

/// The value below which so many permille lie.
pub fn permille_of(values: &[f64], permille: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile(&sorted, permille)
}
