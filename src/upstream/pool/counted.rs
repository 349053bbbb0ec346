//! The byte stream under hyper, with a count of the bytes written.
//!
//! The count tells whether a request may have been sent: hyper's errors do not say how much of it was written.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use prometheus_client::metrics::gauge::Gauge;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::connect::Stream;
use crate::upstream::http2::Received;

/// The byte stream of one connection. It is counted as an open connection until it is dropped. Over HTTP/2 it passes what
/// it reads to [`Received`] first.
#[derive(Debug)]
pub(in crate::upstream) struct Counted {
    stream: Stream,
    /// The number of bytes written so far, shared with the pool's [`super::Connection`].
    pub(super) written: Arc<AtomicU64>,
    /// Records what is read. `None` over HTTP/1.1, which does not need it: there a request takes six reads, and
    /// recording each would cost time.
    received: Option<Received>,
    open: Gauge,
}

impl Counted {
    /// Wraps a connected stream, and counts it in `open` until it is dropped.
    pub(super) fn new(stream: Stream, received: Option<Received>, open: Gauge) -> Self {
        open.inc();
        Self { stream, written: Arc::default(), received, open }
    }

    /// Adds the bytes that a write call took to the count, and returns the result of the call. A failed write over TLS
    /// counts as one byte.
    fn count(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        let bytes = match (&written, &self.stream) {
            (Poll::Ready(Ok(bytes)), _) => *bytes as u64,
            // A TLS record may have left in part before the error. One byte is enough, since the count is only
            // compared.
            (Poll::Ready(Err(_)), Stream::Tls(_)) => 1,
            (Poll::Ready(Err(_)), Stream::Plain(_)) | (Poll::Pending, _) => 0,
        };
        self.written.fetch_add(bytes, Ordering::Relaxed);
        written
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.open.dec();
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { stream, received, .. } = &mut *self;
        let Some(received) = received else { return Pin::new(stream).poll_read(cx, buf) };
        // hyper may pass a buffer that is filled in part.
        let before = buf.filled().len();
        let read = Pin::new(stream).poll_read(cx, buf);
        // Ready without bytes is the end or an error. That is a sign of life, too, and must wake `Connection::open`.
        if read.is_ready() {
            received.came(&buf.filled()[before..]);
        }
        read
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.count(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.count(written)
    }

    fn is_write_vectored(&self) -> bool {
        // As the stream does: hyper joins buffers itself where one call cannot take several.
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
