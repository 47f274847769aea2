//! The link's gRPC service, by hand: generated code would encode a change anew for every node.

use std::{
    convert::Infallible,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
};

use bytes::{BufMut, Bytes};
use futures::future::BoxFuture;
use orlop_proto::node::v1::{ControlMessage, NodeMessage};
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    codec::{BufferSettings, Codec, EncodeBuf, Encoder},
    server::{Grpc, NamedService, StreamingService},
};
use tonic_prost::ProstCodec;

use super::{Inner, session};

/// The largest message that a node may send.
const MESSAGE_LIMIT: usize = 4 << 20;
/// `ControlMessage.update`, `Update.version`, `Update.changes`, `Update.snapshot_end`.
const UPDATE: u32 = 2;
const VERSION: u32 = 1;
const CHANGES: u32 = 2;
const SNAPSHOT_END: u32 = 3;

/// What control sends.
#[derive(Debug)]
pub(super) enum Outgoing {
    /// Everything but Updates.
    Message(ControlMessage),
    /// An Update of changes that are encoded already.
    Update {
        version: u64,
        changes: Vec<Bytes>,
        snapshot_end: bool,
    },
}

impl Outgoing {
    fn encode(&self, out: &mut impl BufMut) -> Result<(), Status> {
        let (version, changes, snapshot_end) = match self {
            Outgoing::Message(message) => {
                return message.encode(out).map_err(|error| Status::internal(error.to_string()));
            }
            Outgoing::Update {
                version,
                changes,
                snapshot_end,
            } => (*version, changes, *snapshot_end),
        };
        let changes_len: usize = changes
            .iter()
            .map(|change| key_len(CHANGES) + encoded_len_varint(change.len() as u64) + change.len())
            .sum();
        let end_len = if snapshot_end { key_len(SNAPSHOT_END) + 1 } else { 0 };
        let len = key_len(VERSION) + encoded_len_varint(version) + changes_len + end_len;
        encode_key(UPDATE, WireType::LengthDelimited, out);
        encode_varint(len as u64, out);
        encode_key(VERSION, WireType::Varint, out);
        encode_varint(version, out);
        for change in changes {
            encode_key(CHANGES, WireType::LengthDelimited, out);
            encode_varint(change.len() as u64, out);
            out.put_slice(change);
        }
        if snapshot_end {
            encode_key(SNAPSHOT_END, WireType::Varint, out);
            out.put_u8(1);
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
struct LinkCodec;

#[derive(Debug)]
struct LinkEncoder;

impl Encoder for LinkEncoder {
    type Item = Outgoing;
    type Error = Status;

    fn encode(&mut self, item: Outgoing, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.encode(buffer)
    }

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }
}

impl Codec for LinkCodec {
    type Encode = Outgoing;
    type Decode = NodeMessage;
    type Encoder = LinkEncoder;
    type Decoder = <ProstCodec<ControlMessage, NodeMessage> as Codec>::Decoder;

    fn encoder(&mut self) -> LinkEncoder {
        LinkEncoder
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<ControlMessage, NodeMessage>::raw_decoder(buffers())
    }
}

/// Small: there is a pair of them for every node, and most messages are.
fn buffers() -> BufferSettings {
    BufferSettings::new(1024, 16 * 1024)
}

/// `orlop.node.v1.NodeLink`.
#[derive(Clone)]
pub struct NodeLinkService {
    inner: Arc<Inner>,
}

impl NodeLinkService {
    pub(super) fn new(inner: Arc<Inner>) -> Self {
        Self { inner }
    }
}

impl NamedService for NodeLinkService {
    const NAME: &'static str = "orlop.node.v1.NodeLink";
}

impl tower::Service<http::Request<Body>> for NodeLinkService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let inner = Arc::clone(&self.inner);
        Box::pin(async move {
            if request.uri().path() != "/orlop.node.v1.NodeLink/Session" {
                return Ok(Status::unimplemented("the link has one method: Session").into_http());
            }
            let mut grpc = Grpc::new(LinkCodec).apply_max_message_size_config(Some(MESSAGE_LIMIT), None);
            Ok(grpc.streaming(Session(inner), request).await)
        })
    }
}

struct Session(Arc<Inner>);

impl StreamingService<NodeMessage> for Session {
    type Response = Outgoing;
    type ResponseStream = ReceiverStream<Result<Outgoing, Status>>;
    type Future = BoxFuture<'static, Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<NodeMessage>>) -> Self::Future {
        let inner = Arc::clone(&self.0);
        Box::pin(async move { session::begin(inner, request).await.map(Response::new) })
    }
}

impl Inner {
    /// An Update, counted.
    pub(super) fn update(&self, version: u64, changes: Vec<Bytes>, snapshot_end: bool) -> Outgoing {
        let bytes: usize = changes.iter().map(Bytes::len).sum();
        self.counters
            .changes_sent
            .fetch_add(changes.len() as u64, Ordering::Relaxed);
        self.counters.bytes_sent.fetch_add(bytes as u64, Ordering::Relaxed);
        Outgoing::Update {
            version,
            changes,
            snapshot_end,
        }
    }
}

#[cfg(test)]
mod tests {
    use orlop_proto::node::v1::{self as link, change::Change, control_message::Message as Kind};

    use super::*;
    use crate::link::services::encode;

    #[test]
    fn updates_from_encoded_parts_are_what_prost_writes() {
        for (version, count, snapshot_end) in [(1, 0, true), (300, 3, false), (u64::MAX, 200, true)] {
            let changes: Vec<Change> = (0..count)
                .map(|index| Change::RouteRemoved("n".repeat(index * 3)))
                .collect();
            let update = link::Update {
                version,
                changes: changes
                    .iter()
                    .cloned()
                    .map(|change| link::Change { change: Some(change) })
                    .collect(),
                snapshot_end,
            };
            let expected = ControlMessage {
                message: Some(Kind::Update(update)),
            }
            .encode_to_vec();
            let mut found = Vec::new();
            let outgoing = Outgoing::Update {
                version,
                changes: changes.into_iter().map(encode).collect(),
                snapshot_end,
            };
            outgoing.encode(&mut found).unwrap();
            assert_eq!(found, expected);
        }
    }
}
