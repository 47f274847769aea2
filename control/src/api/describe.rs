//! Descriptors of the google.rpc messages in error details, so that grpcurl shows them in words.

use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet, MessageOptions,
    field_descriptor_proto::{Label, Type},
};

/// For the reflection service, beside the model's own descriptors.
pub fn error_details() -> FileDescriptorSet {
    let violation = message("FieldViolation", vec![text("field", 1), text("description", 2)]);
    let violations = nested("field_violations", 1, ".google.rpc.BadRequest.FieldViolation");
    let bad_request = DescriptorProto {
        nested_type: vec![violation],
        ..message("BadRequest", vec![violations])
    };
    let entry = DescriptorProto {
        options: Some(MessageOptions {
            map_entry: Some(true),
            ..MessageOptions::default()
        }),
        ..message("MetadataEntry", vec![text("key", 1), text("value", 2)])
    };
    let metadata = nested("metadata", 3, ".google.rpc.ErrorInfo.MetadataEntry");
    let error_info = DescriptorProto {
        nested_type: vec![entry],
        ..message("ErrorInfo", vec![text("reason", 1), text("domain", 2), metadata])
    };
    let file = FileDescriptorProto {
        name: Some("google/rpc/error_details.proto".to_owned()),
        package: Some("google.rpc".to_owned()),
        syntax: Some("proto3".to_owned()),
        message_type: vec![bad_request, error_info],
        ..FileDescriptorProto::default()
    };
    FileDescriptorSet { file: vec![file] }
}

fn message(name: &str, field: Vec<FieldDescriptorProto>) -> DescriptorProto {
    DescriptorProto {
        name: Some(name.to_owned()),
        field,
        ..DescriptorProto::default()
    }
}

fn text(name: &str, number: i32) -> FieldDescriptorProto {
    FieldDescriptorProto {
        name: Some(name.to_owned()),
        json_name: Some(name.to_owned()),
        number: Some(number),
        label: Some(Label::Optional.into()),
        r#type: Some(Type::String.into()),
        ..FieldDescriptorProto::default()
    }
}

fn nested(name: &str, number: i32, type_name: &str) -> FieldDescriptorProto {
    let json_name = if name == "field_violations" {
        "fieldViolations"
    } else {
        name
    };
    FieldDescriptorProto {
        name: Some(name.to_owned()),
        json_name: Some(json_name.to_owned()),
        number: Some(number),
        label: Some(Label::Repeated.into()),
        r#type: Some(Type::Message.into()),
        type_name: Some(type_name.to_owned()),
        ..FieldDescriptorProto::default()
    }
}
