//! The one fetching task of a credential: fetches first thing, refreshes ahead, backs off, tries changed
//! secrets. Only this task calls the endpoint and puts tokens into the slot.
//!
//! A changed pair is tried beside the old one, each on a schedule of its own: a trial that fails, in whatever
//! way, neither delays nor ends the old pair's refreshes. It goes on being tried as a refused pair is,
//! since the cloud may learn of a new secret later than the gateway.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};
use serde_json::{Map, json};
use tokio::time::{Instant, sleep_until};

use super::endpoint::{Endpoint, FetchError, Fetched, SCHEME, WithoutToken};
use super::metrics::{CredentialLabel, ResultLabels};
use super::pair::{Pair, PairError, Sources};
use super::schedule::{Failure, Held, MIN_GAP, Moment, Plan, Retry};
use super::{Contest, Events, Live, Metrics, Slot, Token, contest};
use crate::changes::Change;
use crate::config::SecretSource;
use crate::files::{Aside, Hangs};
use crate::reason::{Reason, shown};
use crate::secret::needles::{Needles, SHORTEST};
use crate::watched::{Noticed, POLL, SETTLE, Watched};

/// A token that is handed out again this long after its end is taken as a new one: that server has no other.
const GRACE: Duration = Duration::from_secs(2);

/// A server that restates what is left of a token's life rounds it down to whole seconds.
const ROUNDING: Duration = Duration::from_secs(1);

/// What only the fetching task knows.
pub(super) struct Fetcher {
    pub(super) endpoint: Endpoint,
    pub(super) secrets: Secrets,
    /// The pair in use.
    pub(super) proven: Candidate,
    /// A changed pair that has not proved itself.
    pub(super) trial: Option<Candidate>,
    pub(super) last_begun: Option<Instant>,
    pub(super) generation: u64,
    /// It was told that a token is too short to be looked for in replies.
    pub(super) told_short: bool,
    pub(super) contest: Contest,
    pub(super) metrics: Metrics,
    /// What came of the last change of the secrets.
    pub(super) change: Change,
    /// Why the files could not be read, or held no usable pair, when they were last looked at.
    pub(super) unusable: Option<String>,
    pub(super) events: Events,
}

/// The files of a pair. They are looked at on a thread of their own, so that no file that hangs delays a fetch.
pub(super) struct Secrets {
    watched: Aside<Watched<Pair, PairError>, Noticed<Pair, PairError>>,
    due: Instant,
}

/// A pair and when it may be tried.
pub(super) struct Candidate {
    pair: Pair,
    pub(super) retry: Retry,
    without_token: WithoutToken,
    /// What the audit trail was told of this trial.
    told: Option<&'static str>,
    /// Why the last call with it brought no token, while it is on trial.
    refused: Option<String>,
}

/// The next fetch.
pub(super) struct Next {
    pub(super) at: Instant,
    pub(super) is_trial: bool,
}

impl Candidate {
    pub(super) fn new(pair: Pair) -> Self {
        let (retry, without_token) = (Retry::new(Instant::now()), WithoutToken::default());
        Self { pair, retry, without_token, told: None, refused: None }
    }
}

impl Fetcher {
    /// Runs until its runtime ends.
    pub(super) async fn run(mut self, slot: &Slot) {
        // Secrets that hang are no reason to keep the metric as it is.
        let mut poll = Instant::now() + 2 * POLL;
        loop {
            if poll <= Instant::now() {
                poll = Instant::now() + 2 * POLL;
                self.tell_usable(slot);
            }
            self.look_at_contest(slot);
            let next = self.next(slot);
            if next.at <= Instant::now() {
                self.fetch(slot, next.is_trial).await;
                continue;
            }
            let noticed = tokio::select! {
                () = sleep_until(next.at.min(poll)) => continue,
                () = slot.wake.notified() => continue,
                noticed = self.secrets.next() => noticed,
            };
            self.notice(slot, noticed);
            poll = Instant::now() + 2 * POLL;
            self.tell_usable(slot);
        }
    }

