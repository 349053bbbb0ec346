//! The timing rules of a token's life, as pure functions.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::backoff::after_refusals;
use crate::clock;

/// Two fetches are never closer than this.
pub(super) const MIN_GAP: Duration = Duration::from_secs(1);

/// Requests that wait make the next try come at most this long after the earliest allowed moment.
const URGENT: Duration = Duration::from_secs(2);

/// A token's moments, counted from when its request was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// From here on a new one is fetched.
    pub(super) refresh: Duration,
    /// From here on it is not sent any more.
    pub(super) stop: Duration,
}

impl Plan {
    /// For a token of this lifetime; `jitter` from 0 to 1 spreads the refreshes of many gateways.
    pub(super) fn new(lifetime: Duration, jitter: f64) -> Self {
        let ahead = (lifetime / 2).min(Duration::from_secs(20 * 60));
        let spread = lifetime.mul_f64(0.1 * jitter.clamp(0.0, 1.0));
        let margin =
            (lifetime / 50).clamp(Duration::from_secs(5), Duration::from_secs(30)).min(lifetime / 10);
        Self { refresh: (lifetime - ahead).saturating_sub(spread), stop: lifetime - margin }
    }

    /// For a server that hands the same token out again: it has no other until this one is over, so it is
    /// used to its very end. By the server's clock it ends later, by less than the call `took` that brought it.
    pub(super) fn to_the_end(lifetime: Duration, took: Duration) -> Self {
        Self { refresh: lifetime + took.min(MIN_GAP), stop: lifetime }
    }
}

/// One moment by three clocks. The monotonic one stops while the machine sleeps, so that a life is counted by *now*, which
/// does not ([`clock`]). A machine that its host has paused knows of that by the wall clock only, which may also jump back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    pub(super) monotonic: Instant,
    /// *Now*, in nanoseconds since 1970.
    pub(super) now: u64,
    pub(super) wall: SystemTime,
}

impl Moment {
    pub(super) fn now() -> Self {
        Self { monotonic: Instant::now(), now: clock::unix_nanos(), wall: SystemTime::now() }
    }

    /// The present turn of a worker.
    pub(super) fn of_turn() -> Self {
        Self { monotonic: clock::now(), now: clock::unix_nanos(), wall: clock::wall() }
    }

    /// How long before `later` it was, by the clock that says more: what is left of a life is the less.
    pub(super) fn age(&self, later: Self) -> Duration {
        let wall = later.wall.duration_since(self.wall).unwrap_or_default();
        Duration::from_nanos(later.now.saturating_sub(self.now)).max(wall)
    }

    /// The end of a life that began then.
    pub(super) fn end(&self, life: Duration) -> End {
        let life = clock::nanos_of(life);
        End { now: self.now.saturating_add(life), wall: clock::unix_nanos_at(self.wall).saturating_add(life) }
    }
}

/// The end of a life by *now* and by the wall clock, in nanoseconds since 1970: every request looks at it. See [`clock`].
#[derive(Clone, Copy, Debug)]
pub(super) struct End {
    now: u64,
    wall: u64,
}

impl End {
    /// Whether neither clock has come to it, in the present turn of a worker.
    pub(super) fn is_ahead(&self) -> bool {
        clock::unix_nanos() < self.now && clock::wall_nanos() < self.wall
    }
}

/// How a call failed, as far as the next one is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The pair is refused.
    Refused,
    /// The endpoint named the time of the next call.
    NotBefore(Duration),
    /// It may pass at any moment.
    Passing,
}

/// Calls that are not made before a moment, whoever waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) until: Instant,
    /// The pair is refused; else the endpoint named the time.
    pub(super) refused: bool,
}

impl Held {
    /// Whether a request that waits until `deadline` would wait in vain. A refusal is remembered to its end.
    pub(super) fn is_hopeless(&self, now: Instant, deadline: Instant) -> bool {
        self.until > if self.refused { now } else { deadline }
    }
}

/// When the next call with one pair may be made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retry {
    not_before: Instant,
    held: Option<Held>,
    /// Failures that may pass, since the last success.
    failures: u32,
    refusals: u32,
}

impl Retry {
    /// At once.
    pub(super) fn new(now: Instant) -> Self {
        Self { not_before: now, held: None, failures: 0, refusals: 0 }
    }

    /// The earliest moment. What may pass is tried sooner when requests wait.
    pub(super) fn at(&self, urgent: bool, last_begun: Option<Instant>) -> Instant {
        match last_begun {
            Some(begun) if urgent && self.held.is_none() => self.not_before.min(begun + MIN_GAP + URGENT),
            _ => self.not_before,
        }
    }

    /// What no waiting request can shorten.
    pub(super) fn held(&self) -> Option<Held> {
        self.held
    }

    /// Sets the next moment after a failure. `urgent`: there is no usable token, and requests wait.
    pub(super) fn failed(&mut self, failure: Failure, urgent: bool, now: Instant, jitter: f64) {
        let wait = match failure {
            Failure::Refused => {
                self.refusals += 1;
                after_refusals(self.refusals - 1)
            }
            Failure::NotBefore(wait) => wait,
            Failure::Passing => self.back_off(urgent, jitter),
        };
        self.not_before = now + wait;
        self.held = (failure != Failure::Passing)
            .then_some(Held { until: self.not_before, refused: failure == Failure::Refused });
    }

