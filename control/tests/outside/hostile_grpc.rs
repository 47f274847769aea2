//! Clients that break the protocol, or use it against us. Whatever they do, others are served.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use orlop_proto::api::v1::{
    ApplyRequest, DeleteRequest, ListRequest, Preconditions, UpdateRequest, WatchRequest, apply_request::Input,
    objects_client::ObjectsClient,
};
use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{Code, Status, body::Body, transport::Channel};
use tower::{Service, ServiceExt};

use crate::{
    harness::Control,
    join::{join, pair, token},
    requests::{apply, create, lease, name, remove, version},
    wire::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PING, RST_STREAM, SETTINGS, WINDOW_UPDATE, Wire, field,
        frame, grpc_headers,
    },
};

pub const LIST: &str = "/orlop.api.v1.Objects/List";
pub const APPLY: &str = "/orlop.api.v1.Objects/Apply";
const SESSION: &str = "/orlop.node.v1.NodeLink/Session";
const JOIN: &str = "/orlop.cluster.v1.Join/Join";

/// The answer to a call with this body.
pub async fn call(
    channel: &Channel,
    path: &str,
    encoding: Option<&str>,
    body: Body,
) -> Result<http::Response<Body>, tonic::transport::Error> {
    let mut request = http::Request::post(format!("http://control.test{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    if let Some(encoding) = encoding {
        request = request.header("grpc-encoding", encoding);
    }
    let request = request.body(body).expect("a request");
    channel.clone().ready().await?.call(request).await
}

/// What a call gets whose body is these bytes.
pub async fn raw(channel: &Channel, path: &str, encoding: Option<&str>, body: Vec<u8>) -> Status {
    let body = Full::new(Bytes::from(body)).map_err(|never| match never {});
    let response = call(channel, path, encoding, Body::new(body)).await.expect("an answer");
    if let Some(status) = Status::from_header_map(response.headers()) {
        return status;
    }
    let collected = response.into_body().collect().await.expect("a body");
    let trailers = collected.trailers().cloned().unwrap_or_default();
    Status::from_header_map(&trailers).unwrap_or_else(|| Status::unknown("no grpc-status"))
}

pub fn prefixed(flag: u8, length: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![flag];
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}

pub fn whole(flag: u8, body: &[u8]) -> Vec<u8> {
    prefixed(flag, u32::try_from(body.len()).expect("a length"), body)
}

async fn is_served(control: &Control) {
    let request = ListRequest {
        resource: "nodes".to_owned(),
        ..ListRequest::default()
    };
    ObjectsClient::new(control.admin().await)
        .list(request)
        .await
        .expect("others are served");
}

/// A body: what it is, its `grpc-encoding`, its bytes, and what they are answered with.
type Lie = (&'static str, Option<&'static str>, Vec<u8>, Code);

/// For a method that takes messages of `limit` bytes at most, in which `no_text` is a string that is none.
fn lies(limit: u32, no_text: &[u8]) -> [Lie; 8] {
    // Some hundred bytes that would become a megabyte, as gzip does it.
    let bomb: &[u8] = &[
        0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 0xed, 0xc1, 1, 1, 0, 0, 0, 0x80, 0x90, 0xfe,
    ];
    [
        ("4 GiB", None, prefixed(0, u32::MAX, b""), Code::OutOfRange),
        (
            "a limit and a byte",
            None,
            prefixed(0, limit + 1, b""),
            Code::OutOfRange,
        ),
        ("another flag", None, whole(2, b"x"), Code::Internal),
        ("compressed by nothing", None, whole(1, bomb), Code::Internal),
        ("a bomb", Some("gzip"), whole(1, bomb), Code::Unimplemented),
        ("an unknown encoding", Some("x"), whole(1, bomb), Code::Unimplemented),
        ("garbage", None, whole(0, &[0xff; 64]), Code::Internal),
        ("bytes that are no text", None, whole(0, no_text), Code::Internal),
    ]
}

#[tokio::test]
async fn lengths_and_encodings_that_lie() {
    let control = Control::start().await;
    let admin = control.admin().await;
    for path in [
        LIST,
        APPLY,
        "/orlop.api.v1.Objects/Create",
        "/orlop.api.v1.Objects/Watch",
        "/orlop.metrics.v1.Metrics/ListPods",
        "/orlop.cluster.v1.Join/CreateToken",
        "/grpc.health.v1.Health/Check",
    ] {
        for (what, encoding, body, expected) in lies(64 << 20, b"\x0a\x02\xff\xfe") {
            let status = raw(&admin, path, encoding, body).await;
            assert_eq!(status.code(), expected, "{path}: {what}: {status:?}");
        }
        let status = raw(&admin, path, None, prefixed(0, 100, b"less")).await;
        assert_ne!(status.code(), Code::Ok, "{path}: cut off");
    }
    // A node's session, whose service is none of the generated ones.
    let key = rcgen::KeyPair::generate().expect("key");
    let joined = join(&control, &token(&control, 1, 60).await, "hostile", &key)
        .await
        .expect("joins");
    let node = control.channel(Some(&pair(&joined, &key))).await.expect("connects");
    let of_a_session = [
        ("nothing", None, Vec::new(), Code::InvalidArgument),
        ("no greeting", None, whole(0, b""), Code::InvalidArgument),
        ("cut off", None, prefixed(0, 100, b"less"), Code::Internal),
    ];
    let bodies = lies(4 << 20, b"\x0a\x04\x0a\x02\xff\xfe")
        .into_iter()
        .chain(of_a_session);
    for (what, encoding, body, expected) in bodies {
        let status = raw(&node, SESSION, encoding, body).await;
        assert_eq!(status.code(), expected, "{SESSION}: {what}: {status:?}");
    }
    // Only a manifest may be large; who is not known sends little.
    let large = prefixed(0, (4 << 20) + 1, b"");
    assert_eq!(raw(&admin, LIST, None, large.clone()).await.code(), Code::OutOfRange);
    assert_ne!(raw(&admin, APPLY, None, large).await.code(), Code::OutOfRange);
    let anonymous = control.channel(None).await.expect("connects");
    for path in [JOIN, "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"] {
        let status = raw(&anonymous, path, None, prefixed(0, (64 << 10) + 1, b"")).await;
        assert_eq!(status.code(), Code::OutOfRange, "{path}: {status:?}");
    }
    for path in [
        "/",
        "//",
        "/orlop.api.v1.Objects",
        "/orlop.api.v1.Objects/Nothing",
        "/a/b/c",
    ] {
        let status = raw(&admin, path, None, whole(0, b"")).await;
        assert_eq!(status.code(), Code::Unimplemented, "{path}: {status:?}");
    }
    is_served(&control).await;
    control.stop().await;
}

#[tokio::test]
async fn floods_of_frames() {
    let control = Control::start().await;
    let admin = control.pair("admin");
    let headers = |stream: u32| frame(HEADERS, END_HEADERS, stream, &grpc_headers(LIST));
    let odd = |count: u32| (0..count).map(|index| 2 * index + 1);

    // More streams than are allowed, none of which goes on: they are refused, the connection may go on.
    for pair in [Some(&admin), None] {
        let mut wire = Wire::open(&control, pair).await;
        for stream in odd(2_000) {
            if wire.send(&headers(stream)).await.is_err() {
                break;
            }
        }
        let mut refused = false;
        while !refused && let Some((kind, payload)) = wire.frame().await {
            // REFUSED_STREAM, or the whole connection is given up.
            refused = (kind == RST_STREAM && payload == [0, 0, 0, 7]) || kind == crate::wire::GOAWAY;
        }
        assert!(refused, "some are refused");
        is_served(&control).await;
    }

    // Each of these ends the connection.
    let resets: Vec<u8> = odd(20_000)
        .flat_map(|stream| [headers(stream), frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])].concat())
        .collect();
    let mut endless = frame(HEADERS, 0, 1, &grpc_headers(LIST));
    for _ in 0..2_000 {
        let mut block = Vec::new();
        field(&mut block, "x-filler", &"x".repeat(100));
        endless.extend(frame(CONTINUATION, 0, 1, &block.repeat(100)));
    }
    let overflow = [
        headers(1),
        frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]),
        frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]),
    ];
    for (what, frames) in [
        ("rapid resets", resets),
        ("endless headers", endless),
        ("a window beyond its bound", overflow.concat()),
        ("a frame beyond its bound", frame(DATA, 0, 1, &vec![0; (16 << 10) + 1])),
        ("data of no stream", frame(DATA, END_STREAM, 77, b"x")),
        ("settings of a wrong size", frame(SETTINGS, 0, 0, &[0; 5])),
        ("a ping of a wrong size", frame(PING, 0, 0, &[0; 7])),
        ("a stream of the server's", headers(2)),
        ("garbage", vec![0xff; 4096]),
    ] {
        let mut wire = Wire::open(&control, Some(&admin)).await;
        // It may close before it has read all of this.
        let _closed_early = wire.send(&frames).await;
        let code = wire.end().await;
        assert_ne!(code, Some(0), "{what}");
        is_served(&control).await;
    }

    // Answers that nobody reads are not kept without bound: it stops to read, or closes.
    for flood in [frame(PING, 0, 0, &[7; 8]), frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0])] {
        let mut wire = Wire::open(&control, Some(&admin)).await;
        let many = flood.repeat(10_000);
        let mut stopped = false;
        for _ in 0..200 {
            if wire.send(&many).await.is_err() {
                stopped = true;
                break;
            }
        }
        assert!(stopped, "two million frames were taken");
        is_served(&control).await;
    }
    control.stop().await;
}

