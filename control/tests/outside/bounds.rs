//! What hostile input costs the program, by the kernel's own account: the peak of its memory while it has to do with it.

use std::{
    convert::Infallible,
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt as _;
use http_body_util::StreamBody;
use hyper::body::Frame;
use orlop_proto::api::v1::{ApplyRequest, WatchRequest, apply_request::Input, objects_client::ObjectsClient};
use prost::Message;
use tokio::{task::JoinSet, time::timeout};
use tonic::body::Body;

use crate::{
    harness::Control,
    hostile_grpc::{APPLY, LIST, call, prefixed, raw, whole},
    hostile_manifests,
    requests::{Client, apply},
    wire::{CONTINUATION, END_HEADERS, HEADERS, PING, RST_STREAM, SETTINGS, Wire, field, frame, grpc_headers},
};

const MIB: u64 = 1 << 20;
/// What anything may cost that is small itself. Measured: 80 MiB for the bomb of aliases, 40 MiB for watchers that do not read.
const LITTLE: u64 = 256 * MIB;
/// What a flood of frames may cost: less than is sent, so what is kept for every frame would be seen.
const FLOOD: u64 = 32 * MIB;
/// Connections that flood at one time.
const FLOODING: usize = 3;
/// What a manifest may cost beyond that for each of its bytes. Measured: 86 for the most objects that are read.
const FACTOR: u64 = 192;
/// And whatever it holds.
const MOST: u64 = 1 << 30;
/// Apply calls at one time where many of them stall, how many want to, and how much of its message each has.
const PLACES: usize = 2;
const APPLIERS: usize = 20;
const LONG: usize = 15 << 20;

/// A figure of the process's status, in bytes.
fn memory(pid: u32, figure: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix(figure));
    let kib = line.and_then(|line| line.strip_prefix(':')?.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.parse::<u64>().ok()).expect("a figure") * 1024
}

/// Does something to the program, and says by how much its memory grew at most meanwhile.
async fn growth(control: &Control, deed: impl Future<Output = ()>) -> u64 {
    let pid = control.pid();
    // The peak is from now on.
    fs::write(format!("/proc/{pid}/clear_refs"), "5").expect("resets the peak");
    let before = memory(pid, "VmRSS");
    deed.await;
    memory(pid, "VmHWM").saturating_sub(before)
}

/// Most are refused, but a comment may be as long as a manifest.
async fn tried(client: &mut Client, text: &str) {
    apply(client, text).await.ok();
}

#[tokio::test]
async fn hostile_manifests_take_bounded_memory() {
    let control = Control::program("").await;
    let mut client = ObjectsClient::new(control.unix().await);
    let large = |text: String| format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: a}}\n---\n{text}");
    let mut texts: Vec<(&str, String)> = hostile_manifests::texts();
    texts.extend([
        ("the most objects that are read", format!("[{}0]", "{\"\":0},".repeat(660_000))),
        ("the most values that are read", format!("{{\"a\":[{}0]}}", "0,".repeat(1_990_000))),
        ("a long text", large(format!("# {}\n", "x".repeat(31 << 20)))),
        ("a long scalar", large(format!("a: {}\n", "x".repeat(31 << 20)))),
        (
            "errors without number",
            format!("{{\"kind\":\"Pod\",\"apiVersion\":\"v1\",{}\"z\":0}}", (0..100_000).map(|n| format!("\"{n}\":0,")).collect::<String>()),
        ),
        (
            "containers without number, all of one name",
            format!(
                "{{\"apiVersion\":\"v1\",\"kind\":\"Pod\",\"metadata\":{{\"name\":\"a\"}},\"spec\":{{\"containers\":[{}{{}}]}}}}",
                "{\"name\":\"c\",\"image\":\"i\"},".repeat(100_000)
            ),
        ),
    ]);
    for (what, text) in texts {
        let bound = MOST.min(LITTLE + FACTOR * text.len() as u64);
        let grown = growth(&control, tried(&mut client, &text)).await;
        println!("{what}: {} KiB for {} KiB", grown / 1024, text.len() / 1024);
        assert!(grown < bound, "{what}: {grown} bytes for {}", text.len());
    }
    control.stop().await;
}

