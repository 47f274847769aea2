//! The namespaces of a lab's members: made by a holder process that then only waits, entered by everything else.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::AsFd,
        unix::{fs::symlink, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use anyhow::{Context, Result, anyhow, bail};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

use crate::cgroup::{self, Hierarchy};

/// Makes a member's namespaces around this process, says so with a line on stdout, and waits for its end (stdin's).
///
/// The member gets its own network, mount, cgroup and UTS namespace: a private `/run`, `/etc` and `/opt` (what is written
/// there goes with the namespace), `/sys` with its own cgroup mounts and bpffs. Everything else is the machine's.
pub fn hold(name: &str, cgroup_path: &str, keep: &Path) -> Result<()> {
    cgroup::join(cgroup_path)?;
    let hierarchies = cgroup::hierarchies()?;
    unshare(
        CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP | CloneFlags::CLONE_NEWUTS,
    )
    .context("making namespaces; this needs root")?;
    rustix::system::sethostname(name.as_bytes()).context("setting the host name")?;
    mount_private(&hierarchies, keep)?;
    run_tool("ip", &["link", "set", "lo", "up"])?;
    // The cgroup namespace's root stays without processes, as cgroup2 wants it of a cgroup with controllers.
    cgroup::create("system")?;
    cgroup::join("system")?;
    println!("ready");
    std::io::stdout().flush()?;
    let mut end = Vec::new();
    std::io::stdin().read_to_end(&mut end).context("waiting for the end")?;
    Ok(())
}

fn mount_private(hierarchies: &[Hierarchy], keep: &Path) -> Result<()> {
    let kept = File::open(keep).with_context(|| format!("opening {}", keep.display()))?;
    mount_at(None, "/", None, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None)?;
    mount_at(
        Some("tmpfs"),
        "/run",
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=755"),
    )?;
    for folder in ["etc", "opt"] {
        let (upper, work) = (format!("/run/lab/{folder}"), format!("/run/lab/{folder}.work"));
        fs::create_dir_all(&upper).context("making an overlay's folder")?;
        fs::create_dir_all(&work).context("making an overlay's folder")?;
        let options = format!("lowerdir=/{folder},upperdir={upper},workdir={work}");
        mount_at(
            Some("overlay"),
            &format!("/{folder}"),
            Some("overlay"),
            MsFlags::empty(),
            Some(&options),
        )?;
    }
    if keep.starts_with("/etc") || keep.starts_with("/opt") {
        use std::os::fd::AsRawFd;
        let source = format!("/proc/self/fd/{}", kept.as_raw_fd());
        let target = keep.to_str().context("the repository's path is not UTF-8")?;
        mount_at(Some(&source), target, None, MsFlags::MS_BIND | MsFlags::MS_REC, None)?;
    }
    fs::create_dir_all("/etc/cni/net.d").context("making /etc/cni/net.d")?;
    fs::create_dir_all("/opt/cni/bin").context("making /opt/cni/bin")?;
    // The machine's own mounts below /sys go first: runc and the agent read the mount table.
    umount2("/sys", MntFlags::MNT_DETACH).context("unmounting /sys")?;
    mount_at(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), None)?;
    mount_at(
        Some("bpf"),
        "/sys/fs/bpf",
        Some("bpf"),
        MsFlags::empty(),
        Some("mode=700"),
    )?;
    mount_cgroups(hierarchies)
}

fn mount_cgroups(hierarchies: &[Hierarchy]) -> Result<()> {
    if let [only] = hierarchies {
        return mount_at(
            Some("cgroup2"),
            path_text(&only.mount)?,
            Some("cgroup2"),
            MsFlags::empty(),
            None,
        );
    }
    mount_at(
        Some("tmpfs"),
        "/sys/fs/cgroup",
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=755"),
    )?;
    for hierarchy in hierarchies {
        fs::create_dir_all(&hierarchy.mount).with_context(|| format!("making {}", hierarchy.mount.display()))?;
        let target = path_text(&hierarchy.mount)?;
        if hierarchy.is_v2() {
            mount_at(Some("cgroup2"), target, Some("cgroup2"), MsFlags::empty(), None)?;
        } else {
            // A named hierarchy without controllers has to be asked for with `none`.
            let options = if hierarchy.options.starts_with("name=") {
                format!("none,{}", hierarchy.options)
            } else {
                hierarchy.options.clone()
            };
            mount_at(Some("cgroup"), target, Some("cgroup"), MsFlags::empty(), Some(&options))?;
            for controller in hierarchy.options.split(',').filter(|_| hierarchy.options.contains(',')) {
                let link = Path::new("/sys/fs/cgroup").join(controller);
                if !link.exists() {
                    symlink(&hierarchy.mount, &link).with_context(|| format!("linking {}", link.display()))?;
                }
            }
        }
    }
    Ok(())
}

