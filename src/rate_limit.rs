//! Stages 3 and 7: rate limits by the generic cell rate algorithm (GCRA, a token bucket without a timer).
//!
//! [`Limiter`] is a caller's own limit, [`Quota`] the upstream's budget, which all callers share. One atomic number is the
//! theoretical arrival time of GCRA. The rate is stored apart from it, so that a changed rate keeps the state. A limit is exact
//! under concurrency, without a lock or a timer. The tests compare it with `governor`.

mod quota;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use thiserror::Error;

use crate::clock;
use crate::config::RateLimit;
pub use quota::{Exhausted, Quota};

/// A rate limit and its state. All times are in nanoseconds.
// Three atomics without a common order: a request that meets a change of the limit half-way is judged by one of the two limits
// or a mix of them, which a rate limit can bear.
#[derive(Debug)]
pub struct Limiter {
    /// The time that one request costs: as configured, or longer while the quota is throttled.
    interval: AtomicU64,
    /// How far the theoretical arrival may be ahead of now before a request is refused.
    tolerance: AtomicU64,
    /// The theoretical arrival: the time of this process at which the bucket is full again.
    arrival: AtomicU64,
}

/// The error of a limit that is exceeded.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("this caller has reached its rate limit; call again after Retry-After seconds")]
pub struct LimitExceeded {
    /// The time after which one more request would pass, if no other one comes first.
    pub retry_after: Duration,
}

impl Limiter {
    /// A limit of which nothing is spent.
    pub fn new(limit: RateLimit) -> Self {
        let [interval, tolerance] = [interval(limit), tolerance(limit)].map(AtomicU64::new);
        Self { interval, tolerance, arrival: AtomicU64::new(0) }
    }

    /// A limiter that refuses nothing.
    #[cfg(test)]
    pub(crate) fn unlimited() -> Self {
        Self { interval: AtomicU64::new(0), tolerance: AtomicU64::new(0), arrival: AtomicU64::new(0) }
    }

    /// Changes the limit. The number of requests that are spent is kept, up to the new burst.
    pub fn set(&self, limit: RateLimit) {
        self.set_at(clock::nanos(), limit);
    }

    /// Takes one request from the limit. Fails, and takes nothing, if the limit is exceeded.
    pub fn take(&self) -> Result<(), LimitExceeded> {
        self.take_at(clock::nanos())
    }

    /// Returns what [`Limiter::take`] would, and takes nothing. Fails if the limit is exceeded.
    pub fn peek(&self) -> Result<(), LimitExceeded> {
        let (now, arrival) = (clock::nanos(), self.arrival.load(Ordering::Relaxed));
        let wait = arrival.saturating_sub(now + self.tolerance.load(Ordering::Relaxed));
        if wait == 0 { Ok(()) } else { Err(LimitExceeded { retry_after: Duration::from_nanos(wait) }) }
    }

    /// Takes one request from the limit even if none is left, for requests that must be sent and yet be counted.
    pub fn take_unchecked(&self) {
        let (now, interval) = (clock::nanos(), self.interval.load(Ordering::Relaxed));
        let _ = self
            .arrival
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |arrival| Some(arrival.max(now) + interval));
    }

    /// Limits the rate and the burst to a `share` of those of `limit`, from 0 (exclusive) to 1. `now` is in nanoseconds of this
    /// process.
    // The tolerance stays what it is. With longer intervals fewer requests fit into it, which is the smaller burst.
    fn slow_down(&self, now: u64, limit: RateLimit, share: f64) {
        let interval = Duration::from_nanos(interval(limit)).div_f64(share);
        self.set_interval(now, clock::nanos_of(interval));
    }

    /// Changes the interval, in nanoseconds, and keeps the number of requests that are spent.
    fn set_interval(&self, now: u64, interval: u64) {
        let old = self.interval.swap(interval, Ordering::Relaxed);
        if old == interval {
            return;
        }
        // The arrival is scaled, or a limit of one an hour that is raised to a thousand a second would still have its caller
        // wait an hour. It is bounded by the new burst: a lowered burst would otherwise refuse requests for longer than an empty
        // bucket takes to fill.
        let most = self.tolerance.load(Ordering::Relaxed).saturating_add(interval);
        let _ = self.arrival.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |arrival| {
            let ahead =
                u128::from(arrival.saturating_sub(now)) * u128::from(interval) / u128::from(old.max(1));
            Some(now + u64::try_from(ahead).unwrap_or(u64::MAX).min(most))
        });
    }

    /// Spends the whole burst: the next request passes after one interval.
    fn empty(&self, now: u64) {
        let ahead = self.tolerance.load(Ordering::Relaxed) + self.interval.load(Ordering::Relaxed);
        self.arrival.fetch_max(now + ahead, Ordering::Relaxed);
    }

    fn set_at(&self, now: u64, limit: RateLimit) {
        self.tolerance.store(tolerance(limit), Ordering::Relaxed);
        self.set_interval(now, interval(limit));
    }

    fn take_at(&self, now: u64) -> Result<(), LimitExceeded> {
        let (interval, tolerance) =
            (self.interval.load(Ordering::Relaxed), self.tolerance.load(Ordering::Relaxed));
        // Relaxed, since the limit protects no other memory: only the value itself must be exact.
        let taken = self.arrival.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |arrival| {
            (arrival <= now + tolerance).then(|| arrival.max(now) + interval)
        });
        match taken {
            Ok(_) => Ok(()),
            Err(arrival) => {
                Err(LimitExceeded { retry_after: Duration::from_nanos(arrival - tolerance - now) })
            }
        }
    }
}

