//! Errors as gRPC statuses with google.rpc details.

use std::collections::HashMap;

use bytes::Bytes;
use orlop_proto::json::{JsonError, JsonErrorKind};
use prost::Message;
use prost_types::Any;
use tonic::{Code, Status};

use crate::{
    registry::{FieldError, RegistryError},
    store::{Revision, StoreError},
};

/// Statuses travel in HTTP/2 trailers, and many clients take no more than 16 KiB of these.
const MAX_DETAILS: usize = 8 << 10;
const MAX_MESSAGE: usize = 3 << 10;
/// Before the first entry of a long list that was cut.
const MORE: &str = "...";

/// google.rpc.Status.
#[derive(Clone, PartialEq, Message)]
pub struct RpcStatus {
    /// A google.rpc.Code.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// For people.
    #[prost(string, tag = "2")]
    pub message: String,
    /// For programs.
    #[prost(message, repeated, tag = "3")]
    pub details: Vec<Any>,
}

/// google.rpc.BadRequest.
#[derive(Clone, PartialEq, Message)]
pub struct BadRequest {
    /// One for each wrong field.
    #[prost(message, repeated, tag = "1")]
    pub field_violations: Vec<FieldViolation>,
}

/// google.rpc.BadRequest.FieldViolation.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct FieldViolation {
    /// The path as in JSON.
    #[prost(string, tag = "1")]
    pub field: String,
    /// What is wrong.
    #[prost(string, tag = "2")]
    pub description: String,
}

/// google.rpc.ErrorInfo.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ErrorInfo {
    /// "COMPACTED", "SLOW_WATCHER".
    #[prost(string, tag = "1")]
    pub reason: String,
    /// "orlop.dev".
    #[prost(string, tag = "2")]
    pub domain: String,
    /// `resume_after`.
    #[prost(map = "string, string", tag = "3")]
    pub metadata: HashMap<String, String>,
}

/// A wrong field.
pub(super) fn field(path: &str, message: &str) -> FieldError {
    FieldError {
        field: path.to_owned(),
        message: message.to_owned(),
    }
}

/// One wrong field of a request.
pub(super) fn invalid(path: &str, message: &str) -> Status {
    bad_request("request", &[field(path, message)])
}

/// What is wrong with an object's JSON.
pub(super) fn of_json(error: JsonError) -> FieldError {
    let message = match error.kind {
        JsonErrorKind::Unknown => format!("unknown field {}", error.path),
        JsonErrorKind::Wrong(message) => message,
    };
    FieldError {
        field: error.path,
        message,
    }
}

/// INVALID_ARGUMENT with all wrong fields; `what` is wrong.
pub(super) fn bad_request(what: &str, fields: &[FieldError]) -> Status {
    let mut message = format!("{what} is invalid: ");
    for (index, field) in fields.iter().enumerate() {
        // Some messages name their path themselves: "unknown field spec.foo".
        let text = if field.message.ends_with(&field.field) {
            field.message.clone()
        } else {
            field.to_string()
        };
        if message.len() + text.len() > MAX_MESSAGE {
            if index == 0 {
                message.extend(text.chars().take(MAX_MESSAGE / 4));
            }
            message.push_str(&format!("; and {} more", fields.len() - index.max(1)));
            break;
        }
        if index > 0 {
            message.push_str("; ");
        }
        message.push_str(&text);
    }
    let mut violations = Vec::new();
    let mut size = 0;
    for field in fields {
        let violation = FieldViolation {
            field: field.field.clone(),
            description: field.message.clone(),
        };
        size += violation.encoded_len() + 4;
        if size > MAX_DETAILS {
            let left = fields.len() - violations.len();
            violations.push(FieldViolation {
                field: MORE.to_owned(),
                description: format!("and {left} more"),
            });
            break;
        }
        violations.push(violation);
    }
    let detail = BadRequest {
        field_violations: violations,
    };
    with_detail(Code::InvalidArgument, message, "google.rpc.BadRequest", &detail)
}

/// OUT_OF_RANGE: what was asked for is no longer there.
pub(super) fn out_of_range(reason: &str, message: String, resume_after: Revision) -> Status {
    let metadata = HashMap::from([("resume_after".to_owned(), resume_after.to_string())]);
    out_of_range_with(reason, message, metadata)
}

/// A list whose snapshot is no longer kept, and the token to go on with from another.
pub(super) fn expired_list(message: String, resume_after: Revision, token: String) -> Status {
    let metadata = HashMap::from([
        ("resume_after".to_owned(), resume_after.to_string()),
        ("continue".to_owned(), token),
    ]);
    out_of_range_with("COMPACTED", message, metadata)
}

