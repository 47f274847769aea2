//! Orlop's kernel programs.
//!
//! `services` translates ClusterIPs where sockets connect and send; `metrics` counts CPU time and packets. The maps and what
//! they mean are in `orlop-ebpf-abi` and `docs/maps.md`. This crate is compiled for the BPF target only.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
// The BPF target has the instruction for fetch-and-add, but core's atomics do not offer it there.
#![cfg_attr(
    target_arch = "bpf",
    feature(core_intrinsics),
    allow(internal_features, reason = "see above")
)]

#[cfg(target_arch = "bpf")]
mod address;
mod maps;
#[cfg(target_arch = "bpf")]
mod metrics;
#[cfg(target_arch = "bpf")]
mod services;

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Nothing here panics: the linker drops this, and the verifier would refuse the loop.
    loop {}
}

/// Some helpers (time, cgroup ids in tracing programs) are for GPL-compatible programs only.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