/// The time that one request costs, in nanoseconds.
fn interval(limit: RateLimit) -> u64 {
    clock::nanos_of(limit.period) / u64::from(limit.count.get())
}

/// The tolerance of GCRA, in nanoseconds. A burst of one has none: a request passes once the interval of the last one is over.
fn tolerance(limit: RateLimit) -> u64 {
    interval(limit) * (u64::from(limit.burst.get()) - 1)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use governor::clock::FakeRelativeClock;
    use governor::{Quota, RateLimiter};
    use proptest::prelude::*;

    use super::*;

    fn limit(count: u32, burst: u32) -> RateLimit {
        RateLimit {
            count: NonZeroU32::new(count).unwrap(),
            period: Duration::from_secs(1),
            burst: NonZeroU32::new(burst).unwrap(),
        }
    }

    proptest! {
        // Gaps around the intervals of the rates, so that both verdicts are common.
        #[test]
        fn limiter_decisions_match_those_of_governor(
            count in 1u32..2_000,
            burst in 1u32..50,
            gaps in prop::collection::vec(0u64..20_000_000, 1..300),
        ) {
            let ours = Limiter::new(limit(count, burst));
            let clock = FakeRelativeClock::default();
            let quota = Quota::per_second(NonZeroU32::new(count).unwrap())
                .allow_burst(NonZeroU32::new(burst).unwrap());
            let oracle = RateLimiter::direct_with_clock(quota, clock.clone());
            let mut now = 0;
            for gap in gaps {
                now += gap;
                clock.advance(Duration::from_nanos(gap));
                prop_assert_eq!(ours.take_at(now).is_ok(), oracle.check().is_ok(), "at {} ns", now);
            }
        }
    }

    #[test]
    fn retry_after_is_exactly_when_the_next_request_passes() {
        // To the nanosecond: a client that waits just as long as it was told must not be refused again.
        let limiter = Limiter::new(limit(10, 2));
        assert_eq!((limiter.take_at(0), limiter.take_at(0)), (Ok(()), Ok(())));
        let wait = limiter.take_at(0).unwrap_err().retry_after;
        assert_eq!(wait, Duration::from_millis(100));
        let moment = u64::try_from(wait.as_nanos()).unwrap();
        assert!(limiter.take_at(moment - 1).is_err());
        assert_eq!(limiter.take_at(moment), Ok(()));
    }

    #[test]
    fn raised_limit_applies_at_once_and_lowered_limit_refunds_nothing() {
        let slow = RateLimit { period: Duration::from_secs(3600), ..limit(5, 40) };
        let limiter = Limiter::new(slow);
        let spend = || while limiter.take_at(0).is_ok() {};
        let wait = || limiter.take_at(0).map_or_else(|spent| spent.retry_after, |()| Duration::ZERO);
        spend();
        assert_eq!(wait(), Duration::from_secs(720), "the control");
        limiter.set_at(0, limit(1_000_000, 40));
        assert_eq!(wait(), Duration::from_micros(1), "as many requests as before, of the new interval");
        limiter.set_at(0, limit(20, 40));
        spend();
        limiter.set_at(0, slow);
        assert_eq!(wait(), Duration::from_secs(720), "spent is spent");
        limiter.set_at(0, limit(1, 1));
        assert_eq!(wait(), Duration::from_secs(1), "no more than the new burst");
    }

    #[test]
    fn threads_together_never_exceed_the_burst() {
        // One an hour, so that nothing comes back during the test.
        let limiter = Limiter::new(RateLimit { period: Duration::from_secs(3600), ..limit(1, 100) });
        let passed: usize = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..4).map(|_| scope.spawn(|| (0..100).filter(|_| limiter.take().is_ok()).count())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(passed, 100);
    }
}
