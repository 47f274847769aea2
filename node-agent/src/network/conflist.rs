//! CNI configurations as operators write them.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{NetworkError, trust};

const MAX_FILE: u64 = 1 << 20;
/// The versions that this runtime speaks, in order.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// A network: its plugins in the order of ADD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfList {
    /// The network's name.
    pub name: String,
    /// The version that is spoken with all its plugins; one of [`VERSIONS`].
    pub version: String,
    /// Their configurations, as written.
    pub plugins: Vec<Map<String, Value>>,
    /// CHECK is not to be called.
    pub disable_check: bool,
    /// GC is not to be called.
    pub disable_gc: bool,
}

/// The directory that configurations are read from.
#[derive(Debug)]
pub struct Configurations {
    dir: PathBuf,
    /// What was loaded last, and from which file.
    last: Mutex<Option<(PathBuf, ConfList)>>,
}

impl Configurations {
    /// Reads nothing yet.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            last: Mutex::default(),
        }
    }

    /// The first usable configuration of the directory, by file name. Unusable ones are logged and passed over; but the one that
    /// was in use stays in use as it was while its file makes no sense: somebody is writing it.
    pub fn load(&self) -> Result<ConfList, NetworkError> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let mut unusable = Vec::new();
        for path in candidates(&self.dir)? {
            let reason = match ConfList::read(&path) {
                Ok(list) => {
                    *last = Some((path, list.clone()));
                    return Ok(list);
                }
                Err(Unusable::Unreadable(reason)) => match &*last {
                    Some((used, list)) if *used == path => {
                        tracing::warn!(path = %path.display(), reason, "CNI configuration cannot be read, its last good content is used");
                        return Ok(list.clone());
                    }
                    _ => reason,
                },
                Err(Unusable::Refused(reason)) => reason,
            };
            tracing::warn!(path = %path.display(), reason, "CNI configuration passed over");
            unusable.push(format!("{}: {reason}", path.display()));
        }
        let reason = if unusable.is_empty() {
            format!("{} has none", self.dir.display())
        } else {
            format!("none is usable: {}", unusable.join("; "))
        };
        Err(NetworkError::NotConfigured(reason))
    }
}

/// Why a file is not used.
enum Unusable {
    /// It makes no sense as it is now.
    Unreadable(String),
    /// Others could have written it.
    Refused(String),
}

impl ConfList {
    fn read(path: &Path) -> Result<Self, Unusable> {
        trust::check(path).map_err(Unusable::Refused)?;
        let unreadable = |e: io::Error| Unusable::Unreadable(e.to_string());
        let metadata = fs::metadata(path).map_err(unreadable)?;
        if !metadata.is_file() || metadata.len() > MAX_FILE {
            let reason = format!("is not a file of at most {MAX_FILE} bytes");
            return Err(Unusable::Unreadable(reason));
        }
        Self::parse(&fs::read(path).map_err(unreadable)?).map_err(Unusable::Unreadable)
    }

    /// A list, or a single plugin's configuration, which is a list of one.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let value: Map<String, Value> = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        let text = |key: &str| value.get(key).and_then(Value::as_str);
        let name = text("name").unwrap_or_default().to_owned();
        if !is_name(&name) {
            return Err(format!("name {name:?} is not a network's name"));
        }
        let version = version(&value)?;
        let flag = |key: &str| match value.get(key) {
            Some(Value::Bool(flag)) => *flag,
            Some(Value::String(flag)) => flag == "true",
            _ => false,
        };
        let plugins = match value.get("plugins") {
            None if value.contains_key("type") => vec![value.clone()],
            Some(Value::Array(plugins)) => plugins
                .iter()
                .map(|plugin| plugin.as_object().cloned().ok_or("a plugin is not an object"))
                .collect::<Result<_, _>>()?,
            _ => return Err("plugins is missing".into()),
        };
        if plugins.is_empty() {
            return Err("plugins is empty".into());
        }
        if let Some(plugin) = plugins.iter().find(|plugin| !is_plugin_name(plugin_type(plugin))) {
            return Err(format!(
                "a plugin's type is no program's name: {}",
                Value::Object((*plugin).clone())
            ));
        }
        Ok(Self {
            disable_check: flag("disableCheck"),
            disable_gc: flag("disableGC"),
            name,
            version,
            plugins,
        })
    }

    /// Whether the version has a verb that came with `since`.
    pub fn at_least(&self, since: &str) -> bool {
        let rank = |version: &str| VERSIONS.iter().position(|v| *v == version);
        rank(&self.version) >= rank(since)
    }

    /// What a plugin gets on stdin.
    pub fn config(&self, plugin: &Map<String, Value>, more: &[(&str, Value)]) -> Value {
        let mut config = plugin.clone();
        // Only for the runtime.
        for key in ["capabilities", "cniVersions", "disableCheck", "disableGC"] {
            config.remove(key);
        }
        config.insert("name".into(), self.name.clone().into());
        config.insert("cniVersion".into(), self.version.clone().into());
        config.extend(more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        Value::Object(config)
    }
}

/// A plugin's type.
pub fn plugin_type(plugin: &Map<String, Value>) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or_default()
}

