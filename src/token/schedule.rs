//! The timing rules of a token's life, as pure functions.

use std::time::Duration;

/// Two fetches are never closer than this.
pub(super) const MIN_GAP: Duration = Duration::from_secs(1);

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
    /// used to its very end, and the next one is fetched right then.
    pub(super) fn to_the_end(lifetime: Duration) -> Self {
        Self { refresh: lifetime, stop: lifetime }
    }
}

/// How long to wait after a failure that may pass.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The next wait, with full jitter. With a token in hand there is time; without one, requests wait.
    pub(super) fn next(&mut self, has_token: bool, jitter: f64) -> Duration {
        let (base, most) = if has_token { (1.0, 60.0) } else { (0.5, 3.0) };
        let longest = (base * 2_f64.powi(self.failures.min(16) as i32)).min(most);
        self.failures = self.failures.saturating_add(1);
        Duration::from_secs_f64(longest * jitter.clamp(0.0, 1.0))
    }

    /// After a success.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }
}

/// How long a refusal is remembered: 30 s, doubling to 5 min.
pub(super) fn refusal(count: u32) -> Duration {
    Duration::from_secs((30_u64 << count.min(4)).min(300))
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

    #[test]
    fn waits_grow_to_their_bound() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..5).map(|_| backoff.next(false, 1.0).as_millis()).collect();
        assert_eq!(waits, [500, 1000, 2000, 3000, 3000]);
        assert_eq!((refusal(0).as_secs(), refusal(1).as_secs(), refusal(9).as_secs()), (30, 60, 300));
    }
}
