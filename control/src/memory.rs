//! What glibc's allocator is asked to do, so that memory follows what there is and not what there was: after a burst (thousands of
//! nodes that join, a large list) free pages would stay resident in every thread's arena.

use std::time::Duration;

/// Threads share so many arenas. More of them are faster only where threads allocate all the time; each keeps what it once took.
#[cfg(target_env = "gnu")]
const ARENAS: libc::c_int = 2;
/// How often free pages are given back.
const PERIOD: Duration = Duration::from_secs(10);

/// Bounds the number of arenas: to be called before there are threads.
pub fn bound_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt only sets a parameter of the allocator; there are no other threads yet.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) } == 0 {
        eprintln!("the allocator's arenas could not be bounded");
    }
}

/// Gives free pages back to the kernel every few seconds, for ever.
pub async fn give_back() {
    loop {
        tokio::time::sleep(PERIOD).await;
        #[cfg(target_env = "gnu")]
        {
            // It may take milliseconds and other allocations wait for it: not on a thread that serves.
            let trim = tokio::task::spawn_blocking(|| {
                // SAFETY: malloc_trim may be called at any time from any thread.
                unsafe { libc::malloc_trim(0) }
            });
            // A panic cannot happen in there; at the end of the runtime there is nothing to give back.
            let _done = trim.await;
        }
    }
}
