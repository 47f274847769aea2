//! What a panic ends: the request, the session or the key that it happened in; everywhere else the process.
//!
//! A part that ended alone would not be missed: control would look alive without a controller, or with a cache that follows nobody,
//! by which its controllers would go on to create what is there already. Whatever a process had in memory is rebuilt from the store,
//! so the service manager's restart loses nothing.

use std::{cell::Cell, future::poll_fn, panic, process};

thread_local! {
    /// Whether this thread is in work whose panic ends only itself.
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// From now on a panic outside of contained work ends the process, after it was told as before.
pub fn end_the_process() {
    let tell = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        tell(info);
        if !CONTAINED.get() {
            tracing::error!(
                thread = std::thread::current().name(),
                "a part of control ended in a panic: so does control"
            );
            process::abort();
        }
    }));
}

/// Work whose panic ends only itself: what strangers say must not end the process. Boxed: an `async fn` would have room for what it is
/// given and for what it waits for, which is the same, and thousands of them wait.
pub fn contained<T>(work: impl Future<Output = T>) -> impl Future<Output = T> {
    let mut work = Box::pin(work);
    poll_fn(move |context| contain(|| work.as_mut().poll(context)))
}

/// The same for work that does not wait.
pub fn contain<T>(work: impl FnOnce() -> T) -> T {
    let _inside = Inside::enter();
    work()
}

/// As long as it lives this thread is in contained work.
struct Inside {
    before: bool,
}

impl Inside {
    fn enter() -> Self {
        Self {
            before: CONTAINED.replace(true),
        }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        CONTAINED.set(self.before);
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt as _, process::Command};

    use super::*;

    /// Says which of the cases below this process is to be.
    const CASE: &str = "ORLOP_PANIC_CASE";

    /// What becomes of a process in which this panics.
    fn process_of(case: &str) -> process::ExitStatus {
        let status = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "panics::tests::a_process_in_which_something_panics",
                "--nocapture",
            ])
            .env(CASE, case)
            .stdout(process::Stdio::null())
            .stderr(process::Stdio::null())
            .status();
        status.unwrap()
    }

    #[test]
    fn a_process_in_which_something_panics() {
        let Ok(case) = std::env::var(CASE) else { return };
        end_the_process();
        let runtime = tokio::runtime::Builder::new_multi_thread().build().unwrap();
        let ended = runtime.block_on(async move {
            match case.as_str() {
                "a part" => tokio::spawn(async { panic!("as a bug would") }).await,
                "a thread" => {
                    let thread = std::thread::spawn(|| panic!("as a bug would"));
                    assert!(thread.join().is_err());
                    return true;
                }
                "a request" => {
                    let request = contained(async {
                        tokio::task::yield_now().await;
                        panic!("as a bug would")
                    });
                    tokio::spawn(request).await
                }
                "a part after a request" => {
                    let both = async {
                        contained(async { tokio::task::yield_now().await }).await;
                        contain(|| ());
                        panic!("as a bug would")
                    };
                    tokio::spawn(both).await
                }
                other => panic!("{other}"),
            }
            .is_err()
        });
        assert!(ended);
    }

    #[test]
    fn what_is_not_contained_ends_the_process() {
        for case in ["a part", "a thread", "a part after a request"] {
            assert_eq!(process_of(case).signal(), Some(libc::SIGABRT), "{case}");
        }
        assert!(process_of("a request").success());
    }
}
