//! `cargo xtask peers`: the real Kubernetes and etcd, which benchmarks measure beside, built from the Go module proxy.
//!
//! A module of our own requires theirs, so that no source tree is copied or changed. Kubernetes' own modules (k8s.io/api, ...) are
//! replaced by directories in its repository; we replace them by the versions that are published of them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::run::{output, repository, run};

const KUBERNETES_MODULE: &str = "k8s.io/kubernetes";
const KUBERNETES: &str = "v1.36.0";
/// The version of Kubernetes' published parts that belongs to [`KUBERNETES`].
const STAGING: &str = "v0.36.0";
const ETCD_MODULE: &str = "go.etcd.io/etcd/server/v3";
const ETCD: &str = "v3.6.8";
const COMPONENTS: &[&str] = &[
    "kube-apiserver",
    "kube-scheduler",
    "kube-controller-manager",
    "kube-proxy",
    "kubectl",
];
const ETCD_SERVER: &str = "etcd-server";

/// Where they are: `.orlop/peers`.
pub fn folder() -> PathBuf {
    repository().join(".orlop").join("peers")
}

/// Builds what is missing.
pub fn build() -> Result<()> {
    let folder = folder();
    let missing: Vec<&str> = COMPONENTS
        .iter()
        .copied()
        .filter(|component| !folder.join(component).is_file())
        .collect();
    let etcd = !folder.join(ETCD_SERVER).is_file();
    if missing.is_empty() && !etcd {
        return Ok(());
    }
    if output(Command::new("go").arg("version")).is_none() {
        bail!(
            "the peers are built with Go, which is not on this machine: install Go 1.26 or newer, or leave the peers out"
        );
    }
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    if etcd {
        let module = folder.join("etcd-module");
        prepare(&module, ETCD_MODULE, ETCD, &[])?;
        compile(&module, ETCD_MODULE, "", &folder.join(ETCD_SERVER))?;
    }
    if !missing.is_empty() {
        let module = folder.join("kubernetes-module");
        prepare(&module, KUBERNETES_MODULE, KUBERNETES, &staging()?)?;
        for component in missing {
            let version = format!(
                "-X k8s.io/component-base/version.gitVersion={KUBERNETES} \
                 -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36"
            );
            let package = format!("{KUBERNETES_MODULE}/cmd/{component}");
            compile(&module, &package, &version, &folder.join(component))?;
        }
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Downloaded {
    go_mod: PathBuf,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct GoMod {
    #[serde(default)]
    replace: Vec<Replace>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Replace {
    old: Module,
    new: Module,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Module {
    path: String,
}

/// The modules that Kubernetes replaces by directories of its own repository.
fn staging() -> Result<Vec<String>> {
    let wanted = format!("{KUBERNETES_MODULE}@{KUBERNETES}");
    let mut download = go(Path::new("/"));
    let text = output(download.args(["mod", "download", "-json", &wanted]))
        .with_context(|| format!("go mod download {wanted}: is the Go module proxy reachable?"))?;
    let downloaded: Downloaded = serde_json::from_str(&text).context("what go mod download prints")?;
    let mut edit = go(Path::new("/"));
    let text = output(edit.args(["mod", "edit", "-json"]).arg(&downloaded.go_mod))
        .with_context(|| format!("reading {}", downloaded.go_mod.display()))?;
    let module: GoMod = serde_json::from_str(&text).context("what go mod edit prints")?;
    Ok(module
        .replace
        .into_iter()
        .filter(|replace| replace.new.path.starts_with("./staging/"))
        .map(|replace| replace.old.path)
        .collect())
}

/// A module that requires theirs.
fn prepare(folder: &Path, module: &str, version: &str, staging: &[String]) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let manifest = folder.join("go.mod");
    fs::write(&manifest, "module orlop.dev/peers\n").with_context(|| format!("writing {}", manifest.display()))?;
    let mut edit = go(folder);
    edit.args(["mod", "edit", &format!("-require={module}@{version}")]);
    edit.args(
        staging
            .iter()
            .map(|replaced| format!("-replace={replaced}={replaced}@{STAGING}")),
    );
    run(&mut edit)
}

fn compile(module: &Path, package: &str, version: &str, to: &Path) -> Result<()> {
    println!("== building {package}");
    let begin = Instant::now();
    // Put in place when it is whole: an interrupted build leaves nothing that looks like a program.
    let unfinished = to.with_extension("new");
    run(go(module)
        .args(["build", "-ldflags", version, "-o"])
        .arg(&unfinished)
        .arg(package))?;
    fs::rename(&unfinished, to).with_context(|| format!("putting {} in place", to.display()))?;
    println!("   {:.0} s", begin.elapsed().as_secs_f64());
    Ok(())
}

/// Go that resolves what is not written down yet, and no workspace around it.
fn go(folder: &Path) -> Command {
    let mut go = Command::new("go");
    go.current_dir(folder).env("GOWORK", "off");
    if folder.join("go.mod").exists() {
        go.env("GOFLAGS", "-mod=mod");
    }
    go
}
