//! Removes a link without the wait that the kernel ends a removal with.
//!
//! `RTM_DELLINK` takes a device, a veth's other end too, off its namespace and its addresses with it within a millisecond, under the
//! lock of all network configuration. Then it gives that lock back and waits until nobody can hold on to the device any more: RCU
//! periods, 10 to 40 ms of doing nothing, after which only memory is freed. Nobody needs to wait for that but the one who asked, who
//! cannot leave the system call. So a child process asks, and ends by itself when the kernel lets it go; we listen for the kernel's
//! notice that the link is gone, and then ask for its removal once more. The kernel answers that under the same lock, so
//! "there is no such link" says that both ends are gone with their addresses.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    time::{Duration, Instant},
};

use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::wait::waitpid,
    unistd::{ForkResult, fork},
};
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

use crate::error::{Failure, code};

/// A notice that does not come by then has been lost: the question that decides is asked without it.
const NOTICE_PATIENCE: Duration = Duration::from_secs(2);
/// The group that links' notices are sent to: RTMGRP_LINK.
const LINKS: u32 = 1;

/// Removes a link by name, in the namespace of this thread, and with a veth its other end; a success when it is gone. When
/// this returns neither end is there, nor are its addresses; the kernel may not have freed them yet.
pub fn remove(name: &str) -> Result<(), Failure> {
    let failed = |doing: &str| {
        let doing = format!("removing link {name}: {doing}");
        move |error: &io::Error| Failure::io(doing, error)
    };
    let notices = socket(LINKS).map_err(|e| failed("listening for its end")(&e))?;
    let asking = socket(0).map_err(|e| failed("opening a netlink socket")(&e))?;
    let request = request(name);
    if let Some(answer) = ask_in_a_child(&asking, &request, &notices, name).map_err(|e| failed("asking")(&e))? {
        return judge(name, answer);
    }
    let own = socket(0).map_err(|e| failed("opening a netlink socket")(&e))?;
    judge(name, ask(&own, &request))
}

/// 0, or the kernel's error number.
fn judge(name: &str, answer: i32) -> Result<(), Failure> {
    match answer {
        0 | libc::ENODEV => Ok(()),
        other => {
            Err(Failure::new(code::NETLINK, format!("removing link {name}")).with(io::Error::from_raw_os_error(other)))
        }
    }
}

/// The child's answer if it comes first: the link was not there, or the kernel refused. Otherwise the notice has come, or
/// is not to be waited for any longer.
fn ask_in_a_child(asking: &Socket, request: &[u8], notices: &Socket, name: &str) -> io::Result<Option<i32>> {
    let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    // SAFETY: the child calls nothing but system calls on memory that it has, and ends with _exit.
    match unsafe { fork() }? {
        ForkResult::Child => {
            // Who reads our output waits for its end, and another call for the container for the lock: neither must be the child's.
            close_all_but([asking.as_raw_fd(), theirs.as_raw_fd()]);
            let answer = ask(asking, request).to_ne_bytes();
            // SAFETY: the pipe's open end, and the four bytes of `answer`.
            unsafe {
                libc::write(theirs.as_raw_fd(), answer.as_ptr().cast(), answer.len());
                libc::_exit(0)
            }
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            let answer = await_notice(&ours, notices, name)?;
            if answer.is_some() {
                // It has ended, or is about to.
                let _reaped = waitpid(child, None);
            }
            Ok(answer)
        }
    }
}

/// System calls only, for a child.
fn close_all_but(mut kept: [RawFd; 2]) {
    kept.sort_unstable();
    let mut first = 0;
    for last in kept.map(|fd| fd - 1).into_iter().chain([RawFd::MAX]) {
        if first <= last {
            // SAFETY: closes descriptors that nothing of the child uses.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
        first = last.saturating_add(2);
    }
}

fn await_notice(child: &OwnedFd, notices: &Socket, name: &str) -> io::Result<Option<i32>> {
    let deadline = Instant::now() + NOTICE_PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // SAFETY: the socket is open for as long as this is used.
        let notices_fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(notices.as_raw_fd()) };
        let mut fds = [
            PollFd::new(child.as_fd(), PollFlags::POLLIN),
            PollFd::new(notices_fd, PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
        if ready(&fds[0]) {
            let mut answer = [0; 4];
            let mut pipe = File::from(child.try_clone()?);
            // A child that was killed has answered nothing: ask ourselves.
            return Ok(pipe.read_exact(&mut answer).is_ok().then(|| i32::from_ne_bytes(answer)));
        }
        if ready(&fds[1]) && tells_its_end(notices, name) {
            return Ok(None);
        }
    }
}

/// Whether the next notices say that the link is gone; also when some were lost, so that it is asked for.
fn tells_its_end(notices: &Socket, name: &str) -> bool {
    let Ok((bytes, _)) = notices.recv_from_full() else {
        return true;
    };
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest) else {
            return true;
        };
        let length = (message.header.length as usize).next_multiple_of(4);
        if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) = &message.payload
            // Those of the bridge's family say that it has lost a port.
            && link.header.interface_family == netlink_packet_route::AddressFamily::Unspec
            && link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::IfName(of) if of == name))
        {
            return true;
        }
        rest = rest.get(length..).unwrap_or_default();
    }
    false
}

/// 0, or the error number of the kernel's answer. No allocation: a child uses it.
fn ask(socket: &Socket, request: &[u8]) -> i32 {
    const ERROR_AT: usize = 16;
    let kernel = SocketAddr::new(0, 0);
    let mut answer = [0_u8; 1024];
    let mut room = &mut answer[..];
    let asked = socket
        .send_to(request, &kernel, 0)
        .and_then(|_sent| socket.recv(&mut room, 0));
    match asked {
        Ok(length) if length >= ERROR_AT + 4 => {
            let mut code = [0; 4];
            code.copy_from_slice(&answer[ERROR_AT..ERROR_AT + 4]);
            -i32::from_ne_bytes(code)
        }
        Ok(_) => libc::EBADMSG,
        Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
    }
}

fn request(name: &str) -> Vec<u8> {
    let mut link = LinkMessage::default();
    link.attributes.push(LinkAttribute::IfName(name.to_owned()));
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::DelLink(link));
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    message.header.sequence_number = 1;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn socket(groups: u32) -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind(&SocketAddr::new(0, groups))?;
    Ok(socket)
}
