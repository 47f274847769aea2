//! HTTP/2 by hand, for what no client library would send.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::client::TlsStream;

use crate::harness::{Control, Pair};

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

const SECONDS: Duration = Duration::from_secs(20);

/// A connection after the handshake and the preface.
pub struct Wire {
    stream: TlsStream<TcpStream>,
}

impl Wire {
    pub async fn open(control: &Control, pair: Option<&Pair>) -> Self {
        let mut stream = control.tls(pair, &[b"h2"]).await.expect("handshake");
        stream
            .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            .await
            .expect("preface");
        let mut wire = Self { stream };
        wire.send(&frame(SETTINGS, 0, 0, &[])).await.expect("settings");
        wire
    }

    /// Whole frames. An error says that the other side has closed, or does not read any more.
    pub async fn send(&mut self, frames: &[u8]) -> std::io::Result<()> {
        let write = async {
            self.stream.write_all(frames).await?;
            self.stream.flush().await
        };
        match timeout(Duration::from_secs(2), write).await {
            Ok(result) => result,
            Err(_) => Err(std::io::ErrorKind::TimedOut.into()),
        }
    }

    /// The next frame: type and payload; `None` at the end of the connection.
    pub async fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let read = async {
            let mut header = [0; 9];
            self.stream.read_exact(&mut header).await.ok()?;
            let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
            let mut payload = vec![0; length as usize];
            self.stream.read_exact(&mut payload).await.ok()?;
            Some((header[3], payload))
        };
        timeout(SECONDS, read).await.expect("a frame, or the end")
    }

    /// Reads to the end of the connection; the error code of the GOAWAY that came before it.
    pub async fn end(&mut self) -> Option<u32> {
        let mut code = None;
        while let Some((kind, payload)) = self.frame().await {
            if kind == GOAWAY {
                code = Some(u32::from_be_bytes(payload[4..8].try_into().expect("a code")));
            }
        }
        code
    }
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a length").to_be_bytes();
    let mut bytes = vec![length[1], length[2], length[3], kind, flags];
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// The header block of a gRPC request, without compression.
pub fn grpc_headers(path: &str) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "https"),
        (":authority", "control.test"),
        (":path", path),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ] {
        field(&mut block, name, value);
    }
    block
}

/// A literal field that is not indexed.
pub fn field(block: &mut Vec<u8>, name: &str, value: &str) {
    block.push(0);
    for text in [name, value] {
        block.push(
            u8::try_from(text.len())
                .ok()
                .filter(|length| *length < 127)
                .expect("a short text"),
        );
        block.extend_from_slice(text.as_bytes());
    }
}
