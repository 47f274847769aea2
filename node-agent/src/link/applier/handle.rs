//! What sessions have of the applier.

use orlop_proto::node::v1 as link;
use tokio::sync::{mpsc, watch};

/// A step of a session, in the order in which control sent it.
#[derive(Debug)]
pub(super) enum Input {
    Welcome(u64, link::Welcome),
    Update(u64, link::Update),
}

/// How far a session's Updates are taken in: what they ask for is durable and applied, or waits for the disk or the kernel to take it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Applied {
    /// The session, as [`ApplierHandle`] counts them.
    pub session: u64,
    /// The highest such version.
    pub version: u64,
}

/// Feeds the applier. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ApplierHandle {
    inputs: mpsc::Sender<Input>,
    applied: watch::Receiver<Applied>,
    ledger: watch::Receiver<Option<String>>,
}

impl ApplierHandle {
    pub(super) fn new(
        inputs: mpsc::Sender<Input>,
        applied: watch::Receiver<Applied>,
        ledger: watch::Receiver<Option<String>>,
    ) -> Self {
        Self {
            inputs,
            applied,
            ledger,
        }
    }

    /// A session begins with control's Welcome; whatever an earlier one still has under way is dropped.
    pub async fn welcome(&self, session: u64, welcome: link::Welcome) {
        let _closed = self.inputs.send(Input::Welcome(session, welcome)).await;
    }

    /// Hands an Update on. Waits when the applier is far behind.
    pub async fn update(&self, session: u64, update: link::Update) {
        let _closed = self.inputs.send(Input::Update(session, update)).await;
    }

    /// Follows how far it is.
    pub fn applied(&self) -> watch::Receiver<Applied> {
        self.applied.clone()
    }

    /// Why the ledger cannot be written; `None` while it can.
    pub fn ledger(&self) -> watch::Receiver<Option<String>> {
        self.ledger.clone()
    }
}
