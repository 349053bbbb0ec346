//! The one fetching task of a credential.

use std::{
    sync::{Arc, MutexGuard, PoisonError, atomic::Ordering},
    time::{Duration, SystemTime},
};

use aws_lc_rs::rand;
use http::HeaderValue;
use serde_json::{Map, json};
use tokio::time::{Instant, sleep_until};

use super::{
    Live, Slot, Token,
    endpoint::{FetchError, Fetched},
    schedule::{Backoff, MIN_GAP, Plan, refusal},
};
use crate::{
    config::SecretSource,
    secret::{Secret, SecretError},
};

/// How often the secrets are read again. Polling notices what a watch on a file misses: Kubernetes swaps a
/// link, and a mount can be replaced whole.
const POLL: Duration = Duration::from_secs(1);

/// A token that is handed out again this long after its end is taken as a new one: that server has no other.
const GRACE: Duration = Duration::from_secs(2);

/// Requests that wait make the next try come at most this long after the earliest allowed moment.
const URGENT: Duration = Duration::from_secs(2);

/// What only the fetching task knows.
pub(super) struct Task {
    pub(super) pair: Pair,
    /// A changed pair that has not proved itself.
    pub(super) trial: Option<Pair>,
    pub(super) seen: Pair,
    pub(super) last_begun: Option<Instant>,
    pub(super) not_before: Instant,
    /// The last failure named no time, so that requests that wait may shorten the back-off.
    pub(super) transient: bool,
    pub(super) backoff: Backoff,
    pub(super) refusals: u32,
    pub(super) generation: u64,
}

#[derive(Clone, PartialEq, Eq)]
pub(super) struct Pair {
    app_key: Secret,
    app_secret: Secret,
}

impl Pair {
    pub(super) fn load((app_key, app_secret): &(SecretSource, SecretSource)) -> Result<Self, SecretError> {
        Ok(Self { app_key: Secret::load(app_key)?, app_secret: Secret::load(app_secret)? })
    }

    pub(super) fn header(&self) -> Option<HeaderValue> {
        let mut header = HeaderValue::from_bytes(self.app_key.expose()).ok()?;
        header.set_sensitive(true);
        Some(header)
    }
}

impl Slot {
    /// The one task of this credential: fetches first thing, refreshes ahead, backs off, and notices
    /// changed secrets. Runs until its runtime ends; a second call returns at once.
    pub async fn run(self: Arc<Self>) {
        let Some(mut task) = self.lock_task().take() else { return };
        let mut poll = Instant::now() + POLL;
        loop {
            let due = self.due(&task);
            if due <= Instant::now() {
                self.fetch(&mut task).await;
                continue;
            }
            tokio::select! {
                () = sleep_until(due.min(poll)) => {}
                () = self.wake.notified() => {}
            }
            if poll <= Instant::now() {
                poll = Instant::now() + POLL;
                self.notice_secrets(&mut task);
                let usable = self.usable().is_some();
                self.metrics.usable.with_label_values(&[&self.name]).set(usable.into());
            }
        }
    }

    fn lock_task(&self) -> MutexGuard<'_, Option<Task>> {
        self.task.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the next fetch is due: when there is reason for one, but not before the back-off allows it.
    fn due(&self, task: &Task) -> Instant {
        let now = Instant::now();
        let live = self.live.load();
        let reason = match live.as_ref() {
            _ if task.trial.is_some() => now,
            Some(live) if live.token.generation <= self.refused_generation.load(Ordering::Acquire) => now,
            Some(live) => now + live.plan.refresh.saturating_sub(live.age()),
            None => now,
        };
        let gap = task.last_begun.map_or(now, |begun| begun + MIN_GAP);
        let urgent = task.transient && live.as_ref().is_none_or(|live| !live.is_usable());
        let not_before = if urgent && self.waiting.load(Ordering::Relaxed) > 0 {
            task.not_before.min(gap + URGENT)
        } else {
            task.not_before
        };
        reason.max(gap).max(not_before)
    }

