//! CPU time by container, bytes and packets by pod.

use aya_ebpf::{
    EbpfContext as _, Global,
    bindings::tcx_action_base::TCX_NEXT,
    helpers::generated::{bpf_get_current_ancestor_cgroup_id, bpf_ktime_get_ns, bpf_probe_read_kernel},
    macros::{btf_tracepoint, classifier},
    programs::{BtfTracePointContext, TcContext},
};
use orlop_ebpf_abi::CpuTime;

use crate::maps::{cpu_v1, net_v1, running_v1};

/// The id of this node's cgroup `/orlop/INSTANCE`: only what runs below it is counted.
#[unsafe(no_mangle)]
static NODE_CGROUP: Global<u64> = Global::new(0);

/// Byte offsets in kernel structs, read from the kernel's BTF at load: `task_struct.cgroups`, `css_set.dfl_cgrp`, `cgroup.kn`,
/// `kernfs_node.id`.
#[unsafe(no_mangle)]
static CGROUPS_OFFSET: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static DFL_CGRP_OFFSET: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static KN_OFFSET: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static ID_OFFSET: Global<u32> = Global::new(0);

/// A pod's containers are so many levels below the node's cgroup: `/orlop/INSTANCE/POD_UID/CONTAINER_ID`.
const CONTAINER_DEPTH: i32 = 2;
/// The node's own cgroup is looked for down to this level.
const MAX_LEVEL: i32 = 12;

/// On every switch the task that leaves the CPU is charged for the time since the last one.
#[btf_tracepoint(function = "sched_switch")]
pub fn sched_switch(ctx: BtfTracePointContext) -> i32 {
    let Some(running) = running_v1.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: this CPU's own element; nothing else runs on this CPU between the reads and writes, for interrupts are off.
    let since = unsafe {
        let since = (*running).since;
        (*running).since = now;
        (*running).cgroup = cgroup_of(ctx.arg::<*const u8>(2));
        since
    };
    if since == 0 || now <= since {
        return 0;
    }
    if let Some(container) = current_container() {
        charge(container, now - since);
    }
    0
}

/// The container of the task that is about to leave the CPU, if it is one of this node's.
#[inline(always)]
fn current_container() -> Option<u64> {
    let node = NODE_CGROUP.load();
    let mut level = 1;
    while level < MAX_LEVEL {
        // SAFETY: a helper that takes a number.
        let ancestor = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if ancestor == 0 {
            return None;
        }
        if ancestor == node {
            // SAFETY: as above.
            let container = unsafe { bpf_get_current_ancestor_cgroup_id(level + CONTAINER_DEPTH) };
            return if container == 0 { None } else { Some(container) };
        }
        level += 1;
    }
    None
}

#[inline(always)]
fn charge(container: u64, nanoseconds: u64) {
    if let Some(time) = cpu_v1.get_ptr_mut(container) {
        // SAFETY: this CPU's own element, checked by the verifier.
        unsafe { (*time).nanoseconds += nanoseconds };
        return;
    }
    // When the map is full this container's time is not counted; the agent removes the entries of what is gone.
    let _full = cpu_v1.insert(container, CpuTime { nanoseconds }, 0);
}

/// The cgroup id of a task, 0 if it cannot be read.
#[inline(always)]
fn cgroup_of(task: *const u8) -> u64 {
    let set = follow(task, CGROUPS_OFFSET.load());
    let cgroup = follow(set, DFL_CGRP_OFFSET.load());
    let node = follow(cgroup, KN_OFFSET.load());
    follow(node, ID_OFFSET.load()) as u64
}

#[inline(always)]
fn follow(base: *const u8, offset: u32) -> *const u8 {
    let mut word: u64 = 0;
    let source = base.wrapping_add(offset as usize);
    // SAFETY: the helper writes eight bytes to `word`, and reads any kernel address or fails, leaving zero.
    unsafe { bpf_probe_read_kernel((&raw mut word).cast(), 8, source.cast()) };
    word as *const u8
}

/// What the pod sends arrives at the host's end.
#[classifier]
pub fn pod_ingress(ctx: TcContext) -> i32 {
    if let Some(traffic) = net_v1.get_ptr_mut(interface(&ctx)) {
        // SAFETY: this CPU's own element, checked by the verifier.
        unsafe {
            (*traffic).tx_bytes += u64::from(ctx.len());
            (*traffic).tx_packets += packets(&ctx);
        }
    }
    TCX_NEXT
}

/// What the pod receives leaves through the host's end.
#[classifier]
pub fn pod_egress(ctx: TcContext) -> i32 {
    if let Some(traffic) = net_v1.get_ptr_mut(interface(&ctx)) {
        // SAFETY: as above.
        unsafe {
            (*traffic).rx_bytes += u64::from(ctx.len());
            (*traffic).rx_packets += packets(&ctx);
        }
    }
    TCX_NEXT
}

#[inline(always)]
fn interface(ctx: &TcContext) -> u32 {
    // SAFETY: the context of a tc program is an `__sk_buff`.
    unsafe { (*ctx.as_ptr().cast::<aya_ebpf::bindings::__sk_buff>()).ifindex }
}

#[inline(always)]
fn packets(ctx: &TcContext) -> u64 {
    // SAFETY: as above.
    let segments = unsafe { (*ctx.as_ptr().cast::<aya_ebpf::bindings::__sk_buff>()).gso_segs };
    if segments == 0 { 1 } else { u64::from(segments) }
}
