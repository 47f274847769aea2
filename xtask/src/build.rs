//! Building everything that a lab runs.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, bail};

use crate::run::{cargo, output, repository, run};

/// Cargo's profile.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Quick to build: for `up` and `test`.
    Dev,
    /// For benchmarks.
    Release,
}

impl Profile {
    /// Where its programs are.
    pub fn folder(self) -> PathBuf {
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), PathBuf::from);
        target.join(if self == Self::Release { "release" } else { "debug" })
    }
}

/// The programs that run on hosts, and the static ones that run in containers.
pub fn everything(profile: Profile) -> Result<()> {
    println!("== building");
    let mut programs = cargo();
    programs.args(["build", "--bins"]);
    for package in ["orlop-control", "orlop-node", "orlop-bridge", "orlop-tests"] {
        programs.args(["--package", package]);
    }
    if profile == Profile::Release {
        programs.arg("--release");
    }
    run(&mut programs)?;
    static_programs()
}

/// The integration tests of the workspace, by name.
pub struct Tests {
    /// Of the parts, each on its own.
    pub parts: Vec<String>,
    /// Of the whole, end to end.
    pub whole: Vec<String>,
}

impl Tests {
    /// Asks cargo. No two may have one name: it is what they are chosen by.
    pub fn of_workspace() -> Result<Self> {
        let mut metadata = cargo();
        metadata.args(["metadata", "--no-deps", "--format-version", "1"]);
        let text = output(&mut metadata).context("running cargo metadata")?;
        let workspace: Workspace = serde_json::from_str(&text).context("reading cargo's metadata")?;
        let (mut parts, mut whole) = (Vec::new(), Vec::new());
        for package in workspace.packages {
            let into = if package.name == "orlop-tests" {
                &mut whole
            } else {
                &mut parts
            };
            let is_test = |target: &Target| target.kind.iter().any(|kind| kind == "test");
            into.extend(package.targets.into_iter().filter(is_test).map(|target| target.name));
        }
        match parts.iter().find(|name| whole.contains(name)) {
            Some(name) => bail!("a part and tests/tests both have a test called {name}: rename one"),
            None => Ok(Self { parts, whole }),
        }
    }
}

/// What `cargo metadata` says.
#[derive(serde::Deserialize)]
struct Workspace {
    packages: Vec<Package>,
}

#[derive(serde::Deserialize)]
struct Package {
    name: String,
    targets: Vec<Target>,
}

#[derive(serde::Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// `orlop-pause` and `orlop-fixture` have no libraries beside them in their containers.
fn static_programs() -> Result<()> {
    let version = output(std::process::Command::new("rustc").arg("-vV").current_dir(repository()))
        .context("running rustc -vV")?;
    let host = version
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .context("rustc names no host")?;
    let target = Profile::Release
        .folder()
        .parent()
        .map(|target| target.join("static"))
        .context("a target folder")?;
    let mut build = cargo();
    // With a --target of its own, so that build scripts and procedural macros are not made static.
    build.args([
        "build",
        "--release",
        "--target",
        host,
        "--package",
        "orlop-pause",
        "--package",
        "orlop-fixture",
    ]);
    build
        .arg("--target-dir")
        .arg(&target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols");
    run(&mut build)?;
    let folder = repository().join(".orlop").join("static");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    for name in ["orlop-pause", "orlop-fixture"] {
        let (from, to) = (target.join(host).join("release").join(name), folder.join(name));
        let temporary = folder.join(format!(".{name}.new"));
        fs::copy(&from, &temporary).with_context(|| format!("copying {}", from.display()))?;
        // A running container may have the old one open.
        fs::rename(&temporary, &to).with_context(|| format!("putting {} in place", to.display()))?;
    }
    Ok(())
}
