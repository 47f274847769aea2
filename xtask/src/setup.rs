//! `cargo xtask setup`: what building and running Orlop needs, from Debian's packages, crates.io and the Go module proxy.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context, Result, bail};

use crate::run::{cargo, output, repository, run};

mod containerd;

/// Debian's packages: to build, to run, to look at what runs.
const PACKAGES: &[&str] = &[
    "gcc",
    "g++",
    "make",
    "libc6-dev",
    "protobuf-compiler",
    "libprotobuf-dev",
    "rustc-web",
    "libstd-rust-web-dev-bpf",
    "llvm-22-dev",
    "containerd",
    "runc",
    "etcd-client",
    "etcd-server",
    "docker-registry",
    "iproute2",
    "util-linux",
    "bpftool",
    "curl",
    "procps",
    "jq",
    "tcpdump",
    // Clocks of the tests' own processes.
    "libfaketime",
    // Other people's CNI plugins, and what they call.
    "containernetworking-plugins",
    "iptables",
    // A runtime whose networks are CNI's, under which our plugin is tested.
    "podman",
    // What kube-proxy calls, beside which benchmarks measure.
    "nftables",
];

/// The linker of the kernel programs, built against the LLVM of Debian's Rust for BPF.
const BPF_LINKER: &str = "0.13.0";
/// What runs the fuzz targets.
const CARGO_FUZZ: &str = "0.13.2";

/// A program of the Go module proxy.
struct GoTool {
    name: &'static str,
    package: &'static str,
    version: &'static str,
}

const GO_TOOLS: &[GoTool] = &[
    GoTool {
        name: "grpcurl",
        package: "github.com/fullstorydev/grpcurl/cmd/grpcurl",
        version: "v1.9.3",
    },
    // The CNI project's own runtime.
    GoTool {
        name: "cnitool",
        package: "github.com/containernetworking/cni/cnitool",
        version: "v1.3.0",
    },
];
/// bpf_set_retval, and socket storage in the socket address hooks.
const OLDEST_KERNEL: (u32, u32) = (6, 1);

/// Does what is missing, says what it does and how long it took.
pub fn setup() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("Orlop makes namespaces, cgroups and eBPF programs: run this as root");
    }
    check_kernel()?;
    packages()?;
    bpf_linker()?;
    containerd::containerd_2();
    for tool in GO_TOOLS {
        go_tool(tool)?;
    }
    Ok(())
}

/// cargo-fuzz, for the nightly that is installed.
pub fn cargo_fuzz() -> Result<()> {
    if !crate::fuzz::has_nightly() {
        bail!("fuzzing needs a nightly Rust: rustup toolchain install nightly --profile minimal");
    }
    if find("cargo-fuzz").is_some() {
        return Ok(());
    }
    step(&format!("cargo-fuzz {CARGO_FUZZ}"), || {
        let mut install = cargo();
        install.args([
            "install",
            "--quiet",
            "--locked",
            // It only starts cargo and the targets: what counts is how soon it is there.
            "--debug",
            "cargo-fuzz",
            "--version",
            CARGO_FUZZ,
            "--root",
        ]);
        run(install.arg(tools()))
    })
}

/// Our own tools, beside nobody else's.
pub fn tools() -> PathBuf {
    repository().join(".orlop").join("tools")
}

fn check_kernel() -> Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the kernel's version")?;
    let mut numbers = release
        .split(|character: char| !character.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < OLDEST_KERNEL {
        bail!(
            "this kernel is {}; Orlop needs Linux {}.{} or newer",
            release.trim(),
            OLDEST_KERNEL.0,
            OLDEST_KERNEL.1
        );
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        bail!("this kernel has no BTF (/sys/kernel/btf/vmlinux): Orlop's programs need it");
    }
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading the mount table")?;
    if !mounts.lines().any(|line| line.split(' ').nth(2) == Some("cgroup2")) {
        let target = "/sys/fs/cgroup/unified";
        step("mounting cgroup2", || {
            fs::create_dir_all(target).context("making its mount point")?;
            run(Command::new("mount").args(["-t", "cgroup2", "cgroup2", target]))
        })?;
    }
    Ok(())
}

fn packages() -> Result<()> {
    let missing: Vec<&str> = PACKAGES
        .iter()
        .copied()
        .filter(|package| !is_installed(package))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    step(&format!("Debian's packages: {}", missing.join(" ")), || {
        run(quiet("apt-get").args(["update", "-qq"]))?;
        run(quiet("apt-get")
            .args(["install", "-y", "-qq", "--no-install-recommends"])
            .args(&missing))
    })
}

fn is_installed(package: &str) -> bool {
    let status = output(Command::new("dpkg-query").args(["-W", "-f", "${Status}", package]));
    status.is_some_and(|status| status == "install ok installed")
}

/// A package manager that asks nothing, starts no services, and speaks only of errors.
fn quiet(program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("RUNLEVEL", "1")
        .stdout(std::process::Stdio::null());
    command
}

fn bpf_linker() -> Result<()> {
    if find("bpf-linker").is_some() {
        return Ok(());
    }
    step(&format!("bpf-linker {BPF_LINKER}"), || {
        let mut install = cargo();
        install.args(["install", "--quiet", "--locked", "bpf-linker", "--version", BPF_LINKER]);
        install
            .args(["--no-default-features", "--features", "llvm-22", "--root"])
            .arg(tools());
        install
            .env("LLVM_PREFIX", "/usr/lib/llvm-22")
            .env("LLVM_SYS_221_PREFIX", "/usr/lib/llvm-22");
        run(&mut install)
    })
}

fn go_tool(tool: &GoTool) -> Result<()> {
    let GoTool { name, package, version } = tool;
    if find(name).is_some() {
        return Ok(());
    }
    if output(Command::new("go").arg("version")).is_none() {
        println!("   no Go on this machine: {name} is left out (the tests that drive it will fail)");
        return Ok(());
    }
    step(&format!("{name} {version}"), || {
        let mut install = Command::new("go");
        install.args(["install", &format!("{package}@{version}")]);
        run(install
            .env("GOBIN", tools().join("bin"))
            .stderr(std::process::Stdio::null()))
    })
}

/// A tool of ours, of cargo's, or in the PATH.
fn find(tool: &str) -> Option<PathBuf> {
    let own = tools().join("bin").join(tool);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates = vec![own];
    candidates.extend(std::env::split_paths(&path).map(|folder| folder.join(tool)));
    candidates.into_iter().find(|candidate| candidate.is_file())
}

fn step(what: &str, act: impl FnOnce() -> Result<()>) -> Result<()> {
    println!("== {what}");
    let begin = Instant::now();
    act().with_context(|| format!("setting up: {what}"))?;
    println!("   {:.1} s", begin.elapsed().as_secs_f64());
    Ok(())
}
