//! The deadline timer of a connection's exchanges.
//!
//! The timer is reused. It may be set to an earlier time than the deadline of the present exchange: if that time comes
//! first, the timer is moved to the deadline. Most exchanges end sooner, and so never have to set a timer.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

/// A timer that one exchange after another uses.
#[derive(Debug)]
pub struct Timer(Pin<Box<Sleep>>);

impl Timer {
    /// Polls `what` until `deadline`. Returns `None` if the deadline passed first.
    ///
    /// Dropping the returned future does not drop `what`, and the timer may be used again.
    pub fn until<F: Future>(
        &mut self,
        deadline: Instant,
        mut what: Pin<&mut F>,
    ) -> impl Future<Output = Option<F::Output>> {
        poll_fn(move |cx| {
            // The work first: a reply that is there at the deadline counts.
            if let Poll::Ready(output) = what.as_mut().poll(cx) {
                return Poll::Ready(Some(output));
            }
            // Moved only if it would fire too late. An earlier time is the usual case, since the deadline of an
            // exchange is later than that of the one before.
            if self.0.deadline() > deadline {
                self.0.as_mut().reset(deadline);
            }
            loop {
                ready!(self.0.as_mut().poll(cx));
                // Not by the clock of the turn: it may still be before the deadline when the timer fires, and the
                // loop would spin.
                if Instant::now() >= deadline {
                    return Poll::Ready(None);
                }
                self.0.as_mut().reset(deadline);
            }
        })
    }
}

impl Default for Timer {
    fn default() -> Self {
        // As long as the default of `upstream.timeout`. Any time is right: the first use moves it if it is too late.
        Self(Box::pin(sleep(Duration::from_secs(30))))
    }
}
