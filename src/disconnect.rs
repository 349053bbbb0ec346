//! Whether the caller of a request is still connected.
//!
//! `server/connection` notices that a caller closes the connection; a request asks while it waits for a token, a permit or a
//! connection to the upstream. Neither knows the other.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use thiserror::Error;

/// Whether the caller is still connected while its request waits.
///
/// A caller that gave up may call again, so a request that had to wait must not be sent after its caller has disconnected.
/// A closed sending side looks the same whether the caller gave up or has only finished sending. Only the time differs: a
/// caller that has finished sending closes its side together with its request, one that gives up does so later.
#[derive(Debug, Default)]
pub struct CallerPresence {
    // Atomics only because futures of a request must be `Send`: one thread uses them, so that no order is needed.
    waits: AtomicBool,
    half_closed: AtomicBool,
    gone: AtomicBool,
}

/// The error of a request whose caller disconnected while it waited.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the caller closed its side of the connection while the request waited; nothing was sent")]
pub struct CallerDisconnected;

impl CallerPresence {
    /// Waits for a future, unless the caller disconnects first. A future that is ready at once costs nothing more.
    ///
    /// Fails if the caller has disconnected, and does not poll the future again. For waits before the intent only.
    pub fn unless_disconnected<F: Future + Unpin>(
        &self,
        mut wait: F,
    ) -> impl Future<Output = Result<F::Output, CallerDisconnected>> {
        poll_fn(move |cx| {
            // Before the poll: a token that comes after the caller has gone must not have the request sent.
            if self.gone.load(Ordering::Relaxed) {
                self.waits.store(false, Ordering::Relaxed);
                return Poll::Ready(Err(CallerDisconnected));
            }
            let polled = Pin::new(&mut wait).poll(cx);
            self.waits.store(polled.is_pending(), Ordering::Relaxed);
            polled.map(Ok)
        })
    }

    /// Runs a future to its end whether the caller disconnects or not. Meanwhile the connection watches its caller, so that
    /// [`CallerPresence::has_ended`] says whether it did.
    pub fn beside<F: Future + Unpin>(&self, mut work: F) -> impl Future<Output = F::Output> {
        poll_fn(move |cx| {
            let polled = Pin::new(&mut work).poll(cx);
            self.waits.store(polled.is_pending(), Ordering::Relaxed);
            polled
        })
    }

    /// Whether the connection must watch its caller: a request waits, and its caller is not known to be gone.
    // So a request that never waits costs no look at its socket.
    pub fn is_in_question(&self) -> bool {
        self.waits.load(Ordering::Relaxed) && !self.gone.load(Ordering::Relaxed)
    }

    /// Whether the caller closed its side of the connection, or all of it, while its request was worked on.
    pub fn has_ended(&self) -> bool {
        self.gone.load(Ordering::Relaxed) || self.half_closed.load(Ordering::Relaxed)
    }

    /// Notes that the caller has closed its sending side: `with_request`, or later. Returns whether it counts as gone.
    pub fn closed(&self, with_request: bool) -> bool {
        // A closed side stays closed, and is seen again at each look. Only the first time says when it happened.
        if self.half_closed.load(Ordering::Relaxed) {
            return false;
        }
        let end = if with_request { &self.half_closed } else { &self.gone };
        end.store(true, Ordering::Relaxed);
        !with_request
    }

    /// Notes that the caller has reset the connection, and so is gone.
    pub fn reset(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }
}