    /// Notices that somebody else ends the tokens of this gateway, and that it is over.
    pub(super) fn look_at_contest(&mut self, slot: &Slot) {
        let gauge = self.metrics.contested.get_or_create_owned(&CredentialLabel::of(slot));
        if self.contest.was_ended(slot.ended.load(Ordering::Relaxed)) {
            gauge.set(1);
            slot.contested.begins(None, contest::SAID.to_owned());
            tracing::warn!(credential = slot.name, "{}", contest::SAID);
        }
        let live = slot.live.load();
        let Some(live) = live.as_ref() else { return };
        let (generation, age, refresh) = (live.token.generation(), live.age(), live.plan.refresh);
        let is_over = if live.is_retired() {
            live.had_worked.load(Ordering::Relaxed)
                && self.contest.refused(generation, age, refresh, contest::pause(slot.wait, jitter()))
        } else {
            self.contest.lives(age, refresh)
        };
        if is_over {
            gauge.set(0);
            slot.contested.ends();
            let age = age.as_secs();
            tracing::info!(credential = slot.name, age, "{}", contest::OVER);
        }
    }

    fn tell_usable(&self, slot: &Slot) {
        let usable = slot.current().is_some();
        self.metrics.usable.get_or_create(&CredentialLabel::of(slot)).set(usable.into());
    }

    /// When the next fetch is due: when there is reason for one, but not before the back-off allows it.
    pub(super) fn next(&self, slot: &Slot) -> Next {
        let now = Instant::now();
        let reason = match slot.live.load().as_ref() {
            Some(live) if !live.is_retired() => now + live.plan.refresh.saturating_sub(live.age()),
            Some(_) => self.contest.not_before().unwrap_or(now),
            None => now,
        };
        let urgent = slot.current().is_none() && slot.is_awaited();
        let earliest = self.last_begun.map_or(now, |begun| begun + MIN_GAP);
        let allowed =
            |candidate: &Candidate| candidate.retry.at(urgent, self.last_begun).max(earliest).max(now);
        let proven = reason.max(allowed(&self.proven));
        match self.trial.as_ref().map(allowed) {
            Some(trial) if trial <= proven => Next { at: trial, is_trial: true },
            _ => Next { at: proven, is_trial: false },
        }
    }

    pub(super) async fn fetch(&mut self, slot: &Slot, is_trial: bool) {
        let sent = Moment::now();
        self.last_begun = Some(sent.monotonic);
        slot.fetch_begins();
        let candidate = self.trial.as_mut().filter(|_| is_trial).unwrap_or(&mut self.proven);
        let result = self.endpoint.fetch(&candidate.pair.app_key, &candidate.pair.app_secret).await;
        let result = candidate.without_token.judge(result);
        let label = result.as_ref().map_or_else(|error| error.reason().cause.as_str(), |_| "ok");
        self.metrics.fetches.get_or_create(&ResultLabels::of(slot, label)).inc();
        match result {
            Ok(fetched) => self.succeed(slot, fetched, sent, is_trial),
            Err(error) if is_trial => self.fail_trial(slot, &error),
            Err(error) => self.fail(slot, &error),
        }
    }

    fn succeed(&mut self, slot: &Slot, fetched: Fetched, sent: Moment, is_trial: bool) {
        let adopted = self.trial.take_if(|_| is_trial).map(|trial| self.proven = trial).is_some();
        self.proven.retry = Retry::new(sent.monotonic);
        if let Some(skew) = fetched.skew {
            self.metrics.skew.get_or_create(&CredentialLabel::of(slot)).set(skew);
        }
        let live = match slot.live.load_full() {
            Some(old) if self.is_same(&old, &fetched) => old.to_the_end(fetched.lifetime, sent),
            _ => self.new_token(slot, fetched, sent),
        };
        slot.fetch_succeeded(live, self.held());
        if adopted {
            if self.unusable.is_none() {
                self.change.accepted();
            }
            self.tell(slot, "accepted"); // behind the deed: from here on no request takes the old token
        }
    }

