//! The socket under hyper.
//!
//! It notices what hyper does not report: when a head begins, when the caller disconnects, and whether it received
//! its reply. When it is closed with unread bytes, it lingers, so that the last reply arrives.

use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::phase::{ConnectionPhase, Phase};
use super::stream::CallerStream;
use crate::clock;

/// For how long, and for how many bytes, a closing connection is read on so that the caller receives the last reply.
pub(in super::super) const LINGER_TIME: Duration = Duration::from_secs(1);
pub(in super::super) const LINGER_BYTES: usize = 256 * 1024;

/// For how long a connection that its caller had closed before the reply is watched for a reset, and how often it is
/// checked. A caller that has closed both sides resets it when the reply arrives (RFC 9293 §3.10.7.4); one that has
/// closed its sending side only reads the reply.
const RESET_TIME: Duration = Duration::from_millis(250);
const RESET_CHECK: Duration = Duration::from_millis(2);

/// A caller's socket that keeps the connection's [`ConnectionPhase`] up to date.
#[derive(Debug)]
pub(super) struct WatchedSocket {
    stream: CallerStream,
    /// The state that the connection's requests and timer see.
    phase: Arc<ConnectionPhase>,
    /// Set once the connection lingers.
    linger: Option<Linger>,
    /// Set while the connection is watched for a reset.
    reset: Option<ResetWatch>,
}

/// Checks for a reset of a connection that its caller had closed before the reply.
#[derive(Debug)]
struct ResetWatch {
    until: Pin<Box<Sleep>>,
    next_check: Pin<Box<Sleep>>,
}

#[derive(Debug)]
/// The bounds of lingering: a time, and a number of bytes that may still be read.
struct Linger {
    until: Pin<Box<Sleep>>,
    left: usize,
}

impl AsyncRead for WatchedSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Checked at the next read, not at the one that found no room: the head may have been whole with that piece,
        // and then needs no more.
        if self.phase.has_no_room.load(Ordering::Relaxed) && self.phase.is(Phase::Head) {
            return Poll::Ready(Err(io::ErrorKind::OutOfMemory.into()));
        }
        let before = buf.filled().len();
        let read = ready!(self.stream.poll_read(cx, buf));
        // A TLS stream that ends without close_notify is an error of this kind. It is common, and no reset.
        if read.as_ref().is_err_and(|error| error.kind() != io::ErrorKind::UnexpectedEof) {
            self.phase.was_reset();
        }
        read?;
        if buf.filled().len() > before && self.phase.is(Phase::Idle) {
            // A caller that sends its next request has read the last reply.
            self.phase.was_delivered();
            self.phase.enter(Phase::Head);
        }
        let more = buf.filled().len() - before;
        if self.phase.is(Phase::Busy) {
            self.phase.more_came(more);
        // Of a head nothing but the sum is known here; `head_came` finds out what of it is body.
        } else if !self.phase.head.grow(more) {
            self.phase.has_no_room.store(true, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for WatchedSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = match &mut self.stream {
            CallerStream::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            CallerStream::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
            CallerStream::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        };
        self.went_on(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = match &mut self.stream {
            CallerStream::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            CallerStream::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            CallerStream::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        };
        self.went_on(written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Checks whether the caller has disconnected while its request waits.
    ///
    /// hyper does not read while a request is in flight, but it flushes whenever it is woken.
    // tests/hyper.rs: hyper_does_not_read_while_a_request_is_in_progress
    // tests/hyper.rs: hyper_flushes_on_each_wake_while_a_request_is_in_progress
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Only if the request waits: otherwise nobody acts on the answer, and the look costs a system call.
        if self.phase.presence.is_in_question()
            && let Poll::Ready(end) = self.stream.poll_end(cx)
            && self.phase.is_gone(end)
        {
            // hyper polled the request before it flushes. Only another round lets the request notice.
            cx.waker().wake_by_ref();
        }
        match &mut self.stream {
            // These have no buffer of their own.
            CallerStream::Tcp(_) | CallerStream::Unix(_) => Poll::Ready(Ok(())),
            CallerStream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    // tests/hyper.rs: connection_ends_with_a_socket_shutdown_after_the_last_response
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The steps of a close: shut down our side, see whether the reply was received, read what is left.
        if self.linger.is_none() {
            if self.reset.is_none() {
                ready!(self.stream.poll_shutdown(cx)).inspect_err(|_| self.phase.was_reset())?;
            }
            ready!(self.poll_reset(cx));
            if !self.phase.unread.load(Ordering::Relaxed) {
                return Poll::Ready(Ok(()));
            }
            self.linger = Some(Linger { until: Box::pin(sleep(LINGER_TIME)), left: LINGER_BYTES });
        }
        self.poll_linger(cx)
    }
}

impl WatchedSocket {
    /// Wraps a caller's socket.
    pub(super) fn new(stream: CallerStream, phase: Arc<ConnectionPhase>) -> Self {
        Self { stream, phase, linger: None, reset: None }
    }

    /// Records the result of a write. A long reply is written piece by piece, and a caller that takes the pieces is
    /// not idle.
    fn went_on(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if matches!(written, Poll::Ready(Err(_))) {
            self.phase.was_not_delivered();
        }
        if written.is_ready() && self.phase.is(Phase::Idle) {
            self.phase.enter(Phase::Idle);
        }
        written
    }

    /// Settles whether a caller that had closed its side before the reply received it. Ready when that is known.
    fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // Only a success is worth the wait: its caller would call again, and the task would be done twice.
        let is_open = self.phase.presence.has_ended() && self.phase.delivery.is_full();
        if !is_open {
            return Poll::Ready(());
        }
        let reset = self.reset.get_or_insert_with(|| ResetWatch {
            until: Box::pin(sleep(RESET_TIME)),
            next_check: Box::pin(sleep(RESET_CHECK)),
        });
        loop {
            // Polled by time: after the end of its reading side the socket stays readable, so readiness tells nothing
            // new.
            if self.stream.is_reset() {
                self.phase.was_not_delivered();
                return Poll::Ready(());
            }
            if reset.until.as_mut().poll(cx).is_ready() {
                self.phase.was_delivered();
                return Poll::Ready(());
            }
            ready!(reset.next_check.as_mut().poll(cx));
            // Not at each wake-up: the interval bounds the number of system calls.
            reset.next_check.as_mut().reset(clock::now() + RESET_CHECK);
        }
    }

    /// Reads and discards what the caller still sends, within bounds.
    ///
    /// A socket that is closed with unread bytes sends a reset, and a reset may overtake the reply.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { stream, linger: Some(linger), .. } = self else { return Poll::Ready(Ok(())) };
        while linger.left > 0 && linger.until.as_mut().poll(cx).is_pending() {
            // On the stack of one poll, so that a lingering connection holds no buffer.
            let mut scratch = [0; 4096];
            let mut buf = ReadBuf::new(&mut scratch);
            match ready!(stream.poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => {
                    linger.left = linger.left.saturating_sub(buf.filled().len());
                }
                Ok(()) | Err(_) => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}
