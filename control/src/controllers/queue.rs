//! The work queue: keys that need a look, each at most once at a time.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    fmt::Debug,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

/// The first delay after a failure; it doubles.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
/// The longest delay after a failure.
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// A key of a work queue.
pub trait Key: Clone + Eq + Hash + Ord + Debug + Send + Sync + 'static {}
impl<K: Clone + Eq + Hash + Ord + Debug + Send + Sync + 'static> Key for K {}

/// Keys that wait, each once however often it was added. A key that is added while it is worked on runs again afterwards,
/// never at the same time. Clones share the queue.
#[derive(Debug)]
pub struct WorkQueue<K> {
    inner: Arc<Inner<K>>,
}

impl<K> Clone for WorkQueue<K> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
        }
    }
}

#[derive(Debug)]
struct Inner<K> {
    state: Mutex<State<K>>,
    changed: Notify,
}

#[derive(Debug)]
struct State<K> {
    ready: VecDeque<K>,
    /// What `ready` holds.
    queued: HashSet<K>,
    running: HashSet<K>,
    /// Added while running.
    again: HashSet<K>,
    delayed: BTreeSet<(Instant, K)>,
    /// When each key of `delayed` is due.
    due: HashMap<K, Instant>,
    failures: HashMap<K, u32>,
}

impl<K: Key> Default for WorkQueue<K> {
    fn default() -> Self {
        let state = State {
            ready: VecDeque::new(),
            queued: HashSet::new(),
            running: HashSet::new(),
            again: HashSet::new(),
            delayed: BTreeSet::new(),
            due: HashMap::new(),
            failures: HashMap::new(),
        };
        Self {
            inner: Arc::new(Inner {
                state: Mutex::new(state),
                changed: Notify::new(),
            }),
        }
    }
}

impl<K: Key> WorkQueue<K> {
    /// The key needs a look now.
    pub fn add(&self, key: K) {
        self.lock().push(key);
        self.inner.changed.notify_one();
    }

    /// The key needs a look after a while. The earliest of several such wishes counts.
    pub fn add_after(&self, key: K, delay: Duration) {
        self.lock().delay(key, Instant::now() + delay);
        self.inner.changed.notify_one();
    }

    /// The next key. It counts as running until [`WorkQueue::succeeded`] or [`WorkQueue::failed`].
    pub async fn take(&self) -> K {
        loop {
            let changed = self.inner.changed.notified();
            let wait = {
                let mut state = self.lock();
                let now = Instant::now();
                state.promote(now);
                if let Some(key) = state.ready.pop_front() {
                    state.queued.remove(&key);
                    state.running.insert(key.clone());
                    if !state.ready.is_empty() {
                        self.inner.changed.notify_one();
                    }
                    return key;
                }
                state.delayed.first().map(|(due, _)| *due)
            };
            match wait {
                Some(due) => {
                    tokio::select! {
                        () = changed => {}
                        () = tokio::time::sleep_until(due) => {}
                    }
                }
                None => changed.await,
            }
        }
    }

    /// The key was worked on.
    pub fn succeeded(&self, key: &K) {
        let mut state = self.lock();
        state.failures.remove(key);
        state.finish(key);
        drop(state);
        self.inner.changed.notify_one();
    }

    /// Work on the key failed: again after a delay that doubles each time.
    pub fn failed(&self, key: &K) -> Duration {
        let mut state = self.lock();
        let failures = state.failures.entry(key.clone()).or_default();
        let delay = FIRST_BACKOFF.saturating_mul(1 << (*failures).min(16)).min(MAX_BACKOFF);
        *failures = failures.saturating_add(1);
        state.running.remove(key);
        // Events do not shorten the back-off: a key that fails is looked at again when it ends.
        state.again.remove(key);
        state.delay(key.clone(), Instant::now() + delay);
        drop(state);
        self.inner.changed.notify_one();
        delay
    }

