//! The session with control: one stream, kept for as long as it lives, then dialled again.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use orlop_proto::node::v1::{
    self as link, ControlMessage, NodeMessage, control_message::Message as FromControl,
    node_link_client::NodeLinkClient, node_message::Message as ToControl,
};
use rand::Rng;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use super::{
    Dial, DialError, PROTOCOL, Reports,
    applier::{Applied, ApplierHandle, Chain},
};

/// The node's Heartbeats go out this often.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// A session in which control says nothing for this long is over.
const SILENCE: Duration = Duration::from_secs(15);
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// The largest message that is taken from control.
const MESSAGE_LIMIT: usize = 16 << 20;
/// Updates are asked for in pieces of at most 1 MiB; this many may wait to be applied.
const OUTGOING: usize = 64;

/// How the node introduces itself.
#[derive(Debug, Clone)]
pub struct Hello {
    /// The node's name.
    pub node_name: String,
    /// From `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// For the node's object, when it is made.
    pub labels: BTreeMap<String, String>,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Control could not be reached.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// Control refused, or ended the session.
    #[error("control ended the session: {0}")]
    Status(#[from] Box<tonic::Status>),
    /// The stream ended.
    #[error("control closed the stream")]
    Closed,
    /// Nothing was heard for too long.
    #[error("nothing heard from control for {} s", SILENCE.as_secs())]
    Silent,
    /// Control broke the protocol.
    #[error("control broke the protocol: {0}")]
    Protocol(String),
}

impl SessionError {
    /// Whether control gave no sign of life: it may be stopped, or only be busy.
    fn is_silence(&self) -> bool {
        let unanswered = |status: &tonic::Status| {
            let mut cause = std::error::Error::source(status);
            while let Some(error) = cause {
                if error.downcast_ref().is_some_and(hyper::Error::is_timeout) {
                    return true;
                }
                cause = error.source();
            }
            false
        };
        match self {
            Self::Silent => true,
            Self::Status(status) => unanswered(status),
            _ => false,
        }
    }
}

/// Keeps a session with control until `stop`. Never gives up, and disturbs nothing while there is none.
pub async fn run(dial: Arc<dyn Dial>, hello: Hello, applier: ApplierHandle, reports: Reports, stop: CancellationToken) {
    let mut backoff = BACKOFF_MIN;
    let mut number = 0;
    while !stop.is_cancelled() {
        number += 1;
        let mut session = Session {
            number,
            hello: &hello,
            applier: &applier,
            reports: &reports,
            welcomed: false,
            version: 0,
        };
        let begun = Instant::now();
        let ended = tokio::select! {
            // The session holds nothing that is lost when it is dropped: reports stay queued until acknowledged.
            ended = session.keep(&*dial) => ended,
            () = stop.cancelled() => return,
        };
        // When all replicas are too busy to answer, nodes that go from one to the other must not make it worse.
        let hopping = ended.as_ref().is_err_and(SessionError::is_silence) && begun.elapsed() < SILENCE;
        if session.welcomed && !hopping {
            backoff = BACKOFF_MIN;
        }
        let wait = rand::rng().random_range(backoff / 2..=backoff);
        match ended {
            Ok(()) => tracing::info!(?wait, "session with control ended"),
            Err(error) => tracing::warn!(error = %Chain(&error), ?wait, "no session with control"),
        }
        tokio::select! {
            () = sleep(wait) => {}
            () = stop.cancelled() => return,
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

struct Session<'a> {
    number: u64,
    hello: &'a Hello,
    applier: &'a ApplierHandle,
    reports: &'a Reports,
    welcomed: bool,
    version: u64,
}

impl Session<'_> {
    async fn keep(&mut self, dial: &dyn Dial) -> Result<(), SessionError> {
        let channel = dial.dial().await?;
        let mut client = NodeLinkClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT);
        let (outgoing, messages) = mpsc::channel(OUTGOING);
        let hello = link::Hello {
            node_name: self.hello.node_name.clone(),
            protocol: PROTOCOL,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: self.hello.boot_id.clone(),
            labels: self.hello.labels.clone(),
        };
        let _fresh = outgoing
            .send(NodeMessage {
                message: Some(ToControl::Hello(hello)),
            })
            .await;
        let call = client.session(ReceiverStream::new(messages));
        let incoming = tokio::time::timeout(SILENCE, call)
            .await
            .map_err(|_| SessionError::Silent)?;
        self.reports.begin_session();
        self.exchange(outgoing, incoming.map_err(Box::new)?.into_inner()).await
    }

    async fn exchange(
        &mut self,
        outgoing: mpsc::Sender<NodeMessage>,
        mut incoming: Streaming<ControlMessage>,
    ) -> Result<(), SessionError> {
        let mut heartbeat = interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut applied = self.applier.applied();
        let mut heard = Instant::now();
        // One message at a time waits for room in the stream, so that nothing is encoded before it can be sent.
        let mut waiting: Option<NodeMessage> = None;
        let mut acknowledged = 0;
        loop {
            if waiting.is_none() {
                waiting = self.next_message(&mut applied, &mut acknowledged);
            }
            tokio::select! {
                // Cancel-safe: a message is either taken off the stream or not.
                message = incoming.message() => {
                    heard = Instant::now();
                    match message.map_err(Box::new)? {
                        Some(ControlMessage { message: Some(message) }) => self.receive(message).await?,
                        // Of a later version of the protocol, and of no matter.
                        Some(ControlMessage { message: None }) => {}
                        None => return Err(SessionError::Closed),
                    }
                }
                // Cancel-safe: a permit that is dropped takes nothing.
                permit = outgoing.reserve(), if waiting.is_some() => {
                    let permit = permit.map_err(|_| SessionError::Closed)?;
                    if let Some(message) = waiting.take() {
                        permit.send(message);
                    }
                }
                // Cancel-safe: an interval keeps its tick.
                _ = heartbeat.tick() => {
                    // A full stream says that control is behind; it will see the next one.
                    let _full = outgoing.try_send(NodeMessage { message: Some(ToControl::Heartbeat(link::Heartbeat {})) });
                }
                // Cancel-safe: both only wake.
                () = self.reports.changed(), if self.welcomed && waiting.is_none() => {}
                changed = applied.changed(), if waiting.is_none() => changed.map_err(|_| SessionError::Closed)?,
                () = sleep_until(heard + SILENCE) => return Err(SessionError::Silent),
            }
        }
    }

    fn next_message(&self, applied: &mut watch::Receiver<Applied>, acknowledged: &mut u64) -> Option<NodeMessage> {
        let reached = *applied.borrow_and_update();
        if reached.session == self.number && reached.version > *acknowledged {
            *acknowledged = reached.version;
            return Some(NodeMessage {
                message: Some(ToControl::Ack(link::Ack {
                    version: reached.version,
                })),
            });
        }
        if self.welcomed { self.reports.next() } else { None }
    }

    async fn receive(&mut self, message: FromControl) -> Result<(), SessionError> {
        match message {
            FromControl::Welcome(welcome) => {
                if welcome.pod_cidrs.is_empty() {
                    return Err(SessionError::Protocol("a welcome without a pod range".to_owned()));
                }
                tracing::info!(pod_cidrs = ?welcome.pod_cidrs, "session with control begins");
                self.welcomed = true;
                self.applier.welcome(self.number, welcome).await;
            }
            FromControl::Update(update) => {
                if !self.welcomed || update.version != self.version + 1 {
                    return Err(SessionError::Protocol(format!(
                        "version {} after {}",
                        update.version, self.version
                    )));
                }
                self.version = update.version;
                self.applier.update(self.number, update).await;
            }
            FromControl::ReportAck(ack) => self.reports.acknowledged(ack.sequence),
            FromControl::Ping(_) => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::Full;
    use prost::{Message, bytes::Bytes};
    use tonic::codec::Codec;
    use tonic_prost::ProstCodec;

    use super::*;
    use crate::{
        ledger::Ledger,
        link::applier::Applier,
        simulated::{SimulatedDataplane, SimulatedNetwork},
    };

    /// Field 1000, a text.
    const LATER: &[u8] = b"\xc2\x3e\x05later";

    /// A message in a field of another, with [`LATER`] in it.
    fn field(tag: u8, message: &[u8]) -> Vec<u8> {
        let length = u8::try_from(message.len() + LATER.len()).expect("a short message");
        [&[tag << 3 | 2, length], message, LATER].concat()
    }

    #[tokio::test]
    async fn what_a_newer_control_says_beside_what_is_known_is_passed_over() {
        let welcome = link::Welcome {
            pod_cidrs: vec!["10.244.0.0/24".to_owned()],
            ..link::Welcome::default()
        };
        let route = link::Route {
            node_name: "n2".to_owned(),
            ..link::Route::default()
        };
        let known = link::Change {
            change: Some(link::change::Change::Route(route)),
        };
        let update = link::Update {
            version: 1,
            snapshot_end: true,
            ..link::Update::default()
        };
        // A change of an unknown kind before the known one.
        let update = [update.encode_to_vec(), field(2, &[]), field(2, &known.encode_to_vec())].concat();
        // And a message of an unknown kind between those that are known.
        let messages = [field(1, &welcome.encode_to_vec()), LATER.to_vec(), field(2, &update)];
        let frames = messages.iter().flat_map(|message| {
            let length = u32::try_from(message.len()).expect("a short message").to_be_bytes();
            [&[0][..], &length, message].concat()
        });
        let body = Full::new(frames.collect::<Bytes>());
        let decoder = ProstCodec::<NodeMessage, ControlMessage>::default().decoder();
        let incoming = Streaming::new_response(decoder, body, http::StatusCode::OK, None, None);

        let dir = tempfile::tempdir().expect("a folder");
        let (ledger, desired, _) = Ledger::open(dir.path()).expect("a ledger");
        let (dataplane, network) = (Arc::<SimulatedDataplane>::default(), Arc::<SimulatedNetwork>::default());
        let (applier, handle, mut desired) = Applier::new(ledger, desired, dataplane, network);
        tokio::spawn(applier.run(CancellationToken::new()));
        let hello = Hello {
            node_name: "n1".to_owned(),
            boot_id: String::new(),
            labels: BTreeMap::new(),
        };
        let mut session = Session {
            number: 1,
            hello: &hello,
            applier: &handle,
            reports: &Reports::default(),
            welcomed: false,
            version: 0,
        };
        let (outgoing, _sent) = mpsc::channel(OUTGOING);
        let ended = session.exchange(outgoing, incoming).await;
        assert!(!matches!(ended, Ok(()) | Err(SessionError::Protocol(_))), "{ended:?}");
        assert!(session.welcomed && session.version == 1, "{ended:?}");
        let told = tokio::time::timeout(Duration::from_secs(60), desired.wait_for(|desired| desired.complete));
        let told = told.await.expect("it is applied in time").expect("an applier").clone();
        assert_eq!(told.routes.keys().map(|node| &**node).collect::<Vec<_>>(), ["n2"]);
    }
}