#[tokio::test]
async fn hostile_clients_take_bounded_memory() {
    let control = Control::program("").await;
    let admin = control.pair("admin");
    let channel = control.admin().await;
    let lies = async {
        for path in [LIST, APPLY, "/orlop.api.v1.Objects/Watch"] {
            for _ in 0..50 {
                raw(&channel, path, None, prefixed(0, u32::MAX, b"")).await;
                raw(&channel, path, Some("gzip"), whole(1, &[0x1f, 0x8b, 8, 0])).await;
            }
        }
    };
    // Manifests that are announced and do not come: what was announced is not set aside for them.
    let announced = async {
        let mut stalled = Vec::new();
        for _ in 0..20 {
            let mut wire = Wire::open(&control, Some(&admin)).await;
            for stream in 0..20 {
                let stream = 2 * stream + 1;
                wire.send(&frame(HEADERS, END_HEADERS, stream, &grpc_headers(APPLY)))
                    .await
                    .ok();
                wire.send(&frame(0, 0, stream, &prefixed(0, 63 << 20, b"no more")))
                    .await
                    .ok();
            }
            stalled.push(wire);
        }
        // What was set aside and not yet used is no resident memory: it shows in the size alone.
        memory(control.pid(), "VmSize")
    };
    let resets: Vec<u8> = (0..100_000)
        .map(|index| 2 * index + 1)
        .flat_map(|stream| {
            let headers = frame(HEADERS, END_HEADERS, stream, &grpc_headers(LIST));
            [headers, frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])].concat()
        })
        .collect();
    let mut block = Vec::new();
    field(&mut block, "x-filler", &"x".repeat(100));
    let mut endless = frame(HEADERS, 0, 1, &grpc_headers(LIST));
    for _ in 0..2_000 {
        endless.extend(frame(CONTINUATION, 0, 1, &block.repeat(100)));
    }
    let pings = frame(PING, 0, 0, &[7; 8]).repeat(1_000_000);
    let settings = frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]).repeat(1_000_000);
    // All of them are open until the last has had its say.
    let flood = async |frames: Vec<u8>| {
        assert!((frames.len() * FLOODING) as u64 > FLOOD, "as much as the bound");
        let mut wires = Vec::new();
        for _ in 0..FLOODING {
            wires.push(Wire::open(&control, Some(&admin)).await);
        }
        // It closes, or stops to read.
        let floods = wires.iter_mut().map(|wire| wire.send(&frames));
        futures::future::join_all(floods).await;
    };
    let deaf_watchers = async {
        let mut watchers = Vec::new();
        for _ in 0..40 {
            let mut wire = Wire::open(&control, Some(&admin)).await;
            let request = WatchRequest {
                resource: "events".to_owned(),
                ..WatchRequest::default()
            };
            wire.send(&frame(
                HEADERS,
                END_HEADERS,
                1,
                &grpc_headers("/orlop.api.v1.Objects/Watch"),
            ))
            .await
            .expect("writes");
            wire.send(&frame(0, 1, 1, &whole(0, &request.encode_to_vec())))
                .await
                .expect("writes");
            watchers.push(wire);
        }
        let mut client = ObjectsClient::new(control.unix().await);
        // A copy for each of them would be 40 times 16 MiB.
        for round in 0..8 {
            let manifest: String = (0..100).map(|index| event(round, index, 20 << 10)).collect();
            apply(&mut client, &manifest).await.expect("applies");
        }
    };
    let deaf_appliers = async {
        let mut appliers = Vec::new();
        for number in 0..10 {
            // Within the window that each connection begins with.
            let manifest: String = (0..50).map(|index| event(100 + number, index, 800)).collect();
            let request = ApplyRequest {
                input: Some(Input::Manifest(manifest)),
                ..ApplyRequest::default()
            };
            // No window for the answer.
            let mut frames = frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]);
            frames.extend(frame(HEADERS, END_HEADERS, 1, &grpc_headers(APPLY)));
            let body = whole(0, &request.encode_to_vec());
            let parts = body.chunks(16 << 10).enumerate();
            let last = body.len().div_ceil(16 << 10) - 1;
            frames.extend(parts.flat_map(|(index, part)| frame(0, u8::from(index == last), 1, part)));
            let mut wire = Wire::open(&control, Some(&admin)).await;
            wire.send(&frames).await.ok();
            appliers.push(wire);
        }
    };
    let mut found = Vec::new();
    found.push(("lengths that lie", growth(&control, lies).await));
    let size = memory(control.pid(), "VmSize");
    let mut announcing = size;
    let announced = async { announcing = announced.await };
    found.push(("announced and not sent", growth(&control, announced).await));
    let announcing = announcing.saturating_sub(size);
    println!("announced: {} KiB of addresses", announcing / 1024);
    // All that was announced are 25 GiB.
    assert!(announcing < 4 << 30, "{announcing} bytes of addresses");
    for (what, frames) in [
        ("resets", resets),
        ("endless headers", endless),
        ("pings", pings),
        ("settings", settings),
    ] {
        let grown = growth(&control, flood(frames)).await;
        println!("flood of {what}: {} KiB", grown / 1024);
        assert!(grown < FLOOD, "{what}: {grown} bytes");
    }
    found.push(("watchers that do not read", growth(&control, deaf_watchers).await));
    found.push(("appliers that do not read", growth(&control, deaf_appliers).await));
    for (what, grown) in found {
        println!("{what}: {} KiB", grown / 1024);
        assert!(grown < LITTLE, "{what}: {grown} bytes");
    }
    control.stop().await;
}

