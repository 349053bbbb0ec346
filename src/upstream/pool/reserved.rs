//! A connection while one exchange has it: sends, says whether something may have been sent, and goes back to the pool.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use rustix::net::RecvFlags;

use super::{Idle, NoConnection, Place, Pool, SendError, Timer, closed};
use crate::clock;

/// So many timers are kept for exchanges over HTTP/2, whose connections have none of their own.
const KEPT_TIMERS: usize = 256;

/// A connection reserved for one exchange, or a part of a shared one. It goes back to the pool by
/// [`Reserved::give_back`], or dropped before it was used. Any other is closed, if it is the exchange's own,
/// since nobody knows what still lies in it; of a shared one just the exchange's stream is.
#[derive(Debug)]
pub struct Reserved {
    pool: Arc<Pool>,
    /// `None` while this is dropped, or got no other one instead of a dead one.
    place: Option<Place>,
    timer: Option<Timer>,
    /// The turn of the event loop in which it was reserved.
    reserved: u64,
    /// Nothing lies in it that belongs to somebody else.
    clean: bool,
}

impl Reserved {
    pub(super) fn new(pool: Arc<Pool>, place: Place, timer: Option<Timer>) -> Self {
        Self { pool, place: Some(place), timer, reserved: clock::turn(), clean: true }
    }

    /// Waits until a request can be sent: the last one must be over. It is to be sent without another wait then: the roots
    /// under which the connection was made are known to be in use now.
    pub async fn ready(&mut self) -> Result<(), SendError> {
        self.clean = false;
        let generation = match self.place.as_mut().ok_or(SendError::Closed)? {
            Place::Http1(connection, _) => {
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
        // Asked here, since much may lie between the reservation and this: the wait for the intent, and that for another token.
        if generation == self.pool.connector.generation() { Ok(()) } else { Err(SendError::Closed) }
    }

    /// Sends a request and waits for the head of the answer. The request is made here, so that the future does
    /// not hold it.
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

    /// A number that moves when something may have been sent: bytes written on a connection of one's own, or
    /// requests on a shared one, but for those that the upstream did not process.
    pub fn written(&self) -> u64 {
        match &self.place {
            Some(Place::Http1(connection, _)) => connection.written.load(Ordering::Relaxed),
            Some(Place::Http2(stream)) => stream.sent,
            None => 0,
        }
    }

    /// Replaces a connection that is dead, or refuses requests, by another one. The place under the cap stays.
    #[cold]
    pub async fn reconnect(&mut self) -> Result<(), NoConnection> {
        self.place = Some(match (self.place.take(), &self.pool.http2) {
            (Some(Place::Http1(_, permit)), _) => Box::pin(self.pool.connect(permit)).await?,
            (Some(Place::Http2(stream)), Some(http2)) => {
                let but = http2.release(stream);
                Box::pin(self.pool.shared(http2, Some(&but))).await?.0
            }
            (None, _) | (_, None) => return Err(closed().into()),
        });
        Ok(())
    }

    /// The timer of this connection, for as long as the exchange needs it.
    pub fn take_timer(&mut self) -> Timer {
        self.timer.take().unwrap_or_default()
    }

    /// Gives the timer back.
    pub fn keep_timer(&mut self, timer: Timer) {
        self.timer = Some(timer);
    }

    /// Whether the upstream is known to have closed it: by what the event loop saw, if it has looked since the
    /// connection was reserved; else the kernel is asked, which costs a system call.
    pub fn is_stale(&self) -> bool {
        match &self.place {
            Some(Place::Http1(connection, _)) if clock::turn() == self.reserved => {
                connection.sender.is_closed() || !is_quiet(&connection.probe)
            }
            _ => self.is_closed(),
        }
    }

    /// Whether the upstream closed it, or is not believed any more. Whether it may carry another request under the present roots
    /// is for [`Reserved::ready`] to say.
    pub fn is_closed(&self) -> bool {
        match &self.place {
            Some(Place::Http1(connection, _)) => connection.sender.is_closed(),
            Some(Place::Http2(stream)) => stream.is_closed(),
            None => true,
        }
    }

    /// Gives the connection back after its answer was read to the end.
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

/// Nothing to read and no end in sight: an idle connection has nothing to say.
pub(in crate::upstream) fn is_quiet(socket: &OwnedFd) -> bool {
    let mut byte = [0_u8; 1];
    let peeked = rustix::net::recv(socket, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
    matches!(peeked, Err(rustix::io::Errno::AGAIN))
}
