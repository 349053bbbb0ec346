//! When to fetch a token and how long to send it: refresh ahead, exponential back-off with full jitter, expiry by two clocks.
//!
//! Pure rules: they fetch nothing, hold no lock and do not wait. The fetching task applies them. A *pair* is an app key with its
//! app secret.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::backoff::after_refusals;
use crate::clock;

/// The least time between the beginnings of two fetches of one credential.
// The vendor documents no rate limit for the token endpoint, and a sibling API locks an address out after many bad attempts.
pub(super) const MIN_GAP: Duration = Duration::from_secs(1);

/// While requests wait and no token can be sent, the back-off after a passing failure ends at most this long after [`MIN_GAP`].
const URGENT: Duration = Duration::from_secs(2);

/// The ages at which a token is refreshed and stopped. Its age counts from when the request for it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// From this age on a new token is fetched; this one is still sent.
    pub(super) refresh: Duration,
    /// From this age on the token is no longer sent.
    pub(super) stop: Duration,
}

impl Plan {
    /// The plan for a new token. `jitter`, from 0 to 1, spreads the refreshes of gateways that started together.
    pub(super) fn new(lifetime: Duration, jitter: f64) -> Self {
        // Half of the life, at most 20 minutes: the time for repeating failed refreshes before a request notices.
        let ahead = (lifetime / 2).min(Duration::from_secs(20 * 60));
        let spread = lifetime.mul_f64(0.1 * jitter.clamp(0.0, 1.0));
        // The last part of the life is not used: a token that is sent in it could expire on its way, and a 401 costs a replay.
        let margin =
            (lifetime / 50).clamp(Duration::from_secs(5), Duration::from_secs(30)).min(lifetime / 10);
        Self { refresh: (lifetime - ahead).saturating_sub(spread), stop: lifetime - margin }
    }

    /// The plan for a token that the endpoint returned again: it has no other until this one has expired, so the token is sent to
    /// its very end. `took`: how long the call took that brought it.
    pub(super) fn to_the_end(lifetime: Duration, took: Duration) -> Self {
        // The endpoint issued the token up to `took` after the request, so that there it ends later by as much. A fetch before
        // that would bring the same token once more.
        Self { refresh: lifetime + took.min(MIN_GAP), stop: lifetime }
    }
}

/// One moment, read from three clocks, none of which is right in all cases. The monotonic clock stops while the machine sleeps.
/// *Now* ([`clock`]) goes on then, but not while a host has paused the virtual machine. The wall clock shows such a pause
/// afterwards, but may be set back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    /// For the distance between fetches and for back-off.
    pub(super) monotonic: Instant,
    /// *Now*, in nanoseconds since 1970.
    pub(super) now: u64,
    pub(super) wall: SystemTime,
}

impl Moment {
    /// The present moment, read anew from the clocks.
    pub(super) fn now() -> Self {
        Self { monotonic: Instant::now(), now: clock::unix_nanos(), wall: SystemTime::now() }
    }

    /// The present moment as this turn of the event loop sees it ([`clock`]): cheaper than [`Moment::now`], and exact enough
    /// for ages.
    pub(super) fn of_turn() -> Self {
        Self { monotonic: clock::now(), now: clock::unix_nanos(), wall: clock::wall() }
    }

    /// Returns the time from this moment to `later`, as measured by *now* or by the wall clock, whichever is longer. So a clock
    /// that was set back or stopped does not prolong a life.
    pub(super) fn age(&self, later: Self) -> Duration {
        // A wall clock that was set back gives an error here: it then says nothing, and the other clock counts.
        let wall = later.wall.duration_since(self.wall).unwrap_or_default();
        Duration::from_nanos(later.now.saturating_sub(self.now)).max(wall)
    }

    /// Returns the end of a life of this length that began at this moment.
    pub(super) fn end(&self, life: Duration) -> Expiry {
        let life = clock::nanos_of(life);
        Expiry {
            now: self.now.saturating_add(life),
            wall: clock::unix_nanos_at(self.wall).saturating_add(life),
        }
    }
}

/// The end of a life by *now* and by the wall clock, in nanoseconds since 1970.
// Two numbers and not a `Moment` with a length: every request checks them, and two comparisons are all that this takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Expiry {
    now: u64,
    wall: u64,
}

