//! The syntax of names: k8s.io/apimachinery/pkg/util/validation. The errors are its words.

/// Longest RFC 1123 label.
pub const LABEL_MAX: usize = 63;
/// Longest RFC 1123 subdomain.
pub const SUBDOMAIN_MAX: usize = 253;

const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and \
    end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and \
    must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL_1035: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an \
    alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for \
    validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
const QUALIFIED: &str = "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an \
    alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
    '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and \
    must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for \
    validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";

fn lower_alphanumeric(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

fn at_most(text: &str, max: usize) -> Result<(), String> {
    if text.len() > max {
        Err(format!("must be no more than {max} bytes"))
    } else {
        Ok(())
    }
}

fn is_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends = |byte: Option<&u8>| byte.is_some_and(|byte| lower_alphanumeric(*byte));
    ends(bytes.first()) && ends(bytes.last()) && bytes.iter().all(|byte| lower_alphanumeric(*byte) || *byte == b'-')
}

/// `[A-Za-z0-9]` at both ends, `-_.` between.
fn is_qualified_part(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let inner = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    ends(bytes.first()) && ends(bytes.last()) && bytes.iter().all(inner)
}

/// DNS-1123 label: names of namespaces and containers.
pub fn dns1123_label(text: &str) -> Result<(), String> {
    at_most(text, LABEL_MAX)?;
    if is_label(text) { Ok(()) } else { Err(LABEL.to_owned()) }
}

/// DNS-1123 subdomain: names of pods, nodes and most other objects.
pub fn dns1123_subdomain(text: &str) -> Result<(), String> {
    at_most(text, SUBDOMAIN_MAX)?;
    if text.split('.').all(is_label) {
        Ok(())
    } else {
        Err(SUBDOMAIN.to_owned())
    }
}

/// DNS-1035 label: names of services.
pub fn dns1035_label(text: &str) -> Result<(), String> {
    at_most(text, LABEL_MAX)?;
    if is_label(text) && text.as_bytes()[0].is_ascii_lowercase() {
        Ok(())
    } else {
        Err(LABEL_1035.to_owned())
    }
}

/// `[prefix/]name`: keys of labels, annotations and taints, names of resources and finalizers.
pub fn qualified_name(text: &str) -> Result<(), String> {
    let name = match text.split_once('/') {
        None => text,
        Some((prefix, name)) => {
            if prefix.is_empty() {
                return Err("prefix part must be non-empty".to_owned());
            }
            dns1123_subdomain(prefix).map_err(|error| format!("prefix part {error}"))?;
            name
        }
    };
    if name.contains('/') {
        return Err(format!(
            "a qualified name {QUALIFIED} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
        ));
    }
    if name.is_empty() {
        return Err("name part must be non-empty".to_owned());
    }
    at_most(name, LABEL_MAX).map_err(|error| format!("name part {error}"))?;
    if is_qualified_part(name) {
        Ok(())
    } else {
        Err(format!("name part {QUALIFIED}"))
    }
}

/// A label's value.
pub fn label_value(text: &str) -> Result<(), String> {
    at_most(text, LABEL_MAX)?;
    if text.is_empty() || is_qualified_part(text) {
        Ok(())
    } else {
        Err(LABEL_VALUE.to_owned())
    }
}

/// The name of a port, RFC 6335.
pub fn port_name(text: &str) -> Result<(), String> {
    at_most(text, 15).map_err(|_| "must be no more than 15 characters".to_owned())?;
    if !text.bytes().all(|byte| lower_alphanumeric(byte) || byte == b'-') || text.is_empty() {
        return Err("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".to_owned());
    }
    if !text.bytes().any(|byte| byte.is_ascii_lowercase()) {
        return Err("must contain at least one letter (a-z)".to_owned());
    }
    if text.contains("--") {
        return Err("must not contain consecutive hyphens".to_owned());
    }
    if text.starts_with('-') || text.ends_with('-') {
        return Err("must not begin or end with a hyphen".to_owned());
    }
    Ok(())
}

/// The name of an environment variable.
pub fn env_name(text: &str) -> Result<(), String> {
    if !text.is_empty() && text.bytes().all(|byte| (b' '..=b'~').contains(&byte) && byte != b'=') {
        Ok(())
    } else {
        Err(
            "a valid environment variable name must consist only of printable ASCII characters other than '='"
                .to_owned(),
        )
    }
}

/// A prefix for generated names: as the name, but it may end in a dash.
pub fn prefix_of(text: &str, check: fn(&str) -> Result<(), String>) -> Result<(), String> {
    match text.strip_suffix('-') {
        Some(rest) if rest.len() > 1 => check(&format!("{rest}a")),
        _ => check(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_objects() {
        for good in ["a", "a-b", "1", "a.b-c.d1"] {
            assert_eq!(dns1123_subdomain(good), Ok(()), "{good}");
        }
        let long = "a".repeat(254);
        for bad in [
            "",
            ".",
            "..",
            "a..b",
            "../a",
            "a/b",
            "A",
            "-a",
            "a-",
            "a_b",
            "a\0",
            "a\u{1b}[31m",
            "a b",
            "ä",
            "a.",
            ".a",
            "a\n",
            &long,
        ] {
            assert!(dns1123_subdomain(bad).is_err(), "{bad:?}");
            assert!(dns1123_label(bad).is_err(), "{bad:?}");
            assert!(dns1035_label(bad).is_err(), "{bad:?}");
        }
        assert!(dns1123_label("a.b").is_err());
        assert!(dns1123_label("1a").is_ok());
        assert!(dns1035_label("1a").is_err());
        assert!(dns1123_subdomain(&"a".repeat(253)).is_ok());
    }

    #[test]
    fn qualified_names() {
        for good in ["a", "A_b.c", "example.com/a", "kubernetes.io/service-name", "1"] {
            assert_eq!(qualified_name(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "/a",
            "a/",
            "a/b/c",
            "-a",
            "Example.com/a",
            "a b",
            "a\0",
            &"a".repeat(64),
        ] {
            assert!(qualified_name(bad).is_err(), "{bad:?}");
        }
        assert_eq!(label_value(""), Ok(()));
        assert!(label_value("a/b").is_err());
        assert!(label_value(&"a".repeat(64)).is_err());
    }

    #[test]
    fn other_names() {
        assert!(port_name("http").is_ok() && port_name("8080-a").is_ok());
        for bad in ["", "8080", "a--b", "-a", "a-", "Http", &"a".repeat(16)] {
            assert!(port_name(bad).is_err(), "{bad:?}");
        }
        assert!(env_name("A_B.c-d 1").is_ok());
        for bad in ["", "a=b", "a\n", "ä", "a\0"] {
            assert!(env_name(bad).is_err(), "{bad:?}");
        }
        assert!(prefix_of("web-", dns1123_subdomain).is_ok());
        assert!(prefix_of("-", dns1123_subdomain).is_err());
    }
}
