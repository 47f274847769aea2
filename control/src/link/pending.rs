//! A session's reports on their way into the store.

use std::{collections::HashMap, sync::Arc};

use futures::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use indexmap::IndexMap;
use orlop_proto::{
    core::v1::{NodeStatus, Pod},
    node::v1::PodReport,
};
use prost::Message as _;
use tonic::Status;

use super::reports::ReportWriter;

/// So many reports of one node are written at the same time.
const WRITES: usize = 16;
/// Encoded reports that wait: some hundred pods say less, even if each says much.
const WAITING_BYTES: usize = 4 << 20;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Subject {
    Node,
    /// By its uid.
    Pod(String),
}

enum Report {
    Node(NodeStatus),
    Pod(Arc<Pod>, PodReport),
}

struct Waiting {
    report: Report,
    sequence: Option<u64>,
    bytes: usize,
}

/// What is not written yet: of each pod and of the node one report that is being written, and the latest of those that came since. So
/// a session is heard while the store takes nothing, and no report is written after a later one.
pub(super) struct Pending {
    writer: ReportWriter,
    /// In the order of their sequence numbers.
    waiting: IndexMap<Subject, Waiting>,
    /// Of all in `waiting`.
    bytes: usize,
    writing: HashMap<Subject, Option<u64>>,
    writes: FuturesUnordered<BoxFuture<'static, Subject>>,
    /// The highest sequence number that came.
    last: u64,
}

impl Pending {
    pub fn new(writer: ReportWriter) -> Self {
        Self {
            writer,
            waiting: IndexMap::new(),
            bytes: 0,
            writing: HashMap::new(),
            writes: FuturesUnordered::new(),
            last: 0,
        }
    }

    /// Takes a report of a pod. What does not concern the node is dealt with at once.
    ///
    /// # Errors
    /// When more waits than is kept: the session is to end.
    pub fn pod(&mut self, report: PodReport) -> Result<(), Status> {
        self.last = self.last.max(report.sequence);
        let Some(pod) = self.writer.reported(&report) else {
            return Ok(());
        };
        let (subject, sequence) = (Subject::Pod(report.uid.clone()), Some(report.sequence));
        let bytes = report.encoded_len();
        self.put(
            subject,
            Waiting {
                report: Report::Pod(pod, report),
                sequence,
                bytes,
            },
        )
    }

    /// Takes the node's status. Without a sequence number it is one that was dealt with before.
    ///
    /// # Errors
    /// As with `pod`.
    pub fn node(&mut self, status: NodeStatus, sequence: Option<u64>) -> Result<(), Status> {
        self.last = self.last.max(sequence.unwrap_or(0));
        let bytes = status.encoded_len();
        self.put(
            Subject::Node,
            Waiting {
                report: Report::Node(status),
                sequence,
                bytes,
            },
        )
    }

    /// Whether a status of the node is still to be written.
    pub fn has_node(&self) -> bool {
        self.waiting.contains_key(&Subject::Node) || self.writing.contains_key(&Subject::Node)
    }

    /// Whether [`Pending::written`] has something to wait for.
    pub fn is_writing(&self) -> bool {
        !self.writes.is_empty()
    }

    /// Waits until one of the reports is written. Cancel-safe: what is under way is kept.
    pub async fn written(&mut self) {
        if let Some(subject) = self.writes.next().await {
            self.writing.remove(&subject);
            self.start();
            if self.writing.is_empty() {
                // Nothing waits either. Not even room is kept: there are thousands of these, nearly always empty.
                self.waiting = IndexMap::new();
                self.writing = HashMap::new();
            }
        }
    }

    /// Every report up to this sequence number is written, or a later one of its pod is to be.
    pub fn dealt_with(&self) -> u64 {
        let waiting = self.waiting.values().find_map(|waiting| waiting.sequence);
        let first = waiting
            .into_iter()
            .chain(self.writing.values().copied().flatten())
            .min();
        first.map_or(self.last, |first| first.saturating_sub(1))
    }

    fn put(&mut self, subject: Subject, waiting: Waiting) -> Result<(), Status> {
        self.bytes += waiting.bytes;
        // Taken out first: the later one comes after all others.
        let earlier = self.waiting.shift_remove(&subject);
        self.bytes -= earlier.map_or(0, |earlier| earlier.bytes);
        self.waiting.insert(subject, waiting);
        self.start();
        if self.bytes > WAITING_BYTES {
            return Err(Status::resource_exhausted(format!(
                "{} reports of this node, {} bytes, wait to be written, which is more than {WAITING_BYTES} bytes: begin anew",
                self.waiting.len(),
                self.bytes
            )));
        }
        Ok(())
    }

    /// Begins as many writes as may be: the oldest reports of those of whom none is being written.
    fn start(&mut self) {
        while self.writing.len() < WRITES {
            let free = |subject: &Subject| !self.writing.contains_key(subject);
            let Some(index) = self.waiting.keys().position(free) else {
                return;
            };
            let Some((subject, waiting)) = self.waiting.shift_remove_index(index) else {
                return;
            };
            self.bytes -= waiting.bytes;
            self.writing.insert(subject.clone(), waiting.sequence);
            let write = match waiting.report {
                Report::Node(status) => self.writer.node(status),
                Report::Pod(pod, report) => self.writer.pod(pod, report),
            };
            self.writes.push(Box::pin(async move {
                write.await;
                subject
            }));
        }
    }
}