/// Whether a type can name a program in the plugins' directories, and nothing outside of them.
pub fn is_plugin_name(name: &str) -> bool {
    !name.is_empty() && !name.contains(['/', '\0']) && !name.starts_with('.')
}

fn candidates(dir: &Path) -> Result<Vec<PathBuf>, NetworkError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => {
            return Err(NetworkError::File {
                path: dir.to_owned(),
                source,
            });
        }
    };
    let wanted = |path: &PathBuf| {
        path.extension()
            .and_then(|e| e.to_str())
            .is_some_and(|e| matches!(e, "conflist" | "conf" | "json"))
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(wanted).collect();
    paths.sort();
    Ok(paths)
}

/// `cniVersion`, or the newest of `cniVersions` that is spoken here.
fn version(value: &Map<String, Value>) -> Result<String, String> {
    let one = value.get("cniVersion").and_then(Value::as_str);
    let many = value
        .get("cniVersions")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str);
    let offered: Vec<&str> = one.into_iter().chain(many).collect();
    let spoken = VERSIONS.iter().rev().find(|version| offered.contains(*version));
    spoken
        .map(|version| (*version).to_owned())
        .ok_or_else(|| format!("cniVersion {offered:?} is not spoken, only {}", VERSIONS.join(", ")))
}

fn is_name(name: &str) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    name.len() <= 255 && name.bytes().all(legal) && name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_first_usable_file_wins() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        assert!(matches!(
            Configurations::new(dir.path()).load(),
            Err(NetworkError::NotConfigured(_))
        ));
        write("00-broken.conflist", "{");
        write("01-old.conf", r#"{"cniVersion":"0.2.0","name":"a","type":"x"}"#);
        write("02-empty.conflist", r#"{"cniVersion":"1.0.0","name":"a","plugins":[]}"#);
        write("03-not-mine.txt", r#"{"cniVersion":"1.0.0","name":"a","type":"x"}"#);
        write("04-bad-name.conf", r#"{"cniVersion":"1.0.0","name":"../a","type":"x"}"#);
        std::fs::create_dir(dir.path().join("05-dir.conf")).unwrap();
        let error = Configurations::new(dir.path()).load().unwrap_err().to_string();
        assert!(error.contains("01-old.conf") && error.contains("0.2.0"), "{error}");
        write(
            "20-late.conflist",
            r#"{"cniVersion":"1.0.0","name":"late","plugins":[{"type":"x"}]}"#,
        );
        write("06-path.conf", r#"{"cniVersion":"1.0.0","name":"a","type":"../x"}"#);
        write(
            "07-path.conflist",
            r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"x"},{"type":"a/b"}]}"#,
        );
        write("10-single.conf", r#"{"cniVersion":"0.4.0","name":"single","type":"x"}"#);
        let list = Configurations::new(dir.path()).load().unwrap();
        assert_eq!(
            (&*list.name, &*list.version, list.plugins.len()),
            ("single", "0.4.0", 1)
        );
        assert!(list.at_least("0.4.0") && !list.at_least("1.1.0"));
    }

    #[test]
    fn a_file_that_is_being_written_stays_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let list = |name: &str| format!(r#"{{"cniVersion":"1.0.0","name":"{name}","plugins":[{{"type":"x"}}]}}"#);
        let configurations = Configurations::new(dir.path());
        let loaded = || configurations.load().unwrap().name;
        write("10-used.conflist", &list("used"));
        assert_eq!(loaded(), "used");
        // A new file that sorts before it counts when it is whole.
        write("05-new.conflist", &list("new")[..20]);
        assert_eq!(loaded(), "used");
        write("05-new.conflist", &list("new"));
        assert_eq!(loaded(), "new");
        for cut in [0, 1, 30] {
            write("05-new.conflist", &list("newer")[..cut]);
            assert_eq!(loaded(), "new", "{cut}");
        }
        write("05-new.conflist", &list("newer"));
        assert_eq!(loaded(), "newer");
        fs::remove_file(dir.path().join("05-new.conflist")).unwrap();
        assert_eq!(loaded(), "used");
        // What others could have written is not used, however good its last content was.
        let mode =
            |mode| fs::set_permissions(dir.path().join("10-used.conflist"), fs::Permissions::from_mode(mode)).unwrap();
        mode(0o666);
        let error = configurations.load().unwrap_err().to_string();
        assert!(error.contains("can be written by everybody"), "{error}");
        mode(0o644);
        assert_eq!(loaded(), "used");
    }

    #[test]
    fn the_newest_spoken_version_is_taken() {
        let text = r#"{"cniVersions":["1.0.0","1.1.0","2.0.0"],"name":"a","plugins":[{"type":"x","capabilities":{"a":true}}]}"#;
        let list = ConfList::parse(text.as_bytes()).unwrap();
        assert_eq!(list.version, "1.1.0");
        let config = list.config(&list.plugins[0], &[("prevResult", Value::Null)]);
        assert_eq!(
            config,
            serde_json::json!({"cniVersion":"1.1.0","name":"a","type":"x","prevResult":null})
        );
    }
}
