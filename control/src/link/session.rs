//! One node's session: what goes out, what comes in, and when it is over.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use orlop_proto::{
    Resource,
    core::v1::{Node, NodeStatus},
    meta::v1::ObjectMeta,
    node::v1::{self as link, NodeMessage, control_message::Message as ToNode, node_message::Message as FromNode},
};
use prost::Message as _;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval_at, sleep_until, timeout},
};
use tonic::{Request, Status, Streaming};

use super::{
    Inner, PROTOCOL,
    board::Board,
    codec::{Frames, Outgoing, message},
    events::EventWriter,
    hub::Opening,
    lease::LeaseWriter,
    mailbox::PodChange,
    pending::Pending,
    reports::{ReportWriter, ready},
};
use crate::{
    panics,
    registry::{Registry, RegistryError},
    server::identity::{Identity, caller},
};

/// An Update holds at most so many changes, and about so many bytes.
const UPDATE_CHANGES: usize = 512;
const UPDATE_BYTES: usize = 256 << 10;
/// How long the cache may take to have what the store has.
const CATCH_UP: Duration = Duration::from_secs(10);
/// How long a node has for taking the reason why its session ended.
const LAST_WORD: Duration = Duration::from_secs(1);

type Sender = mpsc::Sender<Result<Outgoing, Status>>;

/// Answers the call: checks who it is and what they say first, then keeps the session in a task of its own.
pub(super) fn begin(inner: Arc<Inner>, request: Request<Streaming<NodeMessage>>) -> Result<Frames, Status> {
    let Identity::Node { name, .. } = caller(&request) else {
        inner.counters.refused.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(caller = caller(&request).describe(), "session refused: not a node");
        return Err(Status::permission_denied("only nodes have sessions"));
    };
    let incoming = request.into_inner();
    // Room for one message: what waits shall wait in the mailbox, where it is folded.
    let (outgoing, frames) = mpsc::channel(1);
    tokio::spawn(panics::contained(async move {
        inner.counters.sessions_begun.fetch_add(1, Ordering::Relaxed);
        inner.counters.sessions.fetch_add(1, Ordering::Relaxed);
        let stop = inner.stop.clone();
        let status = tokio::select! {
            status = keep(&inner, Arc::clone(&name), incoming, &outgoing) => status,
            () = stop.cancelled() => Status::unavailable("control stops"),
            () = outgoing.closed() => Status::cancelled("the node is gone"),
        };
        inner.counters.sessions.fetch_sub(1, Ordering::Relaxed);
        tracing::info!(node = &*name, code = ?status.code(), reason = status.message(), "session ended");
        // The one place may still be taken by a message; a node that reads nothing is not told.
        let _told = timeout(LAST_WORD, outgoing.send(Err(status))).await;
    }));
    Ok(Frames::new(frames))
}

async fn keep(inner: &Arc<Inner>, node: Arc<str>, mut incoming: Streaming<NodeMessage>, outgoing: &Sender) -> Status {
    let hello = match timeout(inner.config.silence, incoming.message()).await {
        Ok(Ok(Some(NodeMessage {
            message: Some(FromNode::Hello(hello)),
        }))) => hello,
        Ok(Ok(_)) => return Status::invalid_argument("a session begins with Hello"),
        Ok(Err(status)) => return status,
        Err(_) => return Status::deadline_exceeded("no Hello"),
    };
    if hello.node_name != *node {
        inner.counters.refused.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(
            node = &*node,
            said = hello.node_name.escape_debug().to_string(),
            "a node gave another's name"
        );
        return Status::permission_denied(format!("the certificate is that of node {node}"));
    }
    if hello.protocol != PROTOCOL {
        let text = format!("link protocol {} is not spoken here, only {PROTOCOL}", hello.protocol);
        return Status::failed_precondition(text);
    }
    // Boxed, as whatever else is over soon: a session that is quiet shall be small.
    let (opening, object, registry) = match Box::pin(open(inner, &node, &hello)).await {
        Ok(opened) => opened,
        Err(status) => return status,
    };
    tracing::info!(
        node = &*node,
        agent = hello.agent_version,
        boot_id = hello.boot_id,
        "session begins"
    );
    let mailbox = Arc::clone(&opening.mailbox);
    let welcome = message(ToNode::Welcome(welcome(inner, &object)));
    let (acks, acknowledged) = watch::channel(0);
    let closed = mailbox.closed.clone();
    let reports = ReportWriter::new(Arc::clone(inner), registry, Arc::clone(&node), hello.labels, closed);
    let receiver = Receiver {
        inner,
        pending: Pending::new(reports.clone()),
        reports,
        lease: LeaseWriter::new(Arc::clone(inner), Arc::clone(&node), object.uid().to_owned()),
        events: EventWriter::new(Arc::clone(inner), Arc::clone(&node)),
        node: Arc::clone(&node),
        status: None,
        sent: 0,
        acks,
        outgoing,
    };
    drop(object);
    let status = tokio::select! {
        Err(status) = send(inner, &node, welcome, opening, acknowledged, outgoing) => status,
        status = ping(inner.config.ping, outgoing) => status,
        status = receiver.run(incoming) => status,
        () = mailbox.closed.cancelled() => Status::aborted("another session of this node has begun, or its object was deleted"),
    };
    inner.hub.close(node, mailbox).await;
    status
}

