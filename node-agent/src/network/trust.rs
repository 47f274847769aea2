//! Whether a file is written by nobody but root and us: what a configuration says is run as root.

use std::{
    collections::VecDeque,
    ffi::OsString,
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

/// As many as the kernel follows.
const MAX_LINKS: u32 = 40;
const GROUP_WRITES: u32 = 0o020;
const OTHERS_WRITE: u32 = 0o002;
const STICKY: u32 = 0o1000;

/// Says who else could have written the file, or put another one in its place: it, the folders on the way to it, and those
/// of every symbolic link on that way must be root's or ours, and writable by nobody else.
pub fn check(path: &Path) -> Result<(), String> {
    let absolute = std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut ahead: VecDeque<OsString> = parts(&absolute);
    let mut at = PathBuf::from("/");
    let mut links = 0;
    while let Some(part) = ahead.pop_front() {
        if part == ".." {
            at.pop();
            continue;
        }
        at.push(&part);
        let metadata = fs::symlink_metadata(&at).map_err(|e| format!("{}: {e}", at.display()))?;
        owned(&at, &metadata)?;
        if metadata.is_symlink() {
            links += 1;
            if links > MAX_LINKS {
                return Err(format!("{} leads through too many symbolic links", path.display()));
            }
            let target = fs::read_link(&at).map_err(|e| format!("{}: {e}", at.display()))?;
            at.pop();
            if target.is_absolute() {
                at = PathBuf::from("/");
            }
            for part in parts(&target).into_iter().rev() {
                ahead.push_front(part);
            }
        } else {
            written_by_us(&at, &metadata)?;
        }
    }
    Ok(())
}

fn parts(path: &Path) -> VecDeque<OsString> {
    let named = |part: Component<'_>| match part {
        Component::Normal(_) | Component::ParentDir => Some(part.as_os_str().to_owned()),
        _ => None,
    };
    path.components().filter_map(named).collect()
}

fn owned(path: &Path, metadata: &Metadata) -> Result<(), String> {
    let uid = metadata.uid();
    if uid == 0 || uid == rustix::process::geteuid().as_raw() {
        return Ok(());
    }
    Err(format!(
        "{} belongs to user {uid}, who could write anything there: chown root it",
        path.display()
    ))
}

fn written_by_us(path: &Path, metadata: &Metadata) -> Result<(), String> {
    let mode = metadata.mode();
    // In a folder with the sticky bit others may add entries, but not replace root's.
    let guarded = metadata.is_dir() && mode & STICKY != 0;
    let who = if mode & OTHERS_WRITE != 0 {
        "everybody"
    } else if mode & GROUP_WRITES != 0 && metadata.gid() != 0 {
        "its group"
    } else {
        return Ok(());
    };
    if guarded {
        return Ok(());
    }
    Err(format!(
        "{} can be written by {who} (mode {:03o}): chmod go-w it",
        path.display(),
        mode & 0o777
    ))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_others_could_have_written_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, file) = (dir.path().join("net.d"), dir.path().join("net.d/a"));
        fs::create_dir(&folder).unwrap();
        fs::write(&file, "x").unwrap();
        check(&file).unwrap();
        for bad in [0o666, 0o646] {
            mode(&file, bad);
            let why = check(&file).unwrap_err();
            assert!(why.contains("everybody") && why.contains("net.d/a"), "{why}");
        }
        mode(&file, 0o644);
        mode(&folder, 0o777);
        assert!(check(&file).unwrap_err().contains("net.d can be written"));
        mode(&folder, 0o1777);
        check(&file).unwrap();
        mode(&folder, 0o755);
        chown(&file, Some(65534), None).unwrap();
        assert!(check(&file).unwrap_err().contains("user 65534"));
        chown(&file, None, Some(65534)).unwrap();
        chown(&file, Some(0), None).unwrap();
        mode(&file, 0o664);
        assert!(check(&file).unwrap_err().contains("its group"));
    }

    #[test]
    fn links_are_followed_to_what_they_lead_to() {
        let dir = tempfile::tempdir().unwrap();
        let (open, closed) = (dir.path().join("open"), dir.path().join("closed"));
        fs::create_dir(&open).unwrap();
        fs::create_dir(&closed).unwrap();
        fs::write(closed.join("good"), "x").unwrap();
        fs::write(open.join("bad"), "x").unwrap();
        symlink("good", closed.join("near")).unwrap();
        symlink("../open/bad", closed.join("far")).unwrap();
        symlink(closed.join("good"), open.join("back")).unwrap();
        symlink("../open/back", closed.join("detour")).unwrap();
        symlink("round", closed.join("round")).unwrap();
        for name in ["near", "far", "detour"] {
            check(&closed.join(name)).unwrap();
        }
        assert!(check(&closed.join("round")).unwrap_err().contains("too many"));
        mode(&open, 0o777);
        check(&closed.join("near")).unwrap();
        for name in ["far", "detour"] {
            let why = check(&closed.join(name)).unwrap_err();
            assert!(why.contains("open can be written"), "{name}: {why}");
        }
    }
}
