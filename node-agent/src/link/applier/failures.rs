//! What failed, when it is tried again, and how it is told.

use std::time::Duration;

use tokio::time::Instant;

/// The first wait after a failure of the dataplane, the network or the ledger; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(200);
pub(super) const RETRY_MAX: Duration = Duration::from_secs(10);

/// Why parts of the ledger could not be written the last time.
#[derive(Debug, Default)]
pub(super) struct Unwritten {
    pub services: Option<String>,
    pub routes: Option<String>,
    pub state: Option<String>,
    /// What is being written takes too long.
    pub hangs: Option<String>,
}

/// When what failed is tried again.
#[derive(Debug, Default)]
pub(super) struct Retry {
    pub at: Option<Instant>,
    wait: Option<Duration>,
}

impl Unwritten {
    /// The first of them, for the node's condition.
    pub fn trouble(&self) -> Option<String> {
        let all = [&self.services, &self.routes, &self.state, &self.hangs];
        all.into_iter().flatten().next().cloned()
    }
}

impl Retry {
    /// Takes note of how the last attempt went.
    pub fn note(&mut self, succeeded: bool) {
        if succeeded {
            *self = Self::default();
        } else {
            let wait = self.wait.map_or(RETRY_MIN, |wait| (wait * 2).min(RETRY_MAX));
            *self = Self {
                at: Some(Instant::now() + wait),
                wait: Some(wait),
            };
        }
    }
}

/// An error with all that caused it.
pub(crate) struct Chain<'a>(pub &'a (dyn std::error::Error + 'static));

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = self.0.to_string();
        let mut source = self.0.source();
        while let Some(error) = source {
            // Many errors name their source in their own text already.
            let cause = error.to_string();
            if !text.contains(&cause) {
                text = format!("{text}: {cause}");
            }
            source = error.source();
        }
        formatter.write_str(&text)
    }
}
