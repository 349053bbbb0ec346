//! A cool-down for refused tokens. If another token does not help, for example because the service was not purchased, further
//! refusals cause no fetch for some time.
//!
//! Without it each refused call would cause a fetch, without end and without any effect.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::after_refusals;

/// Whether refused tokens of one credential on one route still cause fetches.
///
/// Two refusals in a row, or the same token handed out again, show that another token does not help. Then further refusals cause
/// no fetch for 30 s. This time doubles with each further cool-down, up to 5 min. The newest token stays in use. The first
/// success ends the cool-down and resets its length.
///
/// Two refusals are in a row if one request gets both, or if a request is refused with the token that was fetched because of
/// another request's refusal.
#[derive(Debug, Default)]
pub struct Cooldown(Mutex<Cooling>);

#[derive(Debug, Default)]
struct Cooling {
    until: Option<Instant>,
    count: u32,
    /// The refused generation that a fetch is to replace, and when it was first refused.
    doubted: Option<(u64, Instant)>,
    /// The newest generation that was accepted; 0 for none.
    accepted: u64,
}

impl Cooldown {
    /// Whether the refusal of this generation may cause a fetch.
    pub fn may_fetch(&self, generation: u64) -> bool {
        self.lock().may_fetch(generation, Instant::now())
    }

    /// How long the cool-down still lasts; `None` if there is none.
    pub fn remaining(&self) -> Option<Duration> {
        self.lock().remaining(Instant::now())
    }

    /// Starts a cool-down: a fresh token was refused, too, or the same one was handed out again.
    pub fn rejected(&self) {
        self.lock().rejected(Instant::now());
    }

    /// Ends the cool-down and resets its length: a token of this generation was accepted.
    pub fn accepted(&self, generation: u64) {
        self.lock().accepted(generation);
    }

    /// Whether a token of this generation is the newest that was accepted.
    pub fn has_accepted(&self, generation: u64) -> bool {
        self.lock().accepted == generation
    }

    fn lock(&self) -> MutexGuard<'_, Cooling> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// The state without its lock and its clock, so that tests can set the time.
impl Cooling {
    fn remaining(&self, now: Instant) -> Option<Duration> {
        let left = self.until?.saturating_duration_since(now);
        (!left.is_zero()).then_some(left)
    }

    fn may_fetch(&mut self, generation: u64, now: Instant) -> bool {
        if self.remaining(now).is_some() {
            return false;
        }
        // Refusals that are further apart than a first cool-down is long are not in a row: the later token may have ended for a
        // reason of its own.
        let recent =
            self.doubted.filter(|(_, since)| now.saturating_duration_since(*since) < after_refusals(0));
        match recent {
            // The successor of a refused token is refused as well.
            Some((doubted, _)) if generation > doubted => self.rejected(now),
            // Another request was refused with the same token. The slot shares one fetch among all of them.
            Some(_) => return true,
            None => {
                self.doubted = Some((generation, now));
                return true;
            }
        }
        false
    }

    // Requests that are refused together start one cool-down, not one each: a thousand second refusals at once doubled it up to
    // its bound.
    fn rejected(&mut self, now: Instant) {
        if self.remaining(now).is_none() {
            self.until = Some(now + after_refusals(self.count));
            self.count += 1;
            self.doubted = None;
        }
    }

    fn accepted(&mut self, generation: u64) {
        *self = Self { accepted: self.accepted.max(generation), ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simultaneous_rejections_start_one_cooldown_and_the_next_doubles() {
        let (mut cooling, mut now) = (Cooling::default(), Instant::now());
        assert_eq!(cooling.remaining(now), None);
        for seconds in [30, 60, 120, 240, 300, 300] {
            for _ in 0..1000 {
                cooling.rejected(now);
            }
            assert_eq!(cooling.remaining(now), Some(Duration::from_secs(seconds)));
            now += Duration::from_secs(seconds);
            assert_eq!(cooling.remaining(now), None);
        }
    }

    #[test]
    fn second_refused_token_in_a_row_starts_a_cooldown() {
        let (mut cooling, now) = (Cooling::default(), Instant::now());
        assert!(cooling.may_fetch(1, now) && cooling.may_fetch(1, now), "all share one fetch");
        assert!(!cooling.may_fetch(2, now));
        assert_eq!(cooling.remaining(now), Some(Duration::from_secs(30)));
        let after = now + Duration::from_secs(30);
        // The end of a cool-down is no proof that the token is good: one fetch is tried, and its token decides.
        assert!(cooling.may_fetch(2, after), "a cool-down ends with another try");
        assert!(!cooling.may_fetch(3, after));
        assert_eq!(cooling.remaining(after), Some(Duration::from_secs(60)));
    }

    #[test]
    fn success_or_thirty_seconds_allows_another_token_fetch() {
        let (mut cooling, now) = (Cooling::default(), Instant::now());
        assert!(cooling.may_fetch(1, now));
        cooling.accepted(1);
        assert!(cooling.may_fetch(2, now));
        assert!(cooling.may_fetch(3, now + Duration::from_secs(30)));
    }

    #[test]
    fn success_ends_a_cooldown_and_resets_its_length() {
        let (mut cooling, begin) = (Cooling::default(), Instant::now());
        let later = begin + Duration::from_secs(30);
        cooling.rejected(begin);
        cooling.rejected(later);
        assert_eq!(cooling.remaining(later), Some(Duration::from_secs(60)));
        cooling.accepted(1);
        assert_eq!(cooling.remaining(later), None);
        cooling.rejected(later);
        assert_eq!(cooling.remaining(later), Some(Duration::from_secs(30)));
    }
}