/// Makes the node's object and range if they are missing, ends its sessions elsewhere, and takes the snapshot.
async fn open(inner: &Inner, node: &Arc<str>, hello: &link::Hello) -> Result<(Opening, Node, Registry), Status> {
    report_labels(inner, node, &hello.labels);
    let object = ensure_node(inner, node, &hello.labels).await.map_err(|error| {
        tracing::error!(node = &**node, %error, "the node's object or range cannot be written");
        match error {
            RegistryError::Exhausted(text) => Status::resource_exhausted(text),
            error => Status::unavailable(error.to_string()),
        }
    })?;
    let registry = inner.registry.take_session(node).await;
    let registry = registry.map_err(|error| Status::unavailable(error.to_string()))?;
    let cache = registry.cache();
    match cache.catch_up(CATCH_UP).await {
        Ok(true) => {}
        Ok(false) => return Err(Status::unavailable("the cache is behind the store")),
        Err(error) => return Err(Status::unavailable(error.to_string())),
    }
    let opening = inner.hub.open(Arc::clone(node), cache.revision()).await;
    opening
        .map(|opening| (opening, object, registry))
        .ok_or_else(|| Status::unavailable("control stops"))
}

/// The labels that a node's own word is taken for.
fn is_well_known(label: &str) -> bool {
    matches!(
        label,
        "kubernetes.io/hostname" | "kubernetes.io/os" | "kubernetes.io/arch"
    )
}

/// Pods are placed by labels: a node that could give them to itself could choose its pods.
fn report_labels(inner: &Inner, node: &str, labels: &BTreeMap<String, String>) {
    let Some(first) = labels.keys().find(|label| !is_well_known(label)) else {
        return;
    };
    let first: String = first.chars().take(80).collect();
    inner.counters.refused.fetch_add(1, Ordering::Relaxed);
    tracing::warn!(
        node,
        label = first.escape_debug().to_string(),
        "labels that a node gave itself refused"
    );
}

/// The labels of a new node that greets with these.
pub fn own_labels(name: &str, said: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut labels: BTreeMap<String, String> = said
        .iter()
        .filter(|(label, _)| is_well_known(label))
        .map(|(label, value)| (label.clone(), value.clone()))
        .collect();
    // Pods are placed by this one: the name is the certificate's word, not the node's.
    labels.insert("kubernetes.io/hostname".to_owned(), name.to_owned());
    labels
}

/// The node's object, with a pod range.
pub(super) async fn ensure_node(
    inner: &Inner,
    name: &str,
    labels: &BTreeMap<String, String>,
) -> Result<Node, RegistryError> {
    match inner.registry.assign_pod_cidr(name).await {
        Err(error) if error.is_not_found() => {}
        done => return done,
    }
    let metadata = ObjectMeta {
        name: name.to_owned(),
        labels: own_labels(name, labels),
        ..ObjectMeta::default()
    };
    let node = Node {
        metadata: Some(metadata),
        ..Node::default()
    };
    match inner.registry.create_node(node).await {
        Err(error) if error.is_already_exists() => inner.registry.assign_pod_cidr(name).await,
        created => {
            tracing::info!(node = name, registered = created.is_ok(), "a new node");
            created
        }
    }
}

