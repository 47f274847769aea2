//! `[leader]`.

use std::time::Duration;

use serde::Deserialize;

use super::{ConfigError, duration};

/// Which of several replicas runs controllers and scheduler; Kubernetes' three durations, with quicker defaults. Only with etcd:
/// the embedded store has one process. A claim is safe whatever these are, since every write of a leader is fenced; they say how
/// long the cluster is without a leader when one is lost.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LeaderConfig {
    /// A leader that has not renewed its claim for so long may be replaced. Whole seconds.
    #[serde(deserialize_with = "duration")]
    pub lease_duration: Duration,
    /// A leader that could not renew its claim for so long stops leading by itself.
    #[serde(deserialize_with = "duration")]
    pub renew_deadline: Duration,
    /// Between two attempts to renew the claim, or to get it.
    #[serde(deserialize_with = "duration")]
    pub retry_period: Duration,
}

impl Default for LeaderConfig {
    fn default() -> Self {
        Self {
            lease_duration: Duration::from_secs(8),
            renew_deadline: Duration::from_secs(5),
            retry_period: Duration::from_secs(1),
        }
    }
}

impl LeaderConfig {
    /// Whether the durations make sense together.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let reason = if self.lease_duration.subsec_nanos() != 0 || self.lease_duration.is_zero() {
            "lease_duration must be a number of whole seconds: that is what a Lease holds"
        } else if self.lease_duration <= self.renew_deadline {
            "lease_duration must be longer than renew_deadline"
        } else if self.renew_deadline <= self.retry_period.mul_f64(1.2) {
            "renew_deadline must be longer than retry_period by a fifth and more"
        } else if self.retry_period < Duration::from_millis(50) {
            "retry_period must be 50 ms or more"
        } else {
            return Ok(());
        };
        Err(ConfigError::Invalid {
            field: "leader",
            reason: reason.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_that_cannot_work_are_refused() {
        let check = |text: &str| {
            let leader: LeaderConfig = toml::from_str(text).expect("parses");
            leader.check().map_err(|error| error.to_string())
        };
        check("").expect("the default is sound");
        check("lease_duration = \"15s\"\nrenew_deadline = \"10s\"\nretry_period = \"2s\"").expect("Kubernetes' own");
        for (text, reason) in [
            ("lease_duration = \"8500ms\"", "whole seconds"),
            ("lease_duration = \"5s\"", "longer than renew_deadline"),
            ("renew_deadline = \"1100ms\"", "longer than retry_period"),
            ("retry_period = \"1ms\"", "50 ms or more"),
        ] {
            let error = check(text).expect_err(text);
            assert!(error.contains(reason), "{error}");
        }
    }
}
