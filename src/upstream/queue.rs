//! The wait for an upstream connection: short, or not at all.
//!
//! Who would have to wait longer than it may is refused at once, not when its time is over: an overload then costs those
//! who are refused nothing, and those who wait little. How long it takes until one of those who wait is served is
//! learnt from each wait.

use std::{
    future::Future,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::Duration,
};

use tokio::time::timeout;

use crate::clock;

/// The queue of one pool.
#[derive(Debug)]
pub(super) struct Queue {
    waiting: AtomicUsize,
    /// Between two who are served, in nanoseconds; an average of the last few.
    each: AtomicU64,
    longest: Duration,
}

impl Queue {
    /// Nobody waits for longer.
    pub(super) fn new(longest: Duration) -> Self {
        Self { waiting: AtomicUsize::new(0), each: AtomicU64::new(0), longest }
    }

    /// Waits for something that others wait for, too; `None` if that took, or would take, too long. Half of the time is
    /// kept for what an average does not say. The first one is always let in: what it meets is learnt.
    pub(super) async fn wait<T>(&self, what: impl Future<Output = T>) -> Option<T> {
        let place = Place::behind(&self.waiting);
        if place.number > 1 && self.expected(place.number) > self.longest / 2 {
            return None;
        }
        let begin = clock::nanos();
        let output = timeout(self.longest, what).await;
        self.learn(clock::nanos() - begin, place.number);
        output.ok()
    }

    fn expected(&self, number: usize) -> Duration {
        Duration::from_nanos(self.each.load(Ordering::Relaxed).saturating_mul(number as u64))
    }

    fn learn(&self, took: u64, number: usize) {
        let each = took / number as u64;
        let average = self.each.load(Ordering::Relaxed);
        self.each.store(if average == 0 { each } else { (average * 7 + each) / 8 }, Ordering::Relaxed);
    }
}

/// A place in the queue, the first one being 1.
struct Place<'a> {
    waiting: &'a AtomicUsize,
    number: usize,
}

impl<'a> Place<'a> {
    fn behind(waiting: &'a AtomicUsize) -> Self {
        Self { waiting, number: waiting.fetch_add(1, Ordering::Relaxed) + 1 }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, sleep};

    use super::*;

    /// One who is served each 10 ms.
    async fn served(queue: &Queue, number: u32) -> Option<()> {
        queue.wait(sleep(Duration::from_millis(10) * number)).await
    }

    #[tokio::test]
    async fn who_would_wait_too_long_is_refused_at_once_and_who_comes_later_is_not() {
        let queue = Queue::new(Duration::from_millis(200));
        for number in 1..=3 {
            assert_eq!(served(&queue, number).await, Some(()));
        }
        let begin = Instant::now();
        let waits = (1..=100).map(|number| {
            let queue = &queue;
            async move { (served(queue, number).await.is_some(), begin.elapsed()) }
        });
        let mut all = Vec::new();
        let mut waits: Vec<_> = waits.map(Box::pin).collect();
        std::future::poll_fn(|cx| {
            waits.retain_mut(|wait| match wait.as_mut().poll(cx) {
                std::task::Poll::Ready(output) => {
                    all.push(output);
                    false
                }
                std::task::Poll::Pending => true,
            });
            if waits.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
        let (served_ones, refused): (Vec<_>, Vec<_>) = all.into_iter().partition(|(is_served, _)| *is_served);
        assert!((3..=12).contains(&served_ones.len()), "{} were let in", served_ones.len());
        assert!(refused.iter().all(|(_, took)| *took < Duration::from_millis(40)), "{refused:?}");
        assert_eq!(served(&queue, 1).await, Some(()), "the control");
    }

    #[tokio::test]
    async fn after_a_time_in_which_nobody_was_served_the_first_is_let_in_and_what_it_meets_is_learnt() {
        let queue = Queue::new(Duration::from_millis(50));
        for _ in 0..20 {
            assert_eq!(queue.wait(std::future::pending::<()>()).await, None);
        }
        assert!(queue.expected(1) > Duration::from_millis(25), "the control");
        for _ in 0..30 {
            queue.wait(sleep(Duration::from_millis(1))).await;
        }
        assert!(queue.expected(1) < Duration::from_millis(10), "{:?}", queue.expected(1));
    }
}
