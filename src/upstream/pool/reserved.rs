//! A connection while one exchange holds it.
//!
//! It sends requests, tells whether one may have been sent, and returns to the pool.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use rustix::net::RecvFlags;

use super::{Idle, NoConnection, Pool, SendError, Timer, Transport};
use crate::clock;

/// How many timers a worker keeps for exchanges over HTTP/2: as many as one connection has streams.
const KEPT_TIMERS: usize = 256;

/// A connection that is reserved for one exchange, or a stream of a shared connection.
///
/// It returns to the pool by [`PooledConnection::release`], or if it is dropped unused. If it is dropped after use
/// without `release`, an unshared connection is closed, since a part of a reply may still come on it. Of a shared
/// connection only the stream is closed.
#[derive(Debug)]
pub struct PooledConnection {
    pool: Arc<Pool>,
    /// `None` during drop, and after a [`PooledConnection::reconnect`] that failed.
    transport: Option<Transport>,
    timer: Option<Timer>,
    /// The turn of the worker's event loop in which it was reserved, see [`clock::turn`].
    reserved: u64,
    /// Whether it may be reused: no part of a request or a reply is left in it.
    clean: bool,
}

impl PooledConnection {
    /// Wraps a connection or stream that was just taken out of `pool`.
    pub(super) fn new(pool: Arc<Pool>, transport: Transport, timer: Option<Timer>) -> Self {
        Self { pool, transport: Some(transport), timer, reserved: clock::turn(), clean: true }
    }

    /// Waits until a request can be sent. On an unshared connection the previous exchange must be over. On a shared one
    /// the wait is at most one turn of the event loop.
    ///
    /// The caller must send the request without another wait. This function checks last that the root certificates with
    /// which the upstream was verified are still in use; during a wait they could be replaced.
    ///
    /// # Errors
    ///
    /// [`SendError::Closed`] or [`SendError::Http`] if the connection takes no further request. Nothing was sent, and
    /// the caller may try [`PooledConnection::reconnect`].
    pub async fn ready(&mut self) -> Result<(), SendError> {
        self.clean = false;
        let generation = match self.transport.as_mut().ok_or(SendError::Closed)? {
            Transport::Http1(connection, _) => {
                // tests/hyper.rs: sender_is_ready_only_after_the_last_exchange_ends
                connection.sender.ready().await?;
                connection.generation
            }
            Transport::Http2(stream) => {
                // In any later turn, the event loop has polled all sockets, so that a close is known already.
                if clock::turn() == self.reserved {
                    stream.notice_close().await;
                }
                if stream.is_closed() {
                    return Err(SendError::Closed);
                }
                stream.connection.generation
            }
        };
        // Checked here, since the connection may have been reserved long ago: the exchange has waited for its intent,
        // and perhaps for another token after a refused one. Without this check a fresh token went out on a connection
        // whose root certificate had been removed.
        if generation == self.pool.connector.generation() { Ok(()) } else { Err(SendError::Closed) }
    }

