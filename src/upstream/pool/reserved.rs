//! A connection while one exchange has it.
//!
//! It sends requests, says whether one may have been sent, and goes back to the pool.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use rustix::net::RecvFlags;

use super::{Idle, NoConnection, Place, Pool, SendError, Timer};
use crate::clock;

/// How many timers are kept for exchanges over HTTP/2, whose connections have none of their own.
const KEPT_TIMERS: usize = 256;

/// A connection that is reserved for one exchange, or a stream of a shared one.
///
/// It goes back to the pool by [`Reserved::give_back`], or if it is dropped unused. Dropped otherwise, an unshared connection
/// is closed, since part of a reply may still be in it; of a shared one only the stream is closed.
#[derive(Debug)]
pub struct Reserved {
    pool: Arc<Pool>,
    /// `None` during drop, and after a [`Reserved::reconnect`] that failed.
    place: Option<Place>,
    timer: Option<Timer>,
    /// The turn of the event loop in which it was reserved.
    reserved: u64,
    /// No part of another exchange is in it.
    clean: bool,
}

impl Reserved {
    pub(super) fn new(pool: Arc<Pool>, place: Place, timer: Option<Timer>) -> Self {
        Self { pool, place: Some(place), timer, reserved: clock::turn(), clean: true }
    }

    /// Waits until a request can be sent, which is when the last exchange is over. Send without another wait then: it is known
    /// only now that the roots under which the connection was made are still in use.
    pub async fn ready(&mut self) -> Result<(), SendError> {
        self.clean = false;
        let generation = match self.place.as_mut().ok_or(SendError::Closed)? {
            Place::Http1(connection, _) => {
                // tests/hyper.rs: a_sender_is_ready_only_when_the_last_exchange_is_over
                connection.sender.ready().await?;
                connection.generation
            }
            Place::Http2(stream) => {
                if clock::turn() == self.reserved {
                    stream.look().await;
                }
                if stream.is_closed() {
                    return Err(SendError::Closed);
                }
                stream.connection.generation
            }
        };
        // Asked here, since the reservation may be old: the waits for the intent and for another token are in between.
        if generation == self.pool.connector.generation() { Ok(()) } else { Err(SendError::Closed) }
    }

    /// Sends a request and waits for the head of the reply. The request is made here, so that the future does not hold it.
    pub async fn send(
        &mut self,
        request: impl FnOnce() -> Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, SendError> {
        self.clean = false;
        match (self.place.as_mut(), &self.pool.http2) {
            (Some(Place::Http1(connection, _)), _) => {
                connection.sender.send_request(request()).await.map_err(SendError::Http)
            }
            (Some(Place::Http2(stream)), Some(http2)) => {
                let answer = stream.send(http2.adapt(request()));
                answer.await.map_err(|why| {
                    stream.failed(&why);
                    SendError::Http(why.into_error())
                })
            }
            (None, _) | (_, None) => Err(SendError::Closed),
        }
    }

    /// A number that grows when something may have been sent: the bytes written on an unshared connection, or the requests on a
    /// shared one that the upstream may have processed.
    // tests/hyper.rs: no_answer_counts_that_came_before_the_request_was_written
    pub fn written(&self) -> u64 {
        match &self.place {
            Some(Place::Http1(connection, _)) => connection.written.load(Ordering::Relaxed),
            Some(Place::Http2(stream)) => stream.sent,
            None => 0,
        }
    }

    /// Replaces a connection that is dead or refuses requests. The permit under the cap is kept.
    #[cold]
    pub async fn reconnect(&mut self) -> Result<(), NoConnection> {
        self.place = Some(match (self.place.take(), &self.pool.http2) {
            (Some(Place::Http1(_, permit)), _) => Box::pin(self.pool.connect(permit)).await?,
            (Some(Place::Http2(stream)), Some(http2)) => {
                let but = http2.release(stream);
                Box::pin(self.pool.shared(http2, Some(&but))).await?.0
            }
            (None, _) | (_, None) => return Err(SendError::Closed.reason().into()),
        });
        Ok(())
    }

    /// Takes the timer of this connection, for as long as the exchange needs it.
    pub fn take_timer(&mut self) -> Timer {
        self.timer.take().unwrap_or_default()
    }

    /// Puts the timer back.
    pub fn keep_timer(&mut self, timer: Timer) {
        self.timer = Some(timer);
    }

    /// Whether the upstream is known to have closed it. Asks the kernel, which costs a system call, unless the event loop has
    /// looked since the connection was reserved.
    pub fn is_stale(&self) -> bool {
        match &self.place {
            Some(Place::Http1(connection, _)) if clock::turn() == self.reserved => {
                connection.sender.is_closed() || !is_quiet(&connection.probe)
            }
            _ => self.is_closed(),
        }
    }

    /// Whether the upstream closed it, or contradicted itself on it. Does not check the roots: see [`Reserved::ready`].
    pub fn is_closed(&self) -> bool {
        match &self.place {
            Some(Place::Http1(connection, _)) => connection.sender.is_closed(),
            Some(Place::Http2(stream)) => stream.is_closed(),
            None => true,
        }
    }

    /// Returns the connection to the pool, after the reply was read to its end.
    pub fn give_back(mut self) {
        self.clean = true;
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        match self.place.take() {
            Some(Place::Http1(connection, _permit)) if self.clean && !connection.sender.is_closed() => {
                let idle = Idle { connection, timer: self.timer.take(), since: clock::nanos() };
                self.pool.idle().push(idle);
            }
            Some(Place::Http2(stream)) => {
                if let Some(http2) = &self.pool.http2 {
                    http2.release(stream);
                }
                let mut timers = self.pool.timers();
                if timers.len() < KEPT_TIMERS {
                    timers.extend(self.timer.take());
                }
            }
            Some(Place::Http1(..)) | None => {}
        }
    }
}

/// Whether there is nothing to read and no end of the stream. An idle HTTP/1.1 connection that is alive is quiet.
pub(in crate::upstream) fn is_quiet(socket: &OwnedFd) -> bool {
    let mut byte = [0_u8; 1];
    let peeked = rustix::net::recv(socket, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
    matches!(peeked, Err(rustix::io::Errno::AGAIN))
}