fn mount_at(source: Option<&str>, target: &str, kind: Option<&str>, flags: MsFlags, data: Option<&str>) -> Result<()> {
    mount(source, target, kind, flags, data)
        .with_context(|| format!("mounting {} at {target}", kind.unwrap_or("a folder")))
}

fn path_text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}

/// What [`enter`] goes into.
#[derive(Debug, Clone, Default)]
pub struct Target {
    /// The process that holds the member's namespaces.
    pub holder: i32,
    /// Instead of the member's network namespace that of this process (a pod's).
    pub network_of: Option<i32>,
    /// The cgroup to join, relative to the hierarchies' roots as the machine sees them; made when it is missing.
    pub cgroup: String,
    /// In cgroup2 this one instead.
    pub cgroup2: Option<String>,
    /// How many listening sockets are handed on, as file descriptors from 3.
    pub listen_fds: u32,
    /// The folder to start in; `/` when not given.
    pub directory: Option<PathBuf>,
}

/// Puts this process into a member's namespaces and cgroup and becomes the command. Returns only when that failed.
pub fn enter(target: &Target, command: &[String]) -> Result<()> {
    cgroup::create(&target.cgroup)?;
    cgroup::join(&target.cgroup)?;
    if let Some(path) = &target.cgroup2 {
        cgroup::create(path)?;
        cgroup::join_cgroup2(path)?;
    }
    let open = |pid: i32, kind: &str| {
        let path = format!("/proc/{pid}/ns/{kind}");
        File::open(&path).with_context(|| format!("opening {path}: is the lab still up?"))
    };
    let network = open(target.network_of.unwrap_or(target.holder), "net")?;
    let others = [
        (open(target.holder, "uts")?, CloneFlags::CLONE_NEWUTS),
        (open(target.holder, "cgroup")?, CloneFlags::CLONE_NEWCGROUP),
        (open(target.holder, "mnt")?, CloneFlags::CLONE_NEWNS),
    ];
    setns(network.as_fd(), CloneFlags::CLONE_NEWNET).context("entering the network namespace")?;
    for (file, flag) in &others {
        setns(file.as_fd(), *flag).with_context(|| format!("entering {flag:?}"))?;
    }
    let Some((program, arguments)) = command.split_first() else {
        bail!("no command")
    };
    let mut run = Command::new(program);
    run.args(arguments);
    // Entering a mount namespace leads to its root.
    run.current_dir(target.directory.as_deref().unwrap_or(Path::new("/")));
    if target.listen_fds > 0 {
        run.env("LISTEN_PID", std::process::id().to_string())
            .env("LISTEN_FDS", target.listen_fds.to_string());
    }
    let error = run.exec();
    Err(error).with_context(|| format!("running {program}"))
}

/// Runs this in the network namespace of a process, and returns its answer: sockets that it opens stay there.
pub fn in_network<T: Send + 'static>(pid: i32, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    // A thread of its own enters the namespace and ends there: a namespace belongs to a thread.
    let entered = thread::spawn(move || -> Result<T> {
        let path = format!("/proc/{pid}/ns/net");
        let namespace = File::open(&path).with_context(|| format!("opening {path}"))?;
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).with_context(|| format!("entering {path}"))?;
        work()
    });
    entered
        .join()
        .map_err(|_| anyhow!("the thread inside the network of process {pid} panicked"))?
}

/// Runs a tool of the machine here and now; its stderr is part of the error.
pub fn run_tool(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("running {program}"))?;
    if !output.status.success() {
        bail!(
            "{program} {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether a name can be a part of a path and a C string.
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 40
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}
