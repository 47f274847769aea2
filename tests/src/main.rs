//! `orlop-lab`: the lab from the command line. `cargo xtask up`, `down` and `exec` call it.

mod demo;

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use orlop_tests::{
    disk,
    faults::{
        campaign::{Bars, Campaign},
        plan::Kind,
        versions,
    },
    lab,
    layout::{MAX_CONTROLS, StoreEngine},
    namespaces::{Target, enter, hold},
    supervisor::{supervise, sweep},
};

#[derive(Parser)]
#[command(name = "orlop-lab", about = "A cluster in namespaces of this machine")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Brings the demo cluster up and leaves it running.
    Up {
        /// How many nodes.
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=200))]
        nodes: u16,
        /// Control's store: embedded or etcd.
        #[arg(long, default_value = "embedded", value_parser = parse_store)]
        store: StoreEngine,
        /// How many control replicas; more than one only over etcd.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_CONTROLS)))]
        controls: u16,
        /// The API's port at 127.0.0.1.
        #[arg(long, default_value_t = 6443)]
        port: u16,
    },
    /// Takes the demo cluster down, and whatever dead labs left.
    Down,
    /// Runs a command inside a node, or inside a pod's network and cgroup.
    Exec {
        /// "node1", ..., or "control".
        node: String,
        /// NAMESPACE/NAME of a pod on that node.
        #[arg(long)]
        pod: Option<String>,
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Rounds of seeded faults in labs of their own; `cargo xtask soak`.
    Soak {
        /// Decides every fault.
        seed: u64,
        /// Rounds with each store.
        #[arg(long, default_value_t = 10)]
        rounds: u64,
        /// Only with this store: embedded or etcd.
        #[arg(long, value_parser = parse_store)]
        store: Option<StoreEngine>,
        /// Only these faults, in an order that the seed chooses: kill-shim,hang-shim.
        #[arg(long, value_enum, value_delimiter = ',')]
        only: Vec<Kind>,
        /// A folder with our programs in another version: control and agents are replaced by these, and back.
        #[arg(long, value_name = "DIR")]
        other_binaries: Option<PathBuf>,
    },
    /// Runs a lab from its folder (internal).
    #[command(hide = true)]
    Supervise {
        directory: PathBuf,
        /// Ends with stdin.
        #[arg(long)]
        tied: bool,
    },
    /// Puts a disk that can be made to fail under a folder (internal).
    #[command(hide = true)]
    Disk { folder: PathBuf },
    /// Holds a member's namespaces (internal).
    #[command(hide = true)]
    Hold {
        name: String,
        cgroup: String,
        keep: PathBuf,
    },
    /// Becomes a command inside a member (internal).
    #[command(hide = true)]
    Enter {
        #[arg(long)]
        holder: i32,
        #[arg(long)]
        network_of: Option<i32>,
        #[arg(long)]
        cgroup: String,
        #[arg(long)]
        cgroup2: Option<String>,
        #[arg(long, default_value_t = 0)]
        listen_fds: u32,
        #[arg(long)]
        directory: Option<PathBuf>,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
}

fn parse_store(text: &str) -> Result<StoreEngine, String> {
    match text {
        "embedded" => Ok(StoreEngine::Embedded),
        "etcd" => Ok(StoreEngine::Etcd),
        other => Err(format!("no store {other:?}: embedded or etcd")),
    }
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Up {
            nodes,
            store,
            controls,
            port,
        } => demo::up(nodes, store, controls, port),
        Command::Down => {
            demo::down()?;
            for id in sweep()? {
                println!("removed what lab {id} left");
            }
            Ok(())
        }
        Command::Exec { node, pod, command } => demo::exec(&node, pod.as_deref(), &command),
        Command::Soak {
            seed,
            rounds,
            store,
            only,
            other_binaries,
        } => soak(seed, rounds, store, &only, other_binaries),
        Command::Supervise { directory, tied } => supervise(&directory, tied),
        Command::Disk { folder } => disk::serve(&folder),
        Command::Hold { name, cgroup, keep } => hold(&name, &cgroup, &keep),
        Command::Enter {
            holder,
            network_of,
            cgroup,
            cgroup2,
            listen_fds,
            directory,
            command,
        } => enter(
            &Target {
                holder,
                network_of,
                cgroup,
                cgroup2,
                listen_fds,
                directory,
            },
            &command,
        ),
    }
}

fn soak(seed: u64, rounds: u64, store: Option<StoreEngine>, only: &[Kind], other: Option<PathBuf>) -> Result<()> {
    let all = [
        &Kind::PROCESSES[..],
        &Kind::ETCD,
        &Kind::REPLICAS,
        &Kind::LONG,
        &Kind::NETWORK,
        &Kind::MACHINES,
        &Kind::DISKS,
    ]
    .concat();
    let kinds = if only.is_empty() { all } else { only.to_vec() };
    let other = other.map(fs::canonicalize).transpose();
    let other = other.context("the folder of another version's programs")?;
    if let Some(other) = &other {
        versions::check(other, &lab::binaries()?)?;
        let replacing = [Kind::ReplaceControl, Kind::ReplaceAgent];
        ensure!(
            kinds.iter().any(|kind| replacing.contains(kind)),
            "no fault that replaces anything is among --only: replace-control, replace-agent"
        );
    }
    let both = [StoreEngine::Embedded, StoreEngine::Etcd];
    for engine in both
        .into_iter()
        .filter(|engine| store.is_none_or(|store| store == *engine))
    {
        let campaign = Campaign {
            name: "soak".to_owned(),
            seed,
            rounds,
            kinds: kinds.clone(),
            store: engine,
            controls: match engine {
                StoreEngine::Embedded => 1,
                StoreEngine::Etcd => 3,
            },
            nodes: 3,
            bars: Bars::Held,
            other_binaries: other.clone(),
        };
        campaign.run()?;
    }
    println!("seed {seed}: everything held");
    Ok(())
}

/// The demo's folder.
fn demo_directory() -> PathBuf {
    lab::repository().join(".orlop").join("lab").join("demo")
}
