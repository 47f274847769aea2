//! How late the last of many watchers learns of a change: the same for both sides.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

/// How long all watchers may take.
const PATIENCE: Duration = Duration::from_secs(180);
/// Between two changes.
const PAUSE: Duration = Duration::from_millis(50);

/// Counts what watchers were told. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Told(Arc<AtomicUsize>);

impl Told {
    /// A watcher was told of something.
    pub fn one(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits until the watchers were told so many times.
    pub async fn wait_for(&self, count: usize) -> Result<()> {
        let begin = Instant::now();
        while self.0.load(Ordering::Relaxed) < count {
            ensure!(begin.elapsed() < PATIENCE, "not all watchers were told");
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        Ok(())
    }

    /// Makes changes, one after the other, each by `change` with a value of its own. Milliseconds from each call to the moment when
    /// every watcher has been told, ascending.
    pub async fn of_changes<Call>(
        &self,
        watchers: usize,
        changes: usize,
        change: impl Fn(usize) -> Call,
    ) -> Result<Vec<f64>>
    where
        Call: Future<Output = Result<()>>,
    {
        let mut late = Vec::new();
        for index in 0..changes {
            self.0.store(0, Ordering::Relaxed);
            let begin = Instant::now();
            change(1_000_000 + index).await?;
            self.wait_for(watchers).await?;
            late.push(begin.elapsed().as_secs_f64() * 1e3);
            tokio::time::sleep(PAUSE).await;
        }
        late.sort_by(f64::total_cmp);
        Ok(late)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_change_ends_when_every_watcher_has_been_told() {
        let told = Told::default();
        let change = |_| {
            let told = told.clone();
            async move {
                told.one();
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    told.one();
                });
                Ok(())
            }
        };
        assert_eq!(told.of_changes(2, 3, change).await.unwrap().len(), 3);
        assert_eq!(told.0.load(Ordering::Relaxed), 2);
    }
}
