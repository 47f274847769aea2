//! Builds the kernel programs (`ebpf/programs`) for the BPF target, so that the agent can embed the object.
//!
//! Two toolchains can do it: a rustc that comes with a ready-made `core` for BPF (Debian's `rustc-web` with
//! `libstd-rust-web-dev-bpf`, which `cargo xtask setup` installs), or a rustup nightly with `rust-src`. Both link with
//! bpf-linker. `ORLOP_BPF_RUSTC` and `ORLOP_BPF_LINKER` name others.

use std::{
    env, fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::{Path, PathBuf},
    process::{Command, exit},
};

const TARGET: &str = "bpfel-unknown-none";
const OBJECT: &str = "orlop-ebpf";

fn main() {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let workspace = manifest.parent().map_or_else(|| manifest.clone(), Path::to_path_buf);
    for path in [
        "ebpf/abi/src",
        "ebpf/abi/Cargo.toml",
        "ebpf/programs/src",
        "ebpf/programs/Cargo.toml",
        "Cargo.toml",
    ] {
        println!("cargo:rerun-if-changed={}", workspace.join(path).display());
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=ORLOP_BPF_LINKER");
    println!("cargo:rerun-if-env-changed=ORLOP_BPF_RUSTC");

    match build(&workspace) {
        Ok(id) => println!("cargo:rustc-env=ORLOP_BPF_ID={id:016x}"),
        Err(error) => {
            eprintln!(
                "The kernel programs cannot be built: {error}\nRun `cargo xtask setup`, which installs what they need."
            );
            exit(1);
        }
    }
}

/// Builds the object into `OUT_DIR` and returns a hash of it.
fn build(workspace: &Path) -> Result<u64, String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("no OUT_DIR")?);
    let linker = find_linker(workspace)?;
    let target_directory = out.join("bpf");
    let mut command = toolchain()?;
    command
        .current_dir(workspace)
        .args([
            "build",
            "--quiet",
            "--profile",
            "bpf",
            "--package",
            OBJECT,
            "--target",
            TARGET,
            "--target-dir",
        ])
        .arg(&target_directory)
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker)
        // v3: 32-bit instructions and atomics, in every kernel since 5.12.
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            [
                &format!(
                    "--cfg=bpf_target_arch=\"{}\"",
                    env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default()
                ),
                "-Cdebuginfo=2",
                "-Ctarget-cpu=v3",
                "-Clink-arg=--btf",
                // The object is the same wherever the repository lies.
                &format!("--remap-path-prefix={}=.", workspace.display()),
            ]
            .join("\x1f"),
        );
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{command:?}:\n{}", String::from_utf8_lossy(&output.stderr)));
    }
    let built = target_directory.join(TARGET).join("bpf").join(OBJECT);
    let bytes = fs::read(&built).map_err(|error| format!("{}: {error}", built.display()))?;
    fs::write(out.join("orlop-ebpf.o"), &bytes).map_err(|error| error.to_string())?;
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    Ok(hasher.finish())
}

/// A cargo that can compile for the BPF target, with nothing of this build's own environment.
fn toolchain() -> Result<Command, String> {
    let candidates = [env::var_os("ORLOP_BPF_RUSTC"), Some("/usr/bin/rustc".into())];
    for rustc in candidates.into_iter().flatten() {
        if let Some(sysroot) = print_sysroot(Command::new(&rustc))
            && sysroot.join("lib/rustlib").join(TARGET).is_dir()
        {
            let mut cargo = clean(Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into())));
            // A released compiler: the variable allows it the unstable features that the BPF crates use.
            cargo.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
            return Ok(cargo);
        }
    }
    let mut nightly = clean(Command::new("rustup"));
    nightly.args(["run", "nightly", "rustc"]);
    if let Some(sysroot) = print_sysroot(nightly)
        && sysroot.join("lib/rustlib/src/rust/library").is_dir()
    {
        let mut cargo = clean(Command::new("rustup"));
        cargo.args(["run", "nightly", "cargo", "-Zbuild-std=core"]);
        return Ok(cargo);
    }
    Err(format!(
        "no rustc has a `core` for {TARGET}: neither /usr/bin/rustc (Debian's rustc-web and libstd-rust-web-dev-bpf) nor \
         a rustup nightly with rust-src"
    ))
}

fn print_sysroot(mut rustc: Command) -> Option<PathBuf> {
    let output = clean_ref(&mut rustc).args(["--print", "sysroot"]).output().ok()?;
    output
        .status
        .success()
        .then(|| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

/// What cargo set for this build script would steer the inner cargo (clippy's driver as compiler, flags, directories).
fn clean(mut command: Command) -> Command {
    clean_ref(&mut command);
    command
}

fn clean_ref(command: &mut Command) -> &mut Command {
    const KEPT: [&str; 2] = ["CARGO_HOME", "RUSTUP_HOME"];
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let ours = ["CARGO", "RUST", "DEP_", "CLIPPY"]
            .iter()
            .any(|prefix| text.starts_with(prefix))
            || [
                "TARGET",
                "HOST",
                "PROFILE",
                "OPT_LEVEL",
                "DEBUG",
                "NUM_JOBS",
                "OUT_DIR",
                "LD_LIBRARY_PATH",
            ]
            .contains(&text.as_ref());
        let network =
            text.starts_with("CARGO_NET") || text.starts_with("CARGO_HTTP") || text.starts_with("CARGO_REGISTR");
        if ours && !network && !KEPT.contains(&text.as_ref()) {
            command.env_remove(&name);
        }
    }
    command
}

fn find_linker(workspace: &Path) -> Result<PathBuf, String> {
    if let Some(given) = env::var_os("ORLOP_BPF_LINKER") {
        return Ok(given.into());
    }
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")));
    let mut places = vec![workspace.join(".orlop/tools/bin")];
    places.extend(home.map(|home| home.join("bin")));
    places.extend(env::var_os("PATH").iter().flat_map(env::split_paths));
    places
        .iter()
        .map(|place| place.join("bpf-linker"))
        .find(|path| path.is_file())
        .ok_or_else(|| "bpf-linker is neither in .orlop/tools/bin, nor in cargo's bin, nor in PATH".to_owned())
}
