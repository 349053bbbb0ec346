//! Stage 6: caches one access token per credential and fetches it by single flight.
//!
//! Requests read a [`Slot`] without a lock. One task per credential, on the background runtime, is the only caller of the token
//! endpoint. All requests that wait share its next fetch, and a caller that disconnects does not cancel it.
//!
//! No request gets an expired token, and two fetches begin at least one second apart. A token is not stored on disk: a restart
//! fetches a new one. Whether the upstream still accepts a token is not checked here; the exchange reports a refusal.

mod contest;
mod endpoint;
mod fetcher;
mod metrics;
mod pair;
mod schedule;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use http::{HeaderMap, HeaderValue};
use serde::Serialize;
use serde_json::{Map, Value};
use thiserror::Error;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};

use crate::config;
use crate::connect::{Egress, TlsError};
use crate::model::cause::Cause;
use crate::secret::needles::Needles;
use crate::trouble::{LastTrouble, Trouble};
use contest::Contest;
use endpoint::{Endpoint, SCHEME};
use fetcher::{Candidate, Fetcher, Secrets};
pub use metrics::TokenMetrics;
pub use pair::BadPair;
pub(crate) use pair::header as app_key_header;
use pair::{AppKeyPair, Sources};
use schedule::{Expiry, Held, Moment, Plan};

/// Reports an event of one credential, by name and members, to the audit trail.
pub type Events = Box<dyn Fn(&'static str, Map<String, Value>) + Send + Sync>;

/// A token and its app key as header values. `Debug` shows the generation only. A clone costs one reference count.
#[derive(Clone)]
pub struct Token(Arc<Parts>);

struct Parts {
    authorization: HeaderValue,
    app_key: HeaderValue,
    generation: u64,
    needles: Needles,
    /// The headers that all requests with this token share, built at first use.
    head: OnceLock<HeaderMap>,
}

impl Token {
    fn new(authorization: HeaderValue, pair: &AppKeyPair, generation: u64) -> Self {
        // A reply may quote the token without its scheme, so the scheme is not searched for.
        let token = authorization.as_bytes();
        let token = token.strip_prefix(SCHEME.as_bytes()).unwrap_or(token);
        let needles = Needles::new([token, pair.app_key.expose(), pair.app_secret.expose()]);
        let app_key = pair.header.clone();
        Self(Arc::new(Parts { authorization, app_key, generation, needles, head: OnceLock::new() }))
    }

    /// The token, app key and app secret, for the search for quoted secrets in replies.
    pub fn needles(&self) -> &Needles {
        &self.0.needles
    }

    /// Returns the headers cached with this token. Only the first call runs `make`, so every caller must build the same ones.
    pub fn head(&self, make: impl FnOnce() -> HeaderMap) -> &HeaderMap {
        self.0.head.get_or_init(make)
    }

    /// The value of `Authorization`: `Bearer` and the token, marked sensitive.
    pub fn authorization(&self) -> &HeaderValue {
        &self.0.authorization
    }

    /// The value of `x-app-key`, marked sensitive.
    pub fn app_key(&self) -> &HeaderValue {
        &self.0.app_key
    }

    /// The number of this token among those of its credential since the start, from 1.
    pub fn generation(&self) -> u64 {
        self.0.generation
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(generation {})", self.generation())
    }
}

/// Why a request gets no token.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum NoUsableToken {
    /// No token came within `token.wait`, or the endpoint's `Retry-After` allows no fetch within that time.
    #[error("no token came in time")]
    Unavailable {
        /// Why the last fetch with the secret in use failed; [`Cause::Timeout`] if it succeeded, or if none has ended yet.
        cause: Cause,
        /// The value of `Retry-After`.
        retry_after: Duration,
    },
    /// The endpoint refuses the app key or the app secret, and the pause after that refusal is not over.
    #[error("the endpoint refuses the credential")]
    CredentialRefused {
        /// How long the pause still lasts: the value of `Retry-After`.
        retry_after: Duration,
    },
}

/// Why [`Slot::replace`] found no other token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplaceError {
    /// The endpoint returned the refused token again.
    Same,
    /// No fetch brought a token, for this cause.
    Failed(Cause),
}