/// Sends Welcome, the snapshot, and then what changes.
pub(super) async fn send(
    inner: &Inner,
    node: &str,
    welcome: Outgoing,
    opening: Opening,
    mut acknowledged: watch::Receiver<u64>,
    outgoing: &Sender,
) -> Result<Infallible, Status> {
    let Opening {
        pods,
        board: mut told,
        mut boards,
        mailbox,
    } = opening;
    outgoing.send(Ok(welcome)).await.map_err(|_| gone())?;
    let mut updates = Updates {
        inner,
        outgoing,
        version: 0,
    };
    let nothing = Board::default();
    let pods = pods.into_iter().map(|pod| PodChange::Put(pod).encode());
    Box::pin(updates.send(pods.chain(nothing.changes(&told, node)), true)).await?;
    let patience = inner.config.patience;
    let mut moved = Instant::now();
    loop {
        let known = *acknowledged.borrow_and_update();
        let Some(waiting) = updates.version.checked_sub(known) else {
            return Err(Status::invalid_argument(format!(
                "version {known} was acknowledged, {} is the last that was sent",
                updates.version
            )));
        };
        let open = waiting < inner.config.window;
        if open {
            moved = Instant::now();
        }
        tokio::select! {
            // Cancel-safe: all of them only wake. A sender that is gone is the end of the hub or of the session, which others see.
            () = mailbox.changed(), if open => {}
            Ok(()) = boards.changed(), if open => {}
            changed = acknowledged.changed() => {
                changed.map_err(|_| gone())?;
                continue;
            }
            () = sleep_until(moved + patience), if !open => {
                return Err(Status::deadline_exceeded(format!(
                    "{waiting} Updates, from version {} on, are not acknowledged since {patience:?}: begin anew",
                    known + 1
                )));
            }
        }
        let board = boards.borrow_and_update().clone();
        let pods = mailbox.take().map(|change| change.encode());
        // A pod comes after the services that were there before it.
        let sending = Box::pin(updates.send(told.changes(&board, node).chain(pods), false));
        timeout(patience, sending).await.map_err(|_| unread(patience))??;
        told = board;
    }
}

fn unread(patience: Duration) -> Status {
    Status::deadline_exceeded(format!("an Update was not read within {patience:?}: begin anew"))
}

fn gone() -> Status {
    Status::cancelled("the node is gone")
}

/// Says something every now and then, whatever else is on its way.
async fn ping(period: Duration, outgoing: &Sender) -> Status {
    let mut ticks = interval_at(Instant::now() + period, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if outgoing.send(Ok(message(ToNode::Ping(link::Ping {})))).await.is_err() {
            return gone();
        }
    }
}

/// Counts what is sent.
struct Updates<'a> {
    inner: &'a Inner,
    outgoing: &'a Sender,
    version: u64,
}

impl Updates<'_> {
    /// Sends changes in pieces; the stream's flow control holds them back. The end of a snapshot is sent in any case.
    async fn send(&mut self, changes: impl Iterator<Item = Bytes>, snapshot_end: bool) -> Result<(), Status> {
        let mut changes = changes.peekable();
        let mut end = changes.peek().is_none() && !snapshot_end;
        while !end {
            let mut piece: Vec<Bytes> = Vec::new();
            let mut size = 0;
            while piece.len() < UPDATE_CHANGES
                && size < UPDATE_BYTES
                && let Some(change) = changes.next()
            {
                size += change.len();
                piece.push(change);
            }
            self.version += 1;
            end = changes.peek().is_none();
            let update = self.inner.update(self.version, &piece, end && snapshot_end);
            let patience = self.inner.config.patience;
            let sent = timeout(patience, self.outgoing.send(Ok(update))).await;
            sent.map_err(|_| unread(patience))?.map_err(|_| gone())?;
        }
        Ok(())
    }
}

