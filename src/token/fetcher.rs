//! The fetching task of a credential: single flight, exponential back-off and secret rotation.
//!
//! It fetches at the start, refreshes the token before its end and after a refusal by the upstream, and backs off after a
//! failure. It is the only caller of the token endpoint and the only writer of the slot's token.
//!
//! A *pair* is an app key with its app secret. When the files change, the new pair becomes the *candidate* and is put on trial:
//! tokens are fetched with it as well as with the pair in use, each on a schedule of its own. A trial that fails neither delays
//! nor ends the refreshes of the pair in use. A refused trial is repeated after the same pauses as any refused pair, since the
//! cloud may learn of a new secret later than the gateway. The candidate replaces the pair in use once it has brought a token.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};
use serde_json::{Map, json};
use tokio::time::{Instant, sleep_until};

use super::endpoint::{Endpoint, FetchError, Fetched, SCHEME, WithoutToken};
use super::metrics::{CredentialLabel, ResultLabels};
use super::pair::{AppKeyPair, BadPair, Sources};
use super::schedule::{FetchFailure, Held, MIN_GAP, Moment, Plan, Retry};
use super::{ActiveToken, Contest, Events, Slot, Token, TokenMetrics, contest};
use crate::changes::Change;
use crate::config::SecretSource;
use crate::file_watch::{FileChange, FileWatch, POLL, SETTLE};
use crate::files::{Aside, Hangs};
use crate::reason::{Reason, shown};
use crate::secret::needles::{Needles, SHORTEST};

/// The time after the end of the present token in which that token, if the endpoint returns it again, still counts as the old
/// one. After that it counts as a new token with a new lifetime, since the endpoint issues no other.
const GRACE: Duration = Duration::from_secs(2);

/// The largest error of a remaining lifetime that the endpoint states: endpoints round it down to whole seconds.
const ROUNDING: Duration = Duration::from_secs(1);

/// The state of the fetching task.
pub(super) struct Fetcher {
    pub(super) endpoint: Endpoint,
    pub(super) secrets: Secrets,
    /// The pair in use: the last one that brought a token, or the one of the start.
    pub(super) active: Candidate,
    /// A changed pair that has not brought a token yet.
    pub(super) candidate: Option<Candidate>,
    /// When the last fetch began, with either pair.
    pub(super) last_begun: Option<Instant>,
    pub(super) generation: u64,
    /// Whether the log has the warning that a token is too short to be searched for in replies.
    pub(super) told_short: bool,
    pub(super) contest: Contest,
    pub(super) metrics: TokenMetrics,
    /// The result of the last change of the secrets, for `/status` and metrics.
    pub(super) change: Change,
    /// Why the last check of the files found no usable pair; `None` if it found one.
    pub(super) unusable: Option<String>,
    pub(super) events: Events,
}

/// The files of a pair, read on a thread of their own: a dead mount would otherwise stop the refreshes.
pub(super) struct Secrets {
    watch: Aside<FileWatch<AppKeyPair, BadPair>, FileChange<AppKeyPair, BadPair>>,
    /// When the files are checked next.
    next_check: Instant,
}

/// A pair with its own back-off: the one in use, or the one on trial.
pub(super) struct Candidate {
    pair: AppKeyPair,
    pub(super) retry: Retry,
    without_token: WithoutToken,
    /// The result that was recorded last for this trial. The same result is not recorded again.
    reported: Option<&'static str>,
    /// Why the last fetch on trial brought no token. It is reported again once the files can be read again after an error.
    refused: Option<String>,
}

/// When the next fetch is due, and with which pair.
pub(super) struct NextFetch {
    pub(super) at: Instant,
    /// Whether it is a fetch with the changed pair.
    pub(super) is_candidate: bool,
}

impl Candidate {
    pub(super) fn new(pair: AppKeyPair) -> Self {
        let (retry, without_token) = (Retry::new(Instant::now()), WithoutToken::default());
        Self { pair, retry, without_token, reported: None, refused: None }
    }
}

impl Fetcher {
    /// Runs until its runtime ends.
    pub(super) async fn run(mut self, slot: &Slot) {
        // The gauge is set on a timer as well: while the secret files hang, no check of them ends, but the token may expire.
        let mut poll = Instant::now() + 2 * POLL;
        loop {
            if poll <= Instant::now() {
                poll = Instant::now() + 2 * POLL;
                self.update_gauge(slot);
            }
            // Before `next`, which asks the contest how long a refused token is not replaced.
            self.check_contest(slot);
            let next = self.next(slot);
            if next.at <= Instant::now() {
                // Awaited outside of `select!`, which would drop the call half-way at another event.
                self.fetch(slot, next.is_candidate).await;
                continue;
            }
            // Each wake-up computes `next` anew: a waiting request, or a changed pair, may have made a fetch due sooner.
            let change = tokio::select! {
                () = sleep_until(next.at.min(poll)) => continue,
                () = slot.wake.notified() => continue,
                change = self.secrets.next() => change,
            };
            self.on_change(slot, change);
            poll = Instant::now() + 2 * POLL;
            self.update_gauge(slot);
        }
    }

