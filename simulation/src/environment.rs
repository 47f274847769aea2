//! The world that simulated parts live in: one thread, a clock that jumps to the next thing that is due, and randomness from a seed.
//!
//! The parts are the real ones and ask libc for time and entropy. On the thread of a simulation they get the simulated ones: this
//! module's `clock_gettime` and `getrandom` stand before libc's in the executables that are linked with it, and hand every
//! other thread on to the kernel. Hash maps, uuids, back-offs, generated names and tokio's `select!` so follow the seed.
//!
//! What stays outside: `ring`'s entropy (keys and tokens, whose bytes decide nothing); threads for blocking work (the agent's ledger:
//! it is waited for while the clock stands, but among the tasks that are ready at that moment its end has no fixed place); and
//! tokio's count of the runtimes that the process has made, which seeds `select!`. So a seed is replayed by a process of its own,
//! exactly where only control takes part, and nearly so where agents do.

use std::{cell::Cell, future::Future, thread};

use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::SmallRng};
use tokio::time::{Duration, Instant};

/// When every simulation begins: 2030-01-01T00:00:00Z.
const EPOCH: Duration = Duration::from_secs(1_893_456_000);

thread_local! {
    static BEGAN: Cell<Option<Instant>> = const { Cell::new(None) };
    static ENTROPY: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Runs a simulation to its end on a thread of its own, and gives what it gives.
///
/// # Panics
/// When the simulation does.
pub fn simulate<T, F>(seed: u64, simulation: impl FnOnce() -> F + Send + 'static) -> T
where
    T: Send + 'static,
    F: Future<Output = T>,
{
    let thread = thread::Builder::new().name(format!("seed-{seed}"));
    let run = move || {
        ENTROPY.set(Some(seed));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .expect("a runtime on this thread");
        let result = runtime.block_on(async {
            BEGAN.set(Some(Instant::now()));
            simulation().await
        });
        BEGAN.set(None);
        result
    };
    let thread = thread.spawn(run).expect("a thread for the simulation");
    thread.join().unwrap_or_else(|panic| {
        eprintln!("the simulation with seed {seed} failed");
        std::panic::resume_unwind(panic)
    })
}

/// How long the simulation has been running, by its own clock.
pub fn elapsed() -> Duration {
    BEGAN.get().map_or(Duration::ZERO, |began| began.elapsed())
}

/// Choices that follow a seed.
#[derive(Debug)]
pub struct Chance(SmallRng);

impl Chance {
    /// Of a seed and what it is for.
    pub fn new(seed: u64, purpose: u64) -> Self {
        Self(SmallRng::seed_from_u64(
            seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(purpose),
        ))
    }

    /// Once in `times`.
    pub fn once_in(&mut self, times: u32) -> bool {
        self.0.random_ratio(1, times)
    }

    /// A number below a bound.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0.random_range(0..bound.max(1))
    }

    /// Up to so long; short times are more frequent.
    pub fn up_to(&mut self, longest: Duration) -> Duration {
        let part: f64 = self.0.random();
        longest.mul_f64(part * part * part)
    }

    /// Entropy for a chance of its own.
    pub fn seed(&mut self) -> u64 {
        self.0.next_u64()
    }
}

/// In libc's place: `CLOCK_REALTIME` of a simulation's thread is the simulated one.
///
/// # Safety
/// As of `clock_gettime(2)`: `time` is null or points to a timespec.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    if clock == libc::CLOCK_REALTIME
        && !time.is_null()
        && let Some(began) = BEGAN.get()
    {
        let now = EPOCH + began.elapsed();
        // SAFETY: the caller gives a timespec to write to.
        let time = unsafe { &mut *time };
        time.tv_sec = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        time.tv_nsec = i64::from(now.subsec_nanos());
        return 0;
    }
    // SAFETY: the system call has the same contract, and is handed the caller's arguments.
    let result = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) };
    libc::c_int::try_from(result).unwrap_or(-1)
}

/// In libc's place: a simulation's thread gets bytes that follow its seed (SplitMix64).
///
/// # Safety
/// As of `getrandom(2)`: `buffer` has room for `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buffer: *mut libc::c_void, length: usize, flags: libc::c_uint) -> isize {
    let Some(mut state) = ENTROPY.get() else {
        // SAFETY: the system call has the same contract, and is handed the caller's arguments.
        let result = unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) };
        return isize::try_from(result).unwrap_or(-1);
    };
    if length > 0 {
        // SAFETY: the caller gives room for `length` bytes.
        let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
        for piece in bytes.chunks_mut(8) {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            piece.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes()[..piece.len()]);
        }
        ENTROPY.set(Some(state));
    }
    isize::try_from(length).unwrap_or(-1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    #[test]
    fn time_jumps_and_chance_repeats() {
        let run = || {
            simulate(7, || async {
                let before = SystemTime::now();
                assert_eq!(before.duration_since(SystemTime::UNIX_EPOCH).unwrap(), EPOCH);
                tokio::time::sleep(Duration::from_secs(3600)).await;
                assert!(before.elapsed().unwrap() >= Duration::from_secs(3600));
                let map: std::collections::HashMap<u32, u32> = (0..64).map(|number| (number, number)).collect();
                let order: Vec<u32> = map.keys().copied().collect();
                (order, rand::random::<u64>())
            })
        };
        assert_eq!(run(), run());
        let real = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        assert!(
            real > Duration::from_secs(1_600_000_000),
            "other threads see the machine's clock"
        );
    }
}
