//! The address in a socket hook's context, read and written the same way in the hooks for IPv4 and for IPv6.

use aya_ebpf::{bindings::bpf_sock_addr, programs::SockAddrContext};
use orlop_ebpf_abi::Protocol;

/// The address in the hook's context.
pub trait Address {
    /// The IPv4 address, if it is one or maps one.
    fn get(&self) -> Option<[u8; 4]>;
    fn set(&self, address: [u8; 4]);
    fn raw(&self) -> *mut bpf_sock_addr;

    #[inline(always)]
    fn port(&self) -> u16 {
        // SAFETY: the hook's context. Volatile: the verifier wants whole words at their offsets. The port is in network
        // order in the lower half.
        let word = unsafe { (&raw const (*self.raw()).user_port).read_volatile() };
        u16::from_be(word as u16)
    }

    #[inline(always)]
    fn set_port(&self, port: u16) {
        // SAFETY: as above.
        unsafe { (&raw mut (*self.raw()).user_port).write_volatile(u32::from(port.to_be())) };
    }

    #[inline(always)]
    fn protocol(&self) -> Option<Protocol> {
        // SAFETY: as above.
        Protocol::from_number(unsafe { (&raw const (*self.raw()).protocol).read_volatile() })
    }
}

/// The address in a hook for IPv4 sockets.
pub struct V4 {
    raw: *mut bpf_sock_addr,
}

impl V4 {
    #[inline(always)]
    pub fn new(ctx: &SockAddrContext) -> Self {
        Self { raw: ctx.sock_addr }
    }
}

impl Address for V4 {
    #[inline(always)]
    fn get(&self) -> Option<[u8; 4]> {
        // SAFETY: the hook's context.
        Some(unsafe { (&raw const (*self.raw).user_ip4).read_volatile() }.to_ne_bytes())
    }

    #[inline(always)]
    fn set(&self, address: [u8; 4]) {
        // SAFETY: as above.
        unsafe { (&raw mut (*self.raw).user_ip4).write_volatile(u32::from_ne_bytes(address)) };
    }

    #[inline(always)]
    fn raw(&self) -> *mut bpf_sock_addr {
        self.raw
    }
}

/// The address in a hook for IPv6 sockets.
pub struct V6 {
    raw: *mut bpf_sock_addr,
}

impl V6 {
    #[inline(always)]
    pub fn new(ctx: &SockAddrContext) -> Self {
        Self { raw: ctx.sock_addr }
    }
}

impl Address for V6 {
    #[inline(always)]
    fn get(&self) -> Option<[u8; 4]> {
        // SAFETY: the hook's context.
        unsafe {
            let words = (&raw const (*self.raw).user_ip6).cast::<u32>();
            if words.read_volatile() != 0
                || words.add(1).read_volatile() != 0
                || words.add(2).read_volatile() != 0xffff_u32.to_be()
            {
                return None;
            }
            Some(words.add(3).read_volatile().to_ne_bytes())
        }
    }

    #[inline(always)]
    fn set(&self, address: [u8; 4]) {
        // SAFETY: as above; the upper words stay those of a mapped address.
        unsafe {
            (&raw mut (*self.raw).user_ip6)
                .cast::<u32>()
                .add(3)
                .write_volatile(u32::from_ne_bytes(address))
        };
    }

    #[inline(always)]
    fn raw(&self) -> *mut bpf_sock_addr {
        self.raw
    }
}
