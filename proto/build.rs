//! Compiles the .proto files without protoc.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

/// Every file of the model, in the order of their dependencies.
const FILES: &[&str] = &[
    "orlop/meta/v1/options.proto",
    "orlop/meta/v1/meta.proto",
    "orlop/core/v1/core.proto",
    "orlop/apps/v1/apps.proto",
    "orlop/discovery/v1/discovery.proto",
    "orlop/coordination/v1/coordination.proto",
    "orlop/api/v1/api.proto",
    "orlop/metrics/v1/metrics.proto",
    "orlop/node/v1/node.proto",
    "orlop/cluster/v1/join.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=orlop");
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    let mut config = prost_build::Config::new();
    config.btree_map(["."]).bytes(["."]).include_file("_.rs");
    tonic_prost_build::configure().compile_fds_with_config(descriptors, config)?;
    Ok(())
}