    /// Calls `request`, sends the request that it returns, and waits for the head of the reply. `request` is a function,
    /// so that the future does not hold the request before it is sent.
    ///
    /// The caller must call [`PooledConnection::ready`] right before, and must bound the wait. If the future is dropped,
    /// the request may have been sent.
    ///
    /// # Errors
    ///
    /// Returns a [`SendError`] if there was no reply. Compare [`PooledConnection::written`] before and after to learn
    /// whether the request may have been sent.
    pub async fn send(
        &mut self,
        request: impl FnOnce() -> Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, SendError> {
        // Set before the first wait: if the future is dropped during it, half a request or half a reply is left.
        self.clean = false;
        match (self.transport.as_mut(), &self.pool.http2) {
            (Some(Transport::Http1(connection, _)), _) => {
                connection.sender.send_request(request()).await.map_err(SendError::Http)
            }
            (Some(Transport::Http2(stream)), Some(http2)) => {
                let answer = stream.send(http2.adapt(request()));
                answer.await.map_err(|why| {
                    stream.failed(&why);
                    SendError::Http(why.into_error())
                })
            }
            (None, _) | (_, None) => Err(SendError::Closed),
        }
    }

    /// Returns a number to compare with an earlier value: if it has not grown, nothing was sent in between.
    ///
    /// On an unshared connection it counts the bytes written. On a shared one it counts this exchange's requests that
    /// the upstream may have processed.
    // tests/hyper.rs: response_before_the_request_is_written_is_an_error
    pub fn written(&self) -> u64 {
        match &self.transport {
            Some(Transport::Http1(connection, _)) => connection.written.load(Ordering::Relaxed),
            Some(Transport::Http2(stream)) => stream.sent,
            None => 0,
        }
    }

    /// Replaces a connection that is closed or refuses requests. An unshared one keeps its permit, and so does not wait
    /// in the queue again.
    ///
    /// # Errors
    ///
    /// [`NoConnection::Failed`] if no other connection could be opened, over HTTP/2 also [`NoConnection::Busy`].
    /// There is no connection then, and the permit is returned.
    #[cold]
    pub async fn reconnect(&mut self) -> Result<(), NoConnection> {
        self.transport = Some(match (self.transport.take(), &self.pool.http2) {
            // Not by way of `reserve`: the permit would be released, and an exchange whose intent is committed would
            // have to wait for one again.
            (Some(Transport::Http1(_, permit)), _) => Box::pin(self.pool.connect(permit)).await?,
            (Some(Transport::Http2(stream)), Some(http2)) => {
                // Excluded below, since the connection that refused this request would often refuse it again.
                let but = http2.release(stream);
                Box::pin(self.pool.reserve_http2(http2, Some(&but))).await?.0
            }
            (None, _) | (_, None) => return Err(SendError::Closed.reason().into()),
        });
        Ok(())
    }

    /// Takes the connection's timer, for as long as the exchange needs it. Makes a new one if there is none.
    pub fn take_timer(&mut self) -> Timer {
        self.timer.take().unwrap_or_default()
    }

    /// Puts the timer back, so that a later exchange can use it.
    pub fn keep_timer(&mut self, timer: Timer) {
        self.timer = Some(timer);
    }

    /// Returns whether the connection is known to be unusable: [`PooledConnection::is_closed`] is true, or the upstream
    /// has sent bytes on an idle HTTP/1.1 connection.
    ///
    /// For HTTP/1.1 this costs a system call in the turn of the event loop in which the connection was reserved. In any
    /// later turn the event loop has polled all sockets, so that hyper has noticed the close or the bytes.
    pub fn is_stale(&self) -> bool {
        match &self.transport {
            Some(Transport::Http1(connection, _)) if clock::turn() == self.reserved => {
                // Bytes count like a close: what comes on an idle connection (such as a 408) is no reply to a
                // request, and no later request may be matched with it.
                connection.sender.is_closed() || !is_quiet(&connection.probe)
            }
            _ => self.is_closed(),
        }
    }

    /// Returns whether the connection takes no further request. Either it is closed, or the upstream said over HTTP/2 that
    /// it had not processed a request, although it answered that request. Does not check the root certificates:
    /// [`PooledConnection::ready`] does.
    pub fn is_closed(&self) -> bool {
        match &self.transport {
            Some(Transport::Http1(connection, _)) => connection.sender.is_closed(),
            Some(Transport::Http2(stream)) => stream.is_closed(),
            None => true,
        }
    }

    /// Returns the connection to the pool. The caller must have read the reply to its end.
    pub fn release(mut self) {
        self.clean = true;
    }
}

impl Drop for PooledConnection {
    fn drop(&mut self) {
        match self.transport.take() {
            Some(Transport::Http1(connection, _permit)) if self.clean && !connection.sender.is_closed() => {
                let idle = Idle { connection, timer: self.timer.take(), since: clock::nanos() };
                // Before `_permit` is dropped at the end of this arm: whoever gets the permit must find the
                // connection, or it would open one more.
                self.pool.idle().push(idle);
            }
            Some(Transport::Http2(stream)) => {
                if let Some(http2) = &self.pool.http2 {
                    http2.release(stream);
                }
                let mut timers = self.pool.timers();
                if timers.len() < KEPT_TIMERS {
                    timers.extend(self.timer.take());
                }
            }
            Some(Transport::Http1(..)) | None => {}
        }
    }
}

/// Returns whether a read from the socket would block: no bytes, no end of the stream and no error have come. That is
/// so on a live HTTP/1.1 connection that is idle.
pub(in crate::upstream) fn is_quiet(socket: &OwnedFd) -> bool {
    let mut byte = [0_u8; 1];
    // Peeked, so that hyper still finds the byte. Errors count as not quiet.
    let peeked = rustix::net::recv(socket, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
    matches!(peeked, Err(rustix::io::Errno::AGAIN))
}
