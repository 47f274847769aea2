//! The environment that a runtime calls us with, checked.

use std::{collections::BTreeMap, path::PathBuf};

use crate::error::{Failure, code};

/// The longest container id that is taken, in bytes. Runtimes use 64 or fewer.
const MAX_CONTAINER_ID: usize = 255;
/// The kernel's limit for interface names, without the closing zero.
const MAX_IFNAME: usize = 15;
/// The kernel's limit for paths.
const MAX_PATH: usize = 4096;
const MAX_ARGS: usize = 64 * 1024;

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Wire a container.
    Add,
    /// Unwire it.
    Del,
    /// Is it still as ADD left it?
    Check,
    /// Can ADD be served?
    Status,
    /// Clear what is not among the valid attachments.
    Gc,
    /// Which versions are spoken?
    Version,
}

/// Where variables come from: the process's environment, or a test's map.
pub type Env = BTreeMap<String, String>;

/// Which container, by which name of interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// `CNI_NETNS`; empty where DEL was given none.
    pub netns: PathBuf,
    /// `CNI_ARGS`, as pairs.
    pub args: BTreeMap<String, String>,
}

/// The verb. Refuses what the specification does not know.
pub fn verb(env: &Env) -> Result<Verb, Failure> {
    match env.get("CNI_COMMAND").map_or("", String::as_str) {
        "ADD" => Ok(Verb::Add),
        "DEL" => Ok(Verb::Del),
        "CHECK" => Ok(Verb::Check),
        "STATUS" => Ok(Verb::Status),
        "GC" => Ok(Verb::Gc),
        "VERSION" => Ok(Verb::Version),
        "" => Err(bad("CNI_COMMAND", "is missing")),
        other => Err(bad("CNI_COMMAND", &format!("is unknown: {}", shorten(other)))),
    }
}

/// The attachment. Only DEL may go without a namespace.
pub fn attachment(env: &Env, verb: Verb) -> Result<Attachment, Failure> {
    let get = |key: &str| env.get(key).map_or("", String::as_str);
    let container_id = get("CNI_CONTAINERID");
    check_container_id(container_id).map_err(|why| bad("CNI_CONTAINERID", &why))?;
    let ifname = get("CNI_IFNAME");
    check_ifname(ifname).map_err(|why| bad("CNI_IFNAME", &why))?;
    let netns = get("CNI_NETNS");
    if netns.is_empty() && verb != Verb::Del {
        return Err(bad("CNI_NETNS", "is missing"));
    }
    if netns.len() >= MAX_PATH || netns.contains('\0') {
        return Err(bad("CNI_NETNS", "is not a path"));
    }
    Ok(Attachment {
        container_id: container_id.to_owned(),
        ifname: ifname.to_owned(),
        netns: netns.into(),
        args: args(get("CNI_ARGS"))?,
    })
}

/// An id as the specification allows it: a letter or digit, then also `_`, `.` and `-`.
pub fn check_container_id(id: &str) -> Result<(), String> {
    if id.is_empty() {
        return Err("is missing".into());
    }
    if id.len() > MAX_CONTAINER_ID {
        return Err(format!("is longer than {MAX_CONTAINER_ID} bytes"));
    }
    let first = id.as_bytes()[0];
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    if !first.is_ascii_alphanumeric() || !id.bytes().all(legal) {
        return Err(format!("has characters that are not allowed: {}", shorten(id)));
    }
    Ok(())
}

fn check_ifname(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("is missing".into());
    }
    if name.len() > MAX_IFNAME {
        return Err(format!("is longer than {MAX_IFNAME} bytes: {}", shorten(name)));
    }
    let illegal = |c: char| c == '/' || c == ':' || c == '%' || c.is_whitespace() || c.is_control();
    if name == "." || name == ".." || name.contains(illegal) {
        return Err(format!("is not an interface's name: {}", shorten(name)));
    }
    // sysctl directories that stand for all interfaces, and the loopback that every namespace has.
    if matches!(name, "all" | "default" | "lo") {
        return Err(format!("is reserved: {name}"));
    }
    Ok(())
}

fn args(text: &str) -> Result<BTreeMap<String, String>, Failure> {
    if text.len() > MAX_ARGS {
        return Err(bad("CNI_ARGS", "is too long"));
    }
    text.split(';')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (key, value) = pair
                .split_once('=')
                .ok_or_else(|| bad("CNI_ARGS", &format!("has no '=' in {}", shorten(pair))))?;
            Ok((key.to_owned(), value.to_owned()))
        })
        .collect()
}

fn bad(variable: &str, why: &str) -> Failure {
    Failure::new(
        code::INVALID_ENVIRONMENT,
        format!("environment variable {variable} {why}"),
    )
}

/// Hostile input is quoted, escaped and cut.
fn shorten(text: &str) -> String {
    let cut: String = text.chars().take(80).collect();
    format!("{cut:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Env {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn with(id: &str, ifname: &str, netns: &str) -> Result<Attachment, Failure> {
        let env = env(&[("CNI_CONTAINERID", id), ("CNI_IFNAME", ifname), ("CNI_NETNS", netns)]);
        attachment(&env, Verb::Add)
    }

    #[test]
    fn takes_what_the_specification_allows() {
        let long = "a".repeat(255);
        for id in ["a", "Ab9_.-x", "0", &long] {
            assert!(with(id, "eth0", "/n").is_ok(), "{id}");
        }
        assert!(with("a", "fifteen-letters", "/n").is_ok());
    }

    #[test]
    fn refuses_hostile_values_with_code_4() {
        let long = "a".repeat(256);
        let deep = "/".repeat(5000);
        let cases = [
            ("", "eth0", "/n"),
            ("../../etc", "eth0", "/n"),
            ("-x", "eth0", "/n"),
            ("a/b", "eth0", "/n"),
            ("ä", "eth0", "/n"),
            ("a\n", "eth0", "/n"),
            (&long, "eth0", "/n"),
            ("a", "", "/n"),
            ("a", "sixteen-letters!", "/n"),
            ("a", "..", "/n"),
            ("a", "a/b", "/n"),
            ("a", "a b", "/n"),
            ("a", "e\u{7}", "/n"),
            ("a", "lo", "/n"),
            ("a", "all", "/n"),
            ("a", "eth0", ""),
            ("a", "eth0", &deep),
        ];
        for (id, ifname, netns) in cases {
            let failure = with(id, ifname, netns).unwrap_err();
            assert_eq!(failure.code, code::INVALID_ENVIRONMENT, "{id:?} {ifname:?}");
            assert!(failure.msg.len() < 400);
        }
    }

    #[test]
    fn del_goes_without_a_namespace() {
        let env = env(&[("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "eth0")]);
        assert_eq!(attachment(&env, Verb::Del).unwrap().netns, PathBuf::new());
    }

    #[test]
    fn arguments_are_pairs() {
        let parsed = args("IgnoreUnknown=1;MAC=aa:bb:cc:dd:ee:ff;;K8S_POD_NAME=a=b").unwrap();
        assert_eq!(parsed["K8S_POD_NAME"], "a=b");
        assert_eq!(parsed.len(), 3);
        assert_eq!(args("novalue").unwrap_err().code, code::INVALID_ENVIRONMENT);
    }
}
