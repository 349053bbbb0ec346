//! Stage 6: a usable token from the slot of the route's credential.
//!
//! One slot per credential, read without a lock. One task per credential, on the background runtime,
//! fetches; all waiters share what it brings, and a caller that goes away cancels nothing. Guarantees that a
//! token whose life is over is never handed out, and that two fetches are never closer than a second.

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
pub use metrics::Metrics;
pub use pair::PairError;
pub(crate) use pair::header as app_key_header;
use pair::{Pair, Sources};
use schedule::{End, Held, Moment, Plan};

/// Tells the audit trail of a change.
pub type Events = Box<dyn Fn(&'static str, Map<String, Value>) + Send + Sync>;

/// A token and the app key that it belongs to, ready to be injected. Cannot be printed. Cheap to clone.
#[derive(Clone)]
pub struct Token(Arc<Parts>);

struct Parts {
    authorization: HeaderValue,
    app_key: HeaderValue,
    generation: u64,
    needles: Needles,
    /// The head of all requests that are sent with it.
    head: OnceLock<HeaderMap>,
}

impl Token {
    fn new(authorization: HeaderValue, pair: &Pair, generation: u64) -> Self {
        let token = authorization.as_bytes();
        let token = token.strip_prefix(SCHEME.as_bytes()).unwrap_or(token);
        let needles = Needles::new([token, pair.app_key.expose(), pair.app_secret.expose()]);
        let app_key = pair.header.clone();
        Self(Arc::new(Parts { authorization, app_key, generation, needles, head: OnceLock::new() }))
    }

    /// The token, its app key and its app secret, as something to look for in what the other side says.
    pub fn needles(&self) -> &Needles {
        &self.0.needles
    }

    /// What `make` makes, the first time.
    pub fn head(&self, make: impl FnOnce() -> HeaderMap) -> &HeaderMap {
        self.0.head.get_or_init(make)
    }

    /// `Bearer …`, marked sensitive.
    pub fn authorization(&self) -> &HeaderValue {
        &self.0.authorization
    }

    /// The app key, marked sensitive.
    pub fn app_key(&self) -> &HeaderValue {
        &self.0.app_key
    }

    /// Counts the different tokens of this process, from 1.
    pub fn generation(&self) -> u64 {
        self.0.generation
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(generation {})", self.generation())
    }
}

/// Why there is no token.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum TokenError {
    /// None came within `token.wait`.
    #[error("no token came in time")]
    Unavailable {
        /// Why the last fetch brought none; that it takes too long, if none has ended.
        cause: Cause,
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

/// Why there is no other token than a refused one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoOther {
    /// The endpoint handed the same token out again.
    Same,
    /// No fetch brought one: why the last one did not.
    Failed(Cause),
}

/// Why a slot could not be made.
#[derive(Debug, Error)]
pub enum StartError {
    /// A pair that cannot be read or used.
    #[error("credential {0}: {1}")]
    Pair(String, PairError),
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
    /// The last fetch that failed.
    pub last_error: Option<Trouble>,
    /// Somebody else ends this gateway's tokens by fetching others.
    pub contested: Option<Trouble>,
}

/// The token of one credential.
pub struct Slot {
    name: String,
    wait: Duration,
    live: ArcSwapOption<Live>,
    /// Requests that wait for a token.
    waiting: AtomicUsize,
    wake: Notify,
    /// Its lock makes a fetch's end and a token's retirement one step each.
    fetches: watch::Sender<Fetches>,
    /// The last fetch that failed, with its text.
    last_error: LastTrouble,
    contested: LastTrouble,
    /// The newest generation that somebody else ended.
    ended: AtomicU64,
    fetcher: Mutex<Option<Fetcher>>,
}

/// How the fetches stand. What they bring wakes the waiters.
#[derive(Clone, Copy, Debug, Default)]
struct Fetches {
    begun: u64,
    ended: u64,
    held: Option<Held>,
    /// Why the last one failed, if it did.
    failed: Option<Cause>,
    had_token: bool,
}

/// A token in use.
struct Live {
    token: Token,
    lifetime: Duration,
    plan: Plan,
    sent: Moment,
    /// When it stops being sent, by either clock.
    end: End,
    /// From sending the request to having the answer.
    took: Duration,
    /// The upstream refused it, and no fetch has looked into that yet.
    retired: AtomicBool,
    /// It had worked where it was refused, and no fetch of this gateway can have ended it.
    had_worked: AtomicBool,
}

impl Live {
    fn new(token: Token, lifetime: Duration, plan: Plan, sent: Moment) -> Self {
        let took = sent.age(Moment::now());
        let end = sent.end(plan.stop);
        let (retired, had_worked) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { token, lifetime, plan, sent, end, took, retired, had_worked }
    }

    fn age(&self) -> Duration {
        self.sent.age(Moment::of_turn())
    }

    fn is_usable(&self) -> bool {
        self.end.is_ahead()
    }

    fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
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
        egress: &Egress,
        metrics: Metrics,
        events: Events,
    ) -> Result<Arc<Self>, StartError> {
        let (sources, pair) = read(credential)?;
        let fetcher = Fetcher {
            endpoint: Endpoint::new(token, egress)?,
            secrets: Secrets::new(sources, pair.clone()),
            proven: Candidate::new(pair),
            trial: None,
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
            live: ArcSwapOption::empty(),
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

    /// The one task of this credential. Runs until its runtime ends; a second call returns at once.
    pub async fn run(self: Arc<Self>) {
        let fetcher = self.fetcher.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(fetcher) = fetcher {
            fetcher.run(&self).await;
        }
    }

    /// A usable token: at once if there is one, else as soon as a fetch brings it, within `token.wait`.
    pub async fn token(&self) -> Result<Token, TokenError> {
        if let Some(token) = self.current() {
            return Ok(token);
        }
        Box::pin(self.wait_for_token()).await
    }

    /// The last token, whether it may be sent or not.
    pub fn last_token(&self) -> Option<Token> {
        self.live.load().as_ref().map(|live| live.token.clone())
    }

    /// Another token than the refused one, if one can be had. All who ask at once share one fetch, and one
    /// that is under way is as good. `had_worked`: it had worked where it is refused now, and [`Slot::has_left_alone`] held then.
    pub async fn replace(&self, refused: u64, had_worked: bool) -> Result<Token, NoOther> {
        let deadline = Instant::now() + self.wait;
        let mut fetches = self.fetches.subscribe();
        let _waiting = Waiting::new(&self.waiting);
        let looked_into = self.retire(refused, had_worked, deadline);
        self.wake.notify_one();
        loop {
            let Fetches { ended, failed, .. } = *fetches.borrow_and_update();
            let none = NoOther::Failed(failed.unwrap_or(Cause::Timeout));
            if let Some(token) = self.newer(refused) {
                return Ok(token);
            }
            if looked_into.is_none_or(|fetch| fetch <= ended) {
                let same = looked_into.is_some() && failed.is_none();
                return Err(if same { NoOther::Same } else { none });
            }
            if !matches!(timeout_at(deadline, fetches.changed()).await, Ok(Ok(()))) {
                return Err(none);
            }
        }
    }

    /// Whether no fetch of this gateway, done or under way, can have ended a token of this generation.
    pub fn has_left_alone(&self, generation: u64) -> bool {
        let fetches = self.fetches.borrow(); // holds up the end of a fetch
        let live = self.live.load();
        fetches.begun == fetches.ended
            && live.as_ref().is_some_and(|live| live.token.generation() == generation)
    }

    /// A call was refused with a token of this generation, which had worked and was left alone, and succeeded with another one.
    pub fn was_ended(&self, generation: u64) {
        self.ended.fetch_max(generation, Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// A token of a later generation, if there is one already. Fetches nothing.
    pub fn newer(&self, generation: u64) -> Option<Token> {
        self.current().filter(|token| token.generation() > generation)
    }

    /// How things stand, without any secret.
    pub fn status(&self) -> Status {
        let fetches = *self.fetches.borrow();
        let live = self.live.load();
        let left = live.as_ref().and_then(|live| live.plan.stop.checked_sub(live.age()));
        Status {
            name: self.name.clone(),
            had_token: fetches.had_token,
            generation: live.as_ref().map_or(0, |live| live.token.generation()),
            seconds_left: left.map(|left| left.as_secs()),
            last_error: self.last_error.get(),
            contested: self.contested.get(),
        }
    }

    /// A token that may be sent now: alive, and not just refused.
    fn current(&self) -> Option<Token> {
        let live = self.live.load();
        live.as_ref().filter(|live| live.is_usable() && !live.is_retired()).map(|live| live.token.clone())
    }

    /// A token that lives, refused or not.
    fn usable(&self) -> Option<Token> {
        let live = self.live.load();
        live.as_ref().filter(|live| live.is_usable()).map(|live| live.token.clone())
    }

    /// Takes a generation out of use until a fetch has looked into it, and tells which one will. With no
    /// fetch to come before `deadline` it stays: nothing better can be had.
    fn retire(&self, refused: u64, had_worked: bool, deadline: Instant) -> Option<u64> {
        let mut looked_into = None;
        self.fetches.send_if_modified(|fetches| {
            let now = Instant::now();
            if fetches.held.is_none_or(|held| !held.is_hopeless(now, deadline)) {
                looked_into = Some(fetches.begun.max(fetches.ended + 1));
                if let Some(live) = &*self.live.load()
                    && live.token.generation() <= refused
                {
                    live.had_worked
                        .fetch_or(had_worked && live.token.generation() == refused, Ordering::Relaxed);
                    live.retired.store(true, Ordering::Release);
                }
            }
            false
        });
        looked_into
    }

    #[cold]
    async fn wait_for_token(&self) -> Result<Token, TokenError> {
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
            if let Some(Held { until, refused }) = held.filter(|held| held.is_hopeless(now, deadline)) {
                let retry_after = until - now;
                return Err(if refused {
                    TokenError::CredentialRefused { retry_after }
                } else {
                    TokenError::Unavailable { cause, retry_after }
                });
            }
            if !matches!(timeout_at(deadline, fetches.changed()).await, Ok(Ok(()))) {
                return Err(TokenError::Unavailable { cause, retry_after: Duration::from_secs(1) });
            }
        }
    }

    fn is_awaited(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    fn fetch_begins(&self) {
        self.fetches.send_if_modified(|fetches| {
            fetches.begun += 1;
            false // nobody waits for a beginning
        });
    }

    fn fetch_succeeded(&self, live: Live, held: Option<Held>) {
        self.fetches.send_modify(|fetches| {
            self.live.store(Some(Arc::new(live)));
            *fetches = Fetches { ended: fetches.begun, held, failed: None, had_token: true, ..*fetches };
        });
        self.last_error.ends();
    }

    fn fetch_failed(&self, cause: Cause, error: String, held: Option<Held>) {
        let failed = Some(cause);
        self.last_error.begins(failed, error);
        self.fetches.send_modify(|fetches| {
            self.put_back();
            *fetches = Fetches { ended: fetches.begun, held, failed, ..*fetches };
        });
    }

    /// A trial's failure says nothing of the pair in use: whoever waits for that goes on waiting, unless it
    /// is held back.
    fn trial_failed(&self, held: Option<Held>) {
        self.fetches.send_modify(|fetches| {
            fetches.held = held;
            if held.is_some() {
                self.put_back();
                fetches.ended = fetches.begun;
            }
        });
    }

    fn fetches_are_held(&self, held: Option<Held>) {
        self.fetches.send_modify(|fetches| fetches.held = held);
    }

    /// The refusal was looked into; without a new token the old one is used on.
    fn put_back(&self) {
        if let Some(live) = &*self.live.load() {
            live.retired.store(false, Ordering::Release);
        }
    }
}

fn read(credential: &config::Credential) -> Result<(Sources, Pair), StartError> {
    let sources = (credential.app_key(), credential.app_secret());
    let pair = Pair::load(&sources).map_err(|error| StartError::Pair(credential.name.clone(), error))?;
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
