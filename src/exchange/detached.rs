//! Exchanges that outlive their callers, and the boxes that they run in.
//!
//! An exchange runs inside its caller's task, which is cheapest. Only if the caller disconnects, so that its future is
//! dropped, the exchange becomes a task of its own.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use tokio_util::sync::ReusableBoxFuture;

use super::ExchangeReply;

/// The number of boxes that a worker keeps for further exchanges.
const KEPT_BOXES: usize = 256;

/// The exchanges of one worker, and the boxes in which they run. A box is used again for the next exchange.
// A box, since the future of an exchange may have to move into a task at any time; used again, which saves each request a large
// allocation.
#[derive(Debug, Default)]
pub struct Exchanges(Mutex<Vec<ReusableBoxFuture<'static, ExchangeReply>>>);

impl Exchanges {
    /// Runs an exchange in a box. The future that is returned may be dropped: see [`Detached`].
    // Inlined, or the exchange would be moved once more.
    #[inline(always)]
    pub(super) fn detach(
        self: &Arc<Self>,
        run: impl Future<Output = ExchangeReply> + Send + 'static,
    ) -> Detached {
        let future = match self.boxes().pop() {
            Some(mut used) => {
                used.set(run);
                used
            }
            None => ReusableBoxFuture::new(run),
        };
        Detached { future: Some(future), exchanges: self.clone() }
    }

    fn boxes(&self) -> MutexGuard<'_, Vec<ReusableBoxFuture<'static, ExchangeReply>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The future of an exchange. Cancellation-safe: if it is dropped before its end, the exchange runs on as a task of its own.
#[derive(Debug)]
pub struct Detached {
    future: Option<ReusableBoxFuture<'static, ExchangeReply>>,
    exchanges: Arc<Exchanges>,
}

impl Future for Detached {
    type Output = ExchangeReply;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(future) = self.future.as_mut() else { return Poll::Pending };
        let output = ready!(future.poll(cx));
        if let Some(used) = self.future.take() {
            let mut boxes = self.exchanges.boxes();
            if boxes.len() < KEPT_BOXES {
                boxes.push(used);
            }
        }
        Poll::Ready(output)
    }
}

impl Drop for Detached {
    fn drop(&mut self) {
        // A panic drops the exchange: it may be the exchange's own, whose future must not be polled again. Without a runtime, as
        // at the end of the process, there is nothing to run it on. The record then closes itself as `unknown`.
        if let Some(future) = self.future.take()
            && !std::thread::panicking()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(future);
        }
    }
}
