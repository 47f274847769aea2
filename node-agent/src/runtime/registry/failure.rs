//! Why something could not be pulled, in words that may be shown to people.

use std::error::Error as _;

use reqwest::StatusCode;
use serde::Deserialize;

/// What a registry says is cut to this length.
const MAX_TEXT: usize = 512;

/// Why something could not be pulled.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct PullError {
    text: String,
    /// Trying again soon may help.
    pub may_pass: bool,
}

/// What registries say in JSON of a failure, as OCI distribution defines it.
#[derive(Deserialize)]
struct Complaints {
    errors: Vec<Complaint>,
}

#[derive(Deserialize)]
struct Complaint {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

impl PullError {
    /// One that trying again soon will not mend.
    pub fn lasting(text: impl AsRef<str>) -> Self {
        Self {
            text: plain(text.as_ref()),
            may_pass: false,
        }
    }

    /// One that trying again soon may mend.
    pub fn passing(text: impl AsRef<str>) -> Self {
        Self {
            may_pass: true,
            ..Self::lasting(text)
        }
    }

    /// Nobody may ask without credentials, or not with these.
    pub fn unauthorized() -> Self {
        Self::lasting("unauthorized: the registry wants credentials, or others than those it was given")
    }

    /// An answer that is no success, and where it came from.
    pub fn of_status(status: StatusCode, from: &str) -> Self {
        let text = format!("HTTP status {} {from}", status.as_u16());
        let passing = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS].contains(&status);
        if status.is_server_error() || passing {
            Self::passing(text)
        } else {
            Self::lasting(text)
        }
    }

    /// A registry's own answer that is no success, and what it says.
    pub fn of_answer(status: StatusCode, body: &[u8]) -> Self {
        let said = match serde_json::from_slice::<Complaints>(body) {
            Ok(said) if !said.errors.is_empty() => {
                let said = said
                    .errors
                    .iter()
                    .map(|error| format!("{}: {}", error.code, error.message));
                said.collect::<Vec<_>>().join(", ")
            }
            _ => String::from_utf8_lossy(body).trim().to_owned(),
        };
        let error = Self::of_status(status, "");
        Self {
            text: plain(format!("{}: {said}", error.text).trim_end_matches(": ")),
            ..error
        }
    }
}

impl From<reqwest::Error> for PullError {
    fn from(error: reqwest::Error) -> Self {
        let lasting = error.is_redirect() || error.is_builder();
        // Without the address: the text names the registry already, and a token service's has a query.
        let error = error.without_url();
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        match lasting {
            true => Self::lasting(text),
            false => Self::passing(text),
        }
    }
}

/// Without control characters, and not too long: a registry may say anything.
fn plain(text: &str) -> String {
    let mut plain: String = text
        .chars()
        .map(|character| if character.is_control() { ' ' } else { character })
        .take(MAX_TEXT)
        .collect();
    plain.truncate(plain.trim_end().len());
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_registry_says_cannot_harm_a_terminal() {
        let error = PullError::lasting(format!("\u{1b}[31mred\n{}", "x".repeat(10_000)));
        assert!(error.to_string().starts_with(" [31mred xxx"));
        assert_eq!(error.to_string().len(), MAX_TEXT);
    }

    #[test]
    fn a_registrys_own_words_are_told() {
        let said = br#"{"errors":[{"code":"DENIED","message":"not you"},{"code":"TOOMANYREQUESTS"}]}"#;
        let error = PullError::of_answer(StatusCode::TOO_MANY_REQUESTS, said);
        assert_eq!(error.to_string(), "HTTP status 429: DENIED: not you, TOOMANYREQUESTS");
        assert!(error.may_pass);
        let error = PullError::of_answer(StatusCode::IM_A_TEAPOT, b"");
        assert_eq!(error.to_string(), "HTTP status 418");
        assert!(!error.may_pass);
    }
}
