//! `cargo xtask tidy`: formatting, lints, documentation, licences.

use std::process::Command;

use anyhow::Result;

use crate::run::{cargo, output, run};

/// Formats (or checks the formatting) and fails on anything that a lint says.
pub fn tidy(check: bool) -> Result<()> {
    // The fuzz targets are a workspace of their own.
    for manifest in ["Cargo.toml", "fuzz/Cargo.toml"] {
        let mut format = cargo();
        format.args(["fmt", "--all", "--manifest-path", manifest]);
        if check {
            format.arg("--check");
        }
        run(&mut format)?;
    }
    let workspace = ["--workspace", "--exclude", "orlop-ebpf"];
    run(cargo()
        .arg("clippy")
        .args(workspace)
        .args(["--all-targets", "--", "-D", "warnings"]))?;
    run(cargo()
        .arg("doc")
        .args(workspace)
        .args(["--no-deps", "--quiet"])
        .env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links"))?;
    if output(Command::new("cargo-deny").arg("--version")).is_some() {
        run(cargo().args(["deny", "check", "bans", "licenses", "sources"]))?;
    } else {
        println!("cargo-deny is not installed: licences and sources are not checked (cargo install cargo-deny)");
    }
    Ok(())
}
