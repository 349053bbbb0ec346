//! A configuration shown as it is in effect: every key of the file, defaults included, secrets only as their
//! place, and who can use which credential.

use serde::Serialize;
use serde_json::Value;

use super::{Caller, Config, Credential, Route};

/// A caller that can use a credential.
#[derive(Clone, Debug, Serialize)]
pub struct Access {
    /// The credential's name.
    pub credential: String,
    /// The caller's name.
    pub caller: String,
    /// The caller's `peer`.
    pub peer: String,
    /// The same in words.
    #[serde(skip)]
    pub who: String,
    /// Its requests, or those on all these routes, are refused for now.
    pub is_frozen: bool,
    /// Where it is seen.
    pub listeners: Vec<String>,
    /// On which routes it uses this credential.
    pub routes: Vec<String>,
    /// As which operators, the default one first.
    pub operators: Vec<String>,
    /// How often.
    pub rate_limit: String,
    /// How many requests may come at once.
    pub burst: u32,
}

impl Config {
    /// Everything that is in effect, in the form of the file; what is not set is `null`.
    #[expect(clippy::expect_used, reason = "no value of it can be no JSON")]
    pub fn effective(&self) -> Value {
        serde_json::to_value(self).expect("a configuration can be written")
    }

    /// Who can use which credential, credential by credential.
    pub fn access(&self) -> Vec<Access> {
        let pairs = self.credentials.iter().flat_map(|c| self.callers.iter().map(move |caller| (c, caller)));
        pairs.filter_map(|(credential, caller)| self.access_of(credential, caller)).collect()
    }

    fn access_of(&self, credential: &Credential, caller: &Caller) -> Option<Access> {
        let uses = |route: &&Route| {
            let used = route.credential.as_ref().unwrap_or(&caller.credential);
            caller.routes.contains(&route.name) && *used == credential.name
        };
        let is_frozen = caller.frozen || !self.routes.iter().filter(uses).any(|route| !route.frozen);
        let routes: Vec<_> = self.routes.iter().filter(uses).map(|route| route.name.clone()).collect();
        let operators = std::iter::once(&caller.operator_id).chain(&caller.operators);
        let access = Access {
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

fn who(caller: &Caller) -> String {
    let who = caller.peer.who();
    caller.require_header.as_ref().map_or(who.clone(), |name| format!("{who} that sends {name}"))
}
