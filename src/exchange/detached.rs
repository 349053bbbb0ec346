//! Exchanges run to their end, whether their callers stay or leave.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use tokio_util::sync::ReusableBoxFuture;

use super::Told;

/// So many boxes are kept.
const KEPT_BOXES: usize = 256;

/// The exchanges of one worker, and the boxes that they run in, which are used again.
#[derive(Debug, Default)]
pub struct Exchanges(Mutex<Vec<ReusableBoxFuture<'static, Told>>>);

impl Exchanges {
    /// Runs an exchange. The caller of the future that is returned may drop it.
    #[inline(always)] // or the exchange is moved once more
    pub(super) fn detach(self: &Arc<Self>, run: impl Future<Output = Told> + Send + 'static) -> Detached {
        let future = match self.boxes().pop() {
            Some(mut used) => {
                used.set(run);
                used
            }
            None => ReusableBoxFuture::new(run),
        };
        Detached { future: Some(future), exchanges: self.clone() }
    }

    fn boxes(&self) -> MutexGuard<'_, Vec<ReusableBoxFuture<'static, Told>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An exchange that nobody cancels: dropped before its end, it runs on by itself.
#[derive(Debug)]
pub struct Detached {
    future: Option<ReusableBoxFuture<'static, Told>>,
    exchanges: Arc<Exchanges>,
}

impl Future for Detached {
    type Output = Told;

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
        if let Some(future) = self.future.take()
            && !std::thread::panicking()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(future);
        }
    }
}