impl Expiry {
    /// Whether neither clock has reached the end, in the present turn of a worker.
    pub(super) fn is_ahead(&self) -> bool {
        clock::unix_nanos() < self.now && clock::wall_nanos() < self.wall
    }
}

/// What a failed fetch means for the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FetchFailure {
    /// The endpoint refuses the pair. Another try may lock the account, so the pause is long.
    Refused,
    /// The endpoint named the time to the next call (`Retry-After`).
    NotBefore(Duration),
    /// A fault that may end at any moment.
    Passing,
}

/// A pause without fetches that no waiting request can shorten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// When the next fetch may begin.
    pub(super) until: Instant,
    /// Whether the pair is refused; else the endpoint named the time.
    pub(super) refused: bool,
}

impl Held {
    /// Whether a request that can wait until `deadline` fails at once. After a refusal every request does, as long as the pause
    /// lasts.
    pub(super) fn is_hopeless(&self, now: Instant, deadline: Instant) -> bool {
        // A refusal fails even a request that could wait until the next try. That try will most likely be refused as well,
        // until an operator corrects the secret.
        self.until > if self.refused { now } else { deadline }
    }
}

/// The back-off of one pair: when the next fetch with it may begin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retry {
    not_before: Instant,
    held: Option<Held>,
    /// The number of failures of the kind [`FetchFailure::Passing`] since the last success.
    failures: u32,
    /// The number of failures of the kind [`FetchFailure::Refused`] since the last success or the last change of the secret.
    refusals: u32,
}

impl Retry {
    /// The back-off of a pair that has not failed: a fetch may begin at `now`.
    pub(super) fn new(now: Instant) -> Self {
        Self { not_before: now, held: None, failures: 0, refusals: 0 }
    }

    /// Returns when the next fetch may begin. `urgent`: no token can be sent now, and requests wait. This shortens the back-off,
    /// but not a pause after a refusal or one that the endpoint named. `last_begun`: when the last fetch began, with any pair.
    pub(super) fn at(&self, urgent: bool, last_begun: Option<Instant>) -> Instant {
        match last_begun {
            // The pause may have been chosen while there was a token in hand: up to a minute, much longer than a request waits.
            Some(begun) if urgent && self.held.is_none() => self.not_before.min(begun + MIN_GAP + URGENT),
            _ => self.not_before,
        }
    }

    /// Returns the pause that no waiting request can shorten, if the last fetch ended with one.
    pub(super) fn held(&self) -> Option<Held> {
        self.held
    }

    /// Sets the pause after a failure. `urgent`: requests wait, and there is no token or it has expired. `jitter`: from 0 to 1.
    pub(super) fn failed(&mut self, failure: FetchFailure, urgent: bool, now: Instant, jitter: f64) {
        let wait = match failure {
            FetchFailure::Refused => {
                self.refusals += 1;
                after_refusals(self.refusals - 1)
            }
            FetchFailure::NotBefore(wait) => wait,
            FetchFailure::Passing => self.back_off(urgent, jitter),
        };
        self.not_before = now + wait;
        self.held = (failure != FetchFailure::Passing)
            .then_some(Held { until: self.not_before, refused: failure == FetchFailure::Refused });
    }

    /// Counts one more passing failure and returns the pause after it: exponential with full jitter, at most 3 s if urgent, else
    /// 60 s.
    fn back_off(&mut self, urgent: bool, jitter: f64) -> Duration {
        let (base, most) = if urgent { (0.5, 3.0) } else { (1.0, 60.0) };
        // The exponent is bounded, though the bound of the pause is reached far earlier: the cast and the power stay exact.
        let longest = (base * 2_f64.powi(self.failures.min(16) as i32)).min(most);
        self.failures = self.failures.saturating_add(1);
        Duration::from_secs_f64(longest * jitter.clamp(0.0, 1.0))
    }

    /// Ends the pause after refusals, because the secret has changed. A pause that the endpoint named stays.
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
    fn usual_lifetimes_have_the_expected_refresh_and_stop_times() {
        let plan = |seconds, jitter| {
            let plan = Plan::new(Duration::from_secs(seconds), jitter);
            (plan.refresh.as_millis(), plan.stop.as_millis())
        };
        // 600 s is what the vendor's page shows, 3600 s the most that can be asked for. Of 6 s the least margin of 5 s would
        // leave next to nothing.
        assert_eq!(plan(600, 0.0), (300_000, 588_000));
        assert_eq!(plan(600, 1.0), (240_000, 588_000));
        assert_eq!(plan(3600, 0.0), (2_400_000, 3_570_000));
        assert_eq!(plan(6, 0.0), (3_000, 5_400));
    }

