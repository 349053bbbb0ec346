//! Stage 5: a usable token from the slot of the route's credential.
//!
//! One slot per credential, read without a lock. One task per credential, on the background runtime,
//! fetches; all waiters share what it brings, and a caller that goes away cancels nothing. Guarantees that a
//! token whose life is over is never handed out, and that two fetches are never closer than a second.

mod endpoint;
mod schedule;

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use aws_lc_rs::rand;
use http::HeaderValue;
use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry};
use rustls::ClientConfig;
use serde::Serialize;
use serde_json::{Map, Value, json};
use thiserror::Error;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until, timeout_at},
};

use crate::{
    config::{self, SecretSource},
    connect::TlsError,
    secret::{Secret, SecretError},
};
use endpoint::{Endpoint, FetchError, Fetched};
use schedule::{Backoff, MIN_GAP, Plan, refusal};

/// How often the secrets are read again. Polling notices what a watch on a file misses: Kubernetes swaps a
/// link, and a mount can be replaced whole.
const POLL: Duration = Duration::from_secs(1);

/// A token that is handed out again this long after its end is taken as a new one: that server has no other.
const GRACE: Duration = Duration::from_secs(2);

/// Requests that wait make the next try come at most this long after the earliest allowed moment.
const URGENT: Duration = Duration::from_secs(2);

/// Tells the audit trail of a change.
pub type Events = Box<dyn Fn(&'static str, Map<String, Value>) + Send + Sync>;

/// A token and the app key that it belongs to, ready to be injected. Cannot be printed.
#[derive(Clone)]
pub struct Token {
    authorization: HeaderValue,
    app_key: HeaderValue,
    generation: u64,
}

impl Token {
    /// `Bearer …`, marked sensitive.
    pub fn authorization(&self) -> &HeaderValue {
        &self.authorization
    }

    /// The app key, marked sensitive.
    pub fn app_key(&self) -> &HeaderValue {
        &self.app_key
    }

    /// Counts the different tokens of this process, from 1.
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(generation {})", self.generation)
    }
}

/// Why there is no token.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum TokenError {
    /// None came within `token.wait`.
    #[error("no token came in time")]
    Unavailable {
        /// When to come back.
        retry_after: Duration,
    },
    /// The endpoint refuses the credential.
    #[error("the endpoint refuses the credential")]
    CredentialRefused {
        /// When it is asked again.
        retry_after: Duration,
    },
}

/// Why a slot could not be made.
#[derive(Debug, Error)]
pub enum StartError {
    /// A secret could not be read.
    #[error("credential {0}: {1}")]
    Secret(String, SecretError),
    /// An app key that no header can hold.
    #[error("credential {0}: the app key holds characters that a header cannot hold")]
    AppKey(String),
    /// The endpoint's name or TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// What `/status` and `/readyz` tell of a slot.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The credential's name.
    pub name: String,
    /// Whether there ever was a token.
    pub had_token: bool,
    /// The present token's generation, 0 for none.
    pub generation: u64,
    /// How long it may still be used.
    pub seconds_left: Option<u64>,
    /// The class of the last failure since the last success.
    pub last_error: Option<&'static str>,
}

/// Counts of the token's life.
#[derive(Clone, Debug)]
pub struct Metrics {
    fetches: IntCounterVec,
    reloads: IntCounterVec,
    generation: IntGaugeVec,
    usable: IntGaugeVec,
    skew: IntGaugeVec,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let opts = |name: &str, help: &str| Opts::new(format!("ccsqm_gateway_token_{name}"), help);
        let gauge = |name, help| IntGaugeVec::new(opts(name, help), &["credential"]);
        let fetches = opts("fetches_total", "Calls of the token endpoint, by result.");
        let reloads = opts("secret_reloads_total", "Changed secrets that were tried, by result.");
        let metrics = Self {
            fetches: IntCounterVec::new(fetches, &["credential", "result"])?,
            reloads: IntCounterVec::new(reloads, &["credential", "result"])?,
            generation: gauge("generation", "Counts the different tokens since the start.")?,
            usable: gauge("usable", "Whether there is a usable token.")?,
            skew: gauge("skew_seconds", "The endpoint's clock minus ours.")?,
        };
        registry.register(Box::new(metrics.fetches.clone()))?;
        registry.register(Box::new(metrics.reloads.clone()))?;
        for gauge in [&metrics.generation, &metrics.usable, &metrics.skew] {
            registry.register(Box::new(gauge.clone()))?;
        }
        Ok(metrics)
    }
}

/// The token of one credential.
pub struct Slot {
    name: String,
    sources: (SecretSource, SecretSource),
    endpoint: Endpoint,
    wait: Duration,
    live: ArcSwapOption<Live>,
    /// The highest generation that the upstream refused and nobody has tried to replace yet.
    refused_generation: AtomicU64,
    /// Requests that wait for a token.
    waiting: AtomicUsize,
    wake: Notify,
    fetches: watch::Sender<Fetches>,
    task: Mutex<Option<Task>>,
    metrics: Metrics,
    events: Events,
}

/// How the fetches stand; every change wakes the waiters.
#[derive(Clone, Copy, Debug, Default)]
struct Fetches {
    begun: u64,
    ended: u64,
    refused_until: Option<Instant>,
    last_error: Option<&'static str>,
    had_token: bool,
}

/// A token in use.
struct Live {
    token: Token,
    lifetime: Duration,
    plan: Plan,
    sent: Instant,
    sent_wall: SystemTime,
}

impl Live {
    /// The larger of both clocks' ages counts: a suspend stops the monotonic one, a jump back the other.
    fn age(&self) -> Duration {
        self.sent.elapsed().max(self.sent_wall.elapsed().unwrap_or_default())
    }

