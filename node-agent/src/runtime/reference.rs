//! Image references, normalised as Docker does: `web` is `docker.io/library/web:latest`.

use std::fmt;

use super::RuntimeError;

/// A normalised image reference.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    /// `docker.io`, `registry.example:5000`.
    pub domain: String,
    /// `library/web`.
    pub path: String,
    /// `latest`; `None` only when there is a digest.
    pub tag: Option<String>,
    /// `sha256:...`.
    pub digest: Option<String>,
}

impl Reference {
    /// Parses and normalises; an error names what is wrong (for `InvalidImageName`).
    pub fn parse(text: &str) -> Result<Self, RuntimeError> {
        Self::parse_parts(text).map_err(|why| RuntimeError::InvalidImageName {
            reference: text.to_owned(),
            why: why.to_owned(),
        })
    }

    fn parse_parts(text: &str) -> Result<Self, &'static str> {
        if text.is_empty() {
            return Err("it is empty");
        }
        if text.len() > 512 {
            return Err("it is longer than 512 bytes");
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(checked_digest(digest)?)),
            None => (text, None),
        };
        let (domain, remainder) = match rest.split_once('/') {
            Some((first, remainder)) if first.contains(['.', ':']) || first == "localhost" => (first, remainder),
            _ => ("docker.io", rest),
        };
        let domain = if domain == "index.docker.io" {
            "docker.io"
        } else {
            domain
        };
        checked_domain(domain)?;
        let (path, tag) = match remainder.split_once(':') {
            Some((path, tag)) => (path, Some(checked_tag(tag)?)),
            None => (remainder, None),
        };
        checked_path(path)?;
        let path = if domain == "docker.io" && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        let tag = match (tag, &digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag,
        };
        Ok(Self {
            domain: domain.to_owned(),
            path,
            tag,
            digest,
        })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.domain, self.path)?;
        if let Some(tag) = &self.tag {
            write!(formatter, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(formatter, "@{digest}")?;
        }
        Ok(())
    }
}

/// Whether this is a digest that Orlop handles: `sha256:` and 64 hexadecimal digits in lower case.
pub fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))
}

/// Whether this names a registry: `HOST` or `HOST:PORT`.
pub fn is_registry(text: &str) -> bool {
    checked_domain(text).is_ok()
}

fn checked_digest(text: &str) -> Result<String, &'static str> {
    if is_digest(text) {
        Ok(text.to_owned())
    } else {
        Err("its digest is not sha256: and 64 hexadecimal digits")
    }
}

fn checked_tag(text: &str) -> Result<String, &'static str> {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let mut bytes = text.bytes();
    let valid = bytes.next().is_some_and(word)
        && bytes.all(|byte| word(byte) || byte == b'.' || byte == b'-')
        && text.len() <= 128;
    if valid {
        Ok(text.to_owned())
    } else {
        Err("its tag is invalid")
    }
}

fn checked_domain(text: &str) -> Result<(), &'static str> {
    let (host, port) = text
        .split_once(':')
        .map_or((text, None), |(host, port)| (host, Some(port)));
    let label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if !host.split('.').all(label) || port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return Err("its registry's name is invalid");
    }
    Ok(())
}

fn checked_path(text: &str) -> Result<(), &'static str> {
    if text.is_empty() || text.len() > 255 {
        return Err("its repository's name is empty or longer than 255 bytes");
    }
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    for component in text.split('/') {
        let bytes = component.as_bytes();
        let edges = bytes.first().is_some_and(alphanumeric) && bytes.last().is_some_and(alphanumeric);
        let inner = bytes
            .iter()
            .all(|byte| alphanumeric(byte) || matches!(byte, b'.' | b'_' | b'-'));
        if !edges || !inner || component.contains("..") || component.contains("___") {
            return Err(
                "its repository's name is invalid (lower case letters, digits, and '.', '_', '-' between them)",
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalises_like_docker() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (given, wanted) in [
            ("web", "docker.io/library/web:latest".to_owned()),
            ("web:v1", "docker.io/library/web:v1".to_owned()),
            ("team/web", "docker.io/team/web:latest".to_owned()),
            ("docker.io/web", "docker.io/library/web:latest".to_owned()),
            ("index.docker.io/web", "docker.io/library/web:latest".to_owned()),
            ("localhost/web", "localhost/web:latest".to_owned()),
            ("localhost:5000/web", "localhost:5000/web:latest".to_owned()),
            ("reg.example/a/b_c:1.2", "reg.example/a/b_c:1.2".to_owned()),
            (&format!("web@{digest}"), format!("docker.io/library/web@{digest}")),
            (
                &format!("web:v1@{digest}"),
                format!("docker.io/library/web:v1@{digest}"),
            ),
        ] {
            let parsed = Reference::parse(given).unwrap();
            assert_eq!(parsed.to_string(), wanted, "{given}");
            assert_eq!(
                Reference::parse(&wanted).unwrap(),
                parsed,
                "normalising twice changes nothing"
            );
        }
    }

    #[test]
    fn refuses_what_is_no_reference() {
        for given in [
            "",
            "UPPER",
            "web:",
            "web:tag/x",
            "-web",
            "a//b",
            "web@sha256:12",
            "a..b",
            "../x",
            "web: x",
            "a\0b",
            "reg.example:99999/x",
            "reg..example/x",
            "\u{1b}[31m",
        ] {
            assert!(Reference::parse(given).is_err(), "{given:?}");
        }
        assert!(Reference::parse(&"a".repeat(600)).is_err());
    }
}
