//! Upstream refusals that fetching does not help against.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::schedule::refusal;

/// Whether refused tokens of one credential on one route still cause fetches.
///
/// A second 401 in a row says that the token is not what is wrong. For 30 s, doubling to 5 min, further ones
/// cause no fetch; the newest token stays in use, and the first success ends it.
#[derive(Debug, Default)]
pub struct Cooldown(Mutex<Cooling>);

#[derive(Debug, Default)]
struct Cooling {
    until: Option<Instant>,
    count: u32,
}

impl Cooldown {
    /// Whether it is going on.
    pub fn active(&self) -> bool {
        self.remaining().is_some()
    }

    /// How long it still goes on.
    pub fn remaining(&self) -> Option<Duration> {
        let left = self.lock().until?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// A fresh token was refused, too.
    pub fn rejected(&self) {
        let mut cooling = self.lock();
        cooling.until = Some(Instant::now() + refusal(cooling.count));
        cooling.count += 1;
    }

    /// A token was accepted.
    pub fn accepted(&self) {
        let mut cooling = self.lock();
        if cooling.count > 0 {
            *cooling = Cooling::default();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Cooling> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