    async fn fetch(&self, task: &mut Task) {
        let begun = Instant::now();
        let sent_wall = SystemTime::now();
        task.last_begun = Some(begun);
        self.fetches.send_modify(|fetches| fetches.begun += 1);
        let replaced = self.live.load().as_ref().map_or(0, |live| live.token.generation);
        let is_trial = task.trial.is_some();
        let pair = task.trial.clone().unwrap_or_else(|| task.pair.clone());
        let result = self.endpoint.fetch(&pair.app_key, &pair.app_secret).await;
        let label = result.as_ref().map_or_else(FetchError::class, |_| "ok");
        self.metrics.fetches.with_label_values(&[&self.name, label]).inc();
        let error = match result {
            Ok(fetched) => {
                self.accept(task, fetched, &pair, begun, sent_wall);
                None
            }
            Err(error) => {
                tracing::warn!(credential = self.name, %error, trial = is_trial, "no token");
                self.back_off(task, &error);
                Some(error)
            }
        };
        if is_trial {
            self.conclude_trial(task, pair, error.as_ref());
        }
        // Whatever came of it, the refusal was looked into; without a new token the old one is used on.
        let _ = self
            .refused_generation
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |refused| (refused <= replaced).then_some(0));
        let refused = matches!(error, Some(FetchError::Refused(_)));
        self.fetches.send_modify(|fetches| {
            fetches.ended = fetches.begun;
            fetches.had_token |= error.is_none();
            fetches.last_error = error.as_ref().map(FetchError::class);
            fetches.refused_until = refused.then_some(task.not_before);
        });
    }

    fn accept(&self, task: &mut Task, fetched: Fetched, pair: &Pair, sent: Instant, sent_wall: SystemTime) {
        let Fetched { authorization, lifetime, skew } = fetched;
        task.backoff.reset();
        task.refusals = 0;
        task.not_before = sent;
        if let Some(skew) = skew {
            self.metrics.skew.with_label_values(&[&self.name]).set(skew);
        }
        let old = self.live.load_full();
        let same =
            old.filter(|old| old.token.authorization == authorization && old.age() < old.lifetime + GRACE);
        if let Some(old) = same {
            let plan = Plan::to_the_end(old.lifetime);
            let (token, lifetime) = (old.token.clone(), old.lifetime);
            self.live.store(Some(Arc::new(Live {
                token,
                lifetime,
                plan,
                sent: old.sent,
                sent_wall: old.sent_wall,
            })));
            return;
        }
        let Some(app_key) = pair.header() else { return };
        task.generation += 1;
        let token = Token { authorization, app_key, generation: task.generation };
        let plan = Plan::new(lifetime, jitter());
        self.live.store(Some(Arc::new(Live { token, lifetime, plan, sent, sent_wall })));
        let generation = i64::try_from(task.generation).unwrap_or(i64::MAX);
        self.metrics.generation.with_label_values(&[&self.name]).set(generation);
        tracing::info!(credential = self.name, generation, lifetime = lifetime.as_secs(), "new token");
    }

    fn back_off(&self, task: &mut Task, error: &FetchError) {
        let urgent = self.usable().is_none() && self.waiting.load(Ordering::Relaxed) > 0;
        task.transient = !matches!(error, FetchError::Refused(_) | FetchError::Status(_, Some(_)));
        let wait = match error {
            FetchError::Refused(_) => {
                task.refusals += 1;
                refusal(task.refusals - 1)
            }
            FetchError::Status(_, Some(wait)) => *wait,
            FetchError::Status(_, None)
            | FetchError::Invalid(_)
            | FetchError::Connect(_)
            | FetchError::Http
            | FetchError::Timeout => task.backoff.next(!urgent, jitter()),
        };
        task.not_before = Instant::now() + wait;
    }

    /// A changed pair is tried before it replaces the old one.
    fn notice_secrets(&self, task: &mut Task) {
        let Ok(pair) = Pair::load(&self.sources) else { return };
        if pair == task.seen {
            return;
        }
        task.seen = pair.clone();
        task.trial = (pair != task.pair && pair.header().is_some()).then_some(pair);
        task.refusals = 0;
        task.not_before = Instant::now();
        self.fetches.send_modify(|fetches| fetches.refused_until = None);
        tracing::info!(credential = self.name, "the secret changed");
    }

    fn conclude_trial(&self, task: &mut Task, pair: Pair, error: Option<&FetchError>) {
        let result = match error {
            None => {
                task.pair = pair;
                task.trial = None;
                "accepted"
            }
            Some(FetchError::Refused(_)) => {
                task.trial = None; // until it changes again
                task.not_before = Instant::now();
                "refused"
            }
            Some(_) => return, // tried again after the back-off
        };
        self.metrics.reloads.with_label_values(&[&self.name, result]).inc();
        (self.events)("secret_change", Map::from_iter([("result".to_owned(), json!(result))]));
    }
}

/// A number from 0 to 1.
fn jitter() -> f64 {
    let mut bytes = [0; 4];
    // Without randomness all gateways would refresh at once, which is no reason to refuse work.
    let _ = rand::fill(&mut bytes);
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}