/// Messages that are announced and come, but for their end.
#[tokio::test]
async fn appliers_that_stall_take_the_memory_of_those_who_have_a_place() {
    let limits = format!(
        "[limits]\nconcurrent_applies = {PLACES}\nmanifest_bytes = {}\n",
        LONG + (1 << 20)
    );
    let control = Control::program(&limits).await;
    let sent: Vec<Arc<AtomicUsize>> = (0..APPLIERS).map(|_| Arc::default()).collect();
    let mut calls = JoinSet::new();
    let whole = || sent.iter().filter(|sent| sent.load(Ordering::Relaxed) == LONG).count();
    let stalled = async {
        for sent in &sent {
            let (channel, body) = (control.admin().await, but_for_its_end(Arc::clone(sent)));
            calls.spawn(async move { call(&channel, APPLY, None, body).await });
        }
        let total = || sent.iter().map(|sent| sent.load(Ordering::Relaxed)).sum();
        let mut before: usize = 0;
        // Until nobody's is taken any more.
        while whole() < PLACES || before != total() {
            before = total();
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    let stalled = async { timeout(Duration::from_secs(60), stalled).await.expect("they stall") };
    let grown = growth(&control, stalled).await;
    println!("appliers that stall: {} KiB", grown / 1024);
    // Theirs, and for each a connection with what HTTP/2 has in flight, 1 MiB. Measured: 68 MiB.
    let bound = (PLACES * LONG) as u64 + 4 * APPLIERS as u64 * MIB;
    assert!(2 * bound < (APPLIERS * LONG) as u64, "less than all of them have sent");
    assert!(grown < bound, "{grown} bytes");
    assert_eq!(whole(), PLACES, "had a place");
    assert!(calls.try_join_next().is_none(), "none has an answer");
    control.stop().await;
}

/// A message of a length, without its last byte and without an end; how much of it was taken.
fn but_for_its_end(taken: Arc<AtomicUsize>) -> Body {
    const PIECE: usize = 64 << 10;
    let header = prefixed(0, u32::try_from(LONG + 1).expect("a length"), b"");
    let pieces = (0..LONG / PIECE).map(move |_| {
        taken.fetch_add(PIECE, Ordering::Relaxed);
        Bytes::from(vec![b'x'; PIECE])
    });
    let pieces = std::iter::once(Bytes::from(header)).chain(pieces);
    let pieces = futures::stream::iter(pieces.map(|piece| Ok::<_, Infallible>(Frame::data(piece))));
    Body::new(StreamBody::new(pieces.chain(futures::stream::pending())))
}

/// With a message of some bytes more; beyond 1 kB they are an annotation's.
fn event(round: usize, index: usize, padding: usize) -> String {
    let (message, note) = (padding.min(800), padding.saturating_sub(800));
    let (message, note) = ("x".repeat(message), "x".repeat(note));
    format!(
        "---\napiVersion: v1\nkind: Event\nmetadata: {{name: e{round}-{index}, annotations: {{note: \"{note}\"}}}}\n\
         involvedObject: {{kind: Pod, name: p, namespace: default}}\nreason: Test\ntype: Normal\nmessage: {message}\n"
    )
}
