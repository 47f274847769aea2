//! The first process of a pod's sandbox: it holds the namespaces that the pod's containers share, and reaps what is left to it.
//! It ends on SIGTERM and SIGINT.

use std::{mem::MaybeUninit, process::ExitCode, ptr};

fn main() -> ExitCode {
    // SAFETY: `signals` is written by sigemptyset before it is read; the calls take pointers to it that live long enough.
    let signals = unsafe {
        let mut signals = MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(signals.as_mut_ptr());
        let mut signals = signals.assume_init();
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGCHLD] {
            libc::sigaddset(&raw mut signals, signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &raw const signals, ptr::null_mut());
        signals
    };
    loop {
        let mut signal = 0;
        // SAFETY: both pointers are to live variables.
        if unsafe { libc::sigwait(&raw const signals, &raw mut signal) } != 0 {
            return ExitCode::FAILURE;
        }
        if signal != libc::SIGCHLD {
            return ExitCode::SUCCESS;
        }
        // One SIGCHLD may stand for many children.
        // SAFETY: a null status is allowed.
        while unsafe { libc::waitpid(-1, ptr::null_mut(), libc::WNOHANG) } > 0 {}
    }
}
