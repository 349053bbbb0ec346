//! The upstream's quota, shared by all callers: the configured one, or a throttled one after the upstream answered 429.
//!
//! Multiplicative decrease, additive increase. Each 429 halves the quota for as long as the upstream asks; then 2 % of the
//! configured rate come back each second. So the gateway finds the rate that the upstream bears, instead of meeting the next
//! 429 at full rate. The quota is never more than what is configured.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;

use super::{LimitExceeded, Limiter};
use crate::clock;
use crate::config::RateLimit;

/// The share of the configured quota that comes back each second.
const RECOVERY: f64 = 0.02;

/// The smallest share of the configured quota to which it is throttled.
// Some requests must pass, or the gateway would never learn that the upstream has recovered.
const LEAST: f64 = 1.0 / 32.0;

/// The longest pause that the upstream can ask for.
// A `Retry-After` of days, by mistake or on purpose, must not throttle all callers for as long.
const LONGEST: Duration = Duration::from_secs(300);

/// The time within which several 429s count as one, in nanoseconds.
// They answer requests that were under way together. If each of them halved the quota, it would be at its least after one burst.
const TOGETHER: u64 = 1_000_000_000;

/// A quota that all callers share.
#[derive(Debug)]
pub struct Quota {
    limiter: Limiter,
    limit: Mutex<RateLimit>,
    // Apart from the lock, so that a request does not take the lock while the quota is whole, which it nearly always is.
    is_throttled: AtomicBool,
    throttled: Mutex<Option<Throttled>>,
}

/// A throttled quota: its share of the configured one, the time of the 429 that set this share, and the end of the pause, after
/// which the share grows. Times are in nanoseconds of this process.
#[derive(Clone, Copy, Debug)]
struct Throttled {
    share: f64,
    since: u64,
    until: u64,
}

/// The error of a quota that is exceeded.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Exhausted {
    /// The configured quota.
    #[error("the quota that all callers share is used up; call again after Retry-After seconds")]
    Whole(LimitExceeded),
    /// The quota as it was throttled after a 429 of the upstream.
    #[error(
        "nothing was sent: the upstream answered 429 (too many requests) to earlier calls, so the gateway sends fewer \
         requests for some time; call again after Retry-After seconds"
    )]
    Throttled(LimitExceeded),
}

impl Exhausted {
    /// The time after which one more request would pass, if no other one comes first.
    pub fn retry_after(self) -> Duration {
        let (Self::Whole(exceeded) | Self::Throttled(exceeded)) = self;
        exceeded.retry_after
    }
}

impl Throttled {
    /// The share at a time; more than 1 once all has come back.
    fn share(&self, now: u64) -> f64 {
        self.share + Duration::from_nanos(now.saturating_sub(self.until)).as_secs_f64() * RECOVERY
    }
}

impl Quota {
    /// A quota of which nothing is spent.
    pub fn new(limit: RateLimit) -> Self {
        Self {
            limiter: Limiter::new(limit),
            limit: Mutex::new(limit),
            is_throttled: AtomicBool::new(false),
            throttled: Mutex::default(),
        }
    }

    /// Changes the quota. The number of requests that are spent is kept, and a throttled quota stays throttled to the same
    /// share.
    pub fn set(&self, limit: RateLimit) {
        let (now, throttled) = (clock::nanos(), self.throttled());
        *self.limit.lock().unwrap_or_else(PoisonError::into_inner) = limit;
        self.limiter.set(limit);
        if let Some(throttled) = *throttled {
            self.limiter.slow_down(now, limit, throttled.share(now).min(1.0));
        }
    }

    /// Takes one request from the quota. Fails, and takes nothing, if the quota is exceeded.
    pub fn take(&self) -> Result<(), Exhausted> {
        self.recover(clock::nanos());
        self.limiter.take().map_err(|exceeded| self.exhausted(exceeded))
    }

    /// Returns what [`Quota::take`] would, and takes nothing. Fails if the quota is exceeded.
    pub fn peek(&self) -> Result<(), Exhausted> {
        self.recover(clock::nanos());
        self.limiter.peek().map_err(|exceeded| self.exhausted(exceeded))
    }

    #[cold]
    fn exhausted(&self, exceeded: LimitExceeded) -> Exhausted {
        let is_throttled = self.is_throttled.load(Ordering::Relaxed);
        if is_throttled { Exhausted::Throttled(exceeded) } else { Exhausted::Whole(exceeded) }
    }

    /// Takes one request from the quota even if none is left, for requests that must be sent and yet be counted.
    pub fn take_unchecked(&self) {
        self.limiter.take_unchecked();
    }

    /// Throttles the quota: the upstream has answered 429 and asks for a pause, of which at most 5 minutes count.
    pub fn throttle(&self, pause: Duration) {
        self.throttle_at(clock::nanos(), pause);
    }

    /// The share of the configured quota that is in effect, up to 1.
    pub fn share(&self) -> f64 {
        self.recover(clock::nanos());
        self.throttled().map_or(1.0, |throttled| throttled.share(clock::nanos()))
    }

