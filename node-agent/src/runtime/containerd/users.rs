//! Who a container's process is: the image's `User`, looked up in the image's own passwd and group files.

use std::{
    fs::File,
    io::Read as _,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use containerd_client::types::Mount;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::runtime::{RuntimeError, spec::User};

/// No passwd or group file is read further.
const MAX_FILE: u64 = 1 << 20;

/// Resolves `""`, `uid`, `uid:gid`, `name`, `name:group` and mixtures.
pub fn resolve(user: &str, mounts: &[Mount]) -> Result<User, RuntimeError> {
    if user.is_empty() {
        return Ok(User::default());
    }
    let layers = layers(mounts);
    find(user, &read(&layers, "etc/passwd"), &read(&layers, "etc/group"))
}

/// The same, of these texts of the two files.
pub fn find(user: &str, passwd: &str, groups: &str) -> Result<User, RuntimeError> {
    let (name, group) = user
        .split_once(':')
        .map_or((user, None), |(name, group)| (name, Some(group)));
    let number: Option<u32> = name.parse().ok();
    let entry = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| {
            fields.len() >= 4 && (fields[0] == name || number.is_some_and(|uid| fields[2].parse() == Ok(uid)))
        });
    let found = entry.and_then(|fields| Some((fields[0].to_owned(), fields[2].parse().ok()?, fields[3].parse().ok()?)));
    let (login, uid, mut gid) = match (found, number) {
        (Some((login, uid, gid)), _) => (login, uid, gid),
        (None, Some(uid)) => (String::new(), uid, 0),
        (None, None) => return Err(RuntimeError::InvalidSpec(format!("the image has no user {name:?}"))),
    };
    if let Some(group) = group {
        let known = entries(groups)
            .find(|(known, ..)| *known == group)
            .map(|(_, gid, _)| gid);
        gid = group
            .parse()
            .ok()
            .or(known)
            .ok_or_else(|| RuntimeError::InvalidSpec(format!("the image has no group {group:?}")))?;
    }
    let additional_gids = entries(groups)
        .filter(|(_, other, members)| *other != gid && !login.is_empty() && members.split(',').any(|m| m == login))
        .map(|(_, other, _)| other)
        .collect();
    Ok(User {
        uid,
        gid,
        additional_gids,
    })
}

fn entries(groups: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    groups.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

/// The directories that the root is made of, uppermost first: of a bind mount, or an overlay's lower ones.
fn layers(mounts: &[Mount]) -> Vec<PathBuf> {
    let Some(mount) = mounts.first() else { return Vec::new() };
    let lower = mount.options.iter().find_map(|option| option.strip_prefix("lowerdir="));
    lower.map_or_else(
        || vec![PathBuf::from(&mount.source)],
        |lower| lower.split(':').map(PathBuf::from).collect(),
    )
}

/// The uppermost layer's file; links are followed inside the layer only.
fn read(layers: &[PathBuf], name: &str) -> String {
    layers.iter().find_map(|layer| read_in(layer, name)).unwrap_or_default()
}

fn read_in(layer: &Path, name: &str) -> Option<String> {
    let root = File::open(layer).ok()?;
    // Only found at first: opening a device may already do something.
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let found = openat2(
        &root,
        name,
        flags,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
    .ok()?;
    if !File::from(found.try_clone().ok()?).metadata().ok()?.is_file() {
        return None;
    }
    let file = File::open(format!("/proc/self/fd/{}", found.as_raw_fd())).ok()?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes).ok()?;
    // Somebody's full name may be in Latin-1; the names and numbers that are looked for are ASCII.
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(dir: &Path) -> Vec<Mount> {
        let options = vec![format!("lowerdir={}", dir.display())];
        vec![Mount {
            r#type: "overlay".into(),
            source: "overlay".into(),
            options,
            ..Mount::default()
        }]
    }

    #[test]
    fn users_come_from_the_image() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("etc/passwd"), "root:x:0:0::/:/sh\nweb:x:33:34::/:/sh\n").unwrap();
        std::fs::write(dir.path().join("etc/group"), "web:x:34:\nlog:x:50:other,web\n").unwrap();
        let user =
            |text: &str| resolve(text, &mounts(dir.path())).map(|user| (user.uid, user.gid, user.additional_gids));
        assert_eq!(user("").unwrap(), (0, 0, vec![]));
        assert_eq!(user("web").unwrap(), (33, 34, vec![50]));
        assert_eq!(user("33").unwrap(), (33, 34, vec![50]));
        assert_eq!(user("web:log").unwrap(), (33, 50, vec![]));
        assert_eq!(user("1000").unwrap(), (1000, 0, vec![]));
        assert_eq!(user("1000:1001").unwrap(), (1000, 1001, vec![]));
        assert!(user("nobody").is_err());
        assert!(user("web:none").is_err());
        std::fs::write(
            dir.path().join("etc/passwd"),
            b"j:x:7:7:J\xfcrgen:/:/sh\nweb:x:33:34::/:/sh\n",
        )
        .unwrap();
        assert_eq!(user("web").unwrap(), (33, 34, vec![50]));
    }

    #[test]
    fn links_do_not_leave_the_image() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("etc/passwd")).unwrap();
        assert!(resolve("root", &mounts(dir.path())).is_err());
    }
}