#[tokio::test]
async fn stalled_handshakes_do_not_keep_others_out() {
    let control = Control::start_with("[limits]\nhandshakes = 4\nhandshake_timeout = \"500ms\"\n").await;
    let mut stalled = Vec::new();
    for _ in 0..40 {
        let mut stream = TcpStream::connect(control.address).await.expect("connects");
        stream.write_all(&[22, 3, 1, 2, 0, 1, 0]).await.expect("writes");
        stalled.push(stream);
    }
    let attempts = async {
        while control.channel(Some(&control.pair("admin"))).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), attempts)
        .await
        .expect("gets in");
    for mut stream in stalled {
        let mut rest = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut rest)).await;
        assert!(read.is_ok(), "closed");
    }
    control.stop().await;
}

#[tokio::test]
async fn who_is_not_known_does_not_stay() {
    let control = Control::start_with("[limits]\nanonymous_lifetime = \"300ms\"\nhandshake_timeout = \"1s\"\n").await;
    let mut idle = Wire::open(&control, None).await;
    let mut busy = Wire::open(&control, None).await;
    busy.send(&frame(HEADERS, END_HEADERS, 1, &grpc_headers(JOIN)))
        .await
        .expect("writes");
    let mut admin = Wire::open(&control, Some(&control.pair("admin"))).await;
    assert_eq!(idle.end().await, Some(0), "ended in good order");
    busy.end().await;
    admin.send(&frame(PING, 0, 0, &[7; 8])).await.expect("writes");
    while let Some((kind, payload)) = admin.frame().await
        && (kind, payload.as_slice()) != (PING, [7; 8].as_slice())
    {
        assert_ne!(kind, crate::wire::GOAWAY, "administrators stay");
    }
    control.stop().await;
}

