//! Stage 5: a usable token from the slot of the route's credential.
//!
//! One slot per credential, read without a lock. One task per credential, on the background runtime,
//! fetches; all waiters share what it brings, and a caller that goes away cancels nothing. Guarantees that a
//! token whose life is over is never handed out, and that two fetches are never closer than a second.

mod cooldown;
mod endpoint;
mod fetcher;
mod metrics;
mod schedule;

use std::{
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use http::HeaderValue;
use rustls::ClientConfig;
use serde::Serialize;
use serde_json::{Map, Value};
use thiserror::Error;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout_at},
};

use crate::{
    config::{self, SecretSource},
    connect::TlsError,
    secret::SecretError,
};
pub use cooldown::Cooldown;
use endpoint::Endpoint;
use fetcher::{Pair, Task};
pub use metrics::Metrics;
use schedule::{Backoff, Plan};

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
