//! `cargo xtask fuzz`: the fuzz targets of `fuzz/`, built by cargo-fuzz on the nightly toolchain.

use std::{
    collections::VecDeque,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread::{available_parallelism, scope},
};

use anyhow::{Context, Result, bail};

use crate::{
    run::{output, repository, run},
    setup,
};

/// An input may take no longer, in seconds: what does is a finding.
const SLOWEST_INPUT: u32 = 20;
/// Nor more memory, in MiB.
const MEMORY: u32 = 1024;
/// Runs that are shorter, in seconds, are of targets that are built quickly rather than fast ones, and repeatable on a clean clone: they try the same
/// inputs in the same order every time, at most [`REPEATABLE`]. What is found belongs to a change then, not to chance.
const LONG: u32 = 30;
const REPEATABLE: usize = 5000;

/// What the targets exercise has no unsafe code of its own; without a sanitizer they build and run in a fraction of the time.
const SANITIZER: [&str; 2] = ["--sanitizer", "none"];

/// How the targets are built.
#[derive(Clone, Copy)]
enum Build {
    Quick,
    Fast,
}

/// Runs targets, or all, for some seconds each, from the seeds in the repository and what earlier runs found; as many at a time
/// as there are processors.
///
/// # Errors
/// A finding: the input is kept in `fuzz/artifacts/TARGET`.
pub fn fuzz(wanted: &[String], seconds: u32) -> Result<()> {
    setup::cargo_fuzz()?;
    let targets = targets()?;
    if let Some(unknown) = wanted.iter().find(|name| !targets.contains(name)) {
        bail!("there is no fuzz target {unknown}; there are {}", targets.join(", "));
    }
    println!("== fuzz targets, {seconds} s each");
    let build = if seconds < LONG { Build::Quick } else { Build::Fast };
    run(&mut cargo_fuzz_build(build))?;
    let waiting: VecDeque<&String> = targets
        .iter()
        .filter(|name| wanted.is_empty() || wanted.contains(name))
        .collect();
    let (waiting, findings) = (Mutex::new(waiting), Mutex::new(Vec::new()));
    let next = || waiting.lock().ok().and_then(|mut waiting| waiting.pop_front());
    scope(|scope| {
        for _ in 0..available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(target) = next() {
                    if let Err(finding) = one(build, target, seconds)
                        && let Ok(mut findings) = findings.lock()
                    {
                        eprintln!("error: {finding:#}");
                        findings.push(target.as_str());
                    }
                }
            });
        }
    });
    let findings = findings.into_inner().unwrap_or_default();
    if !findings.is_empty() {
        bail!(
            "fuzz targets that failed: {}; the inputs that were found are in fuzz/artifacts",
            findings.join(", ")
        );
    }
    Ok(())
}

fn one(build: Build, target: &str, seconds: u32) -> Result<()> {
    let [seeds, corpus, artifacts] = ["seeds", "corpus", "artifacts"].map(|kind| folder().join(kind).join(target));
    for needed in [&seeds, &corpus, &artifacts] {
        fs::create_dir_all(needed).with_context(|| format!("making {}", needed.display()))?;
    }
    // libFuzzer begins with what is given, and with an empty input.
    let given = files(&seeds)? + files(&corpus)? + 1;
    let mut command = Command::new(build.folder().join(target));
    // What is new goes into the first.
    command.args([&corpus, &seeds]);
    command.arg(format!("-artifact_prefix={}/", artifacts.display()));
    command.arg(format!("-max_total_time={seconds}"));
    command.arg(format!("-timeout={SLOWEST_INPUT}"));
    command.arg(format!("-rss_limit_mb={MEMORY}"));
    command.arg("-print_final_stats=1");
    if let Build::Quick = build {
        command.args(["-seed=1", &format!("-runs={REPEATABLE}")]);
    }
    let ended = command.output().with_context(|| format!("running {target}"))?;
    let said = String::from_utf8_lossy(&ended.stderr);
    if !ended.status.success() {
        // The last lines have the panic and the input.
        let lines: Vec<&str> = said.lines().collect();
        let last = lines[lines.len().saturating_sub(40)..].join("\n");
        bail!("fuzz target {target}:\n{last}");
    }
    let figure = |name: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(name));
        line.map_or("?", |value| value.trim_start_matches(':').trim())
            .to_owned()
    };
    let (inputs, memory) = (figure("stat::number_of_executed_units"), figure("stat::peak_rss_mb"));
    println!("{target}: {inputs} inputs, {memory} MiB");
    // A corpus of long runs may be all that a short one has the time for.
    if given >= REPEATABLE || inputs.parse().is_ok_and(|inputs: usize| inputs > given) {
        Ok(())
    } else {
        bail!(
            "fuzz target {target} tried {inputs} inputs, no more than it was given ({given}): it is too slow, or tries nothing"
        )
    }
}

fn files(folder: &Path) -> Result<usize> {
    let entries = fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))?;
    Ok(entries.count())
}

impl Build {
    /// Where its programs are.
    fn folder(self) -> PathBuf {
        let profile = match self {
            Self::Quick => "debug",
            Self::Fast => "release",
        };
        folder().join("target").join(platform()).join(profile)
    }
}

fn platform() -> String {
    format!("{}-unknown-linux-gnu", std::env::consts::ARCH)
}

fn folder() -> PathBuf {
    repository().join("fuzz")
}

fn targets() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder().join("fuzz_targets")).context("listing the fuzz targets")? {
        let name = entry?.file_name();
        if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".rs")) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// `cargo fuzz build` on the nightly, whichever toolchain runs us.
fn cargo_fuzz_build(build: Build) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", "cargo", "fuzz", "build"]);
    command.args(SANITIZER).args(["--target", &platform()]);
    if let Build::Quick = build {
        command.arg("--dev");
    }
    command.current_dir(repository());
    command.env("PATH", format!("{}:{path}", setup::tools().join("bin").display()));
    for inherited in ["CARGO", "RUSTC", "RUSTUP_TOOLCHAIN", "CARGO_TARGET_DIR"] {
        command.env_remove(inherited);
    }
    command
}

/// Whether there is a nightly toolchain to fuzz with.
pub fn has_nightly() -> bool {
    output(Command::new("rustup").args(["run", "nightly", "cargo", "--version"])).is_some()
}