    proptest! {
        #[test]
        fn refresh_precedes_the_stop_and_the_stop_precedes_expiry(
            seconds in 1u64..=86_400, jitter in 0.0..=1.0_f64,
        ) {
            let lifetime = Duration::from_secs(seconds);
            let plan = Plan::new(lifetime, jitter);
            prop_assert!(plan.refresh < plan.stop && plan.stop < lifetime);
        }
    }

    fn wait(retry: &mut Retry, failure: FetchFailure, urgent: bool, jitter: f64) -> Duration {
        let now = Instant::now();
        retry.failed(failure, urgent, now, jitter);
        retry.at(false, None) - now
    }

    #[test]
    fn back_off_grows_up_to_its_bounds() {
        for (urgent, waits) in [
            (true, [500, 1000, 2000, 3000, 3000, 3000, 3000, 3000]),
            (false, [1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000]),
        ] {
            let mut retry = Retry::new(Instant::now());
            for millis in waits {
                assert_eq!(
                    wait(&mut retry, FetchFailure::Passing, urgent, 1.0),
                    Duration::from_millis(millis)
                );
            }
        }
    }

    proptest! {
        #[test]
        fn back_off_uses_full_jitter(failures in 0_usize..20, urgent: bool, jitter in 0.0..=1.0_f64) {
            let mut longest = Retry::new(Instant::now());
            let mut jittered = longest;
            for _ in 0..failures {
                wait(&mut longest, FetchFailure::Passing, urgent, 1.0);
                wait(&mut jittered, FetchFailure::Passing, urgent, 0.5);
            }
            let longest = wait(&mut longest, FetchFailure::Passing, urgent, 1.0);
            let wait = wait(&mut jittered, FetchFailure::Passing, urgent, jitter);
            prop_assert!((wait.as_secs_f64() - longest.as_secs_f64() * jitter).abs() < 1e-6);
        }
    }

    #[test]
    fn a_refusal_is_remembered_from_thirty_seconds_to_five_minutes() {
        let mut retry = Retry::new(Instant::now());
        for seconds in [30, 60, 120, 240, 300, 300] {
            assert_eq!(wait(&mut retry, FetchFailure::Refused, true, 0.0), Duration::from_secs(seconds));
        }
        let now = Instant::now();
        retry.forget_refusals(now);
        assert_eq!((retry.at(false, None), retry.held()), (now, None));
        assert_eq!(wait(&mut retry, FetchFailure::Refused, true, 0.0), Duration::from_secs(30));
    }

    // `Retry-After` is about the endpoint's load or the address, not about the pair.
    #[test]
    fn changed_secret_does_not_shorten_a_retry_after() {
        let mut retry = Retry::new(Instant::now());
        let now = Instant::now();
        retry.failed(FetchFailure::NotBefore(Duration::from_secs(60)), true, now, 0.0);
        retry.forget_refusals(now);
        assert_eq!(retry.at(true, Some(now)), now + Duration::from_secs(60));
    }

    #[test]
    fn waiting_requests_shorten_only_transient_back_off() {
        let now = Instant::now();
        let soon = now + Duration::from_secs(3);
        for (failure, at) in [
            (FetchFailure::Passing, soon),
            (FetchFailure::NotBefore(Duration::from_secs(40)), now + Duration::from_secs(40)),
            (FetchFailure::Refused, now + Duration::from_secs(30)),
        ] {
            // After 16 failures the back-off is 60 s: longer than what `URGENT` allows, so that a cut would show.
            let mut retry = Retry { failures: 16, ..Retry::new(now) };
            retry.failed(failure, false, now, 1.0);
            assert_eq!(retry.at(true, Some(now)), at, "{failure:?}");
        }
    }

    #[test]
    fn wait_is_hopeless_during_a_refusal_or_past_its_deadline() {
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
    fn greater_age_of_the_two_clocks_counts() {
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
