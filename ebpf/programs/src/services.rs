//! ClusterIPs at the socket: a backend is chosen once per connection, when the socket connects or first sends, so a packet
//! costs nothing.
//!
//! A v4-mapped address (`::ffff:10.96.0.1` on an AF_INET6 socket, as most servers' clients have it) arrives at the 6 hooks and is
//! treated as the address that it maps. What a socket was told is remembered by its cookie (or in its own storage), so that
//! `getpeername` and `recvmsg` show the ClusterIP again, until it is closed.

use aya_ebpf::{
    helpers::generated::{bpf_get_socket_cookie, bpf_set_retval},
    macros::{cgroup_sock, cgroup_sock_addr},
    programs::{SockAddrContext, SockContext},
};
use aya_log_ebpf::warn;
use orlop_ebpf_abi::{
    Connected, DATAGRAM_PEERS, Datagrams, FrontendKey, Peer, Protocol, Scope, Socket,
    selection::{Selection, select},
};

use crate::{
    address::{Address, V4, V6},
    maps::{Pinned, count_connection, count_refused, failures, place, sk_conn4_v1, sk_udp4_v1},
};

const ALLOW: i32 = 1;
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;
const ENOMEM: i32 = 12;

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect(&ctx, &V4::new(&ctx))
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect(&ctx, &V6::new(&ctx))
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    send(&ctx, &V4::new(&ctx))
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    send(&ctx, &V6::new(&ctx))
}

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    receive(&ctx, &V4::new(&ctx))
}

#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    receive(&ctx, &V6::new(&ctx))
}

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    peer_name(&ctx, &V4::new(&ctx))
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    peer_name(&ctx, &V6::new(&ctx))
}

#[inline(always)]
fn connect<A: Address>(ctx: &SockAddrContext, to: &A) -> i32 {
    let Some(protocol) = to.protocol() else { return ALLOW };
    let Some(address) = to.get() else {
        forget(ctx);
        return ALLOW;
    };
    let key = FrontendKey {
        address,
        port: to.port(),
        protocol,
        scope: Scope::Cluster,
    };
    match select(&Pinned, &key, None) {
        Selection::NotAService => {
            forget(ctx);
            ALLOW
        }
        Selection::Backend {
            service,
            backend,
            address,
            port,
            kept: _,
        } => {
            if !remember(ctx, &key, address, port) {
                return no_storage();
            }
            count_connection(service, backend);
            to.set(address);
            to.set_port(port);
            ALLOW
        }
        Selection::NoBackend { service } => {
            count_refused(service);
            refuse(ECONNREFUSED)
        }
        Selection::Exhausted => exhausted(ctx, &key),
    }
}

/// Notes what a socket was told: at its cookie's place, or where that is another's, in the socket's own storage.
#[inline(always)]
fn remember(ctx: &SockAddrContext, key: &FrontendKey, address: [u8; 4], port: u16) -> bool {
    let connected = match claim(cookie(ctx)) {
        Some(connected) => connected,
        // SAFETY: the hook's socket; the storage goes with it.
        None => unsafe { sk_conn4_v1.get_or_insert_ptr_mut(ctx, None) },
    };
    // SAFETY: checked by the verifier; only this socket's system calls use it.
    let Some(connected) = (unsafe { connected.as_mut() }) else {
        return false;
    };
    connected.service_address = key.address;
    connected.backend_address = address;
    connected.backend_port = port;
    connected.service_port = key.port;
    true
}

/// Takes the cookie's place if it is free. A socket has it until it is closed.
#[inline(always)]
fn claim(cookie: u64) -> Option<*mut Connected> {
    let socket = place(cookie)?;
    // SAFETY: checked by the verifier. Sockets with the same place race for it: one of them finds it free.
    unsafe {
        let holder = (&raw const (*socket).cookie).read_volatile();
        let ours = holder == cookie || (holder == 0 && exchange_if_free(&raw mut (*socket).cookie, cookie));
        ours.then_some(&raw mut (*socket).connected)
    }
}

/// # Safety
/// A valid pointer.
#[inline(always)]
unsafe fn exchange_if_free(holder: *mut u64, cookie: u64) -> bool {
    const ORDER: core::intrinsics::AtomicOrdering = core::intrinsics::AtomicOrdering::SeqCst;
    // SAFETY: the caller's.
    unsafe { core::intrinsics::atomic_cxchg::<u64, ORDER, ORDER>(holder, 0, cookie).1 }
}

/// What was noted at the socket's place.
#[inline(always)]
fn noted(cookie: u64) -> Option<*mut Socket> {
    let socket = place(cookie)?;
    // SAFETY: checked by the verifier. While this socket is open nobody else writes its cookie here or takes it away.
    (unsafe { (&raw const (*socket).cookie).read_volatile() } == cookie).then_some(socket)
}

