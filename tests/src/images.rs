//! The test image, made here: one static program in a docker-archive.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};

/// The image's name in manifests.
pub const FIXTURE_IMAGE: &str = "orlop.dev/fixture:1";

/// Writes `orlop-fixture.tar` into a folder of image archives, from the static `orlop-fixture` program. The archive has the
/// same bytes for the same program.
pub fn write_fixture_image(program: &Path, folder: &Path) -> Result<PathBuf> {
    let binary =
        fs::read(program).with_context(|| format!("reading {}: cargo xtask up builds it", program.display()))?;
    let layer = layer(&[("fixture", &binary)])?;
    let diff_id = format!("sha256:{}", hex::encode(Sha256::digest(&layer)));
    let config = serde_json::to_vec(&json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": {
            "Entrypoint": ["/fixture"],
            "Cmd": ["web", "8080"],
            "Env": ["PATH=/"],
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [],
    }))?;
    let config_name = format!("{}.json", hex::encode(Sha256::digest(&config)));
    let manifest = serde_json::to_vec(&json!([{
        "Config": config_name,
        "RepoTags": [FIXTURE_IMAGE],
        "Layers": ["layer.tar"],
    }]))?;
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let path = folder.join("orlop-fixture.tar");
    // Tests of one process may do this side by side.
    let temporary = folder.join(format!(".orlop-fixture.{}", uuid::Uuid::new_v4()));
    let mut archive = tar::Builder::new(File::create(&temporary).context("writing the image")?);
    append(&mut archive, &config_name, &config, 0o644)?;
    append(&mut archive, "layer.tar", &layer, 0o644)?;
    append(&mut archive, "manifest.json", &manifest, 0o644)?;
    archive.into_inner()?.flush()?;
    fs::rename(&temporary, &path).context("putting the image in place")?;
    Ok(path)
}

/// A layer of executable files: the same bytes for the same files.
pub fn layer(files: &[(&str, &[u8])]) -> Result<Vec<u8>> {
    let mut layer = tar::Builder::new(Vec::new());
    for (name, content) in files {
        append(&mut layer, name, content, 0o755)?;
    }
    Ok(layer.into_inner()?)
}

fn append<W: Write>(archive: &mut tar::Builder<W>, name: &str, content: &[u8], mode: u32) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_cksum();
    archive
        .append_data(&mut header, name, content)
        .with_context(|| format!("adding {name}"))
}