#[tokio::test]
async fn a_manifest_that_does_not_come_keeps_nobody_waiting() {
    let control = Control::start_with("[limits]\nconcurrent_applies = 1\napply_timeout = \"500ms\"\n").await;
    let mut stalled = Wire::open(&control, Some(&control.pair("admin"))).await;
    stalled
        .send(&frame(HEADERS, END_HEADERS, 1, &grpc_headers(APPLY)))
        .await
        .expect("writes");
    stalled
        .send(&frame(DATA, 0, 1, &prefixed(0, 1000, b"no more")))
        .await
        .expect("writes");
    // Another that has sent everything, but has no window for the results.
    let mut deaf = Wire::open(&control, Some(&control.pair("admin"))).await;
    let manifest: String = (0..200)
        .map(|index| format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: deaf-{index}}}\n"))
        .collect();
    let request = ApplyRequest {
        input: Some(Input::Manifest(manifest)),
        ..ApplyRequest::default()
    };
    let body = whole(0, &request.encode_to_vec());
    let mut frames = frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]);
    frames.extend(frame(HEADERS, END_HEADERS, 1, &grpc_headers(APPLY)));
    frames.extend(frame(DATA, END_STREAM, 1, &body));
    deaf.send(&frames).await.expect("writes");

    let mut client = ObjectsClient::new(control.admin().await);
    let manifest = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";
    let applied = apply(&mut client, manifest).await.expect("has its turn");
    assert_eq!(applied[0].action, "created");
    control.stop().await;
}

#[tokio::test]
async fn revisions_that_cannot_be() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.unix().await);
    let mut object = create(&mut client, lease("a", "x")).await;
    let now = version(&object);
    for (given, expected) in [
        ("-1", Code::InvalidArgument),
        ("x", Code::InvalidArgument),
        ("1.5", Code::InvalidArgument),
        (" 1", Code::InvalidArgument),
        ("99999999999999999999999", Code::InvalidArgument),
        ("18446744073709551615", Code::FailedPrecondition),
        ("1000000", Code::FailedPrecondition),
    ] {
        let request = WatchRequest {
            resource: "leases".to_owned(),
            resource_version: given.to_owned(),
            ..WatchRequest::default()
        };
        let status = client.watch(request).await.expect_err(given);
        assert_eq!(status.code(), expected, "watch {given}: {status:?}");
        object.meta_mut().expect("metadata").resource_version = given.to_owned();
        let request = UpdateRequest {
            object: Some(object.clone()),
        };
        let status = client.update(request).await.expect_err(given);
        assert!(
            matches!(status.code(), Code::InvalidArgument | Code::Aborted),
            "update {given}: {status:?}"
        );
        let request = DeleteRequest {
            resource: "leases".to_owned(),
            name: "a".to_owned(),
            preconditions: Some(Preconditions {
                resource_version: given.to_owned(),
                ..Preconditions::default()
            }),
            ..DeleteRequest::default()
        };
        let status = client.delete(request).await.expect_err(given);
        assert!(
            matches!(
                status.code(),
                Code::InvalidArgument | Code::FailedPrecondition | Code::Aborted
            ),
            "delete {given}: {status:?}"
        );
    }
    // After a restart the window is empty, and the store's log has what came after.
    remove(&mut client, "leases", "a").await;
    drop(client);
    let control = Control::start_in(control.stop().await, "").await;
    let mut client = ObjectsClient::new(control.unix().await);
    let request = WatchRequest {
        resource: "leases".to_owned(),
        resource_version: now.to_string(),
        ..WatchRequest::default()
    };
    let mut events = client.watch(request).await.expect("resumes").into_inner();
    let event = events.message().await.expect("no error").expect("an event");
    assert_eq!(
        (event.r#type.as_str(), name(&event.object.expect("an object"))),
        ("DELETED", "a".to_owned())
    );
    drop(events);
    control.stop().await;
}
