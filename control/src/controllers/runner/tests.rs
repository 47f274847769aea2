use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::mpsc;

use super::*;
use crate::store::memory::MemoryStore;

/// Panics at the first two looks at "shaky".
struct Shaky {
    looks: AtomicUsize,
    done: mpsc::UnboundedSender<&'static str>,
}

#[async_trait]
impl Controller for Shaky {
    const NAME: &'static str = "shaky";
    type Key = &'static str;

    async fn reconcile(&self, key: &&'static str) -> Result<Outcome, ControlError> {
        tokio::task::yield_now().await;
        assert!(
            *key != "shaky" || self.looks.fetch_add(1, Ordering::Relaxed) >= 2,
            "as a bug would"
        );
        self.done.send(key).unwrap();
        Ok(Outcome::default())
    }
}

#[tokio::test(start_paused = true)]
async fn a_look_that_panics_ends_neither_its_worker_nor_its_key() {
    let cache = Cache::start(Arc::new(MemoryStore::default())).await;
    let (done, mut looked) = mpsc::unbounded_channel();
    let controller = Arc::new(Shaky {
        looks: AtomicUsize::new(0),
        done,
    });
    let queue = WorkQueue::default();
    queue.add("shaky");
    queue.add("sound");
    let cancel = CancellationToken::new();
    let working = tokio::spawn(work(controller, queue, cache, 1, cancel.clone()));
    for expected in ["sound", "shaky"] {
        let key = tokio::time::timeout(Duration::from_secs(60), looked.recv()).await;
        assert_eq!(key.expect("is looked at"), Some(expected));
    }
    cancel.cancel();
    working.await.unwrap();
}