    /// Whether the server handed the token out again that it gave before.
    fn is_same(&self, old: &Live, fetched: &Fetched) -> bool {
        let token = &old.token;
        *token.authorization() == fetched.authorization
            && *token.app_key() == self.proven.pair.header
            && token.needles().are_of(&self.proven.pair.app_secret) // replies are searched for the present one
            && old.age() < old.lifetime + GRACE
    }

    fn new_token(&mut self, slot: &Slot, fetched: Fetched, sent: Moment) -> Live {
        self.generation += 1;
        let generation = i64::try_from(self.generation).unwrap_or(i64::MAX);
        self.metrics.generation.get_or_create(&CredentialLabel::of(slot)).set(generation);
        let Fetched { authorization, lifetime, .. } = fetched;
        tracing::info!(credential = slot.name, generation, lifetime = lifetime.as_secs(), "new token");
        if authorization.len() < SCHEME.len() + SHORTEST && !std::mem::replace(&mut self.told_short, true) {
            tracing::warn!(
                "the token of credential {} has fewer than {SHORTEST} bytes: replies that quote it are not noticed",
                slot.name
            );
        }
        let token = Token::new(authorization, &self.proven.pair, self.generation);
        Live::new(token, lifetime, Plan::new(lifetime, jitter()), sent)
    }

    fn fail(&mut self, slot: &Slot, error: &FetchError) {
        let (reason, text) = self.said(error, slot);
        tracing::warn!(credential = slot.name, cause = %reason.cause, error = text, "no token");
        let urgent = slot.usable().is_none() && slot.is_awaited();
        self.proven.retry.failed(error.failure(), urgent, Instant::now(), jitter());
        slot.fetch_failed(reason.cause, text, self.held());
    }

    fn fail_trial(&mut self, slot: &Slot, error: &FetchError) {
        let (reason, text) = self.said(error, slot);
        tracing::warn!(
            credential = slot.name,
            cause = %reason.cause,
            error = &*text,
            "the changed secret brought no token; the old one stays in use"
        );
        let refused = format!("it brought no token ({}): {text}", reason.cause);
        if self.unusable.is_none() {
            self.change.refused(&refused);
        }
        let urgent = slot.usable().is_none() && slot.is_awaited();
        let failure = error.failure();
        if let Some(trial) = &mut self.trial {
            trial.retry.failed(failure, urgent, Instant::now(), jitter());
            trial.refused = Some(refused);
        }
        slot.trial_failed(self.held());
        self.tell(slot, if failure == Failure::Refused { "refused" } else { "postponed" });
    }

    /// Why a fetch failed, and what is shown of it: nothing that quotes either pair or the token.
    fn said(&self, error: &FetchError, slot: &Slot) -> (Reason, String) {
        let reason = error.reason();
        let pairs = [Some(&self.proven), self.trial.as_ref()].into_iter().flatten();
        let pairs: Vec<_> = pairs
            .map(|Candidate { pair, .. }| {
                Needles::new([b"", pair.app_key.expose(), pair.app_secret.expose()])
            })
            .collect();
        let token = slot.last_token();
        let text = shown(&reason, pairs.iter().chain(token.as_ref().map(Token::needles)));
        (reason, text)
    }

    /// What no request can shorten: each pair is held back.
    fn held(&self) -> Option<Held> {
        let proven = self.proven.retry.held()?;
        let Some(trial) = &self.trial else { return Some(proven) };
        let until = trial.retry.held()?.until.min(proven.until);
        Some(Held { until, refused: proven.refused })
    }

