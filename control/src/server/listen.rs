//! Listening sockets: bound here, or passed by whoever started us.

use std::{
    env,
    io::{self, ErrorKind},
    net::{SocketAddr, TcpListener as StdTcpListener},
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        unix::{fs::PermissionsExt, net::UnixListener as StdUnixListener},
    },
    path::Path,
};

use tokio::net::{TcpListener, UnixListener};

use crate::config::Config;

/// The first descriptor of `LISTEN_FDS`.
const FIRST_FD: RawFd = 3;

/// What is known of a peer on a TCP listener before it says anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// Nothing: TLS.
    Tls,
    /// Everything: plaintext, and whoever connects is an administrator.
    Insecure,
}

/// A socket that takes connections.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener, Trust),
    /// A unix socket: the peer's uid decides.
    Unix(UnixListener),
}

/// All listeners that the configuration asks for. `inherited` ones take the place of `listen`.
///
/// # Errors
/// When an address cannot be bound.
pub async fn bind(config: &Config, inherited: Vec<Listener>) -> io::Result<Vec<Listener>> {
    let mut listeners = inherited;
    if !listeners.iter().any(|listener| matches!(listener, Listener::Tcp(..))) {
        for address in &config.listen {
            listeners.push(tcp(*address, Trust::Tls).await?);
        }
    }
    for address in &config.insecure_listen {
        tracing::warn!(%address, "insecure listener: everybody who reaches it is an administrator");
        listeners.push(tcp(*address, Trust::Insecure).await?);
    }
    if !config.unix_socket.as_os_str().is_empty() {
        listeners.push(unix(&config.unix_socket)?);
    }
    for listener in &listeners {
        match listener {
            Listener::Tcp(socket, trust) => tracing::info!(address = %socket.local_addr()?, ?trust, "listening"),
            Listener::Unix(_) => tracing::info!(path = %config.unix_socket.display(), "listening"),
        }
    }
    Ok(listeners)
}

/// The sockets that the service manager opened for us (`LISTEN_FDS`, sd_listen_fds(3)): TCP ones serve TLS, unix ones the
/// administrators of this machine. `LISTEN_PID`, when it is there, must name this process.
///
/// # Errors
/// When the variables are garbage or a descriptor is not a listening socket.
pub fn inherited() -> io::Result<Vec<Listener>> {
    let garbage = |name: &str| io::Error::new(ErrorKind::InvalidInput, format!("{name} is not a number"));
    let Ok(count) = env::var("LISTEN_FDS") else {
        return Ok(Vec::new());
    };
    if let Ok(pid) = env::var("LISTEN_PID")
        && pid.parse::<u32>().map_err(|_| garbage("LISTEN_PID"))? != std::process::id()
    {
        return Ok(Vec::new());
    }
    let count: u16 = count.parse().map_err(|_| garbage("LISTEN_FDS"))?;
    (FIRST_FD..FIRST_FD + RawFd::from(count)).map(take).collect()
}

fn take(fd: RawFd) -> io::Result<Listener> {
    // SAFETY: fcntl with F_SETFD touches no memory, and fails on a descriptor that is not open.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, as fcntl has just shown, and by the protocol of LISTEN_FDS it is ours alone. `inherited`
    // is called once, at the start of main, before anything else could own it.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    let tcp = StdTcpListener::from(owned);
    // The address of a socket of another family cannot be read as an internet address.
    if tcp.local_addr().is_ok() {
        tcp.set_nonblocking(true)?;
        return Ok(Listener::Tcp(TcpListener::from_std(tcp)?, Trust::Tls));
    }
    let unix = StdUnixListener::from(OwnedFd::from(tcp));
    unix.local_addr()?;
    unix.set_nonblocking(true)?;
    Ok(Listener::Unix(UnixListener::from_std(unix)?))
}

async fn tcp(address: SocketAddr, trust: Trust) -> io::Result<Listener> {
    let listener = TcpListener::bind(address)
        .await
        .map_err(|error| io::Error::new(error.kind(), format!("listen on {address}: {error}")))?;
    Ok(Listener::Tcp(listener, trust))
}

/// Binds a unix socket with mode 0600. A socket that a dead process left behind is replaced, a live one is not.
fn unix(path: &Path) -> io::Result<Listener> {
    let context = |error: io::Error| io::Error::new(error.kind(), format!("listen on {}: {error}", path.display()));
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        std::fs::create_dir_all(directory).map_err(context)?;
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => {
            let error = io::Error::new(ErrorKind::AddrInUse, "another process listens there");
            return Err(context(error));
        }
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(context)?,
        Err(_) => {}
    }
    // Bound under another name first: the socket is never there with a wider mode.
    let temporary = path.with_extension(format!("{}.new", std::process::id()));
    let listener = StdUnixListener::bind(&temporary).map_err(context)?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600)).map_err(context)?;
    std::fs::rename(&temporary, path).map_err(context)?;
    listener.set_nonblocking(true)?;
    Ok(Listener::Unix(UnixListener::from_std(listener)?))
}
