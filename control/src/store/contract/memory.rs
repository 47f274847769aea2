//! The engine of simulations.

use super::*;
use crate::store::memory::MemoryStore;

pub(super) struct Memory(MemoryStore);

pub(super) async fn bench() -> Memory {
    Memory(MemoryStore::default())
}

#[async_trait]
impl Bench for Memory {
    fn store(&self) -> Arc<dyn Store> {
        Arc::new(self.0.clone())
    }
    async fn restart(&mut self) {
        // What outlives a simulated process is another clone.
        self.0 = self.0.clone();
    }
    async fn compact(&self, revision: Revision) {
        self.0.compact_to(revision);
    }
    async fn write_raw(&self, key: &Key, bytes: &[u8]) {
        self.0.write_raw(key, bytes);
    }
}
