//! What a failed call answers with.

use serde_json::{Value, json};

/// Codes of the specification, and our own from 100 on.
pub mod code {
    /// The configuration's `cniVersion` is not supported.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// The configuration asks for something that is not done; the message names key and value.
    pub const UNSUPPORTED_FIELD: u32 = 2;
    /// The container (its namespace) is not there.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// An environment variable is missing or unusable.
    pub const INVALID_ENVIRONMENT: u32 = 4;
    /// Reading or writing failed.
    pub const IO: u32 = 5;
    /// The input is not JSON of the expected shape.
    pub const DECODE: u32 = 6;
    /// The configuration is readable, but makes no sense.
    pub const INVALID_CONFIG: u32 = 7;
    /// Something transient: the runtime may try again.
    pub const TRY_AGAIN: u32 = 11;
    /// STATUS: the plugin cannot serve ADD.
    pub const NOT_AVAILABLE: u32 = 50;
    /// The kernel refused a change of links, addresses or routes.
    pub const NETLINK: u32 = 100;
    /// The container has an interface of that name already.
    pub const ALREADY_ADDED: u32 = 101;
    /// No address is free.
    pub const RANGE_FULL: u32 = 102;
    /// CHECK found something else than the ADD's result.
    pub const CHECK_FAILED: u32 = 103;
    /// The address management plugin that was delegated to failed without a code of its own.
    pub const DELEGATED: u32 = 104;
}

/// An error of the plugin, as the specification wants it on stdout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{msg}{}{details} (code {code})", if details.is_empty() { "" } else { ": " })]
pub struct Failure {
    /// See [`code`].
    pub code: u32,
    /// One line.
    pub msg: String,
    /// What lies beneath it; may be empty.
    pub details: String,
}

impl Failure {
    /// A failure without details.
    pub fn new(code: u32, msg: impl Into<String>) -> Self {
        Self {
            code,
            msg: msg.into(),
            details: String::new(),
        }
    }

    /// Adds what lies beneath.
    #[must_use]
    pub fn with(mut self, details: impl std::fmt::Display) -> Self {
        self.details = details.to_string();
        self
    }

    /// An I/O failure.
    pub fn io(msg: impl Into<String>, error: &std::io::Error) -> Self {
        Self::new(code::IO, msg).with(error)
    }

    /// A refused netlink request.
    pub fn netlink(msg: impl Into<String>, error: &rtnetlink::Error) -> Self {
        Self::new(code::NETLINK, msg).with(error)
    }

    /// A configuration key that is known and not done.
    pub fn unsupported(key: &str, value: &Value) -> Self {
        Self::new(
            code::UNSUPPORTED_FIELD,
            format!("unsupported field {key:?} with value {value}"),
        )
    }

    /// The answer's JSON. `version` is the configuration's where that could be read.
    pub fn to_json(&self, version: &str) -> Value {
        json!({"cniVersion": version, "code": self.code, "msg": self.msg, "details": self.details})
    }
}
