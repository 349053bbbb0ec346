//! The wait for an upstream connection: short, or not at all.
//!
//! Who would have to wait longer than it may is refused at once, not when its time is over: an overload then costs those
//! who are refused nothing, and those who wait little. How long it takes is learnt from those who wait: the time, of that
//! in which anyone waits, in which as many were served as there are connections, twice in a row, so that one stall (a
//! token that is fetched) is not taken for the pace. Once somebody waited in vain, only the first in line waits until
//! somebody is served.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::timeout;

use crate::clock;

/// The queue of one pool.
#[derive(Debug)]
pub(super) struct Queue {
    waiting: AtomicUsize,
    pace: Mutex<Pace>,
}

/// How fast those who wait are served. Times are in nanoseconds of this process.
#[derive(Debug)]
struct Pace {
    /// So many make a window.
    size: u64,
    /// When somebody began to wait, or was served while others waited.
    since: u64,
    served: u64,
    /// The time in which anyone waited for them.
    took: u64,
    /// For each one who waits, in the last two windows.
    each: [u64; 2],
    /// Somebody waited in vain, and nobody was served since.
    is_stalled: bool,
}

impl Pace {
    fn new(size: usize) -> Self {
        Self { size: size.max(1) as u64, since: 0, served: 0, took: 0, each: [0, 0], is_stalled: false }
    }

    /// Nobody waited until now.
    fn begin(&mut self, now: u64) {
        self.since = now;
    }

    fn pass(&mut self, now: u64) {
        self.took += now.saturating_sub(self.since);
        self.since = now;
    }

    fn stall(&mut self, now: u64) {
        self.pass(now);
        self.is_stalled = true;
    }

    fn serve(&mut self, now: u64) {
        self.pass(now);
        self.is_stalled = false;
        self.served += 1;
        if self.served >= self.size {
            self.each = [self.each[1], self.took / self.size];
            (self.served, self.took) = (0, 0);
        }
    }

    fn expected(&self, number: usize) -> Duration {
        if self.is_stalled {
            return Duration::MAX;
        }
        Duration::from_nanos(self.each[0].min(self.each[1]).saturating_mul(number as u64))
    }
}

impl Queue {
    /// For so many connections.
    pub(super) fn new(connections: usize) -> Self {
        Self { waiting: AtomicUsize::new(0), pace: Mutex::new(Pace::new(connections)) }
    }

    /// Waits for something that others wait for, too; `None` if that took, or would take, too long. Half of the time is
    /// kept for what a pace does not say. The first one is always let in: what it meets is learnt.
    pub(super) async fn wait<T>(&self, longest: Duration, what: impl Future<Output = T>) -> Option<T> {
        let place = Place::behind(&self.waiting);
        if place.number == 1 {
            self.pace().begin(clock::nanos());
        } else if self.pace().expected(place.number) > longest / 2 {
            return None;
        }
        let output = timeout(longest, what).await.ok();
        match output {
            Some(_) => self.pace().serve(clock::nanos()),
            None => self.pace().stall(clock::nanos()),
        }
        output
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
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
    async fn served(queue: &Queue, longest: u64, number: u32) -> Option<()> {
        queue.wait(Duration::from_millis(longest), sleep(Duration::from_millis(10) * number)).await
    }

    #[tokio::test]
    async fn who_would_wait_too_long_is_refused_at_once_and_who_comes_later_is_not() {
        let queue = Queue::new(1);
        for number in 1..=3 {
            assert_eq!(served(&queue, 200, number).await, Some(()));
        }
        let begin = Instant::now();
        let waits = (1..=100).map(|number| {
            let queue = &queue;
            async move { (served(queue, 200, number).await.is_some(), begin.elapsed()) }
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
        assert_eq!(served(&queue, 200, 1).await, Some(()), "the control");
    }

    #[test]
    fn one_stall_is_not_the_pace_and_two_in_a_row_are() {
        let mut pace = Pace::new(4);
        let second = 1_000_000_000;
        pace.begin(0);
        (0..4).for_each(|_| pace.serve(second));
        assert_eq!(pace.expected(100), Duration::ZERO, "one");
        (0..4).for_each(|_| pace.serve(2 * second));
        assert_eq!(pace.expected(100), Duration::from_secs(25), "two");
        (0..4).for_each(|_| pace.serve(2 * second + second / 1000));
        assert_eq!(pace.expected(100), Duration::from_millis(25), "it is fast again");
    }

    /// After a slow time nobody but the first one in line is let in: those must do to learn that it is over.
    #[test]
    fn those_who_wait_alone_make_the_pace_too() {
        let (mut pace, second) = (Pace::new(4), 1_000_000_000);
        let mut alone = |from: u64, takes: u64| {
            for number in 0..8 {
                pace.begin((from + number) * second);
                pace.serve((from + number) * second + takes);
            }
            pace.expected(1)
        };
        assert_eq!(alone(0, second), Duration::from_secs(1));
        assert_eq!(alone(8, second / 1000), Duration::from_millis(1));
    }

    #[tokio::test]
    async fn who_waits_in_vain_waits_alone_until_somebody_is_served() {
        let queue = Queue::new(4);
        assert_eq!(served(&queue, 50, 100).await, None);
        let (first, second) = tokio::join!(served(&queue, 50, 100), served(&queue, 50, 1));
        assert_eq!((first, second), (None, None), "the second would have been served");
        assert_eq!(served(&queue, 50, 1).await, Some(()), "the first in line is let in");
        let (first, second) = tokio::join!(served(&queue, 50, 2), served(&queue, 50, 1));
        assert_eq!((first, second), (Some(()), Some(())), "the control");
    }
}