    /// With a token in hand there is time; without one, requests wait. Full jitter.
    fn back_off(&mut self, urgent: bool, jitter: f64) -> Duration {
        let (base, most) = if urgent { (0.5, 3.0) } else { (1.0, 60.0) };
        let longest = (base * 2_f64.powi(self.failures.min(16) as i32)).min(most);
        self.failures = self.failures.saturating_add(1);
        Duration::from_secs_f64(longest * jitter.clamp(0.0, 1.0))
    }

    /// Refusals say nothing once the secret changed.
    pub(super) fn forget_refusals(&mut self, now: Instant) {
        self.refusals = 0;
        if self.held.take_if(|held| held.refused).is_some() {
            self.not_before = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_moments_of_usual_lifetimes() {
        let plan = |seconds, jitter| {
            let plan = Plan::new(Duration::from_secs(seconds), jitter);
            (plan.refresh.as_millis(), plan.stop.as_millis())
        };
        assert_eq!(plan(600, 0.0), (300_000, 588_000));
        assert_eq!(plan(600, 1.0), (240_000, 588_000));
        assert_eq!(plan(3600, 0.0), (2_400_000, 3_570_000));
        assert_eq!(plan(6, 0.0), (3_000, 5_400));
    }

    proptest! {
        #[test]
        fn a_refresh_always_comes_before_the_stop_and_the_stop_before_the_end(
            seconds in 1u64..=86_400, jitter in 0.0..=1.0_f64,
        ) {
            let lifetime = Duration::from_secs(seconds);
            let plan = Plan::new(lifetime, jitter);
            prop_assert!(plan.refresh < plan.stop && plan.stop < lifetime);
        }
    }

    fn wait(retry: &mut Retry, failure: Failure, urgent: bool, jitter: f64) -> Duration {
        let now = Instant::now();
        retry.failed(failure, urgent, now, jitter);
        retry.at(false, None) - now
    }

    #[test]
    fn waits_grow_to_their_bounds_and_no_further() {
        for (urgent, waits) in [
            (true, [500, 1000, 2000, 3000, 3000, 3000, 3000, 3000]),
            (false, [1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000]),
        ] {
            let mut retry = Retry::new(Instant::now());
            for millis in waits {
                assert_eq!(wait(&mut retry, Failure::Passing, urgent, 1.0), Duration::from_millis(millis));
            }
        }
    }

    proptest! {
        #[test]
        fn jitter_is_full(failures in 0_usize..20, urgent: bool, jitter in 0.0..=1.0_f64) {
            let mut longest = Retry::new(Instant::now());
            let mut jittered = longest;
            for _ in 0..failures {
                wait(&mut longest, Failure::Passing, urgent, 1.0);
                wait(&mut jittered, Failure::Passing, urgent, 0.5);
            }
            let longest = wait(&mut longest, Failure::Passing, urgent, 1.0);
            let wait = wait(&mut jittered, Failure::Passing, urgent, jitter);
            prop_assert!((wait.as_secs_f64() - longest.as_secs_f64() * jitter).abs() < 1e-6);
        }
    }

    #[test]
    fn a_refusal_is_remembered_from_thirty_seconds_to_five_minutes() {
        let mut retry = Retry::new(Instant::now());
        for seconds in [30, 60, 120, 240, 300, 300] {
            assert_eq!(wait(&mut retry, Failure::Refused, true, 0.0), Duration::from_secs(seconds));
        }
        let now = Instant::now();
        retry.forget_refusals(now);
        assert_eq!((retry.at(false, None), retry.held()), (now, None));
        assert_eq!(wait(&mut retry, Failure::Refused, true, 0.0), Duration::from_secs(30));
    }

    #[test]
    fn a_changed_secret_does_not_shorten_a_time_that_the_endpoint_named() {
        let mut retry = Retry::new(Instant::now());
        let now = Instant::now();
        retry.failed(Failure::NotBefore(Duration::from_secs(60)), true, now, 0.0);
        retry.forget_refusals(now);
        assert_eq!(retry.at(true, Some(now)), now + Duration::from_secs(60));
    }

    #[test]
    fn waiting_requests_shorten_what_may_pass_and_nothing_else() {
        let now = Instant::now();
        let soon = now + Duration::from_secs(3);
        for (failure, at) in [
            (Failure::Passing, soon),
            (Failure::NotBefore(Duration::from_secs(40)), now + Duration::from_secs(40)),
            (Failure::Refused, now + Duration::from_secs(30)),
        ] {
            let mut retry = Retry { failures: 16, ..Retry::new(now) };
            retry.failed(failure, false, now, 1.0);
            assert_eq!(retry.at(true, Some(now)), at, "{failure:?}");
        }
    }

    #[test]
    fn a_wait_is_hopeless_while_a_refusal_lasts_or_beyond_its_own_end() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        for (refused, until, hopeless) in
            [(true, 1, true), (true, 0, false), (false, 1, false), (false, 5, false), (false, 6, true)]
        {
            let held = Held { until: at(until), refused };
            assert_eq!(held.is_hopeless(now, at(5)), hopeless, "{held:?}");
        }
    }

    #[test]
    fn the_clock_that_says_more_counts() {
        let begin = Moment::now();
        let later = |now: u64, wall: i64| {
            let apart = Duration::from_secs(wall.unsigned_abs());
            let wall = if wall < 0 { begin.wall - apart } else { begin.wall + apart };
            Moment { now: begin.now + now * 1_000_000_000, wall, ..begin }
        };
        for (now, wall, age) in [(10, 10, 10), (10, 3600, 3600), (10, -3600, 10), (0, 600, 600)] {
            assert_eq!(begin.age(later(now, wall)), Duration::from_secs(age), "{now} {wall}");
        }
    }
}
