//! The token endpoint `tokenByAkSk`: issues tokens, bounds their lifetime, and decides what a new one does to older ones.
//!
//! A token expires by the monotonic clock, so that a jump of the wall clock changes no test. `CreateTime` is the only use of the
//! wall clock.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::faults::{Fault, Habit};
use super::http::{Head, Reply};
use super::journal::Recording;
use super::{Cloud, lock};

/// The lifetime without `X-Token-Expire`, in seconds. Not documented; clients without this header observe about this.
const DEFAULT_LIFETIME: u64 = 600;

/// The longest lifetime that a call can ask for, in seconds; a longer one is cut to it.
const MAX_LIFETIME: u64 = 3600;

/// Expired tokens are dropped once so many tokens are stored.
const SWEEP_AT: usize = 10_000;

/// Answers a call of the token endpoint.
pub(super) fn answer(cloud: &Cloud, head: &Head, body: &[u8], fault: &Fault, recording: &Recording) -> Reply {
    if let Some(reply) = fault.replacement() {
        return reply;
    }
    let (habit, lifetime_ms) = {
        let script = cloud.script();
        (script.faults.habit, script.faults.lifetime_ms)
    };
    // One lock for the check and the issue: a rotation between them would issue a token for the pair that was replaced.
    let mut tokens = lock(&cloud.tokens);
    let issued = tokens.check(head, body).map(|seconds| {
        let lifetime = lifetime_ms.map_or(Duration::from_secs(seconds), Duration::from_millis);
        tokens.issue(habit, lifetime)
    });
    match issued {
        Ok((token, issued)) => {
            recording.issued(&token);
            issued.reply(&token, fault)
        }
        Err(reply) => reply,
    }
}

/// The accepted pair of app key and secret, and the tokens that were issued.
pub(super) struct Tokens {
    app_key: String,
    app_secret: String,
    living: HashMap<String, Issued>,
    latest: Option<String>,
}

#[derive(Clone)]
struct Issued {
    app_key: String,
    ends: Instant,
    created: SystemTime,
    lifetime: Duration,
}

impl Tokens {
    pub(super) fn new(app_key: String, app_secret: String) -> Self {
        Self { app_key, app_secret, living: HashMap::new(), latest: None }
    }

    pub(super) fn rotate(&mut self, app_key: &str, app_secret: &str) {
        app_key.clone_into(&mut self.app_key);
        app_secret.clone_into(&mut self.app_secret);
        // Under `SameUntilExpiry` the new pair must get a token of its own.
        self.latest = None;
    }

    pub(super) fn revoke(&mut self) {
        self.living.clear();
    }

    /// Returns the app key that a token was issued to; `None` if the token is unknown, revoked or expired.
    pub(super) fn holder(&self, token: &str) -> Option<&str> {
        self.living.get(token).filter(|issued| issued.lives()).map(|issued| issued.app_key.as_str())
    }

    /// Checks a token call. Returns the requested lifetime in seconds; the error is the reply to a call that gets no token.
    fn check(&self, head: &Head, body: &[u8]) -> Result<u64, Reply> {
        if head.method != "POST" {
            return Err(Reply::error(405, "tokenByAkSk is a POST"));
        }
        if !head.is_json() {
            return Err(Reply::error(400, "Content-Type must be application/json"));
        }
        let lifetime = asked_lifetime(head)?;
        let pair = serde_json::from_slice::<Value>(body).unwrap_or_default();
        match (pair["app_key"].as_str(), pair["app_secret"].as_str()) {
            (Some(key), Some(secret)) if key == self.app_key && secret == self.app_secret => Ok(lifetime),
            (Some(_), Some(_)) => Err(Reply::error(403, "app_key or app_secret is wrong")),
            _ => Err(Reply::error(400, "app_key and app_secret must be strings of a JSON object")),
        }
    }

    /// Returns a token: a new one, or the one before if `habit` says so.
    fn issue(&mut self, habit: Habit, lifetime: Duration) -> (String, Issued) {
        if habit == Habit::SameUntilExpiry
            && let Some(token) = self.latest.clone()
            && let Some(issued) = self.living.get(&token).filter(|issued| issued.lives())
        {
            return (token, issued.clone());
        }
        if habit == Habit::LastWins {
            self.living.retain(|_, issued| issued.app_key != self.app_key);
        } else if self.living.len() >= SWEEP_AT {
            self.living.retain(|_, issued| issued.lives());
        }
        let token = uuid::Uuid::now_v7().simple().to_string();
        let issued = Issued {
            app_key: self.app_key.clone(),
            ends: Instant::now() + lifetime,
            created: SystemTime::now(),
            lifetime,
        };
        self.living.insert(token.clone(), issued.clone());
        self.latest = Some(token.clone());
        (token, issued)
    }
}

impl Issued {
    fn lives(&self) -> bool {
        Instant::now() < self.ends
    }

    /// Returns the reply of the vendor's page: seven members, all of them strings.
    fn reply(&self, token: &str, fault: &Fault) -> Reply {
        let created = self.created.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let prefix = if fault.prefixed { "Bearer " } else { "" };
        Reply::json(
            200,
            &json!({
                "AccessToken": format!("{prefix}{token}"),
                "ApplyType": "Bearer",
                "CreateTime": created.saturating_add_signed(fault.skew_s).to_string(),
                "Expires": self.lifetime.as_secs().max(1).to_string(),
                "Scope": "",
                "AppKey": self.app_key,
                "UserID": "Anonymous",
            }),
        )
    }
}

fn asked_lifetime(head: &Head) -> Result<u64, Reply> {
    if !head.has("x-token-expire") {
        return Ok(DEFAULT_LIFETIME);
    }
    match head.only("x-token-expire").and_then(|text| text.parse::<u64>().ok()) {
        Some(seconds) if seconds > 0 => Ok(seconds.min(MAX_LIFETIME)),
        _ => Err(Reply::error(400, "X-Token-Expire must be a number of seconds")),
    }
}
