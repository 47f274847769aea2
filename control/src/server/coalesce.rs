//! Fewer, larger writes to a connection.
//!
//! HTTP/2 flushes after every answer. When a group commit lets a hundred calls end at once, that is a hundred TLS records and a
//! hundred packets; each costs more than the answer. [`Coalesced`] lets the tasks that are ready run before it flushes: a flush
//! is put off once, to the end of the runtime's queue. When nothing else is ready, that is at once.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is held back at most, in bytes.
const MOST: usize = 64 << 10;

/// A stream whose writes go on together.
pub struct Coalesced<S> {
    stream: S,
    held: Vec<u8>,
    /// Of `held`, what was written.
    done: usize,
    put_off: bool,
}

impl<S> Coalesced<S> {
    /// Around a stream.
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            held: Vec::new(),
            done: 0,
            put_off: false,
        }
    }
}

impl<S: AsyncWrite + Unpin> Coalesced<S> {
    /// Writes what is held.
    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.done < self.held.len() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(context, &self.held[self.done..]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.done += written;
        }
        // A quiet connection holds no memory.
        self.held = Vec::new();
        self.done = 0;
        self.put_off = false;
        Poll::Ready(Ok(()))
    }

    /// Ready when there is room.
    fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.held.len() < MOST {
            return Poll::Ready(Ok(()));
        }
        self.poll_drain(context)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Coalesced<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Coalesced<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_room(context))?;
        self.held.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_room(context))?;
        let before = self.held.len();
        self.held.reserve(buffers.iter().map(|buffer| buffer.len()).sum());
        buffers.iter().for_each(|buffer| self.held.extend_from_slice(buffer));
        Poll::Ready(Ok(self.held.len() - before))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.held.is_empty() {
            return Pin::new(&mut self.stream).poll_flush(context);
        }
        if !self.put_off {
            self.put_off = true;
            // A task that wakes itself goes behind those that are ready.
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        ready!(self.poll_drain(context))?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(context))?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Notes the sizes of its writes, of which each takes a bounded part.
    #[derive(Clone, Default)]
    struct Noting {
        sizes: Arc<Mutex<Vec<usize>>>,
        bytes: Arc<Mutex<Vec<u8>>>,
    }

    impl AsyncWrite for Noting {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            let taken = bytes.len().min(40_000);
            self.sizes.lock().unwrap().push(taken);
            self.bytes.lock().unwrap().extend_from_slice(&bytes[..taken]);
            Poll::Ready(Ok(taken))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn what_comes_before_the_flush_goes_together() {
        let noting = Noting::default();
        let stream = Arc::new(tokio::sync::Mutex::new(Coalesced::new(noting.clone())));
        // The first flush waits for the second writer, which is ready when it begins.
        let first = tokio::spawn({
            let stream = Arc::clone(&stream);
            async move {
                stream.lock().await.write_all(b"one").await.unwrap();
                std::future::poll_fn(|context| {
                    let mut stream = stream.try_lock().unwrap();
                    Pin::new(&mut *stream).poll_flush(context)
                })
                .await
                .unwrap();
            }
        });
        let second = tokio::spawn({
            let stream = Arc::clone(&stream);
            async move { stream.lock().await.write_all(b"two").await.unwrap() }
        });
        first.await.unwrap();
        second.await.unwrap();
        assert_eq!(*noting.bytes.lock().unwrap(), b"onetwo");
        assert_eq!(*noting.sizes.lock().unwrap(), [6]);
        assert_eq!(
            stream.lock().await.held.capacity(),
            0,
            "nothing is held when all is written"
        );
    }

    #[tokio::test]
    async fn much_is_not_held_back_and_comes_in_order() {
        let noting = Noting::default();
        let mut stream = Coalesced::new(noting.clone());
        let mut expected = Vec::new();
        for number in 0..100_u8 {
            let part = vec![number; 7_001];
            stream.write_all(&part).await.unwrap();
            expected.extend(part);
            assert!(stream.held.len() < MOST + 7_001);
        }
        stream.shutdown().await.unwrap();
        assert!(*noting.bytes.lock().unwrap() == expected);
    }

    #[tokio::test]
    async fn both_directions_work_over_a_pipe() {
        let (near, far) = tokio::io::duplex(1000);
        let (mut near, mut far) = (Coalesced::new(near), Coalesced::new(far));
        let text = vec![7; 100_000];
        let send = async {
            near.write_all(&text).await.unwrap();
            near.flush().await.unwrap();
            let mut answer = [0; 2];
            near.read_exact(&mut answer).await.unwrap();
            answer
        };
        let receive = async {
            let mut found = vec![0; text.len()];
            far.read_exact(&mut found).await.unwrap();
            far.write_all(b"ok").await.unwrap();
            far.flush().await.unwrap();
            found
        };
        let (answer, found) = tokio::join!(send, receive);
        assert!(&answer == b"ok" && found == text);
    }
}
