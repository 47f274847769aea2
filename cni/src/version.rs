//! The versions of the specification that are spoken.

use std::fmt;

use crate::error::{Failure, code};

/// A supported version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CniVersion {
    /// 0.3.1: ADD, DEL.
    V0_3_1,
    /// 0.4.0: and CHECK.
    V0_4_0,
    /// 1.0.0: addresses without `version`.
    V1_0_0,
    /// 1.1.0: and STATUS, GC; interfaces with `mtu`.
    V1_1_0,
}

impl CniVersion {
    /// All of them, in order.
    pub const ALL: [Self; 4] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];
    /// The newest.
    pub const LATEST: Self = Self::V1_1_0;

    /// The version that a configuration names. A missing one means 0.1.0 by the specification, which is not supported.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        Self::ALL.into_iter().find(|v| v.as_str() == text).ok_or_else(|| {
            let supported = Self::ALL.map(Self::as_str).join(", ");
            Failure::new(code::INCOMPATIBLE_VERSION, "incompatible CNI version")
                .with(format!("config is {text:?}, plugin supports {supported}"))
        })
    }

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }
}

impl fmt::Display for CniVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