/// Why a slot could not be created.
#[derive(Debug, Error)]
pub enum SlotError {
    /// The app key or the app secret of the named credential cannot be read or used.
    #[error("credential {0}: {1}")]
    Pair(String, BadPair),
    /// The endpoint's host is not a server name.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// The state of a slot in `/status` and `/readyz`. Holds no secret.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The credential's name.
    pub name: String,
    /// Whether a fetch has succeeded since the start.
    pub had_token: bool,
    /// The generation of the last token; 0 before the first.
    pub generation: u64,
    /// The whole seconds for which that token may still be sent; `None` once it has expired.
    pub seconds_left: Option<u64>,
    /// The last failure of fetches; its `over` is set once a fetch succeeds.
    pub last_error: Option<Trouble>,
    /// The last contest: another client's fetches with the same app key ended this gateway's tokens.
    pub contested: Option<Trouble>,
}

/// The token of one credential.
pub struct Slot {
    name: String,
    wait: Duration,
    active: ArcSwapOption<ActiveToken>,
    /// The number of requests that wait for a token.
    waiting: AtomicUsize,
    /// Wakes the fetcher. It stores one permit, so a wake-up during a fetch is not lost.
    wake: Notify,
    /// The state of the fetches. Its lock makes the end of a fetch atomic, and the invalidation of a token as well.
    fetches: watch::Sender<Fetches>,
    last_error: LastTrouble,
    contested: LastTrouble,
    /// The newest generation that another client's fetch ended.
    ended: AtomicU64,
    /// `None` once [`Slot::run`] has taken it.
    fetcher: Mutex<Option<Fetcher>>,
}

/// The state of the fetches. A change wakes the requests that wait.
#[derive(Clone, Copy, Debug, Default)]
struct Fetches {
    /// The number of the last fetch that began, from 1.
    begun: u64,
    /// The number of the last fetch that answered waiting requests. One that failed with a changed secret usually answers none.
    ended: u64,
    held: Option<Held>,
    /// Why the last fetch with the secret in use failed; `None` after a success.
    failed: Option<Cause>,
    had_token: bool,
}

/// The token of a slot, with the times at which it is refreshed and ends.
struct ActiveToken {
    token: Token,
    lifetime: Duration,
    plan: Plan,
    sent: Moment,
    /// The end of its use: it is not sent once *now* or the wall clock has reached this.
    end: Expiry,
    /// The time from sending the request for it to reading the reply.
    took: Duration,
    /// Whether it is out of use: the upstream refused it, and no fetch has ended after that.
    invalidated: AtomicBool,
    /// Whether the upstream had accepted it earlier on the refused call's route, and no fetch of this gateway can have ended it.
    had_worked: AtomicBool,
}

impl ActiveToken {
    fn new(token: Token, lifetime: Duration, plan: Plan, sent: Moment) -> Self {
        let took = sent.age(Moment::now());
        let end = sent.end(plan.stop);
        let (invalidated, had_worked) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { token, lifetime, plan, sent, end, took, invalidated, had_worked }
    }

    fn age(&self) -> Duration {
        self.sent.age(Moment::of_turn())
    }

    fn is_usable(&self) -> bool {
        self.end.is_ahead()
    }

    fn is_invalidated(&self) -> bool {
        self.invalidated.load(Ordering::Acquire)
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot({})", self.name)
    }
}

impl Slot {
    /// Creates a slot without a token, which [`Slot::run`] fills. Reads the app key and secret, and fails if they cannot be used.
    pub fn new(
        credential: &config::Credential,
        token: &config::Token,
        egress: &Egress,
        metrics: TokenMetrics,
        events: Events,
    ) -> Result<Arc<Self>, SlotError> {
        let (sources, pair) = read(credential)?;
        let fetcher = Fetcher {
            endpoint: Endpoint::new(token, egress)?,
            secrets: Secrets::new(sources, pair.clone()),
            active: Candidate::new(pair),
            candidate: None,
            last_begun: None,
            generation: 0,
            told_short: false,
            contest: Contest::default(),
            change: metrics.changes.of(format!("credential {}", credential.name)),
            unusable: None,
            metrics,
            events,
        };
        Ok(Arc::new(Self {
            name: credential.name.clone(),
            wait: token.wait,
            active: ArcSwapOption::empty(),
            waiting: AtomicUsize::new(0),
            wake: Notify::new(),
            fetches: watch::Sender::new(Fetches::default()),
            last_error: LastTrouble::default(),
            contested: LastTrouble::default(),
            ended: AtomicU64::new(0),
            fetcher: Mutex::new(Some(fetcher)),
        }))
    }

