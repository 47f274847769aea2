//! The namespaces that a test runs in, and the programs that it needs.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
};

use orlop_node::runtime::cgroup::Cgroups;

/// Set in the inner process: the folder of the test's files.
const INNER: &str = "ORLOP_TEST_STAGE";
/// Set in the inner process: which containerd it is on.
const SERIES: &str = "ORLOP_TEST_CONTAINERD";

/// The containerds that pods are tested on, oldest and newest: the folder of its programs and its first number.
fn containerds() -> [(Option<PathBuf>, u32); 2] {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.orlop/tools/containerd-2/usr/bin");
    [(None, 1), (Some(unpacked), 2)]
}

/// Where a test plays.
#[derive(Clone)]
pub struct Stage {
    /// The test's own folder, with a short path: sockets are in it.
    pub dir: PathBuf,
    /// The static pause program.
    pub pause: PathBuf,
    /// The static fixture program.
    pub fixture: PathBuf,
    /// A folder with the CNI plugin.
    pub cni_bin_dir: PathBuf,
    /// The first number of containerd's version.
    pub containerd: u32,
}

impl Stage {
    fn new(dir: PathBuf) -> Self {
        let target = target();
        let programs = target.join("x86_64-unknown-linux-gnu/debug");
        Self {
            dir,
            pause: programs.join("orlop-pause"),
            fixture: programs.join("orlop-fixture"),
            cni_bin_dir: target.join("debug"),
            containerd: env::var(SERIES).map_or(1, |series| series.parse().unwrap()),
        }
    }

    /// The cgroup of this test's pods.
    pub fn cgroup(&self) -> String {
        let name = self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        format!("/orlop-test-{name}")
    }

    /// Starts containerd. The configuration in the version that is the series' own: 3 with names of its own from 2.0 on.
    pub fn spawn_containerd(&self) -> Child {
        let config = self.dir.join("containerd.toml");
        let (version, cri) = if self.containerd == 1 {
            (2, "\"io.containerd.grpc.v1.cri\"")
        } else {
            (
                3,
                "\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.runtime\", \"io.containerd.cri.v1.images\"",
            )
        };
        let text = format!(
            "version = {version}\nroot = \"{dir}/c\"\nstate = \"/run/c\"\ndisabled_plugins = [{cri}]\n\
             [grpc]\naddress = \"/run/c.sock\"\n[debug]\nlevel = \"warn\"\n",
            dir = self.dir.display()
        );
        fs::write(&config, text).unwrap();
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.join("containerd.log"))
            .unwrap();
        Command::new("containerd")
            .arg("--config")
            .arg(config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    /// Writes the fixture's program as a docker-archive into a folder.
    pub fn write_image(&self, dir: &Path) {
        use sha2::Digest as _;
        let tar_of = |files: &[(&str, &[u8], u32)]| {
            let mut builder = tar::Builder::new(Vec::new());
            for (name, bytes, mode) in files {
                let mut header = tar::Header::new_ustar();
                header.set_size(bytes.len() as u64);
                header.set_mode(*mode);
                builder.append_data(&mut header, name, *bytes).unwrap();
            }
            builder.into_inner().unwrap()
        };
        let program = fs::read(&self.fixture).unwrap();
        let layer = tar_of(&[("fixture", &program, 0o755)]);
        let config = |stop_signal: &str| {
            serde_json::json!({
                "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux",
                "config": {"Entrypoint": ["/fixture"], "Cmd": ["sleep"], "StopSignal": stop_signal},
                "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", hex::encode(sha2::Sha256::digest(&layer)))]},
            })
            .to_string()
        };
        let manifest = serde_json::json!([
            {"Config": "c.json", "RepoTags": ["fixture:1"], "Layers": ["l.tar"]},
            {"Config": "kill.json", "RepoTags": ["fixture:kill"], "Layers": ["l.tar"]},
        ])
        .to_string();
        let archive = tar_of(&[
            ("l.tar", &layer, 0o644),
            ("c.json", config("").as_bytes(), 0o644),
            ("kill.json", config("SIGKILL").as_bytes(), 0o644),
            ("manifest.json", manifest.as_bytes(), 0o644),
        ]);
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("fixture.tar"), archive).unwrap();
    }
}

/// Runs the test inside namespaces of its own, once on each containerd; `name` is the test's own name.
pub fn on_stage(name: &str, test: impl AsyncFnOnce(Stage)) {
    if let Ok(dir) = env::var(INNER) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test(Stage::new(dir.into())));
        return;
    }
    assert!(
        rustix::process::geteuid().is_root(),
        "this test needs root: namespaces, cgroups, mounts"
    );
    build();
    for (programs, series) in containerds() {
        play(name, programs.as_deref(), series);
    }
}

/// Runs this program again for the one test, with these programs of containerd first in its PATH.
fn play(name: &str, programs: Option<&Path>, series: u32) {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = programs
        .map(Path::to_owned)
        .into_iter()
        .chain(env::split_paths(&path))
        .collect::<Vec<_>>();
    let path = env::join_paths(folders).unwrap();
    let version = Command::new("containerd")
        .arg("--version")
        .env("PATH", &path)
        .output()
        .unwrap();
    let version = String::from_utf8_lossy(&version.stdout).trim().to_owned();
    assert!(
        version
            .split(' ')
            .nth(2)
            .is_some_and(|number| number.starts_with(&format!("{series}."))),
        "containerd {series}.x is wanted in {programs:?} or PATH, and what is there says {version:?}: run cargo xtask setup"
    );
    println!("on {version}");
    let dir = tempfile::Builder::new().prefix("ot").rand_bytes(5).tempdir().unwrap();
    let ended = Command::new("unshare")
        .args([
            "--mount",
            "--net",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--propagation",
            "private",
        ])
        .arg("--")
        .arg(env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(INNER, dir.path())
        .env(SERIES, series.to_string())
        .env("PATH", path)
        .stdin(Stdio::null())
        .status()
        .unwrap();
    let stage = Stage::new(dir.path().to_owned());
    let left = Cgroups::detect().unwrap().remove(&stage.cgroup());
    if !ended.success() {
        let log = fs::read_to_string(stage.dir.join("containerd.log")).unwrap_or_default();
        let tail: Vec<&str> = log.lines().rev().take(20).collect();
        for line in tail.iter().rev() {
            eprintln!("containerd: {line}");
        }
    }
    assert!(
        ended.success(),
        "the test failed inside its namespaces on {version}: {ended}"
    );
    left.unwrap();
}

/// Builds what this package's tests need of other packages, once.
fn build() {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        cargo(&[
            "--target",
            "x86_64-unknown-linux-gnu",
            "-p",
            "orlop-pause",
            "-p",
            "orlop-fixture",
        ])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .status()
        .map(|status| assert!(status.success()))
        .unwrap();
        // Beside the packages that `cargo xtask` builds it with: alone it would have other features of what it depends on, and all of that
        // be built once more.
        cargo(&[
            "-p",
            "orlop-control",
            "-p",
            "orlop-node",
            "-p",
            "orlop-bridge",
            "-p",
            "orlop-tests",
            "--bin",
            "orlop-bridge",
        ])
        .status()
        .map(|status| assert!(status.success()))
        .unwrap();
    });
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()));
    command
        .arg("build")
        .arg("--quiet")
        .args(arguments)
        .arg("--target-dir")
        .arg(target());
    command
}

/// The target directory: this program is `TARGET/debug/deps/pods-HASH`.
fn target() -> PathBuf {
    let program = env::current_exe().unwrap();
    program.ancestors().nth(3).map(Path::to_owned).unwrap()
}
