//! The deadline timer of a connection's exchanges.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

/// A timer that one exchange after another uses. Their deadlines follow each other, and moving a timer forward costs tokio next
/// to nothing.
#[derive(Debug)]
pub struct Timer(Pin<Box<Sleep>>);

impl Timer {
    /// Polls something until a deadline.
    pub fn until<F: Future>(
        &mut self,
        deadline: Instant,
        mut what: Pin<&mut F>,
    ) -> impl Future<Output = Option<F::Output>> {
        poll_fn(move |cx| {
            if let Poll::Ready(output) = what.as_mut().poll(cx) {
                return Poll::Ready(Some(output));
            }
            if self.0.deadline() > deadline {
                self.0.as_mut().reset(deadline);
            }
            loop {
                ready!(self.0.as_mut().poll(cx));
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
        Self(Box::pin(sleep(Duration::from_secs(30))))
    }
}
