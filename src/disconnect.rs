//! Whether the caller of a request is still there.
//!
//! `server/connection` notices that a caller closes it; a request asks where it waits for a token, a permit or a connection. Neither
//! knows the other.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use thiserror::Error;

/// Whether the caller is still there while its request waits.
///
/// A caller that gave up may call again, so that a request which had to wait for something must not go out
/// behind its back. A sending side that was closed looks the same whether the caller left or has nothing more
/// to say; but who has nothing more to say closes it with its request, and who gives up does so later.
#[derive(Debug, Default)]
pub struct CallerPresence {
    waits: AtomicBool,
    half_closed: AtomicBool,
    gone: AtomicBool,
}

/// The caller closed its connection, or its side of it, while its request waited.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the caller closed its side of the connection while the request waited; nothing was sent")]
pub struct CallerDisconnected;

impl CallerPresence {
    /// Waits for something, unless the caller leaves meanwhile. What is there at once costs nothing.
    pub fn during<F: Future + Unpin>(
        &self,
        mut wait: F,
    ) -> impl Future<Output = Result<F::Output, CallerDisconnected>> {
        poll_fn(move |cx| {
            if self.gone.load(Ordering::Relaxed) {
                self.waits.store(false, Ordering::Relaxed);
                return Poll::Ready(Err(CallerDisconnected));
            }
            let polled = Pin::new(&mut wait).poll(cx);
            self.waits.store(polled.is_pending(), Ordering::Relaxed);
            polled.map(Ok)
        })
    }

    /// Runs something to its end whether the caller leaves or not, and notices whether it does.
    pub fn beside<F: Future + Unpin>(&self, mut work: F) -> impl Future<Output = F::Output> {
        poll_fn(move |cx| {
            let polled = Pin::new(&mut work).poll(cx);
            self.waits.store(polled.is_pending(), Ordering::Relaxed);
            polled
        })
    }

    /// Whether the connection is to look for its caller: a request waits, and its caller is not known to have left.
    pub fn is_in_question(&self) -> bool {
        self.waits.load(Ordering::Relaxed) && !self.gone.load(Ordering::Relaxed)
    }

    /// Whether the caller closed its side, or all, of the connection while its request was worked on.
    pub fn has_ended(&self) -> bool {
        self.gone.load(Ordering::Relaxed) || self.half_closed.load(Ordering::Relaxed)
    }

    /// The caller has closed its sending side, `with_request` or later. Returns whether it is gone.
    pub fn closed(&self, with_request: bool) -> bool {
        if self.half_closed.load(Ordering::Relaxed) {
            return false;
        }
        let end = if with_request { &self.half_closed } else { &self.gone };
        end.store(true, Ordering::Relaxed);
        !with_request
    }

    /// The caller has reset the connection: it is gone.
    pub fn reset(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }
}
