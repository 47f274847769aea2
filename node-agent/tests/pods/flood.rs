//! A registry that answers each question with a flood, and what the agent keeps of it: the tests are the agent's process, so its memory is
//! theirs.

use std::{fs, io::Write as _};

use orlop_node::runtime::image_source::{CONFIG, Descriptor, LAYER, Manifest, digest_of};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::{
    images::{registry_node, waiting},
    node::pod,
    registry::{self, layer},
    stage::on_stage,
};

/// What comes where a few bytes were asked for; and a whole layer, which nobody has to hold.
const FLOOD: usize = 128 << 20;
/// What the agent may take for one image of these. Measured: 26 MiB for the first, with which a node begins; 3 MiB for a layer.
const BOUND: u64 = 48 << 20;

#[test]
fn floods_of_images_take_bounded_memory() {
    on_stage("pods::flood::floods_of_images_take_bounded_memory", async |stage| {
        let (mut node, stage) = registry_node(stage, |_| {}).await;
        let listener = TcpListener::bind("127.0.0.1:5000").await.unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream));
            }
        });
        // Its manifest, of a hole, is looked for in every archive when any image is.
        archive(&stage.dir.join("images/flood.tar"));
        let blob = digest_of(b"flood");
        for (name, why) in [
            ("manifest", "larger than 4194304 bytes"),
            ("refusal", "HTTP status 500"),
            ("token", "its answer is too long"),
            ("config", "longer than the 100 bytes"),
            ("layer", blob.as_str()),
        ] {
            fs::write("/proc/self/clear_refs", "5").expect("resets the peak");
            let before = memory("VmRSS:");
            let image = format!("127.0.0.1:5000/flood:{name}");
            node.want(&pod(name, &[("web", &["sleep"], image.as_str())]));
            let refused = node
                .until(name, "shows why", |status| !waiting(status).is_empty())
                .await;
            let grown = memory("VmHWM:").saturating_sub(before);
            println!("a flood in the place of the {name}: {} KiB", grown >> 10);
            assert!(grown < BOUND, "a flood in the place of the {name}: {grown} bytes");
            assert!(waiting(&refused).contains(why), "{}", waiting(&refused));
            node.delete(name, 0).await;
        }
        node.until_empty().await;
        node.assert_nothing_left();
    });
}

/// Answers one question about the image `flood`, whose tag says where the flood is.
async fn answer(mut stream: TcpStream) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let path = head.split(' ').nth(1).unwrap_or_default();
    let name = path.rsplit('/').next().unwrap_or_default();
    let ok = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n";
    let config = digest_of(CONFIG_OF_LAYER.as_bytes());
    let (start, body) = match name {
        "manifest" => (ok, None),
        "refusal" => ("HTTP/1.1 500 Oh\r\nconnection: close\r\n\r\n", None),
        "token" => (
            "HTTP/1.1 401 No\r\nwww-authenticate: Bearer realm=\"http://127.0.0.1:5000/endless\"\r\nconnection: close\r\n\r\n",
            None,
        ),
        "config" => (ok, Some(manifest(described(CONFIG, &digest_of(b"flood"), 100), 100))),
        "layer" => (
            ok,
            Some(manifest(
                registry::described(CONFIG, CONFIG_OF_LAYER.as_bytes()),
                FLOOD as u64,
            )),
        ),
        // Of the one that is asked for by its digest.
        digest if digest == config => (ok, Some(CONFIG_OF_LAYER.into())),
        _ => (ok, None),
    };
    // Who has enough hangs up.
    if stream.write_all(start.as_bytes()).await.is_err() {
        return;
    }
    if let Some(body) = body {
        stream.write_all(&body).await.ok();
        return;
    }
    let piece = [b' '; 64 << 10];
    for _ in 0..FLOOD / piece.len() {
        if stream.write_all(&piece).await.is_err() {
            return;
        }
    }
}

/// With one layer.
const CONFIG_OF_LAYER: &str = r#"{"rootfs":{"type":"layers","diff_ids":["sha256:0000000000000000000000000000000000000000000000000000000000000000"]}}"#;

fn manifest(config: Descriptor, layer: u64) -> Vec<u8> {
    Manifest::new(config, vec![described(LAYER, &digest_of(b"flood"), layer)])
        .to_bytes()
        .into()
}

fn described(media_type: &str, digest: &str, size: u64) -> Descriptor {
    Descriptor {
        digest: digest.to_owned(),
        size,
        ..registry::described(media_type, b"")
    }
}

/// An archive whose `manifest.json` is long.
fn archive(path: &std::path::Path) {
    let whole = layer(&[("manifest.json", &[b' '; 512])]);
    let mut header = tar::Header::from_byte_slice(&whole[..512]).clone();
    header.set_size(FLOOD as u64);
    header.set_cksum();
    let mut file = fs::File::create(path).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((512 + FLOOD + 1024) as u64).unwrap();
}

/// A figure of this process's status, in bytes.
fn memory(figure: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(figure)).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}