fn welcome(inner: &Inner, object: &Node) -> link::Welcome {
    let spec = object.spec.clone().unwrap_or_default();
    let pod_cidrs = if spec.pod_cidrs.is_empty() {
        vec![spec.pod_cidr]
    } else {
        spec.pod_cidrs
    };
    let ranges = inner.registry.config();
    link::Welcome {
        pod_cidrs,
        cluster_pod_cidr: ranges.pod_cidr.to_string(),
        service_cidr: ranges.service_cidr.to_string(),
    }
}

/// The session's other direction.
pub(super) struct Receiver<'a> {
    pub inner: &'a Arc<Inner>,
    pub node: Arc<str>,
    pub reports: ReportWriter,
    pub pending: Pending,
    pub lease: LeaseWriter,
    pub events: EventWriter,
    /// What the node last said of itself, encoded: it is seldom asked for.
    pub status: Option<Said>,
    /// The highest version that was acknowledged.
    pub sent: u64,
    pub acks: watch::Sender<u64>,
    pub outgoing: &'a Sender,
}

pub(super) struct Said {
    /// The status of its condition Ready.
    ready: Option<String>,
    status: Vec<u8>,
}

impl Receiver<'_> {
    pub async fn run(mut self, mut incoming: impl Stream<Item = Result<NodeMessage, Status>> + Unpin) -> Status {
        let mut acknowledged = 0;
        let mut heard = Instant::now();
        loop {
            let silence = sleep_until(heard + self.inner.config.silence);
            let dealt_with = self.pending.dealt_with();
            tokio::select! {
                // Cancel-safe: a message is taken off the stream or not. It is read whatever the store does: a node that is gone is to be
                // noticed.
                message = incoming.next() => {
                    heard = Instant::now();
                    match message {
                        Some(Ok(NodeMessage { message: Some(message) })) => {
                            if let Err(status) = self.receive(message) {
                                return status;
                            }
                        }
                        Some(Ok(NodeMessage { message: None })) => {}
                        None => return Status::cancelled("the node closed the stream"),
                        Some(Err(status)) => return status,
                    }
                }
                // Cancel-safe: the set keeps what is not done.
                () = self.pending.written(), if self.pending.is_writing() => {}
                // Cancel-safe: a permit that is dropped takes nothing.
                permit = self.outgoing.reserve(), if dealt_with > acknowledged => {
                    let Ok(permit) = permit else { return Status::cancelled("the node is gone") };
                    permit.send(Ok(message(ToNode::ReportAck(link::ReportAck { sequence: dealt_with }))));
                    acknowledged = dealt_with;
                }
                () = silence => return Status::deadline_exceeded("nothing heard from the node"),
            }
        }
    }

    fn receive(&mut self, message: FromNode) -> Result<(), Status> {
        match message {
            FromNode::Hello(_) => return Err(Status::invalid_argument("a second Hello")),
            FromNode::Node(report) => {
                let status = report.status.unwrap_or_default();
                self.status = Some(Said {
                    ready: ready(&status).map(str::to_owned),
                    status: status.encode_to_vec(),
                });
                self.pending.node(status, Some(report.sequence))?;
            }
            FromNode::Pod(report) => self.pending.pod(report)?,
            FromNode::SnapshotEnd(_) => {}
            FromNode::Ack(ack) => {
                if ack.version < self.sent {
                    return Err(Status::invalid_argument("an acknowledgement of an older version"));
                }
                self.sent = ack.version;
                self.acks.send_replace(ack.version);
            }
            FromNode::Heartbeat(_) => {
                self.lease.renew();
                // Somebody has declared the node lost meanwhile: it is not.
                if !self.pending.has_node()
                    && let Some(said) = &self.status
                    && self.reports.is_ready_otherwise(said.ready.as_deref())
                    && let Ok(status) = NodeStatus::decode(said.status.as_slice())
                {
                    self.pending.node(status, None)?;
                }
            }
            FromNode::Metrics(report) => {
                if let Err(reason) = self.reports.check_metrics(&report) {
                    self.inner.counters.refused.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(node = &*self.node, reason, "metrics refused");
                } else {
                    self.inner.metrics.put(&self.node, report);
                }
            }
            FromNode::Event(report) => {
                if let Some(event) = report.event {
                    self.events.write(event);
                }
            }
        }
        Ok(())
    }
}