    /// Detects the beginning and the end of a contest, in which another client's fetches end this gateway's tokens. Sets the
    /// gauge and `/status`, and logs each of the two once.
    pub(super) fn check_contest(&mut self, slot: &Slot) {
        let gauge = self.metrics.contested.get_or_create_owned(&CredentialLabel::of(slot));
        if self.contest.was_ended(slot.ended.load(Ordering::Relaxed)) {
            gauge.set(1);
            slot.contested.begins(None, contest::SAID.to_owned());
            tracing::warn!(credential = slot.name, "{}", contest::SAID);
        }
        let active = slot.active.load();
        let Some(active) = active.as_ref() else { return };
        let (generation, age, refresh) = (active.token.generation(), active.age(), active.plan.refresh);
        // A token that was never accepted on the route, as for a service that is not purchased, says nothing of another client.
        let is_over = if active.is_invalidated() {
            active.had_worked.load(Ordering::Relaxed)
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

    fn update_gauge(&self, slot: &Slot) {
        let usable = slot.current().is_some();
        self.metrics.usable.get_or_create(&CredentialLabel::of(slot)).set(usable.into());
    }

    /// Returns the next fetch: due when there is a reason for one, but not before the pair's back-off and [`MIN_GAP`] allow it.
    pub(super) fn next(&self, slot: &Slot) -> NextFetch {
        let now = Instant::now();
        let reason = match slot.active.load().as_ref() {
            Some(active) if !active.is_invalidated() => {
                now + active.plan.refresh.saturating_sub(active.age())
            }
            Some(_) => self.contest.not_before().unwrap_or(now),
            None => now,
        };
        // Back-off gets shorter only if a request waits and no token can be sent. Then a longer pause would fail that request.
        let urgent = slot.current().is_none() && slot.is_awaited();
        let earliest = self.last_begun.map_or(now, |begun| begun + MIN_GAP);
        let allowed =
            |candidate: &Candidate| candidate.retry.at(urgent, self.last_begun).max(earliest).max(now);
        let active = reason.max(allowed(&self.active));
        // The candidate does not wait for the next refresh: a wrong secret would go unnoticed until the token ends.
        match self.candidate.as_ref().map(allowed) {
            Some(candidate) if candidate <= active => NextFetch { at: candidate, is_candidate: true },
            _ => NextFetch { at: active, is_candidate: false },
        }
    }

    /// Calls the endpoint once and takes the result into the slot. `is_candidate`: with the changed pair, if there is one.
    pub(super) async fn fetch(&mut self, slot: &Slot, is_candidate: bool) {
        // The life is counted from before the request: the endpoint issues the token at an unknown moment after that.
        let sent = Moment::now();
        self.last_begun = Some(sent.monotonic);
        slot.fetch_begins();
        let candidate = self.candidate.as_mut().filter(|_| is_candidate).unwrap_or(&mut self.active);
        let result = self.endpoint.fetch(&candidate.pair.app_key, &candidate.pair.app_secret).await;
        let result = candidate.without_token.on_result(result);
        let label = result.as_ref().map_or_else(|error| error.reason().cause.as_str(), |_| "ok");
        self.metrics.fetches.get_or_create(&ResultLabels::of(slot, label)).inc();
        match result {
            Ok(fetched) => self.succeed(slot, fetched, sent, is_candidate),
            Err(error) if is_candidate => self.candidate_failed(slot, &error),
            Err(error) => self.fail(slot, &error),
        }
    }

    fn succeed(&mut self, slot: &Slot, fetched: Fetched, sent: Moment, is_candidate: bool) {
        let adopted =
            self.candidate.take_if(|_| is_candidate).map(|candidate| self.active = candidate).is_some();
        // Reset after the adoption above, since the schedule is that of the pair that brought the token.
        self.active.retry = Retry::new(sent.monotonic);
        if let Some(skew) = fetched.skew {
            self.metrics.skew.get_or_create(&CredentialLabel::of(slot)).set(skew);
        }
        let active = match slot.active.load_full() {
            Some(old) if self.is_same(&old, &fetched) => old.to_the_end(fetched.lifetime, sent),
            _ => self.new_token(slot, fetched, sent),
        };
        slot.fetch_succeeded(active, self.held());
        if adopted {
            // An error of the files is more recent than this token, so it stays in `/status`.
            if self.unusable.is_none() {
                self.change.accepted();
            }
            // Recorded after the token is in the slot: a request that begins after this record must not get the token of the old
            // pair.
            self.report(slot, "accepted");
        }
    }

    /// Whether the endpoint returned the present token again, for the pair in use.
    fn is_same(&self, old: &ActiveToken, fetched: &Fetched) -> bool {
        let token = &old.token;
        *token.authorization() == fetched.authorization
            && *token.app_key() == self.active.pair.header
            // With a changed secret it counts as new, so that replies are searched for the present secret.
            && token.needles().are_of(&self.active.pair.app_secret)
            && old.age() < old.lifetime + GRACE
    }

    /// Returns a fetched token with the next generation number and its plan.
    fn new_token(&mut self, slot: &Slot, fetched: Fetched, sent: Moment) -> ActiveToken {
        self.generation += 1;
        let generation = i64::try_from(self.generation).unwrap_or(i64::MAX);
        self.metrics.generation.get_or_create(&CredentialLabel::of(slot)).set(generation);
        let Fetched { authorization, lifetime, .. } = fetched;
        tracing::info!(credential = slot.name, generation, lifetime = lifetime.as_secs(), "new token");
        // A short token would be found where nobody quoted it, so it is not searched for. Operators must know that, once.
        if authorization.len() < SCHEME.len() + SHORTEST && !std::mem::replace(&mut self.told_short, true) {
            tracing::warn!(
                "the token of credential {} has fewer than {SHORTEST} bytes: replies that quote it are not noticed",
                slot.name
            );
        }
        let token = Token::new(authorization, &self.active.pair, self.generation);
        ActiveToken::new(token, lifetime, Plan::new(lifetime, jitter()), sent)
    }

    /// Records a failed fetch with the pair in use.
    fn fail(&mut self, slot: &Slot, error: &FetchError) {
        let (reason, text) = self.described(error, slot);
        tracing::warn!(credential = slot.name, cause = %reason.cause, error = text, "token fetch failed");
        // An invalidated token counts as usable here, unlike in `next`: this failure puts it back into use, so there is time.
        let urgent = slot.usable().is_none() && slot.is_awaited();
        self.active.retry.failed(error.failure(), urgent, Instant::now(), jitter());
        slot.fetch_failed(reason.cause, text, self.held());
    }

    /// Records a failed fetch with the changed pair, which stays the candidate.
    fn candidate_failed(&mut self, slot: &Slot, error: &FetchError) {
        let (reason, text) = self.described(error, slot);
        tracing::warn!(
            credential = slot.name,
            cause = %reason.cause,
            error = &*text,
            "token fetch with the changed secret failed; the old secret stays in use"
        );
        let refused = format!("a token fetch with it failed ({}): {text}", reason.cause);
        if self.unusable.is_none() {
            self.change.refused(&refused);
        }
        let urgent = slot.usable().is_none() && slot.is_awaited();
        let failure = error.failure();
        if let Some(candidate) = &mut self.candidate {
            candidate.retry.failed(failure, urgent, Instant::now(), jitter());
            candidate.refused = Some(refused);
        }
        slot.candidate_failed(self.held());
        self.report(slot, if failure == FetchFailure::Refused { "refused" } else { "postponed" });
    }

    /// Returns the reason of a failed fetch, and its text for log and `/status`. The text contains no app key, no app secret
    /// and no token.
    fn described(&self, error: &FetchError, slot: &Slot) -> (Reason, String) {
        let reason = error.reason();
        // Both pairs: an endpoint, or a proxy before it, may quote the one that an earlier call sent.
        let pairs = [Some(&self.active), self.candidate.as_ref()].into_iter().flatten();
        let pairs: Vec<_> = pairs
            .map(|Candidate { pair, .. }| {
                Needles::new([b"", pair.app_key.expose(), pair.app_secret.expose()])
            })
            .collect();
        let token = slot.last_token();
        let text = shown(&reason, pairs.iter().chain(token.as_ref().map(Token::needles)));
        (reason, text)
    }

    /// Returns the pause in which no fetch is made, even if requests wait. `None` if at least one pair is in no such pause.
    fn held(&self) -> Option<Held> {
        let active = self.active.retry.held()?;
        let Some(candidate) = &self.candidate else { return Some(active) };
        // The earlier end counts. Only the refusal of the pair in use is reported, since callers depend on that pair.
        let until = candidate.retry.held()?.until.min(active.until);
        Some(Held { until, refused: active.refused })
    }

    /// Counts and records the result of a candidate, unless it is the same as the last one.
    fn report(&mut self, slot: &Slot, result: &'static str) {
        // An accepted candidate has become the pair in use by now.
        let candidate = self.candidate.as_mut().unwrap_or(&mut self.active);
        if candidate.reported.replace(result) != Some(result) {
            self.metrics.reloads.get_or_create(&ResultLabels::of(slot, result)).inc();
            (self.events)("secret_change", Map::from_iter([("result".to_owned(), json!(result))]));
        }
    }

    /// Waits for the next check of the files, and makes a changed pair the candidate.
    #[cfg(test)]
    pub(super) async fn check_secrets(&mut self, slot: &Slot) {
        let change = self.secrets.next().await;
        self.on_change(slot, change);
    }

    /// Applies the result of a check of the files: puts a changed pair on trial, or reports why the files cannot be used.
    fn on_change(&mut self, slot: &Slot, change: Result<FileChange<AppKeyPair, BadPair>, Hangs>) {
        match change {
            // Read once only: the files of a pair are written one after the other, so this may be a mixed or half-written pair.
            Ok(FileChange::Settling) => {}
            Ok(FileChange::Nothing) => {
                // The files can be read again and hold the same pair as before the error, so the result of that pair is reported
                // again.
                if self.unusable.take().is_some() {
                    match &self.candidate {
                        None => self.change.accepted(),
                        Some(candidate) => candidate.refused.iter().for_each(|why| self.change.refused(why)),
                    }
                }
            }
            Ok(FileChange::Unusable(error)) => self.report_unusable(slot, error.to_string()),
            Err(hangs) => self.report_unusable(slot, hangs.to_string()),
            Ok(FileChange::Changed(pair)) => {
                self.unusable = None;
                tracing::info!(credential = slot.name, "the secret changed");
                // An operator has acted: a pair that was refused may be accepted now, even if the files hold the pair in use
                // again.
                self.active.retry.forget_refusals(Instant::now());
                self.active.without_token = WithoutToken::default();
                self.candidate = (pair != self.active.pair).then(|| Candidate::new(pair));
                if self.candidate.is_none() {
                    self.change.accepted();
                }
                // From here on requests wait for a fetch again, instead of failing at once because of the old refusal.
                slot.fetches_are_held(self.held());
            }
        }
    }

    /// Reports why the files hold no usable pair. A reason that repeats at the next checks is reported once.
    fn report_unusable(&mut self, slot: &Slot, error: String) {
        if self.unusable.as_ref() == Some(&error) {
            return;
        }
        self.change.refused(&error);
        tracing::warn!(credential = slot.name, error, "the secret cannot be used; the old one stays in use");
        self.unusable = Some(error);
    }
}

impl Secrets {
    /// Watches the files of these sources; `known` is what they hold.
    pub(super) fn new(sources: Sources, known: AppKeyPair) -> Self {
        // Nobody can change the environment of a running process, so only files are watched.
        let file = |source: &SecretSource| match source {
            SecretSource::File(path) => Some(path.clone()),
            SecretSource::Env(_) => None,
        };
        let files = [&sources.0, &sources.1].into_iter().filter_map(file).collect();
        let watch = FileWatch::new(files, move || AppKeyPair::load(&sources), known);
        Self { watch: Aside::new(watch), next_check: Instant::now() + POLL }
    }

    /// Waits until the next check is due and returns its result. Cancellation safe: the thread that reads goes on, and the next
    /// call takes its result.
    async fn next(&mut self) -> Result<FileChange<AppKeyPair, BadPair>, Hangs> {
        sleep_until(self.next_check).await;
        let change = self.watch.run(FileWatch::poll).await?;
        // Two equal readings must follow each other soon, so that a change takes about a second and not two.
        let wait = if matches!(change, FileChange::Settling) { SETTLE } else { POLL };
        self.next_check = Instant::now() + wait;
        Ok(change)
    }
}

impl ActiveToken {
    /// Returns this token with new times, after the endpoint has returned it again. `lifetime` is what that reply states, and
    /// `sent` is when its request was sent. The token ends no later than before. It is sent to its very end, since the endpoint
    /// issues no other until then.
    pub(super) fn to_the_end(&self, lifetime: Duration, sent: Moment) -> Self {
        // Some servers state the full lifetime each time, some the rest of it. Only a rest that is clearly shorter ends it
        // earlier.
        let restated = self.sent.age(sent) + lifetime + ROUNDING;
        let lifetime = if restated < self.lifetime { restated - ROUNDING } else { self.lifetime };
        let plan = Plan::to_the_end(lifetime, self.took);
        Self {
            token: self.token.clone(),
            lifetime,
            plan,
            end: self.sent.end(plan.stop),
            invalidated: AtomicBool::new(false),
            had_worked: AtomicBool::new(false),
            ..*self
        }
    }
}

/// Returns a random number from 0 to 1; 0 if the kernel has no randomness.
fn jitter() -> f64 {
    let mut bytes = [0; 4];
    // The error is ignored: without jitter many gateways would refresh at the same time, which is no reason to stop fetching.
    let _ = getrandom(&mut bytes, GetRandomFlags::empty());
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}
