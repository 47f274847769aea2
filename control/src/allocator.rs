//! The allocator of `orlop-control`.
//!
//! jemalloc rather than glibc's: thousands of sessions and their objects are many small pieces that live for seconds, which glibc's
//! free lists take a third of control's CPU for, and whose pages glibc gives back only when asked. The agent keeps glibc's, which is
//! smaller for the few things that it holds.

use std::ffi::c_char;

use tikv_jemallocator::Jemalloc;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// What jemalloc is told before `main` (its `malloc_conf`, see jemalloc(3); an operator's `_RJEM_MALLOC_CONF` comes after it and wins):
/// two arenas, since each keeps what it once took, and a thread of its own that gives free pages back within seconds, so that
/// memory follows what there is and not what there was.
#[unsafe(export_name = "_rjem_malloc_conf")]
static CONFIGURATION: Option<&'static c_char> = {
    let text = c"narenas:2,background_thread:true,dirty_decay_ms:3000,muzzy_decay_ms:0";
    // SAFETY: a C string has at least the byte that ends it, and is never freed.
    Some(unsafe { &*text.as_ptr() })
};
