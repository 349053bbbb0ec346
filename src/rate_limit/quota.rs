//! The upstream's budget, shared by all callers: what is configured, or what the upstream leaves of it.
//!
//! An upstream that answers 429 has less to give than was configured: the quota is halved for as long as it asks for,
//! and then grows back a little every second, so that the gateway finds out what it may have instead of running into
//! the next 429 with all it has. Never more than what is configured.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;

use super::{Limiter, Spent};
use crate::clock;
use crate::config::Limit;

/// How much of the quota comes back each second.
const RECOVERY: f64 = 0.02;

/// The smallest share that is left.
const LEAST: f64 = 1.0 / 32.0;

/// The longest that the upstream can ask for.
const LONGEST: Duration = Duration::from_secs(300);

/// Several 429s within this time are one: they were under way together. In nanoseconds.
const TOGETHER: u64 = 1_000_000_000;

/// A shared quota.
#[derive(Debug)]
pub struct Quota {
    limiter: Limiter,
    limit: Mutex<Limit>,
    is_shrunk: AtomicBool,
    shrunk: Mutex<Option<Shrunk>>,
}

/// Less than was configured. Times are in nanoseconds of this process.
#[derive(Clone, Copy, Debug)]
struct Shrunk {
    share: f64,
    since: u64,
    until: u64,
}

/// The quota is spent.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Exhausted {
    /// The configured one.
    #[error("the quota that all callers share is spent; call again after Retry-After seconds")]
    Whole(Spent),
    /// What the upstream left of it.
    #[error(
        "nothing was sent: the upstream answered 429 (too many requests) to earlier calls, so that the gateway sends less for some \
         time; call again after Retry-After seconds"
    )]
    Shrunk(Spent),
}

impl Exhausted {
    /// When one more request would pass, if nobody else asks.
    pub fn retry_after(self) -> Duration {
        let (Self::Whole(spent) | Self::Shrunk(spent)) = self;
        spent.retry_after
    }
}

impl Shrunk {
    fn share(&self, now: u64) -> f64 {
        self.share + Duration::from_nanos(now.saturating_sub(self.until)).as_secs_f64() * RECOVERY
    }
}

impl Quota {
    /// The whole quota, with a full burst.
    pub fn new(limit: Limit) -> Self {
        Self {
            limiter: Limiter::new(limit),
            limit: Mutex::new(limit),
            is_shrunk: AtomicBool::new(false),
            shrunk: Mutex::default(),
        }
    }

    /// Another quota from now on. What is spent stays spent, and what the upstream has left of it is left of this one.
    pub fn set(&self, limit: Limit) {
        let (now, shrunk) = (clock::nanos(), self.shrunk());
        *self.limit.lock().unwrap_or_else(PoisonError::into_inner) = limit;
        self.limiter.set(limit);
        if let Some(shrunk) = *shrunk {
            self.limiter.slow_down(now, limit, shrunk.share(now).min(1.0));
        }
    }

    /// Takes one request's worth, or says when to come back.
    pub fn take(&self) -> Result<(), Exhausted> {
        self.recover(clock::nanos());
        self.limiter.take().map_err(|spent| self.exhausted(spent))
    }

    /// Says what [`Quota::take`] would, and takes nothing.
    pub fn look(&self) -> Result<(), Exhausted> {
        self.recover(clock::nanos());
        self.limiter.look().map_err(|spent| self.exhausted(spent))
    }

    #[cold]
    fn exhausted(&self, spent: Spent) -> Exhausted {
        let is_shrunk = self.is_shrunk.load(Ordering::Relaxed);
        if is_shrunk { Exhausted::Shrunk(spent) } else { Exhausted::Whole(spent) }
    }

    /// Takes one request's worth even if none is left: for what must go on anyway and yet be counted.
    pub fn overdraw(&self) {
        self.limiter.overdraw();
    }

    /// The upstream has answered 429, and asks for a pause.
    pub fn shrink(&self, pause: Duration) {
        self.shrink_at(clock::nanos(), pause);
    }

    /// How much of the quota is left, from 0 to 1.
    pub fn share(&self) -> f64 {
        self.recover(clock::nanos());
        self.shrunk().map_or(1.0, |shrunk| shrunk.share(clock::nanos()))
    }

