//! Generates the table of fields: what the messages of the object model look like in JSON, and how their lists merge.

use std::{error::Error, fmt::Write as _};

use prost_reflect::{DescriptorPool, FieldDescriptor, Kind, MessageDescriptor};

use crate::{Options, object_messages};

/// The source of the tables, included by `src/schema.rs`.
pub fn generate(pool: &DescriptorPool, options: &Options) -> Result<String, Box<dyn Error>> {
    let mut source = String::new();
    let mut all = Vec::new();
    for message in object_messages(pool) {
        let constant = constant(&message);
        writeln!(
            source,
            "static {constant}: Message = Message {{ name: {:?}, fields: &[",
            message.full_name()
        )?;
        for field in message.fields() {
            let value = value_type(&field, options)?;
            let shape = shape(&field, options)?;
            writeln!(
                source,
                "    Field {{ json: {:?}, name: {:?}, value: {value}, shape: {shape}, always: {} }},",
                field.json_name(),
                field.name(),
                options.always(&field)
            )?;
        }
        writeln!(source, "] }};")?;
        all.push(constant);
    }
    writeln!(source, "/// Every message of the object model.")?;
    writeln!(source, "pub static MESSAGES: &[&Message] = &[&{}];", all.join(", &"))?;
    Ok(source)
}

fn constant(message: &MessageDescriptor) -> String {
    message.full_name().replace('.', "_").to_uppercase()
}

fn value_type(field: &FieldDescriptor, options: &Options) -> Result<String, Box<dyn Error>> {
    let kind = match field.kind() {
        Kind::Message(entry) if field.is_map() => entry.map_entry_value_field().kind(),
        kind => kind,
    };
    Ok(match kind {
        Kind::String if options.quantity(field) => "Value::Quantity".to_owned(),
        Kind::String => "Value::String".to_owned(),
        Kind::Bool => "Value::Bool".to_owned(),
        Kind::Int32 => "Value::Int32".to_owned(),
        Kind::Int64 => "Value::Int64".to_owned(),
        Kind::Message(message) => match message.full_name() {
            "google.protobuf.Timestamp" => "Value::Time".to_owned(),
            "google.protobuf.Value" => "Value::IntOrString".to_owned(),
            _ => format!("Value::Message(&{})", constant(&message)),
        },
        kind => return Err(format!("{}: {kind:?} has no JSON form yet", field.full_name()).into()),
    })
}

fn shape(field: &FieldDescriptor, options: &Options) -> Result<String, Box<dyn Error>> {
    if field.is_map() {
        return Ok("Shape::Map".to_owned());
    }
    if !field.is_list() {
        return Ok("Shape::Single".to_owned());
    }
    let keys = options.merge_key(field);
    if let Kind::Message(element) = field.kind() {
        for key in &keys {
            if element.fields().all(|field| field.json_name() != key) {
                return Err(format!("{}: no merge key {key}", field.full_name()).into());
            }
        }
    }
    Ok(match (keys.is_empty(), options.set(field)) {
        (false, _) => format!("Shape::List(ListMerge::Keys(&{keys:?}))"),
        (true, true) => "Shape::List(ListMerge::Set)".to_owned(),
        (true, false) => "Shape::List(ListMerge::Atomic)".to_owned(),
    })
}
