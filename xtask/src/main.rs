//! Orlop's automation: `cargo xtask COMMAND`.

mod build;
mod fuzz;
mod peers;
mod run;
mod setup;
mod tidy;

use std::{
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};

use run::{repository, run, status};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Orlop's automation")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Installs what building and running need. The other commands call it; twice is as good as once.
    Setup,
    /// Brings up a cluster in namespaces of this machine, with a demo service, and leaves it running.
    Up {
        /// How many nodes.
        #[arg(long, default_value_t = 3)]
        nodes: u16,
        /// Control's store: embedded or etcd.
        #[arg(long, default_value = "embedded")]
        store: String,
        /// How many control replicas; more than one only with `--store etcd`.
        #[arg(long, default_value_t = 1)]
        controls: u16,
        /// The API's port at 127.0.0.1.
        #[arg(long, default_value_t = 6443)]
        port: u16,
        /// With the release build.
        #[arg(long)]
        release: bool,
    },
    /// Takes the cluster down and removes every trace of it.
    Down,
    /// Runs a command inside a node (network, mounts, cgroup), or inside a pod's network and cgroup.
    Exec {
        /// "node1", ..., or "control".
        node: String,
        /// NAMESPACE/NAME of a pod on that node.
        #[arg(long)]
        pod: Option<String>,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Runs all tests, or those whose name contains FILTER.
    Test {
        /// A part of the tests' names.
        filter: Option<String>,
    },
    /// Rounds of faults in a lab, chosen by a seed, with everything checked that has to hold meanwhile.
    Soak {
        /// Decides every fault.
        seed: u64,
        /// Rounds with each store.
        #[arg(long, default_value_t = 10)]
        rounds: u64,
        /// Only with this store: embedded or etcd.
        #[arg(long)]
        store: Option<String>,
        /// Only these faults: kill-shim,hang-shim,...
        #[arg(long)]
        only: Option<String>,
        /// A folder with our programs in another version (orlop-control, orlop-node, orlop-logger, orlop-bridge): where control
        /// and agents are replaced, it is by these, and back.
        #[arg(long, value_name = "DIR")]
        other_binaries: Option<PathBuf>,
    },
    /// Measures; the last line is one JSON object.
    Bench {
        /// connect, program, cni, start, schedule, control, store, or all.
        name: String,
        /// Options of the benchmark.
        #[arg(last = true)]
        options: Vec<String>,
    },
    /// Fuzzes the parsers; a finding fails.
    Fuzz {
        /// Which targets; all without.
        targets: Vec<String>,
        /// For how long each, in seconds.
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
    /// Builds the real Kubernetes and etcd, which benchmarks measure beside, into `.orlop/peers` (minutes, once).
    Peers,
    /// Formats, lints, checks documentation, licences and repetition of protobuf tags.
    Tidy {
        /// Only say what is not tidy.
        #[arg(long)]
        check: bool,
    },
}

/// For how long `test` runs each fuzz target: enough to go through the seeds and some thousands of inputs.
const FUZZ_SECONDS: u32 = 4;

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Task::Setup => setup::setup().map(|()| ExitCode::SUCCESS),
        Task::Up {
            nodes,
            store,
            controls,
            port,
            release,
        } => up(nodes, &store, controls, port, release),
        Task::Down => lab(&["down".to_owned()]),
        Task::Exec { node, pod, command } => exec(node, pod, command),
        Task::Test { filter } => test(filter.as_deref()).map(|()| ExitCode::SUCCESS),
        Task::Soak {
            seed,
            rounds,
            store,
            only,
            other_binaries,
        } => soak(seed, rounds, store, only, other_binaries),
        Task::Bench { name, options } => bench(&name, &options),
        Task::Fuzz { targets, seconds } => fuzz::fuzz(&targets, seconds).map(|()| ExitCode::SUCCESS),
        Task::Peers => peers::build().map(|()| ExitCode::SUCCESS),
        Task::Tidy { check } => tidy::tidy(check).map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn up(nodes: u16, store: &str, controls: u16, port: u16, release: bool) -> Result<ExitCode> {
    setup::setup()?;
    let profile = if release {
        build::Profile::Release
    } else {
        build::Profile::Dev
    };
    build::everything(profile)?;
    let program = profile.folder().join("orlop-lab");
    let arguments = [
        "up",
        "--nodes",
        &nodes.to_string(),
        "--store",
        store,
        "--controls",
        &controls.to_string(),
        "--port",
        &port.to_string(),
    ]
    .map(str::to_owned);
    status(Command::new(program).args(arguments))
}

fn exec(node: String, pod: Option<String>, command: Vec<String>) -> Result<ExitCode> {
    let mut arguments = vec!["exec".to_owned(), node];
    if let Some(pod) = pod {
        arguments.extend(["--pod".to_owned(), pod]);
    }
    arguments.push("--".to_owned());
    arguments.extend(command);
    lab(&arguments)
}

/// The lab's program, as `up` built it; `down` and `exec` do not build.
fn lab(arguments: &[String]) -> Result<ExitCode> {
    let built = [build::Profile::Dev, build::Profile::Release].map(|profile| profile.folder().join("orlop-lab"));
    let newest = built.into_iter().filter(|path| path.exists()).max_by_key(|path| {
        path.metadata()
            .and_then(|metadata| metadata.modified())
            .unwrap_or(std::time::SystemTime::UNIX_EPOCH)
    });
    let Some(program) = newest else {
        bail!("nothing is built yet: cargo xtask up")
    };
    status(Command::new(program).args(arguments))
}

fn test(filter: Option<&str>) -> Result<()> {
    setup::setup()?;
    build::everything(build::Profile::Dev)?;
    // Both runs are of the same packages, so that cargo takes the same features of what they depend on: otherwise the second would build
    // nearly everything anew.
    let tests = |targets: &[&str]| {
        let mut tests = run::cargo();
        tests.args(["test", "--workspace", "--exclude", "orlop-ebpf", "--no-fail-fast"]);
        tests.args(targets).args(filter);
        tests
    };
    let targets = build::Tests::of_workspace()?;
    println!("== tests of the parts");
    let parts = run(&mut tests(
        &[&["--lib", "--bins"][..], &options(&targets.parts)].concat(),
    ));
    println!("== end-to-end tests, each in a lab of its own");
    let whole = run(tests(&options(&targets.whole)).args(["--", "--test-threads=1"]));
    // The parsers' fuzz targets are no part of a filtered run: they have no tests' names.
    let fuzzed = match filter {
        None => fuzz::fuzz(&[], FUZZ_SECONDS),
        Some(_) => Ok(()),
    };
    parts.and(whole).and(fuzzed)
}

/// What has cargo take these integration tests.
fn options(tests: &[String]) -> Vec<&str> {
    tests.iter().flat_map(|test| ["--test", test]).collect()
}

/// Benchmarks that run the real Kubernetes or etcd 3.6 beside ours. Without them ours is measured alone.
const NEED_PEERS: &[&str] = &["all", "connect", "program", "schedule", "control", "store"];

fn soak(
    seed: u64,
    rounds: u64,
    store: Option<String>,
    only: Option<String>,
    other_binaries: Option<PathBuf>,
) -> Result<ExitCode> {
    setup::setup()?;
    build::everything(build::Profile::Dev)?;
    let mut soak = Command::new(build::Profile::Dev.folder().join("orlop-lab"));
    soak.args(["soak", &seed.to_string(), "--rounds", &rounds.to_string()]);
    if let Some(store) = store {
        soak.args(["--store", &store]);
    }
    if let Some(only) = only {
        soak.args(["--only", &only]);
    }
    if let Some(folder) = other_binaries {
        soak.arg("--other-binaries").arg(folder);
    }
    status(&mut soak)
}

fn bench(name: &str, options: &[String]) -> Result<ExitCode> {
    setup::setup()?;
    build::everything(build::Profile::Release)?;
    if NEED_PEERS.contains(&name)
        && let Err(error) = peers::build()
    {
        eprintln!("the peers are left out: {error:#}");
    }
    let program = build::Profile::Release.folder().join("orlop-bench");
    status(Command::new(program).arg(name).args(options).current_dir(repository()))
}