    fn is_usable(&self) -> bool {
        self.age() < self.plan.stop
    }
}

/// What only the fetching task knows.
struct Task {
    pair: Pair,
    /// A changed pair that has not proved itself.
    trial: Option<Pair>,
    seen: Pair,
    last_begun: Option<Instant>,
    not_before: Instant,
    /// The last failure named no time, so that requests that wait may shorten the back-off.
    transient: bool,
    backoff: Backoff,
    refusals: u32,
    generation: u64,
}

#[derive(Clone, PartialEq, Eq)]
struct Pair {
    app_key: Secret,
    app_secret: Secret,
}

impl Pair {
    fn load((app_key, app_secret): &(SecretSource, SecretSource)) -> Result<Self, SecretError> {
        Ok(Self { app_key: Secret::load(app_key)?, app_secret: Secret::load(app_secret)? })
    }

    fn header(&self) -> Option<HeaderValue> {
        let mut header = HeaderValue::from_bytes(self.app_key.expose()).ok()?;
        header.set_sensitive(true);
        Some(header)
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot({})", self.name)
    }
}

impl Slot {
    /// A slot without a token. [`Slot::run`] fills it.
    pub fn new(
        credential: &config::Credential,
        token: &config::Token,
        tls: &Arc<ClientConfig>,
        metrics: Metrics,
        events: Events,
    ) -> Result<Arc<Self>, StartError> {
        let name = credential.name.clone();
        let sources = (credential.app_key.clone(), credential.app_secret.clone());
        let pair = Pair::load(&sources).map_err(|error| StartError::Secret(name.clone(), error))?;
        if pair.header().is_none() {
            return Err(StartError::AppKey(name));
        }
        let task = Task {
            seen: pair.clone(),
            pair,
            trial: None,
            last_begun: None,
            not_before: Instant::now(),
            transient: true,
            backoff: Backoff::default(),
            refusals: 0,
            generation: 0,
        };
        Ok(Arc::new(Self {
            name,
            sources,
            endpoint: Endpoint::new(token, tls)?,
            wait: token.wait,
            live: ArcSwapOption::empty(),
            refused_generation: AtomicU64::new(0),
            waiting: AtomicUsize::new(0),
            wake: Notify::new(),
            fetches: watch::Sender::new(Fetches::default()),
            task: Mutex::new(Some(task)),
            metrics,
            events,
        }))
    }

    /// A usable token: at once if there is one, else as soon as a fetch brings it, within `token.wait`.
    pub async fn token(&self) -> Result<Token, TokenError> {
        if let Some(token) = self.current() {
            return Ok(token);
        }
        self.wait_for_token().await
    }

    /// Another token than the refused one, if one can be had. All who ask at once share one fetch.
    pub async fn replace(&self, refused: u64) -> Option<Token> {
        let another = || self.usable().filter(|token| token.generation > refused);
        let mut fetches = self.fetches.subscribe();
        if let Some(token) = another() {
            return Some(token);
        }
        // A fetch that is under way is as good as one of our own.
        let Fetches { begun, ended, .. } = *fetches.borrow_and_update();
        let ours = begun.max(ended + 1);
        self.refused_generation.fetch_max(refused, Ordering::AcqRel);
        self.wake.notify_one();
        let deadline = Instant::now() + self.wait;
        loop {
            let changed = timeout_at(deadline, fetches.changed()).await;
            let after_us = fetches.borrow_and_update().ended >= ours;
            match another() {
                Some(token) => return Some(token),
                None if after_us || !matches!(changed, Ok(Ok(()))) => return None,
                None => {}
            }
        }
    }

    /// How things stand, without any secret.
    pub fn status(&self) -> Status {
        let fetches = *self.fetches.borrow();
        let live = self.live.load();
        let left = live.as_ref().and_then(|live| live.plan.stop.checked_sub(live.age()));
        Status {
            name: self.name.clone(),
            had_token: fetches.had_token,
            generation: live.as_ref().map_or(0, |live| live.token.generation),
            seconds_left: left.map(|left| left.as_secs()),
            last_error: fetches.last_error,
        }
    }

    /// A token that may be sent now: alive, and not just refused.
    fn current(&self) -> Option<Token> {
        self.usable().filter(|token| token.generation > self.refused_generation.load(Ordering::Acquire))
    }

    fn usable(&self) -> Option<Token> {
        let live = self.live.load();
        live.as_ref().filter(|live| live.is_usable()).map(|live| live.token.clone())
    }

    #[cold]
    async fn wait_for_token(&self) -> Result<Token, TokenError> {
        let deadline = Instant::now() + self.wait;
        let mut fetches = self.fetches.subscribe();
        let _waiting = Waiting::new(&self.waiting);
        self.wake.notify_one();
        loop {
            let refused_until = fetches.borrow_and_update().refused_until;
            if let Some(token) = self.current() {
                return Ok(token);
            }
            let refused = refused_until.map(|until| until.saturating_duration_since(Instant::now()));
            if let Some(retry_after) = refused.filter(|left| !left.is_zero()) {
                return Err(TokenError::CredentialRefused { retry_after });
            }
            if !matches!(timeout_at(deadline, fetches.changed()).await, Ok(Ok(()))) {
                return Err(TokenError::Unavailable { retry_after: Duration::from_secs(1) });
            }
        }
    }

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

/// Counts a waiting request.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

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

/// A number from 0 to 1.
fn jitter() -> f64 {
    let mut bytes = [0; 4];
    // Without randomness all gateways would refresh at once, which is no reason to refuse work.
    let _ = rand::fill(&mut bytes);
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}
