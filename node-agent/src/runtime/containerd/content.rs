//! containerd's content store: blobs by digest.

use std::{collections::HashMap, time::Duration};

use containerd_client::services::v1::{
    AbortRequest, Info, InfoRequest, ReadContentRequest, UpdateRequest, WriteAction, WriteContentRequest,
};
use prost_types::FieldMask;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use super::client::{Client, Refusal as _};
use crate::runtime::RuntimeError;

/// What of a blob is sent at once.
const CHUNK: usize = 1 << 19;
/// A write takes no longer than this, and the time of its bytes at `SLOWEST`.
const WRITE_DEADLINE: Duration = Duration::from_secs(600);
/// In bytes a second.
const SLOWEST: u64 = 100_000;

/// Whether the store has the blob.
pub async fn exists(client: &Client, digest: &str) -> Result<bool, RuntimeError> {
    let request = client.request(InfoRequest {
        digest: digest.to_owned(),
    });
    Ok(client
        .call("looking for a blob", client.content().info(request))
        .await
        .found()?
        .is_some())
}

/// Reads a small blob; one larger than `limit` is an error.
pub async fn read(client: &Client, digest: &str, limit: usize) -> Result<Vec<u8>, RuntimeError> {
    let request = client.request(ReadContentRequest {
        digest: digest.to_owned(),
        offset: 0,
        size: 0,
    });
    let mut stream = client.call("reading a blob", client.content().read(request)).await?;
    let mut bytes = Vec::new();
    while let Some(part) = client
        .call("reading a blob", async {
            stream.message().await.map(tonic::Response::new)
        })
        .await?
    {
        bytes.extend_from_slice(&part.data);
        if bytes.len() > limit {
            return Err(RuntimeError::BadImage {
                reference: digest.to_owned(),
                why: format!("its JSON is larger than {limit} bytes"),
            });
        }
    }
    Ok(bytes)
}

/// Sets labels of a blob that is there.
pub async fn label(client: &Client, digest: &str, labels: HashMap<String, String>) -> Result<(), RuntimeError> {
    let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
    let request = client.request(UpdateRequest {
        info: Some(Info {
            digest: digest.to_owned(),
            labels,
            ..Info::default()
        }),
        update_mask: Some(FieldMask { paths }),
    });
    client
        .call("labelling a blob", client.content().update(request))
        .await?;
    Ok(())
}

/// A blob to be written.
pub struct Blob<'a> {
    /// Its digest, which containerd checks.
    pub digest: &'a str,
    /// Its size, which containerd checks.
    pub size: u64,
    /// What the garbage collector follows from it.
    pub labels: HashMap<String, String>,
}

/// Writes a blob of the image `of`, held by a lease; one that is there already gets the labels only. Bytes that are not the
/// blob's are an error, and nothing of them is kept.
pub async fn write(
    client: &Client,
    of: &str,
    lease: &str,
    blob: Blob<'_>,
    mut from: impl AsyncRead + Unpin + Send,
) -> Result<(), RuntimeError> {
    // Held before it is looked for: it may be on its way out.
    hold(client, lease, blob.digest).await?;
    if exists(client, blob.digest).await? {
        if !blob.labels.is_empty() {
            label(client, blob.digest, blob.labels).await?;
        }
        return Ok(());
    }
    let name = format!("orlop-{}-{}", uuid::Uuid::new_v4().simple(), blob.digest);
    let total = i64::try_from(blob.size).map_err(|_| RuntimeError::InvalidSpec("a blob's size".to_owned()))?;
    let message = |action: WriteAction, offset: i64, data: Vec<u8>| WriteContentRequest {
        action: action.into(),
        r#ref: name.clone(),
        total,
        expected: blob.digest.to_owned(),
        offset,
        data,
        labels: HashMap::new(),
    };
    let (sender, receiver) = tokio::sync::mpsc::channel(2);
    let feed = async {
        let mut offset = 0;
        loop {
            let mut chunk = Vec::with_capacity(CHUNK);
            (&mut from).take(CHUNK as u64).read_to_end(&mut chunk).await?;
            if chunk.is_empty() {
                break;
            }
            let length = chunk.len();
            if sender.send(message(WriteAction::Write, offset, chunk)).await.is_err() {
                return Ok(());
            }
            offset += i64::try_from(length).unwrap_or(0);
        }
        let commit = WriteContentRequest {
            labels: blob.labels.clone(),
            ..message(WriteAction::Commit, offset, Vec::new())
        };
        // A failed send means that the call has ended: its own error says why.
        sender.send(commit).await.ok();
        drop(sender);
        Ok::<(), std::io::Error>(())
    };
    let mut content = client.content();
    let request = client.leased(lease, ReceiverStream::new(receiver));
    let deadline = WRITE_DEADLINE + Duration::from_secs(blob.size / SLOWEST);
    let call = client.call_within(deadline, "writing a blob", async {
        let mut answers = content.write(request).await?.into_inner();
        let mut last = None;
        while let Some(answer) = answers.message().await? {
            last = Some(answer);
        }
        Ok(tonic::Response::new(last))
    });
    tokio::pin!(feed, call);
    let (fed, answered) = tokio::select! {
        biased;
        fed = &mut feed => (fed, call.await),
        // Nobody takes any more: whoever sends in drops would be waited for until the next piece is whole.
        answered = &mut call => (Ok(()), answered),
    };
    let written = match (fed, answered.made()) {
        (Ok(()), Ok(_)) => return Ok(()),
        (Err(source), _) if source.kind() == std::io::ErrorKind::InvalidData => Err(source.to_string()),
        (Err(source), _) => Ok(RuntimeError::Io {
            doing: "reading an image's blob".to_owned(),
            source,
        }),
        // containerd's answer to another digest, or another size.
        (Ok(()), Err(RuntimeError::Containerd { source, .. })) if source.code() == Code::FailedPrecondition => {
            Err(format!("blob {}: {}", blob.digest, source.message()))
        }
        (Ok(()), Err(error)) => Ok(error),
    };
    let request = client.request(AbortRequest { r#ref: name.clone() });
    // What it had written is collected with the lease, if not now.
    client
        .call("aborting a write", client.content().abort(request))
        .await
        .ok();
    Err(written.unwrap_or_else(|why| RuntimeError::BadImage {
        reference: of.to_owned(),
        why,
    }))
}

async fn hold(client: &Client, lease: &str, digest: &str) -> Result<(), RuntimeError> {
    let request = client.request(containerd_client::services::v1::AddResourceRequest {
        id: lease.to_owned(),
        resource: Some(containerd_client::services::v1::Resource {
            id: digest.to_owned(),
            r#type: "content".to_owned(),
        }),
    });
    client
        .call("holding a blob", client.leases().add_resource(request))
        .await
        .made()?;
    Ok(())
}
