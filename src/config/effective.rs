//! The effective configuration: every key of the file, defaults included, and who can use which credential. Secrets
//! appear only as the file or variable that holds them.

use serde::Serialize;
use serde_json::Value;

use super::{Caller, Config, Credential, Route};

/// One caller's access to one credential.
#[derive(Clone, Debug, Serialize)]
pub struct CredentialUser {
    /// The credential's name.
    pub credential: String,
    /// The caller's name.
    pub caller: String,
    /// The caller's `peer`.
    pub peer: String,
    /// The peer in words.
    #[serde(skip)]
    // Not serialized: JSON is for programs, which have `peer`.
    pub who: String,
    /// Whether all the caller's requests with this credential are refused for now: the caller is frozen, or each of
    /// `routes` is.
    pub is_frozen: bool,
    /// The addresses of the listeners at which the caller can connect.
    pub listeners: Vec<String>,
    /// The routes on which the caller uses this credential.
    pub routes: Vec<String>,
    /// The operators that the caller may act as, the default one first.
    pub operators: Vec<String>,
    /// The caller's rate limit, such as `20/s`.
    pub rate_limit: String,
    /// The most requests that may arrive at once.
    pub burst: u32,
}

impl Config {
    /// Returns everything that is in effect, in the form of the file. A key that is not set and has no default is
    /// `null`.
    #[expect(clippy::expect_used, reason = "no value of it can be no JSON")]
    pub fn effective(&self) -> Value {
        serde_json::to_value(self).expect("a configuration can be written")
    }

    /// Returns who can use which credential, in the order of the credentials. `check` prints it for a review of
    /// access.
    pub fn access(&self) -> Vec<CredentialUser> {
        let pairs = self.credentials.iter().flat_map(|c| self.callers.iter().map(move |caller| (c, caller)));
        pairs.filter_map(|(credential, caller)| self.access_of(credential, caller)).collect()
    }

    /// Returns the caller's access to a credential; `None` if the caller uses this credential on no route.
    fn access_of(&self, credential: &Credential, caller: &Caller) -> Option<CredentialUser> {
        let uses = |route: &&Route| {
            // A route's own credential replaces the caller's, so that one caller may use several.
            let used = route.credential.as_ref().unwrap_or(&caller.credential);
            caller.routes.contains(&route.name) && *used == credential.name
        };
        let is_frozen = caller.frozen || !self.routes.iter().filter(uses).any(|route| !route.frozen);
        let routes: Vec<_> = self.routes.iter().filter(uses).map(|route| route.name.clone()).collect();
        let operators = std::iter::once(&caller.operator_id).chain(&caller.operators);
        let access = CredentialUser {
            credential: credential.name.clone(),
            caller: caller.name.clone(),
            peer: caller.peer.to_string(),
            who: who(caller),
            is_frozen,
            listeners: self.listeners_of(caller).map(|listener| listener.address.to_string()).collect(),
            routes,
            operators: operators.cloned().collect(),
            rate_limit: caller.rate_limit.to_string(),
            burst: caller.burst,
        };
        (!access.routes.is_empty()).then_some(access)
    }
}

/// Describes the caller's peer and the header that it must send.
fn who(caller: &Caller) -> String {
    let who = caller.peer.who();
    caller.require_header.as_ref().map_or(who.clone(), |name| format!("{who} that sends {name}"))
}