/// The socket connects to something that is no service: an earlier connect, or attempt, through one no longer counts.
#[inline(always)]
fn forget(ctx: &SockAddrContext) {
    if let Some(socket) = noted(cookie(ctx)) {
        // SAFETY: as in `noted`.
        unsafe { (*socket).connected.service_port = 0 };
        return;
    }
    // SAFETY: the hook's socket.
    if let Some(connected) = unsafe { sk_conn4_v1.get_ptr_mut(ctx).as_mut() } {
        connected.service_port = 0;
    }
}

/// A socket is closed.
#[cgroup_sock(sock_release)]
pub fn sock_release(ctx: SockContext) -> i32 {
    // SAFETY: the hook's context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.sock.cast()) };
    if let Some(socket) = noted(cookie) {
        // SAFETY: as in `noted`. The last exchange is ordered after the writes before it: then the place may be another's.
        unsafe {
            let words = (&raw mut (*socket).connected).cast::<u32>();
            words.write_volatile(0);
            words.add(1).write_volatile(0);
            words.add(2).write_volatile(0);
            core::intrinsics::atomic_xchg::<u64, { core::intrinsics::AtomicOrdering::SeqCst }>(
                &raw mut (*socket).cookie,
                0,
            );
        }
    }
    ALLOW
}

#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the hook's context.
    unsafe { bpf_get_socket_cookie(ctx.sock_addr.cast()) }
}

/// A datagram with an address of its own: the socket keeps its backend for a service while that is ready.
#[inline(always)]
fn send<A: Address>(ctx: &SockAddrContext, to: &A) -> i32 {
    let Some(protocol @ Protocol::Udp) = to.protocol() else {
        return ALLOW;
    };
    let Some(address) = to.get() else { return ALLOW };
    let key = FrontendKey {
        address,
        port: to.port(),
        protocol,
        scope: Scope::Cluster,
    };
    // SAFETY: the hook's socket.
    let known = unsafe { sk_udp4_v1.get_ptr_mut(ctx) };
    let peer = peer_of_service(known, &key);
    match select(&Pinned, &key, peer.and_then(backend_of)) {
        Selection::NotAService => {
            forget_direct(known, key.address, key.port);
            ALLOW
        }
        Selection::Backend {
            service,
            backend,
            address,
            port,
            kept,
        } => {
            if !kept {
                let Some(peer) = peer.or_else(|| new_peer(ctx)) else {
                    return no_storage();
                };
                set_peer(peer, &key, address, port);
                count_connection(service, backend);
            }
            to.set(address);
            to.set_port(port);
            ALLOW
        }
        Selection::NoBackend { service } => {
            count_refused(service);
            refuse(ECONNREFUSED)
        }
        Selection::Exhausted => exhausted(ctx, &key),
    }
}

#[inline(always)]
fn peer_at(known: *mut Datagrams, index: usize) -> *mut Peer {
    // SAFETY: the caller's index is below DATAGRAM_PEERS, as the verifier checks again.
    unsafe { (&raw mut (*known).peers).cast::<Peer>().add(index) }
}

#[inline(always)]
fn pack(address: [u8; 4], port: u16) -> u64 {
    u64::from(u32::from_ne_bytes(address)) | (u64::from(port) << 32)
}

/// The entry of a service.
#[inline(always)]
fn peer_of_service(known: *mut Datagrams, key: &FrontendKey) -> Option<*mut Peer> {
    if known.is_null() {
        return None;
    }
    let wanted = pack(key.address, key.port);
    let mut index = 0;
    while index < DATAGRAM_PEERS {
        let peer = peer_at(known, index);
        // SAFETY: in the storage; the two halves of an entry are one word each.
        if unsafe { peer.cast::<u64>().read_volatile() } == wanted {
            return Some(peer);
        }
        index += 1;
    }
    None
}

/// The entry whose backend a datagram goes to, or comes from.
#[inline(always)]
fn peer_of_backend(known: *mut Datagrams, address: [u8; 4], port: u16) -> Option<*mut Peer> {
    if known.is_null() {
        return None;
    }
    let wanted = pack(address, port);
    let mut index = 0;
    while index < DATAGRAM_PEERS {
        let peer = peer_at(known, index);
        // SAFETY: as above.
        if unsafe { peer.cast::<u64>().add(1).read_volatile() } == wanted {
            return Some(peer);
        }
        index += 1;
    }
    None
}