    /// The credential's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs the fetching task of this credential until its runtime ends. A second call returns at once.
    pub async fn run(self: Arc<Self>) {
        let fetcher = self.fetcher.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(fetcher) = fetcher {
            fetcher.run(&self).await;
        }
    }

    /// Returns a usable token: at once if the slot has one, else as soon as a fetch brings one. Waits at most `token.wait`. Fails
    /// sooner in the pause after a refused credential, or if `Retry-After` allows no fetch in that time. Cancellation safe.
    pub async fn token(&self) -> Result<Token, NoUsableToken> {
        if let Some(token) = self.current() {
            return Ok(token);
        }
        // Boxed, so that the rare wait does not enlarge the future of every request.
        Box::pin(self.wait_for_token()).await
    }

    /// The last token, though it may be expired or refused: to search replies for it, not to send it.
    pub fn last_token(&self) -> Option<Token> {
        self.active.load().as_ref().map(|active| active.token.clone())
    }

    /// Returns a token newer than generation `refused`, which the upstream refused. Concurrent calls share one fetch, even one
    /// that is under way. Waits at most `token.wait`; cancellation safe. `had_worked`: the upstream had accepted the refused
    /// token earlier on the call's route, and [`Slot::has_left_alone`] was true when the refusal came.
    pub async fn replace(&self, refused: u64, had_worked: bool) -> Result<Token, ReplaceError> {
        let deadline = Instant::now() + self.wait;
        let mut fetches = self.fetches.subscribe();
        // Counted before the wake-up: the fetcher tells by the count whether the fetch is urgent.
        let _waiting = Waiting::new(&self.waiting);
        let looked_into = self.invalidate(refused, had_worked, deadline);
        self.wake.notify_one();
        loop {
            // Read before the slot: a fetch that ends in between then counts as a change, and the wait below returns at once.
            let Fetches { ended, failed, .. } = *fetches.borrow_and_update();
            let none = ReplaceError::Failed(failed.unwrap_or(Cause::Timeout));
            if let Some(token) = self.newer(refused) {
                return Ok(token);
            }
            if looked_into.is_none_or(|fetch| fetch <= ended) {
                let same = looked_into.is_some() && failed.is_none();
                return Err(if same { ReplaceError::Same } else { none });
            }
            if !matches!(timeout_at(deadline, fetches.changed()).await, Ok(Ok(()))) {
                return Err(none);
            }
        }
    }

    /// Whether this generation is the present token and no fetch is under way. Then no fetch of this gateway has ended it.
    pub fn has_left_alone(&self, generation: u64) -> bool {
        // The lock is held to the end, so that no fetch replaces the token between the two reads.
        let fetches = self.fetches.borrow();
        let active = self.active.load();
        fetches.begun == fetches.ended
            && active.as_ref().is_some_and(|active| active.token.generation() == generation)
    }