    fn shrink_at(&self, now: u64, pause: Duration) {
        let until = now + clock::nanos_of(pause.min(LONGEST));
        let mut shrunk = self.shrunk();
        let together = shrunk.filter(|known| now < known.since + TOGETHER);
        let (share, since) = match together {
            Some(known) => (known.share, known.since),
            None => ((shrunk.map_or(1.0, |known| known.share(now)) / 2.0).max(LEAST), now),
        };
        let until = shrunk.map_or(until, |known| known.until.max(until));
        *shrunk = Some(Shrunk { share, since, until });
        self.is_shrunk.store(true, Ordering::Relaxed);
        self.limiter.slow_down(now, self.limit(), share);
        self.limiter.empty(now);
        drop(shrunk);
        if together.is_none() {
            tracing::warn!(share, ?pause, "the upstream answered 429: the quota shrinks");
        }
    }

    fn recover(&self, now: u64) {
        if self.is_shrunk.load(Ordering::Relaxed) {
            self.recover_slowly(now);
        }
    }

    #[cold]
    fn recover_slowly(&self, now: u64) {
        let mut shrunk = self.shrunk();
        let share = shrunk.map_or(1.0, |shrunk| shrunk.share(now)).min(1.0);
        self.limiter.slow_down(now, self.limit(), share);
        let is_whole = share >= 1.0 && shrunk.take().is_some();
        if is_whole {
            self.is_shrunk.store(false, Ordering::Relaxed);
        }
        drop(shrunk);
        if is_whole {
            tracing::info!("the quota is whole again");
        }
    }

    fn limit(&self) -> Limit {
        *self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shrunk(&self) -> MutexGuard<'_, Option<Shrunk>> {
        self.shrunk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    fn take_at(&self, now: u64) -> Result<(), Spent> {
        self.recover(now);
        self.limiter.take_at(now)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// A hundred a second, twenty at once.
    fn quota() -> Quota {
        let number = |number| NonZeroU32::new(number).unwrap();
        Quota::new(Limit { count: number(100), period: Duration::from_secs(1), burst: number(20) })
    }

    /// How many of many requests pass in a second.
    fn passed(quota: &Quota, from: u64) -> usize {
        (0..10_000).filter(|i| quota.take_at(from + i * (SECOND / 10_000)).is_ok()).count()
    }

    #[test]
    fn a_429_halves_the_quota_for_as_long_as_it_says_and_it_grows_back() {
        let quota = quota();
        assert!((119..=121).contains(&passed(&quota, 0)), "the control: a burst, and a hundred");
        quota.shrink_at(SECOND, Duration::from_secs(10));
        for second in 1..11 {
            assert!((49..=51).contains(&passed(&quota, second * SECOND)), "second {second}");
        }
        let grown: Vec<_> = (11..40).map(|second| passed(&quota, second * SECOND)).collect();
        assert!(grown.windows(2).all(|two| two[0] < two[1] + 2), "{grown:?}");
        assert!(grown[1] > 51 && grown[10] < 80 && (99..=101).contains(&grown[28]), "{grown:?}");
        assert!(!quota.is_shrunk.load(Ordering::Relaxed));
        assert!((99..=101).contains(&passed(&quota, 40 * SECOND)), "no more than was configured");
    }

    #[test]
    fn nothing_is_left_of_a_burst_that_met_a_429() {
        let quota = quota();
        quota.shrink_at(0, Duration::from_secs(1));
        let wait = quota.take_at(0).unwrap_err().retry_after;
        assert_eq!(wait, Duration::from_millis(20));
        assert!(quota.take_at(clock::nanos_of(wait)).is_ok());
    }

    #[test]
    fn answers_that_were_under_way_together_shrink_it_once_and_later_ones_again() {
        let quota = quota();
        (0..50).for_each(|i| quota.shrink_at(i, Duration::from_secs(10)));
        assert!((49..=51).contains(&passed(&quota, 50)));
        quota.shrink_at(2 * SECOND, Duration::from_secs(1));
        for second in 2..10 {
            assert!((24..=26).contains(&passed(&quota, second * SECOND)), "the longer pause counts");
        }
        (1..100).for_each(|i| quota.shrink_at((10 + 2 * i) * SECOND, Duration::from_secs(1000)));
        assert!((3..=4).contains(&passed(&quota, 300 * SECOND)), "there is always something left");
        assert!(passed(&quota, (208 + 300 + 50) * SECOND) >= 99, "no pause is longer than five minutes");
    }
}