    fn lock(&self) -> MutexGuard<'_, State<K>> {
        // No code that can panic runs under the lock in the middle of a change.
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Key> State<K> {
    fn push(&mut self, key: K) {
        if self.running.contains(&key) {
            self.again.insert(key);
        } else if self.queued.insert(key.clone()) {
            self.ready.push_back(key);
        }
    }

    fn delay(&mut self, key: K, due: Instant) {
        match self.due.get(&key) {
            Some(earlier) if *earlier <= due => return,
            Some(later) => {
                self.delayed.remove(&(*later, key.clone()));
            }
            None => {}
        }
        self.due.insert(key.clone(), due);
        self.delayed.insert((due, key));
    }

    fn promote(&mut self, now: Instant) {
        while self.delayed.first().is_some_and(|(due, _)| *due <= now) {
            if let Some((_, key)) = self.delayed.pop_first() {
                self.due.remove(&key);
                self.push(key);
            }
        }
    }

    fn finish(&mut self, key: &K) {
        self.running.remove(key);
        if self.again.remove(key) {
            self.push(key.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test(start_paused = true)]
    async fn a_key_waits_once_and_runs_again_when_added_meanwhile() {
        let queue = WorkQueue::default();
        queue.add("a");
        queue.add("a");
        assert_eq!(queue.take().await, "a");
        queue.add("a");
        assert!(
            tokio::time::timeout(Duration::from_secs(1), queue.take())
                .await
                .is_err(),
            "the key runs already"
        );
        queue.succeeded(&"a");
        assert_eq!(queue.take().await, "a");
        queue.succeeded(&"a");
        assert!(
            tokio::time::timeout(Duration::from_secs(1), queue.take())
                .await
                .is_err(),
            "nothing was added"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn failures_back_off_and_success_forgets_them() {
        let queue = WorkQueue::default();
        queue.add(1);
        let mut delays = Vec::new();
        for _ in 0..12 {
            let key = queue.take().await;
            delays.push(queue.failed(&key));
        }
        assert_eq!(delays[0], FIRST_BACKOFF);
        assert_eq!(delays[1], FIRST_BACKOFF * 2);
        assert_eq!(delays[11], MAX_BACKOFF);
        let key = queue.take().await;
        queue.succeeded(&key);
        queue.add(1);
        let key = queue.take().await;
        assert_eq!(queue.failed(&key), FIRST_BACKOFF);
    }

    #[tokio::test(start_paused = true)]
    async fn the_earliest_delay_counts() {
        let queue = WorkQueue::default();
        let start = Instant::now();
        queue.add_after("a", Duration::from_secs(9));
        queue.add_after("a", Duration::from_secs(2));
        queue.add_after("a", Duration::from_secs(5));
        queue.take().await;
        assert_eq!(start.elapsed(), Duration::from_secs(2));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn many_workers_never_share_a_key() {
        let queue = WorkQueue::default();
        let busy: Arc<Vec<AtomicUsize>> = Arc::new((0..8).map(|_| AtomicUsize::new(0)).collect());
        let runs = Arc::new(AtomicUsize::new(0));
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let (queue, busy, runs) = (queue.clone(), busy.clone(), runs.clone());
                tokio::spawn(async move {
                    loop {
                        let key: usize = queue.take().await;
                        assert_eq!(busy[key].fetch_add(1, Ordering::SeqCst), 0);
                        tokio::task::yield_now().await;
                        busy[key].fetch_sub(1, Ordering::SeqCst);
                        runs.fetch_add(1, Ordering::SeqCst);
                        queue.succeeded(&key);
                    }
                })
            })
            .collect();
        for round in 0..2000 {
            queue.add(round % 8);
        }
        while runs.load(Ordering::SeqCst) < 8 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        for worker in workers {
            assert!(!worker.is_finished(), "a worker panicked");
            worker.abort();
        }
    }
}
