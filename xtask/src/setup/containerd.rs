//! A containerd of the 2 series beside the system's: the tests run pods on both.
//!
//! Debian's stable releases have older ones, so it is unpacked, never installed, from a later suite. Which version that suite has, and
//! what its file is called, its index says: apt reads it with the machine's own settings (mirror, proxy), but into a folder of
//! its own, so that neither the machine's package lists nor its packages change.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use super::{step, tools};
use crate::run::{output, run};

/// Suites in the order in which they are tried; the first whose containerd is new enough and runs here is taken.
const SUITES: &[&str] = &["sid", "testing"];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where its programs are.
pub fn folder() -> PathBuf {
    tools().join("containerd-2").join("usr/bin")
}

/// Fetches it, unless it is there. That it cannot be had stops nothing but the tests that need it.
pub fn containerd_2() {
    if is_new_enough(&folder()) {
        return;
    }
    let fetched = step("containerd 2, unpacked beside the system's", || {
        let mut failures = Vec::new();
        for suite in SUITES {
            match fetch(suite) {
                Ok(()) => return Ok(()),
                Err(error) => failures.push(format!("{suite}: {error:#}")),
            }
        }
        bail!("{}", failures.join("; "))
    });
    if let Err(error) = fetched {
        println!(
            "   {error:#}\n   Without it the tests that run pods on containerd 2 fail. Put containerd, containerd-shim-runc-v2 and ctr of a 2.x \
             release into {} yourself, and run this again.",
            folder().display()
        );
    }
}

/// The program itself is asked: it must run here, too (a later suite's may want a later libc).
fn is_new_enough(folder: &Path) -> bool {
    let version = output(Command::new(folder.join("containerd")).arg("--version"));
    let shim = folder.join("containerd-shim-runc-v2").is_file();
    shim && version.as_deref().and_then(major).is_some_and(|major| major >= 2)
}

/// "containerd github.com/containerd/containerd/v2 2.1.9+unknown COMMIT" -> 2.
fn major(version: &str) -> Option<u32> {
    let number = version.split_whitespace().nth(2)?.trim_start_matches('v');
    number.split('.').next()?.parse().ok()
}

fn fetch(suite: &str) -> Result<()> {
    let root = tools().join("apt");
    let _ = fs::remove_dir_all(&root);
    let unpacked = download(suite, &root).and_then(|package| unpack(&package));
    // Package lists are large, and the next time they would be old.
    let _ = fs::remove_dir_all(&root);
    unpacked
}

fn download(suite: &str, root: &Path) -> Result<PathBuf> {
    for folder in ["state/lists/partial", "cache/archives/partial", "package"] {
        let folder = root.join(folder);
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let sources = root.join("sources.list");
    let signed = if Path::new(KEYRING).exists() {
        format!("[signed-by={KEYRING}] ")
    } else {
        String::new()
    };
    fs::write(&sources, format!("deb {signed}{} {suite} main\n", archive()?)).context("writing sources.list")?;
    run(apt(root, "apt-get").args(["update", "-qq"])).context("reading its index")?;
    run(apt(root, "apt-get")
        .args(["download", "-qq", "containerd"])
        .current_dir(root.join("package")))?;
    let mut entries = fs::read_dir(root.join("package")).context("looking for the package")?;
    let entry = entries.next().context("apt-get downloaded nothing")?;
    Ok(entry.context("looking for the package")?.path())
}

/// Where this machine gets its Debian packages from.
fn archive() -> Result<String> {
    let mut targets = Command::new("apt-get");
    targets.args([
        "indextargets",
        "--format",
        "$(LABEL) $(REPO_URI)",
        "Created-By: Packages",
    ]);
    let text = output(&mut targets).context("asking apt-get for its archives")?;
    let found = text.lines().find_map(|line| line.strip_prefix("Debian "));
    found.map(str::to_owned).context(
        "apt knows no archive of Debian's (\"apt-get indextargets\" shows none labelled Debian): run apt-get update",
    )
}

/// apt with the machine's settings, but with sources, lists and cache of its own.
fn apt(root: &Path, program: &str) -> Command {
    let mut command = Command::new(program);
    let path = |name: &str| root.join(name).display().to_string();
    for (key, value) in [
        ("Dir::Etc::SourceList", path("sources.list")),
        ("Dir::Etc::SourceParts", "/dev/null".to_owned()),
        ("Dir::Etc::Preferences", "/dev/null".to_owned()),
        ("Dir::Etc::PreferencesParts", "/dev/null".to_owned()),
        ("Dir::State", path("state")),
        ("Dir::State::status", "/dev/null".to_owned()),
        ("Dir::Cache", path("cache")),
        ("Dir::Cache::pkgcache", String::new()),
        ("Dir::Cache::srcpkgcache", String::new()),
        ("Acquire::Languages", "none".to_owned()),
        // A mirror may be a snapshot; that the index is Debian's own its signature says.
        ("Acquire::Check-Valid-Until", "false".to_owned()),
        ("APT::Sandbox::User", "root".to_owned()),
    ] {
        command.args(["-o", &format!("{key}={value}")]);
    }
    command.stdout(Stdio::null());
    command
}

fn unpack(package: &Path) -> Result<()> {
    let fresh = tools().join("containerd-2.new");
    let _ = fs::remove_dir_all(&fresh);
    run(Command::new("dpkg").arg("-x").arg(package).arg(&fresh))?;
    let name = package.file_name().unwrap_or_default().display().to_string();
    if !is_new_enough(&fresh.join("usr/bin")) {
        let _ = fs::remove_dir_all(&fresh);
        bail!("{name} is older than 2, or does not run here");
    }
    let place = tools().join("containerd-2");
    let _ = fs::remove_dir_all(&place);
    fs::rename(&fresh, &place).with_context(|| format!("putting {} in place", place.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_as_programs_print_it() {
        let debian = "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3\n";
        assert_eq!(major(debian), Some(1));
        let newer = "containerd github.com/containerd/containerd/v2 2.1.9+unknown \n";
        assert_eq!(major(newer), Some(2));
        assert_eq!(major("containerd example.org/containerd v2.0.0 abc"), Some(2));
        assert_eq!(major(""), None);
    }
}