fn out_of_range_with(reason: &str, message: String, metadata: HashMap<String, String>) -> Status {
    let detail = ErrorInfo {
        reason: reason.to_owned(),
        domain: "orlop.dev".to_owned(),
        metadata,
    };
    with_detail(Code::OutOfRange, message, "google.rpc.ErrorInfo", &detail)
}

/// A failed write or read.
pub(super) fn of_registry(error: &RegistryError) -> Status {
    match error {
        RegistryError::NotFound { .. } => Status::not_found(error.to_string()),
        RegistryError::AlreadyExists { .. } => Status::already_exists(error.to_string()),
        RegistryError::Conflict { .. } => Status::aborted(error.to_string()),
        RegistryError::Invalid { resource, name, fields } => bad_request(&format!("{resource} \"{name}\""), fields),
        RegistryError::Precondition(_) => Status::failed_precondition(error.to_string()),
        RegistryError::Exhausted(_) => Status::resource_exhausted(error.to_string()),
        RegistryError::Fenced(_) => Status::unavailable(error.to_string()),
        RegistryError::Store(error) => of_store(error),
    }
}

/// The store failed.
pub(super) fn of_store(error: &StoreError) -> Status {
    match error {
        StoreError::Conflict { .. } => Status::aborted(error.to_string()),
        StoreError::Compacted { oldest, .. } => out_of_range("COMPACTED", error.to_string(), *oldest),
        StoreError::Future { .. } | StoreError::Newer { .. } => Status::failed_precondition(error.to_string()),
        StoreError::TooLarge(reason) => invalid("object", &format!("is too large to be stored: {reason}")),
        StoreError::Damaged { .. } => Status::data_loss(error.to_string()),
        StoreError::Disk { full: true, .. } | StoreError::Full { .. } => Status::resource_exhausted(error.to_string()),
        StoreError::Disk { .. } => Status::unavailable(error.to_string()),
        StoreError::Unavailable(source) => {
            tracing::warn!(error = source.to_string(), "store unavailable");
            Status::unavailable("the store is unavailable; whether a write happened is unknown")
        }
    }
}

fn with_detail(code: Code, message: String, name: &str, detail: &impl Message) -> Status {
    let any = Any {
        type_url: format!("type.googleapis.com/{name}"),
        value: detail.encode_to_vec(),
    };
    let status = RpcStatus {
        code: code as i32,
        message: message.clone(),
        details: vec![any],
    };
    Status::with_details(code, message, Bytes::from(status.encode_to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn details(status: &Status) -> RpcStatus {
        RpcStatus::decode(status.details()).expect("a status")
    }

    #[test]
    fn every_field_is_named() {
        let status = bad_request(
            "pods \"a\"",
            &[field("spec.x", "unknown field"), field("spec.y[0]", "too long")],
        );
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(
            status.message(),
            "pods \"a\" is invalid: spec.x: unknown field; spec.y[0]: too long"
        );
        let details = details(&status);
        assert_eq!(details.details[0].type_url, "type.googleapis.com/google.rpc.BadRequest");
        let bad = BadRequest::decode(details.details[0].value.as_slice()).expect("decodes");
        assert_eq!(bad.field_violations[1].field, "spec.y[0]");
    }

    #[test]
    fn a_thousand_wrong_fields_fit_into_trailers() {
        let fields: Vec<FieldError> = (0..1000)
            .map(|index| field(&format!("spec.containers[{index}].unknown"), "unknown field"))
            .collect();
        let status = bad_request("manifest", &fields);
        assert!(status.message().len() < MAX_MESSAGE + 64, "{}", status.message().len());
        assert!(status.message().ends_with(" more"), "{}", status.message());
        let encoded = details(&status).details[0].value.len();
        assert!(encoded < MAX_DETAILS + 64, "{encoded}");
        let long = bad_request("manifest", &[field("x", &"y".repeat(1 << 20))]);
        assert!(long.message().len() < MAX_MESSAGE);
        assert!(details(&long).encoded_len() < MAX_DETAILS);
    }

    #[test]
    fn what_is_too_large_has_a_path_too() {
        let status = of_store(&StoreError::TooLarge("2 bytes, at most 1".to_owned()));
        let bad = BadRequest::decode(details(&status).details[0].value.as_slice()).expect("decodes");
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(bad.field_violations[0].field, "object");
        assert!(bad.field_violations[0].description.contains("at most 1"), "{bad:?}");
    }

    #[test]
    fn where_to_resume_is_told() {
        let status = of_store(&StoreError::Compacted {
            requested: 3,
            oldest: 17,
        });
        assert_eq!(status.code(), Code::OutOfRange);
        let info = ErrorInfo::decode(details(&status).details[0].value.as_slice()).expect("decodes");
        assert_eq!(
            (info.reason.as_str(), info.metadata["resume_after"].as_str()),
            ("COMPACTED", "17")
        );
    }
}
