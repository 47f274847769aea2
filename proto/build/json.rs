//! Serde attributes for the messages of the object model, so that their JSON is Kubernetes' own.

use std::error::Error;

use prost_reflect::{Cardinality, DescriptorPool, FieldDescriptor, Kind};

use crate::{Options, object_messages};

/// Adds derives and attributes for every message of the object model.
pub fn configure(
    config: &mut prost_build::Config,
    pool: &DescriptorPool,
    options: &Options,
) -> Result<(), Box<dyn Error>> {
    for message in object_messages(pool) {
        let path = format!(".{}", message.full_name());
        config.type_attribute(
            &path,
            "#[derive(::serde::Serialize, ::serde::Deserialize)]\n#[serde(default)]",
        );
        for field in message.fields() {
            config.field_attribute(format!("{path}.{}", field.name()), attribute(&field, options)?);
        }
    }
    Ok(())
}

/// The serde attribute of one field.
fn attribute(field: &FieldDescriptor, options: &Options) -> Result<String, Box<dyn Error>> {
    let module = module(field, options)?;
    let mut attribute = format!(
        "#[serde(rename = \"{}\", with = \"crate::json::{module}\"",
        field.json_name()
    );
    if !options.always(field) {
        let empty = match field.cardinality() {
            Cardinality::Repeated => "is_empty",
            _ if field.supports_presence() => "is_none",
            _ => "is_default",
        };
        attribute.push_str(&format!(", skip_serializing_if = \"crate::json::{empty}\""));
    }
    attribute.push_str(")]");
    Ok(attribute)
}

/// The module of `src/json.rs` that reads and writes the field.
fn module(field: &FieldDescriptor, options: &Options) -> Result<&'static str, Box<dyn Error>> {
    if field.is_map() {
        return Ok(if options.quantity(field) { "quantity_map" } else { "map" });
    }
    if field.is_list() {
        return match field.kind() {
            Kind::String | Kind::Message(_) => Ok("plain"),
            kind => Err(format!("{}: a list of {kind:?} has no JSON form yet", field.full_name()).into()),
        };
    }
    if options.quantity(field) {
        return Err(format!("{}: a quantity outside of a map is not modelled yet", field.full_name()).into());
    }
    Ok(match field.kind() {
        Kind::Message(message) => match message.full_name() {
            "google.protobuf.Timestamp" if options.micro_time(field) => "micro_time",
            "google.protobuf.Timestamp" => "time",
            "google.protobuf.Value" if options.int_or_string(field) => "int_or_string",
            "google.protobuf.Value" => return Err(format!("{}: any JSON is not modelled", field.full_name()).into()),
            _ if options.always(field) => "always_message",
            _ => "plain",
        },
        Kind::String | Kind::Bool | Kind::Int32 | Kind::Int64 => "plain",
        kind => return Err(format!("{}: {kind:?} has no JSON form yet", field.full_name()).into()),
    })
}
