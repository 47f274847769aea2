//! Many writers at once, each with one call under way, and how long their calls took.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Result;
use tokio::task::JoinSet;

/// What a load gave.
#[derive(Debug, Clone, Default)]
pub struct Load {
    /// From the first call to the last answer.
    pub seconds: f64,
    /// Milliseconds, ascending.
    pub milliseconds: Vec<f64>,
}

/// When a load ends.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    /// After so many calls.
    Calls(usize),
    /// After this time.
    Time(Duration),
}

/// Runs `work(index)` from many writers. The first failure ends it.
pub async fn run<Work, Answer>(until: Until, writers: usize, work: Work) -> Result<Load>
where
    Work: Fn(usize) -> Answer + Send + Sync + 'static,
    Answer: Future<Output = Result<()>> + Send,
{
    let begin = Instant::now();
    let next = Arc::new(AtomicUsize::new(0));
    let work = Arc::new(work);
    let mut tasks = JoinSet::new();
    for _ in 0..writers {
        let (next, work) = (Arc::clone(&next), Arc::clone(&work));
        tasks.spawn(async move {
            let mut milliseconds = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let ends = match until {
                    Until::Calls(calls) => index >= calls,
                    Until::Time(time) => begin.elapsed() >= time,
                };
                if ends {
                    return Ok::<_, anyhow::Error>(milliseconds);
                }
                let call = Instant::now();
                work(index).await?;
                milliseconds.push(call.elapsed().as_secs_f64() * 1e3);
            }
        });
    }
    let mut load = Load::default();
    while let Some(done) = tasks.join_next().await {
        load.milliseconds.extend(done??);
    }
    load.seconds = begin.elapsed().as_secs_f64();
    load.milliseconds.sort_by(f64::total_cmp);
    Ok(load)
}

impl Load {
    /// Calls a second.
    pub fn rate(&self) -> f64 {
        rate(self.milliseconds.len(), self.seconds)
    }

    /// Milliseconds that so many permille of the calls stay below.
    pub fn permille(&self, permille: usize) -> f64 {
        quantile(&self.milliseconds, permille)
    }
}

/// So many a second.
pub fn rate(count: usize, seconds: f64) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX)) / seconds.max(1e-9)
}

/// The value below which so many permille of an ascending list lie; 0 of an empty one.
pub fn quantile(ascending: &[f64], permille: usize) -> f64 {
    let position = (ascending.len() * permille / 1000).min(ascending.len().saturating_sub(1));
    ascending.get(position).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_call_is_made_once_and_counted() {
        let seen = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&seen);
        let load = run(Until::Calls(100), 7, move |index| {
            let counter = Arc::clone(&counter);
            async move {
                counter.fetch_add(index, Ordering::Relaxed);
                Ok(())
            }
        })
        .await
        .unwrap();
        assert_eq!((load.milliseconds.len(), seen.load(Ordering::Relaxed)), (100, 4950));
    }

    #[test]
    fn quantiles_of_few_and_none() {
        assert!((quantile(&[1.0, 2.0, 3.0], 500) - 2.0).abs() < 1e-9);
        assert!((quantile(&[1.0, 2.0, 3.0], 990) - 3.0).abs() < 1e-9);
        assert!(quantile(&[], 500).abs() < 1e-9);
    }
}
