//! Compiles the .proto files without protoc, and derives from their descriptors what protobuf does not know: the
//! Kubernetes JSON of every message of the object model, and the table of its fields that [`schema`](src/schema.rs) offers.

#[path = "build/json.rs"]
mod json;
#[path = "build/schema.rs"]
mod schema;

use std::{env, error::Error, fs, path::PathBuf};

use prost_reflect::{DescriptorPool, FieldDescriptor, MessageDescriptor};

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

/// The packages whose messages have a JSON form.
const OBJECT_PACKAGES: &[&str] = &[
    "orlop.meta.v1",
    "orlop.core.v1",
    "orlop.apps.v1",
    "orlop.discovery.v1",
    "orlop.coordination.v1",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=orlop");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=build.rs");
    let mut compiler = protox::Compiler::new(["."])?;
    compiler
        .include_source_info(true)
        .include_imports(true)
        .open_files(FILES)?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // Encoded by the compiler itself: prost's own descriptor types would lose our options.
    let encoded = compiler.encode_file_descriptor_set();
    fs::write(out.join("descriptors.bin"), &encoded)?;

    let pool = DescriptorPool::decode(encoded.as_slice())?;
    let options = Options::new(&pool)?;
    let mut config = prost_build::Config::new();
    config.btree_map(["."]).bytes(["."]).include_file("_.rs");
    json::configure(&mut config, &pool, &options)?;
    fs::write(out.join("schema.rs"), schema::generate(&pool, &options)?)?;
    tonic_prost_build::configure().compile_fds_with_config(compiler.file_descriptor_set(), config)?;
    Ok(())
}

/// The messages of the object model.
fn object_messages(pool: &DescriptorPool) -> impl Iterator<Item = MessageDescriptor> + '_ {
    pool.all_messages()
        .filter(|message| OBJECT_PACKAGES.contains(&message.package_name()) && !message.is_map_entry())
}

/// Reads the options of `orlop/meta/v1/options.proto`.
struct Options {
    always: prost_reflect::ExtensionDescriptor,
    merge_key: prost_reflect::ExtensionDescriptor,
    micro_time: prost_reflect::ExtensionDescriptor,
    quantity: prost_reflect::ExtensionDescriptor,
    int_or_string: prost_reflect::ExtensionDescriptor,
    set: prost_reflect::ExtensionDescriptor,
}

impl Options {
    fn new(pool: &DescriptorPool) -> Result<Self, Box<dyn Error>> {
        let find = |name: &str| {
            let name = format!("orlop.meta.v1.{name}");
            pool.get_extension_by_name(&name)
                .ok_or_else(|| format!("no option {name}"))
        };
        Ok(Self {
            always: find("always")?,
            merge_key: find("merge_key")?,
            micro_time: find("micro_time")?,
            quantity: find("quantity")?,
            int_or_string: find("int_or_string")?,
            set: find("set")?,
        })
    }

    fn flag(field: &FieldDescriptor, option: &prost_reflect::ExtensionDescriptor) -> bool {
        field.options().get_extension(option).as_bool().unwrap_or(false)
    }

    fn always(&self, field: &FieldDescriptor) -> bool {
        Self::flag(field, &self.always)
    }

    fn micro_time(&self, field: &FieldDescriptor) -> bool {
        Self::flag(field, &self.micro_time)
    }

    fn quantity(&self, field: &FieldDescriptor) -> bool {
        Self::flag(field, &self.quantity)
    }

    fn int_or_string(&self, field: &FieldDescriptor) -> bool {
        Self::flag(field, &self.int_or_string)
    }

    fn set(&self, field: &FieldDescriptor) -> bool {
        Self::flag(field, &self.set)
    }

    /// The element's identifying fields; empty without the option.
    fn merge_key(&self, field: &FieldDescriptor) -> Vec<String> {
        let options = field.options();
        let text = options.get_extension(&self.merge_key);
        text.as_str()
            .unwrap_or_default()
            .split(',')
            .filter(|key| !key.is_empty())
            .map(str::to_owned)
            .collect()
    }
}
