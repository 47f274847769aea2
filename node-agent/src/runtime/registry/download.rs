//! One blob on its way: as long as its manifest says, resumed where a connection broke.

use std::{io, sync::Arc};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream::BoxStream};
use reqwest::{Response, StatusCode, header::CONTENT_RANGE};
use tokio::sync::OwnedSemaphorePermit;

use super::endpoint::{Endpoint, PAUSE};

/// How many broken connections one blob survives.
const RESUMES: u32 = 5;

/// A blob on its way; nothing is asked before it is read.
pub struct Download {
    endpoint: Arc<Endpoint>,
    repository: String,
    digest: String,
    size: u64,
    /// How much was handed on.
    offset: u64,
    /// What of the present answer is known already.
    skip: u64,
    answer: Option<Response>,
    breaks: u32,
    /// Its place among the registry's downloads.
    _turn: OwnedSemaphorePermit,
}

impl Download {
    /// Of one blob, when it is its turn.
    pub async fn new(endpoint: Arc<Endpoint>, repository: &str, digest: &str, size: u64) -> io::Result<Self> {
        let turn = endpoint.downloads.clone().acquire_owned().await;
        Ok(Self {
            endpoint,
            repository: repository.to_owned(),
            digest: digest.to_owned(),
            size,
            offset: 0,
            skip: 0,
            answer: None,
            breaks: 0,
            _turn: turn.map_err(io::Error::other)?,
        })
    }

    /// The blob's bytes. An error of the kind `InvalidData` says that they are not the blob's.
    pub fn stream(self) -> BoxStream<'static, io::Result<Bytes>> {
        Self::unfold(self).boxed()
    }

    fn unfold(self) -> impl Stream<Item = io::Result<Bytes>> + Send {
        futures::stream::try_unfold(self, |mut download| async move {
            Ok(download.next().await?.map(|bytes| (bytes, download)))
        })
    }

    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            if self.answer.is_none() {
                self.answer = Some(self.ask().await?);
            }
            let Some(answer) = &mut self.answer else { continue };
            let broken = match tokio::time::timeout(self.endpoint.timeout, answer.chunk()).await {
                Ok(Ok(Some(bytes))) => match self.fresh(bytes)? {
                    Some(bytes) => return Ok(Some(bytes)),
                    None => continue,
                },
                Ok(Ok(None)) if self.offset == self.size => return Ok(None),
                Ok(Ok(None)) => format!("it ended after {} of {} bytes", self.offset, self.size),
                Ok(Err(error)) => super::PullError::from(error).to_string(),
                Err(_) => format!("nothing came for {} s", self.endpoint.timeout.as_secs()),
            };
            self.answer = None;
            self.breaks += 1;
            if self.breaks > RESUMES {
                return Err(io::Error::other(self.of_blob(&broken)));
            }
            tracing::info!(blob = self.digest, offset = self.offset, broken, "resuming a download");
            tokio::time::sleep(PAUSE * self.breaks).await;
        }
    }

    /// What of these bytes has not been handed on before.
    fn fresh(&mut self, mut bytes: Bytes) -> io::Result<Option<Bytes>> {
        let known = self.skip.min(bytes.len() as u64);
        self.skip -= known;
        // At most the buffer's own length.
        drop(bytes.split_to(usize::try_from(known).unwrap_or(bytes.len())));
        if bytes.is_empty() {
            return Ok(None);
        }
        self.offset += bytes.len() as u64;
        if self.offset > self.size {
            return Err(self.invalid(&format!("it is longer than the {} bytes of its manifest", self.size)));
        }
        Ok(Some(bytes))
    }

    /// Asks for what is not known yet, and checks that this is what comes.
    async fn ask(&mut self) -> io::Result<Response> {
        let answer = self.endpoint.blob(&self.repository, &self.digest, self.offset).await;
        let answer = answer.map_err(|error| io::Error::other(self.of_blob(&error.to_string())))?;
        let begin = match answer.status() {
            StatusCode::PARTIAL_CONTENT => range_begin(&answer).unwrap_or(self.offset),
            _ => 0,
        };
        // What was handed on may come again; a gap may not be.
        self.skip = self
            .offset
            .checked_sub(begin)
            .ok_or_else(|| self.invalid(&format!("asked from {} on, it begins at {begin}", self.offset)))?;
        match answer.content_length() {
            Some(length) if begin.saturating_add(length) != self.size => Err(self.invalid(&format!(
                "its registry says that it has {} bytes, its manifest {}",
                begin.saturating_add(length),
                self.size
            ))),
            _ => Ok(answer),
        }
    }

    fn invalid(&self, why: &str) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, self.of_blob(why))
    }

    fn of_blob(&self, why: &str) -> String {
        format!("{}: blob {}: {why}", self.endpoint.host, self.digest)
    }
}

/// Where `Content-Range: bytes FROM-TO/SIZE` begins.
fn range_begin(answer: &Response) -> Option<u64> {
    begin_of(answer.headers().get(CONTENT_RANGE)?.to_str().ok()?)
}

/// [`range_begin`] of the header's text.
pub(super) fn begin_of(range: &str) -> Option<u64> {
    range
        .trim()
        .strip_prefix("bytes ")?
        .split_once('-')?
        .0
        .trim()
        .parse()
        .ok()
}
