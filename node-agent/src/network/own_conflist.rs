//! The agent's own CNI configuration, from the ranges that control gave the node.

use std::{fs, io, path::Path};

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{NetworkError, attachments::write_durably};

/// Its name in the configuration directory.
pub const FILE: &str = "10-orlop.conflist";
/// Our plugin's `type`.
pub const OWN_PLUGIN: &str = "orlop-bridge";
/// The bridge's name.
pub const BRIDGE: &str = "orlop0";

/// The configuration: one address a family, from the node's ranges.
pub fn conflist(ranges: &[IpNet], mtu: u32, lease_dir: &Path, boot_id_file: &Path) -> Value {
    let of = |v4: bool| -> Vec<Value> {
        ranges
            .iter()
            .filter(|net| net.addr().is_ipv4() == v4)
            .map(|net| json!({"subnet": net.trunc()}))
            .collect()
    };
    let sets: Vec<Vec<Value>> = [of(true), of(false)]
        .into_iter()
        .filter(|set| !set.is_empty())
        .collect();
    json!({
        "cniVersion": "1.1.0",
        "name": "orlop",
        "plugins": [{
            "type": OWN_PLUGIN,
            "bridge": BRIDGE,
            "isGateway": true,
            "isDefaultGateway": true,
            // The node's range may change while it has no pods; the bridge stays.
            "forceAddress": true,
            "hairpinMode": true,
            "mtu": mtu,
            // A pod's next sandbox asks for the addresses of the one before.
            "capabilities": {"ips": true},
            "ipam": {"type": "orlop", "ranges": sets, "dataDir": lease_dir, "bootIdFile": boot_id_file},
        }],
    })
}

/// Makes the file's content this; whether that changed anything.
pub fn install(dir: &Path, conflist: &Value) -> Result<bool, NetworkError> {
    let path = dir.join(FILE);
    let mut content = serde_json::to_vec_pretty(conflist).map_err(|e| NetworkError::File {
        path: path.clone(),
        source: io::Error::other(e),
    })?;
    content.push(b'\n');
    // What a symlink points to is not ours to write; the rename replaces the link itself.
    let is_file = fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_file());
    if is_file && fs::read(&path).is_ok_and(|present| present == content) {
        return Ok(false);
    }
    let write = || -> io::Result<()> {
        fs::create_dir_all(dir)?;
        write_durably(&path, &content)
    };
    write().map_err(|source| NetworkError::File {
        path: path.clone(),
        source,
    })?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_once_and_in_place_of_a_symlink() {
        let dir = tempfile::tempdir().unwrap();
        let ranges: Vec<IpNet> = ["10.1.0.0/24", "fd00::/64", "10.2.0.0/24"]
            .map(|net| net.parse().unwrap())
            .into();
        let list = conflist(&ranges, 1450, Path::new("/run/x"), Path::new("/boot"));
        let sets = &list["plugins"][0]["ipam"]["ranges"];
        assert_eq!(
            *sets,
            json!([[{"subnet": "10.1.0.0/24"}, {"subnet": "10.2.0.0/24"}], [{"subnet": "fd00::/64"}]])
        );
        let victim = dir.path().join("victim");
        fs::write(&victim, "untouched").unwrap();
        std::os::unix::fs::symlink(&victim, dir.path().join(FILE)).unwrap();
        assert!(install(dir.path(), &list).unwrap());
        assert!(!install(dir.path(), &list).unwrap());
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        assert_eq!(
            super::super::conflist::Configurations::new(dir.path())
                .load()
                .unwrap()
                .name,
            "orlop"
        );
    }
}
