//! The link's gRPC service, by hand: generated code would encode a change anew for every node.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
};

use bytes::{BufMut, Bytes, BytesMut};
use futures::future::BoxFuture;
use http::HeaderMap;
use hyper::body::Frame;
use orlop_proto::node::v1::{ControlMessage, NodeMessage, control_message::Message as ToNode};
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len},
};
use tokio::sync::mpsc;
use tonic::{
    Request, Status, Streaming,
    body::Body,
    codec::{BufferSettings, Codec},
    server::NamedService,
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

/// What control sends: messages in gRPC's frames, encoded into just the room that they take. tonic's own encoder would keep a buffer for
/// every session, as large as its largest message.
pub(super) type Outgoing = Bytes;

/// Compressed or not, and the length.
const PREFIX: usize = 5;

fn frame(len: usize, encode: impl FnOnce(&mut BytesMut)) -> Outgoing {
    let mut frame = BytesMut::with_capacity(PREFIX + len);
    frame.put_u8(0);
    // What control sends is bounded far below.
    frame.put_u32(u32::try_from(len).unwrap_or(u32::MAX));
    encode(&mut frame);
    debug_assert_eq!(frame.len(), PREFIX + len, "the length is the message's");
    frame.freeze()
}

/// Any message but an Update.
pub(super) fn message(message: ToNode) -> Outgoing {
    let message = ControlMessage { message: Some(message) };
    frame(message.encoded_len(), |out| message.encode_raw(out))
}

/// An Update of changes that are encoded already.
fn update(version: u64, changes: &[Bytes], snapshot_end: bool) -> Outgoing {
    let changes_len: usize = changes
        .iter()
        .map(|change| key_len(CHANGES) + encoded_len_varint(change.len() as u64) + change.len())
        .sum();
    let end_len = if snapshot_end { key_len(SNAPSHOT_END) + 1 } else { 0 };
    let len = key_len(VERSION) + encoded_len_varint(version) + changes_len + end_len;
    frame(key_len(UPDATE) + encoded_len_varint(len as u64) + len, |out| {
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
    })
}

/// The answer's body: frames as they come, then the status.
pub(super) struct Frames {
    frames: mpsc::Receiver<Result<Outgoing, Status>>,
    ended: bool,
}

impl Frames {
    pub(super) fn new(frames: mpsc::Receiver<Result<Outgoing, Status>>) -> Self {
        Self { frames, ended: false }
    }
}

impl hyper::body::Body for Frames {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let status = match ready!(self.frames.poll_recv(context)) {
            Some(Ok(frame)) => return Poll::Ready(Some(Ok(Frame::data(frame)))),
            Some(Err(status)) => status,
            None => Status::unavailable("the session was cut off"),
        };
        self.ended = true;
        let mut trailers = HeaderMap::new();
        Poll::Ready(Some(
            status.add_header(&mut trailers).map(|()| Frame::trailers(trailers)),
        ))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}

/// Small: there is one for every node, and most messages are.
fn decoder() -> <ProstCodec<ControlMessage, NodeMessage> as Codec>::Decoder {
    ProstCodec::<ControlMessage, NodeMessage>::raw_decoder(BufferSettings::new(1024, 16 * 1024))
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
            let encoding = request.headers().get("grpc-encoding");
            if encoding.is_some_and(|encoding| encoding != "identity") {
                return Ok(Status::unimplemented("messages of the link are not compressed").into_http());
            }
            let request = request.map(|body| Streaming::new_request(decoder(), body, None, Some(MESSAGE_LIMIT)));
            let frames = match session::begin(inner, Request::from_http(request)) {
                Ok(frames) => frames,
                Err(status) => return Ok(status.into_http()),
            };
            let mut response = http::Response::new(Body::new(frames));
            let content = http::HeaderValue::from_static("application/grpc");
            response.headers_mut().insert(http::header::CONTENT_TYPE, content);
            Ok(response)
        })
    }
}

impl Inner {
    /// An Update, counted.
    pub(super) fn update(&self, version: u64, changes: &[Bytes], snapshot_end: bool) -> Outgoing {
        let bytes: usize = changes.iter().map(Bytes::len).sum();
        self.counters
            .changes_sent
            .fetch_add(changes.len() as u64, Ordering::Relaxed);
        self.counters.bytes_sent.fetch_add(bytes as u64, Ordering::Relaxed);
        update(version, changes, snapshot_end)
    }
}

#[cfg(test)]
mod tests {
    use orlop_proto::node::v1::{self as link, change::Change};

    use super::*;
    use crate::link::services::encode;

    #[test]
    fn updates_from_encoded_parts_are_what_prost_writes() {
        for (version, count, snapshot_end) in [(1, 0, true), (300, 3, false), (u64::MAX, 200, true)] {
            let changes: Vec<Change> = (0..count)
                .map(|index| Change::RouteRemoved("n".repeat(index * 3)))
                .collect();
            let expected = message(ToNode::Update(link::Update {
                version,
                changes: changes
                    .iter()
                    .cloned()
                    .map(|change| link::Change { change: Some(change) })
                    .collect(),
                snapshot_end,
            }));
            let changes: Vec<Bytes> = changes.into_iter().map(encode).collect();
            assert_eq!(update(version, &changes, snapshot_end), expected);
        }
    }
}
