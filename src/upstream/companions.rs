//! The futures that hyper runs beside an HTTP/2 connection: one for each request, until its answer is there.
//!
//! All are polled by one task, in boxes that are used again: a task of its own for each would cost as much as
//! HTTP/2 itself does. Guarantees that a future which is done holds nothing any more.

use std::any::Any;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker, ready};

/// The companions of one connection. Clones are the same ones.
#[derive(Clone, Default)]
pub(super) struct Companions {
    places: Arc<Mutex<Places>>,
    ready: Arc<Mutex<Ready>>,
}

#[derive(Default)]
struct Places {
    all: Vec<Option<Place>>,
    free: Vec<usize>,
}

/// Those that want to be polled, and the task that does it.
#[derive(Default)]
struct Ready {
    places: Vec<usize>,
    task: Option<Waker>,
}

/// A box for one future after another.
struct Place {
    future: Box<dyn Companion>,
    bell: Arc<Bell>,
    waker: Waker,
}

/// Rung by whatever the future of a place waits for.
struct Bell {
    place: usize,
    /// Since the place was polled last.
    rung: AtomicBool,
    ready: Arc<Mutex<Ready>>,
}

impl Companions {
    /// Takes one more in, to be polled for the first time by the next [`Self::poll`]: nobody is woken for it.
    pub(super) fn add<F: Future<Output = ()> + Send + 'static>(&self, future: F) {
        let mut places = self.places();
        let number = places.free.pop().unwrap_or(places.all.len());
        let used = places.all.get_mut(number).and_then(Option::as_mut);
        match used.and_then(|place| place.future.as_any().downcast_mut::<Boxed<F>>()) {
            Some(boxed) => boxed.0.set(Some(future)),
            None => {
                let place = Some(Place::new(number, Box::new(Boxed(Box::pin(Some(future)))), &self.ready));
                match places.all.get_mut(number) {
                    Some(other) => *other = place,
                    None => places.all.push(place),
                }
            }
        }
        self.ready().places.push(number);
    }

    /// Polls those that want it. Ready once none is left.
    pub(super) fn poll(&self, cx: &Context<'_>) -> Poll<()> {
        let mut wanting = {
            let mut ready = self.ready();
            if !ready.task.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
                ready.task = Some(cx.waker().clone());
            }
            std::mem::take(&mut ready.places)
        };
        for number in wanting.drain(..) {
            self.poll_one(number);
        }
        let mut ready = self.ready();
        if ready.places.is_empty() {
            ready.places = wanting; // its memory
        }
        drop(ready);
        let places = self.places();
        if places.free.len() == places.all.len() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Not under the lock: a future may do anything.
    fn poll_one(&self, number: usize) {
        let Some(mut place) = self.places().all.get_mut(number).and_then(Option::take) else { return };
        place.bell.rung.store(false, Ordering::Relaxed);
        let polled = place.future.poll(&mut Context::from_waker(&place.waker));
        let mut places = self.places();
        places.all[number] = Some(place);
        if polled.is_ready() {
            places.free.push(number);
        }
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ready(&self) -> MutexGuard<'_, Ready> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    fn new(place: usize, future: Box<dyn Companion>, ready: &Arc<Mutex<Ready>>) -> Self {
        let bell = Arc::new(Bell { place, rung: AtomicBool::new(true), ready: ready.clone() });
        Self { future, waker: bell.clone().into(), bell }
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.rung.swap(true, Ordering::Relaxed) {
            return;
        }
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        ready.places.push(self.place);
        let task = ready.task.take();
        drop(ready);
        if let Some(task) = task {
            task.wake();
        }
    }
}

/// A future in a box that another one of its type may use later.
trait Companion: Send {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()>;
    fn as_any(&mut self) -> &mut dyn Any;
}

struct Boxed<F>(Pin<Box<Option<F>>>);

impl<F: Future<Output = ()> + Send + 'static> Companion for Boxed<F> {
    /// Ready once; an empty box has nothing to say.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(future) = self.0.as_mut().as_pin_mut() else { return Poll::Pending };
        ready!(future.poll(cx));
        self.0.set(None);
        Poll::Ready(())
    }

    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::atomic::AtomicUsize;

    use tokio::sync::oneshot;

    use super::*;

    /// Counts those that are alive.
    struct Alive(Arc<AtomicUsize>);

    impl Alive {
        fn new(count: &Arc<AtomicUsize>) -> Self {
            count.fetch_add(1, Ordering::Relaxed);
            Self(count.clone())
        }
    }

    impl Drop for Alive {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn each_is_polled_when_woken_and_holds_nothing_once_it_is_done() {
        let (companions, alive) = (Companions::default(), Arc::default());
        let add = || {
            let (sender, receiver) = oneshot::channel::<()>();
            let held = Alive::new(&alive);
            companions.add(async move {
                let _ = receiver.await;
                drop(held);
            });
            sender
        };
        for _ in 0..3 {
            let senders: Vec<_> = (0..10).map(|_| add()).collect();
            assert!(poll_fn(|cx| Poll::Ready(companions.poll(cx))).await.is_pending());
            for (done, sender) in senders.into_iter().rev().enumerate() {
                assert_eq!(alive.load(Ordering::Relaxed), 10 - done);
                sender.send(()).unwrap();
                poll_fn(|cx| {
                    let _ = companions.poll(cx);
                    if alive.load(Ordering::Relaxed) == 9 - done { Poll::Ready(()) } else { Poll::Pending }
                })
                .await;
            }
            poll_fn(|cx| companions.poll(cx)).await;
            assert_eq!(companions.places().all.len(), 10, "places are used again");
        }
        companions.add(async {}); // of another type
        poll_fn(|cx| companions.poll(cx)).await;
        assert_eq!(companions.places().all.len(), 10);
    }

    #[tokio::test]
    async fn one_that_adds_another_and_one_that_is_woken_in_vain_do_no_harm() {
        let companions = Companions::default();
        let (more, mut polls) = (companions.clone(), 0);
        companions.add(poll_fn(move |cx| {
            polls += 1;
            cx.waker().wake_by_ref();
            cx.waker().wake_by_ref();
            if polls < 3 {
                return Poll::Pending;
            }
            more.add(async {});
            Poll::Ready(())
        }));
        poll_fn(|cx| companions.poll(cx)).await;
        poll_fn(|cx| companions.poll(cx)).await;
        let places = companions.places();
        assert_eq!((places.all.len(), places.free.len()), (2, 2));
    }
}