#[inline(always)]
fn backend_of(peer: *mut Peer) -> Option<([u8; 4], u16)> {
    // SAFETY: as above.
    let word = unsafe { peer.cast::<u64>().add(1).read_volatile() };
    if word == 0 {
        None
    } else {
        Some(((word as u32).to_ne_bytes(), (word >> 32) as u16))
    }
}

/// Takes the next entry; threads that share the socket get one each. (With a relaxed ordering LLVM leaves out the fetch.)
#[inline(always)]
fn new_peer(ctx: &SockAddrContext) -> Option<*mut Peer> {
    // SAFETY: the hook's socket; the storage starts as zeros and goes with it.
    unsafe {
        let known = sk_udp4_v1.get_or_insert_ptr_mut(ctx, None);
        if known.is_null() {
            return None;
        }
        let next = core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::SeqCst }>(
            &raw mut (*known).next,
            1,
        );
        Some(peer_at(known, next as usize & (DATAGRAM_PEERS - 1)))
    }
}

/// First the backend, then the service: an entry with a service has a backend.
#[inline(always)]
fn set_peer(peer: *mut Peer, key: &FrontendKey, address: [u8; 4], port: u16) {
    // SAFETY: in the storage; see `peer_of_service`.
    unsafe {
        peer.cast::<u64>().add(1).write_volatile(pack(address, port));
        peer.cast::<u64>().write_volatile(pack(key.address, key.port));
    }
}

/// The socket talks to an address that is no service. If that is the backend of one it talks to as well, its answers can
/// no longer be told apart: the last send wins.
#[inline(always)]
fn forget_direct(known: *mut Datagrams, address: [u8; 4], port: u16) {
    if let Some(peer) = peer_of_backend(known, address, port) {
        // SAFETY: in the storage.
        unsafe {
            peer.cast::<u64>().write_volatile(0);
            peer.cast::<u64>().add(1).write_volatile(0);
        }
    }
}

/// Shows the ClusterIP as the sender.
#[inline(always)]
fn receive<A: Address>(ctx: &SockAddrContext, from: &A) -> i32 {
    let Some(address) = from.get() else { return ALLOW };
    let port = from.port();
    if show_service(ctx, from, address, port) {
        return ALLOW;
    }
    // SAFETY: the hook's socket.
    let known = unsafe { sk_udp4_v1.get_ptr_mut(ctx) };
    if let Some(peer) = peer_of_backend(known, address, port) {
        // SAFETY: in the storage; see `peer_of_service`.
        let word = unsafe { peer.cast::<u64>().read_volatile() };
        if word != 0 {
            from.set((word as u32).to_ne_bytes());
            from.set_port((word >> 32) as u16);
        }
    }
    ALLOW
}

/// Shows the ClusterIP as the peer.
#[inline(always)]
fn peer_name<A: Address>(ctx: &SockAddrContext, peer: &A) -> i32 {
    if let Some(address) = peer.get() {
        show_service(ctx, peer, address, peer.port());
    }
    ALLOW
}

/// Replaces a backend's address by that of the service which the socket is connected through.
#[inline(always)]
fn show_service<A: Address>(ctx: &SockAddrContext, shown: &A, address: [u8; 4], port: u16) -> bool {
    let connected = match noted(cookie(ctx)) {
        // SAFETY: as in `noted`.
        Some(socket) => unsafe { &raw const (*socket).connected },
        // SAFETY: the hook's socket.
        None => unsafe { sk_conn4_v1.get_ptr_mut(ctx) },
    };
    // SAFETY: the verifier has checked the pointer; a socket's entry changes only with its own connect.
    let Some(connected) = (unsafe { connected.as_ref() }) else {
        return false;
    };
    if connected.service_port == 0 || connected.backend_port != port || connected.backend_address != address {
        return false;
    }
    shown.set(connected.service_address);
    shown.set_port(connected.service_port);
    true
}

#[inline(always)]
fn refuse(error: i32) -> i32 {
    // SAFETY: the connect and sendmsg hooks may set what the system call returns.
    unsafe { bpf_set_retval(-error) };
    REFUSE
}

#[inline(always)]
fn no_storage() -> i32 {
    if let Some(failures) = failures() {
        // SAFETY: this CPU's own element.
        unsafe { (*failures).no_storage += 1 };
    }
    refuse(ENOMEM)
}

#[cold]
#[inline(never)]
fn exhausted(ctx: &SockAddrContext, key: &FrontendKey) -> i32 {
    if let Some(failures) = failures() {
        // SAFETY: this CPU's own element.
        unsafe { (*failures).exhausted += 1 };
    }
    warn!(
        ctx,
        "service {:i}:{} refused: its entry was another's each time",
        u32::from_be_bytes(key.address),
        key.port
    );
    refuse(ECONNREFUSED)
}
