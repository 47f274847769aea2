//! What the programs log with aya-log (rare events only), handed to tracing. The ring buffer is pinned with the programs and
//! found through one of them, so an adopted program's messages are read too; what was logged without an agent waits there.

use std::{
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use aya_log::EbpfLogger;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{DataplaneError, failed};

/// How long the reader sleeps at most before it looks whether it should end.
const POLL_MILLISECONDS: u16 = 500;

/// Reads until dropped.
#[derive(Debug)]
pub struct Reader {
    end: Arc<AtomicBool>,
}

impl Reader {
    /// Starts a thread that reads the log of the program with this id.
    ///
    /// # Errors
    /// The program has no log, or no thread can be started.
    pub fn start(program: u32) -> Result<Self, DataplaneError> {
        let mut logger = EbpfLogger::init_from_id_with_logger(program, ToTracing)
            .map_err(|error| failed("open the programs' log", error))?;
        let end = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&end);
        thread::Builder::new()
            .name("ebpf-log".into())
            .spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    let mut fds = [PollFd::new(logger.as_fd(), PollFlags::POLLIN)];
                    if poll(&mut fds, PollTimeout::from(POLL_MILLISECONDS)).is_ok_and(|ready| ready > 0) {
                        logger.flush();
                    }
                }
            })
            .map_err(|error| failed("start the log's thread", error))?;
        Ok(Self { end })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

struct ToTracing;

impl log::Log for ToTracing {
    fn enabled(&self, _metadata: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let (program, message) = (record.target(), record.args());
        match record.level() {
            log::Level::Error => tracing::error!(target: "orlop_ebpf", program, "{message}"),
            log::Level::Warn => tracing::warn!(target: "orlop_ebpf", program, "{message}"),
            log::Level::Info => tracing::info!(target: "orlop_ebpf", program, "{message}"),
            log::Level::Debug | log::Level::Trace => tracing::debug!(target: "orlop_ebpf", program, "{message}"),
        }
    }

    fn flush(&self) {}
}