    /// Reports that another client ended this generation: a call that was refused with it succeeded with another token. To be
    /// called only if `had_worked` was true in [`Slot::replace`].
    pub fn was_ended(&self, generation: u64) {
        self.ended.fetch_max(generation, Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// Returns the present token if it is usable and of a later generation. Causes no fetch.
    pub fn newer(&self, generation: u64) -> Option<Token> {
        self.current().filter(|token| token.generation() > generation)
    }

    /// The state for `/status` and `/readyz`.
    pub fn status(&self) -> Status {
        let fetches = *self.fetches.borrow();
        let active = self.active.load();
        let left = active.as_ref().and_then(|active| active.plan.stop.checked_sub(active.age()));
        Status {
            name: self.name.clone(),
            had_token: fetches.had_token,
            generation: active.as_ref().map_or(0, |active| active.token.generation()),
            seconds_left: left.map(|left| left.as_secs()),
            last_error: self.last_error.get(),
            contested: self.contested.get(),
        }
    }

    /// The token if it may be sent now: neither expired nor invalidated.
    fn current(&self) -> Option<Token> {
        let active = self.active.load();
        let active = active.as_ref().filter(|active| active.is_usable() && !active.is_invalidated())?;
        Some(active.token.clone())
    }

    /// The token if it has not expired, invalidated or not.
    fn usable(&self) -> Option<Token> {
        let active = self.active.load();
        active.as_ref().filter(|active| active.is_usable()).map(|active| active.token.clone())
    }

    /// Invalidates the token, unless it is newer than `refused`, until the end of the fetch under way, or else of the next fetch.
    /// Returns the number of that fetch. Does nothing and returns `None` if waiting is hopeless: even a refused token beats none.
    fn invalidate(&self, refused: u64, had_worked: bool, deadline: Instant) -> Option<u64> {
        let mut looked_into = None;
        // For its lock only: no fetch may end between the choice of its number and the invalidation of the token.
        self.fetches.send_if_modified(|fetches| {
            let now = Instant::now();
            if fetches.held.is_none_or(|held| !held.is_hopeless(now, deadline)) {
                looked_into = Some(fetches.begun.max(fetches.ended + 1));
                if let Some(active) = &*self.active.load()
                    && active.token.generation() <= refused
                {
                    let is_refused = active.token.generation() == refused;
                    active.had_worked.fetch_or(had_worked && is_refused, Ordering::Relaxed);
                    // Last: the fetcher reads `had_worked` only once it sees this.
                    active.invalidated.store(true, Ordering::Release);
                }
            }
            false
        });
        looked_into
    }

    #[cold]
    async fn wait_for_token(&self) -> Result<Token, NoUsableToken> {
        let deadline = Instant::now() + self.wait;
        let mut fetches = self.fetches.subscribe();
        let _waiting = Waiting::new(&self.waiting);
        self.wake.notify_one();
        loop {
            let Fetches { held, failed, .. } = *fetches.borrow_and_update();
            let cause = failed.unwrap_or(Cause::Timeout);
            if let Some(token) = self.current() {
                return Ok(token);
            }
            let now = Instant::now();
            // Fails now rather than after the whole wait, which no fetch can end.
            if let Some(Held { until, refused }) = held.filter(|held| held.is_hopeless(now, deadline)) {
                let retry_after = until - now;
                return Err(if refused {
                    NoUsableToken::CredentialRefused { retry_after }
                } else {
                    NoUsableToken::Unavailable { cause, retry_after }
                });
            }
            if !matches!(timeout_at(deadline, fetches.changed()).await, Ok(Ok(()))) {
                return Err(NoUsableToken::Unavailable { cause, retry_after: Duration::from_secs(1) });
            }
        }
    }

    fn is_awaited(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    fn fetch_begins(&self) {
        self.fetches.send_if_modified(|fetches| {
            fetches.begun += 1;
            // No request waits for the beginning of a fetch.
            false
        });
    }

    fn fetch_succeeded(&self, active: ActiveToken, held: Option<Held>) {
        self.fetches.send_modify(|fetches| {
            self.active.store(Some(Arc::new(active)));
            *fetches = Fetches { ended: fetches.begun, held, failed: None, had_token: true, ..*fetches };
        });
        self.last_error.ends();
    }

    fn fetch_failed(&self, cause: Cause, error: String, held: Option<Held>) {
        let failed = Some(cause);
        self.last_error.begins(failed, error);
        self.fetches.send_modify(|fetches| {
            self.reinstate();
            *fetches = Fetches { ended: fetches.begun, held, failed, ..*fetches };
        });
    }

    /// Records that a fetch with a changed secret failed. Requests go on waiting, unless both secrets are in a pause ([`Held`]).
    fn candidate_failed(&self, held: Option<Held>) {
        self.fetches.send_modify(|fetches| {
            fetches.held = held;
            if held.is_some() {
                self.reinstate();
                fetches.ended = fetches.begun;
            }
        });
    }

    fn fetches_are_held(&self, held: Option<Held>) {
        self.fetches.send_modify(|fetches| fetches.held = held);
    }

    /// Lets an invalidated token be used again: no other can be had, and the refusal may have another cause than the token.
    fn reinstate(&self) {
        if let Some(active) = &*self.active.load() {
            active.invalidated.store(false, Ordering::Release);
        }
    }
}

fn read(credential: &config::Credential) -> Result<(Sources, AppKeyPair), SlotError> {
    let sources = (credential.app_key(), credential.app_secret());
    let pair = AppKeyPair::load(&sources).map_err(|error| SlotError::Pair(credential.name.clone(), error))?;
    Ok((sources, pair))
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

#[cfg(test)]
mod tests;
