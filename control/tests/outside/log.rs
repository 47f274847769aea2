//! What control logs, when it runs in this process.

use std::{
    io::Write,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use tracing_subscriber::{filter::LevelFilter, fmt::MakeWriter};

/// What was logged in this process, from the first call on.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    pub fn start() -> Self {
        static LOG: OnceLock<Log> = OnceLock::new();
        LOG.get_or_init(|| {
            let log = Log::default();
            let subscriber = tracing_subscriber::fmt()
                .with_max_level(LevelFilter::WARN)
                .with_ansi(false)
                .with_writer(log.clone());
            subscriber.init();
            log
        })
        .clone()
    }

    /// Whether a line has all of these.
    pub fn has(&self, parts: &[&str]) -> bool {
        self.since(0, parts) > 0
    }

    /// Its length, for [`Log::since`].
    pub fn length(&self) -> usize {
        self.0.lock().expect("no panic").len()
    }

    /// How many lines behind that length have all of these.
    pub fn since<T: AsRef<str>>(&self, length: usize, parts: &[T]) -> usize {
        let bytes = self.0.lock().expect("no panic")[length..].to_vec();
        let text = String::from_utf8_lossy(&bytes);
        let lines = text
            .lines()
            .filter(|line| parts.iter().all(|part| line.contains(part.as_ref())));
        lines.count()
    }

    /// Waits until a line behind that length has all of these: what ends a connection is logged after it is.
    pub async fn comes(&self, length: usize, parts: &[&str]) {
        for _ in 0..2_000 {
            if self.since(length, parts) > 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not logged: {parts:?}");
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no panic").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;
    fn make_writer(&self) -> Self {
        self.clone()
    }
}
