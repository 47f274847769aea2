//! What glibc's allocator is asked to do, so that the agent's memory follows what a node has now, and not the largest burst that it
//! saw: the kernel's BTF at start, a snapshot with all services, an image's layers.

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether this process is an agent: where many of them are simulated in one, each would walk the heap of all.
static CONFIGURED: AtomicBool = AtomicBool::new(false);

/// Threads share so many arenas. Each keeps what was once freed in it, and the agent's few threads seldom allocate at the same time.
#[cfg(target_env = "gnu")]
const ARENAS: libc::c_int = 1;
/// Blocks of this size and more are the kernel's own mappings, which go back when they are freed. Said explicitly, it stays
/// so: otherwise the first large block that is freed raises the limit above its own size, and the next ones come from an arena.
#[cfg(target_env = "gnu")]
const MAPPED: libc::c_int = 128 << 10;

/// Sets both: to be called before there are threads.
pub fn configure() {
    CONFIGURED.store(true, Ordering::Relaxed);
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [(libc::M_ARENA_MAX, ARENAS), (libc::M_MMAP_THRESHOLD, MAPPED)] {
        // SAFETY: mallopt only sets a parameter of the allocator; there are no other threads yet.
        if unsafe { libc::mallopt(parameter, value) } == 0 {
            eprintln!("the allocator did not take parameter {parameter}");
        }
    }
}

/// Gives free pages back to the kernel, after a burst. Takes a millisecond or some, in which other allocations wait. Only in a process
/// that called [`configure`].
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    if CONFIGURED.load(Ordering::Relaxed) {
        // SAFETY: malloc_trim may be called at any time from any thread.
        unsafe { libc::malloc_trim(0) };
    }
}