    /// Throttles the quota at a time, in nanoseconds of this process.
    fn throttle_at(&self, now: u64, pause: Duration) {
        let until = now + clock::nanos_of(pause.min(LONGEST));
        let mut throttled = self.throttled();
        let together = throttled.filter(|known| now < known.since + TOGETHER);
        let (share, since) = match together {
            Some(known) => (known.share, known.since),
            None => ((throttled.map_or(1.0, |known| known.share(now)) / 2.0).max(LEAST), now),
        };
        // The longest pause counts: the upstream asked for it, and a later 429 with a shorter one does not revoke it.
        let until = throttled.map_or(until, |known| known.until.max(until));
        *throttled = Some(Throttled { share, since, until });
        self.is_throttled.store(true, Ordering::Relaxed);
        self.limiter.slow_down(now, self.limit(), share);
        // Otherwise what is left of a burst would be sent at once, right after the 429.
        self.limiter.empty(now);
        // Logged without the lock. Under it, one 429 held up every call while stderr was a full pipe.
        drop(throttled);
        if together.is_none() {
            tracing::warn!(share, ?pause, "the upstream answered 429: quota reduced");
        }
    }

    /// Raises a throttled quota by the share that has come back.
    // At each request instead of by a timer: between two requests the share has no effect.
    fn recover(&self, now: u64) {
        if self.is_throttled.load(Ordering::Relaxed) {
            self.recover_slowly(now);
        }
    }

    /// Applies the share of this moment, and ends the throttling once all has come back.
    #[cold]
    fn recover_slowly(&self, now: u64) {
        let mut throttled = self.throttled();
        let share = throttled.map_or(1.0, |throttled| throttled.share(now)).min(1.0);
        self.limiter.slow_down(now, self.limit(), share);
        let is_whole = share >= 1.0 && throttled.take().is_some();
        if is_whole {
            self.is_throttled.store(false, Ordering::Relaxed);
        }
        drop(throttled);
        if is_whole {
            tracing::info!("quota restored");
        }
    }

    fn limit(&self) -> RateLimit {
        *self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn throttled(&self) -> MutexGuard<'_, Option<Throttled>> {
        self.throttled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    fn take_at(&self, now: u64) -> Result<(), LimitExceeded> {
        self.recover(now);
        self.limiter.take_at(now)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// A quota of a hundred requests a second, with a burst of twenty.
    fn quota() -> Quota {
        let number = |number| NonZeroU32::new(number).unwrap();
        Quota::new(RateLimit { count: number(100), period: Duration::from_secs(1), burst: number(20) })
    }

    /// The number of requests that pass in a second, of ten thousand.
    fn passed(quota: &Quota, from: u64) -> usize {
        (0..10_000).filter(|i| quota.take_at(from + i * (SECOND / 10_000)).is_ok()).count()
    }

    #[test]
    fn status_429_halves_the_quota_until_retry_after_then_it_recovers() {
        let quota = quota();
        assert!((119..=121).contains(&passed(&quota, 0)), "the control: a burst, and a hundred");
        quota.throttle_at(SECOND, Duration::from_secs(10));
        for second in 1..11 {
            assert!((49..=51).contains(&passed(&quota, second * SECOND)), "second {second}");
        }
        let grown: Vec<_> = (11..40).map(|second| passed(&quota, second * SECOND)).collect();
        assert!(grown.windows(2).all(|two| two[0] < two[1] + 2), "{grown:?}");
        assert!(grown[1] > 51 && grown[10] < 80 && (99..=101).contains(&grown[28]), "{grown:?}");
        assert!(!quota.is_throttled.load(Ordering::Relaxed));
        assert!((99..=101).contains(&passed(&quota, 40 * SECOND)), "no more than was configured");
    }

    #[test]
    fn status_429_discards_the_remaining_burst() {
        let quota = quota();
        quota.throttle_at(0, Duration::from_secs(1));
        let wait = quota.take_at(0).unwrap_err().retry_after;
        assert_eq!(wait, Duration::from_millis(20));
        assert!(quota.take_at(clock::nanos_of(wait)).is_ok());
    }

    #[test]
    fn concurrent_429s_shrink_the_quota_once_and_later_ones_again() {
        let quota = quota();
        (0..50).for_each(|i| quota.throttle_at(i, Duration::from_secs(10)));
        assert!((49..=51).contains(&passed(&quota, 50)));
        quota.throttle_at(2 * SECOND, Duration::from_secs(1));
        for second in 2..10 {
            assert!((24..=26).contains(&passed(&quota, second * SECOND)), "the longer pause counts");
        }
        // A pause of 1,000 s each time, of which 300 s count.
        (1..100).for_each(|i| quota.throttle_at((10 + 2 * i) * SECOND, Duration::from_secs(1000)));
        assert!((3..=4).contains(&passed(&quota, 300 * SECOND)), "there is always something left");
        assert!(passed(&quota, (208 + 300 + 50) * SECOND) >= 99, "no pause is longer than five minutes");
    }
}