    /// Says what became of a changed secret, once for each result.
    fn tell(&mut self, slot: &Slot, result: &'static str) {
        let candidate = self.trial.as_mut().unwrap_or(&mut self.proven);
        if candidate.told.replace(result) != Some(result) {
            self.metrics.reloads.get_or_create(&ResultLabels::of(slot, result)).inc();
            (self.events)("secret_change", Map::from_iter([("result".to_owned(), json!(result))]));
        }
    }

    /// Waits for the next look at the pair, and takes it if it has changed.
    #[cfg(test)]
    pub(super) async fn notice_secrets(&mut self, slot: &Slot) {
        let noticed = self.secrets.next().await;
        self.notice(slot, noticed);
    }

    fn notice(&mut self, slot: &Slot, noticed: Result<Noticed<Pair, PairError>, Hangs>) {
        match noticed {
            Ok(Noticed::Settling) => {}
            Ok(Noticed::Nothing) => {
                // What could not be read is what it was: in use, or on trial as before.
                if self.unusable.take().is_some() {
                    match &self.trial {
                        None => self.change.accepted(),
                        Some(trial) => trial.refused.iter().for_each(|why| self.change.refused(why)),
                    }
                }
            }
            Ok(Noticed::Unusable(error)) => self.tell_unusable(slot, error.to_string()),
            Err(hangs) => self.tell_unusable(slot, hangs.to_string()),
            Ok(Noticed::Changed(pair)) => {
                self.unusable = None;
                tracing::info!(credential = slot.name, "the secret changed");
                self.proven.retry.forget_refusals(Instant::now());
                self.proven.without_token = WithoutToken::default();
                self.trial = (pair != self.proven.pair).then(|| Candidate::new(pair));
                if self.trial.is_none() {
                    self.change.accepted();
                }
                slot.fetches_are_held(self.held());
            }
        }
    }

    /// Each reason is told once, and again when another one was told in between.
    fn tell_unusable(&mut self, slot: &Slot, error: String) {
        if self.unusable.as_ref() == Some(&error) {
            return;
        }
        self.change.refused(&error);
        tracing::warn!(credential = slot.name, error, "the secret cannot be used; the old one stays in use");
        self.unusable = Some(error);
    }
}

impl Secrets {
    pub(super) fn new(sources: Sources, known: Pair) -> Self {
        let file = |source: &SecretSource| match source {
            SecretSource::File(path) => Some(path.clone()),
            SecretSource::Env(_) => None,
        };
        let files = [&sources.0, &sources.1].into_iter().filter_map(file).collect();
        let watched = Watched::new(files, move || Pair::load(&sources), known);
        Self { watched: Aside::new(watched), due: Instant::now() + POLL }
    }

    /// The next look at them, when it is due. Can be cancelled.
    async fn next(&mut self) -> Result<Noticed<Pair, PairError>, Hangs> {
        sleep_until(self.due).await;
        let noticed = self.watched.run(Watched::look).await?;
        let wait = if matches!(noticed, Noticed::Settling) { SETTLE } else { POLL };
        self.due = Instant::now() + wait;
        Ok(noticed)
    }
}

impl Live {
    /// The same token once more. It keeps its earlier end, and is used up to it: that server has no other.
    pub(super) fn to_the_end(&self, lifetime: Duration, sent: Moment) -> Self {
        let restated = self.sent.age(sent) + lifetime + ROUNDING;
        let lifetime = if restated < self.lifetime { restated - ROUNDING } else { self.lifetime };
        let plan = Plan::to_the_end(lifetime, self.took);
        Self {
            token: self.token.clone(),
            lifetime,
            plan,
            end: self.sent.end(plan.stop),
            retired: AtomicBool::new(false),
            had_worked: AtomicBool::new(false),
            ..*self
        }
    }
}

/// A number from 0 to 1.
fn jitter() -> f64 {
    let mut bytes = [0; 4];
    // Without randomness all gateways would refresh at once, which is no reason to refuse work.
    let _ = getrandom(&mut bytes, GetRandomFlags::empty());
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}
