//! The one object model of Orlop and all its RPCs, generated from the `.proto` files beside this crate.
//!
//! The modules mirror the protobuf packages: [`meta`], [`core`], [`apps`], [`discovery`], [`coordination`] hold objects,
//! [`api`], [`node`], [`cluster`] and [`metrics`] the services.

mod exposition;
mod int_or_string;
pub mod json;
pub mod quantity;
mod resource;
pub mod schema;
pub mod time;

pub use exposition::prometheus_text;
pub use generated::orlop::{api, apps, cluster, coordination, core, discovery, meta, metrics, node};
pub use int_or_string::IntOrString;
pub use resource::{Resource, ResourceKind, object_kind};

#[allow(
    missing_docs,
    reason = "the documentation stands in the .proto files; generated enums and clients have none"
)]
#[allow(clippy::all, clippy::pedantic, clippy::restriction, reason = "generated code")]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/_.rs"));
}

/// The encoded `google.protobuf.FileDescriptorSet` of the whole model, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
