//! The facts about a request: collected while it passes the stages, then written into its records.
//!
//! Values are stored as they will be written, after redaction.

use std::fmt;
use std::sync::Arc;

use http::HeaderValue;
use serde_json::json;

use super::aggregation::RefusedPeer;
use super::line::Line;
use crate::clock;
use crate::log::requests;
use crate::log::requests::FinishedRequest;
use crate::model::cause::Cause;
use crate::model::code::Code;
use crate::model::outcome::Outcome;
use crate::model::peer::Peer;
use crate::model::request_id::{FirstCall, RequestId};
use crate::model::stage::Stage;

/// What is known of a request so far.
pub(super) struct RequestFacts {
    pub(super) id: RequestId,
    pub(super) peer: Peer,
    /// What is written instead of the peer's address: `None` if the address itself is written, `Some(None)` if nothing
    /// is.
    pub(super) peer_redacted: Option<Option<HeaderValue>>,
    pub(super) caller: Option<Arc<str>>,
    pub(super) caller_id: Option<HeaderValue>,
    pub(super) traceparent: Option<HeaderValue>,
    pub(super) route: Option<Arc<str>>,
    pub(super) operator: Option<HeaderValue>,
    /// The earlier call that this one repeats (by its key) or equals (by its bytes).
    pub(super) first: Option<FirstCall>,
    /// Whether it repeats a call of unknown outcome by force.
    pub(super) is_forced: bool,
    /// Details for a refusal.
    pub(super) detail: Option<Box<Detail>>,
    pub(super) stage: Stage,
    /// When the present stage began, in nanoseconds of [`clock::nanos`].
    pub(super) entered: u64,
    /// The time spent in each stage, in nanoseconds.
    pub(super) took: [u64; Stage::COUNT],
}

/// What a refusal records beyond its code.
#[derive(Debug, Default)]
pub struct Detail {
    /// The path of the request.
    pub path: Option<String>,
    /// The names in the caller's certificate.
    pub names: Vec<String>,
    /// JSON Pointers to the places where the body breaks the contract, each with the keyword that it breaks.
    pub errors: Vec<(String, &'static str)>,
}

impl RequestFacts {
    /// Makes the facts of a request that enters its first stage now.
    pub(super) fn new(id: RequestId, peer: Peer, peer_redacted: Option<Option<HeaderValue>>) -> Self {
        Self {
            id,
            peer,
            peer_redacted,
            caller: None,
            caller_id: None,
            traceparent: None,
            route: None,
            operator: None,
            first: None,
            is_forced: false,
            detail: None,
            stage: Stage::Admission,
            entered: clock::nanos(),
            took: [0; Stage::COUNT],
        }
    }

    /// Adds the time since the last call to the stage that ends, and enters `stage`.
    pub(super) fn enter(&mut self, stage: Stage) {
        let now = clock::nanos();
        self.took[self.stage as usize] += now.saturating_sub(self.entered);
        self.entered = now;
        self.stage = stage;
    }

    /// Returns the caller, or else the peer, under which a refusal of this request is aggregated.
    // The address without the port: a stranger has a new port for each connection.
    pub(super) fn refused_peer(&self) -> RefusedPeer {
        match (&self.caller, self.peer) {
            (Some(caller), _) => RefusedPeer::Caller(caller.clone()),
            (None, Peer::Tcp(address)) => RefusedPeer::Address(address.ip()),
            (None, Peer::Unix { uid, .. }) => RefusedPeer::Uid(uid),
        }
    }

    /// Logs the finished request, if requests with this outcome, code and status are logged.
    pub(super) fn log(&self, outcome: Outcome, code: Option<Code>, cause: Option<Cause>, status: u16) {
        if requests::may_have_line(outcome, code, status) {
            let (id, caller, route) = (self.id, self.caller.as_ref(), self.route.as_deref());
            FinishedRequest { id, caller, route, outcome, code, cause, status, took: &self.took }.log();
        }
    }

    /// Appends all members about the request, for an intent or a refusal: those of [`Self::write_briefly`], peer, operator,
    /// first call, and the ids that the caller sent.
    pub(super) fn write(&self, line: &mut Line<'_>) {
        self.write_briefly(line);
        match &self.peer_redacted {
            None => line.word(",\"peer\":\"", self.peer.text(&mut [0; Peer::TEXT])),
            Some(Some(hidden)) => line.word(",\"peer\":\"", hidden),
            Some(None) => {}
        }
        // The operator needs no escape: its id was validated, or is a hash.
        if let Some(operator) = &self.operator {
            line.word(",\"operator\":\"", operator);
        }
        if let Some(first) = &self.first {
            line.word(",\"first\":\"", *first.request_id().as_bytes());
            line.word(",\"first_outcome\":\"", first.outcome.as_str());
        }
        line.optional(",\"caller_id\":", self.caller_id.as_ref());
        line.optional(",\"traceparent\":", self.traceparent.as_ref());
    }

    /// Appends the members that an outcome repeats from its intent: id, caller and route.
    pub(super) fn write_briefly(&self, line: &mut Line<'_>) {
        line.word(",\"id\":\"", *self.id.as_bytes());
        // Names need no escape: the configuration allows only plain characters in them.
        if let Some(caller) = &self.caller {
            line.word(",\"caller\":\"", caller.as_bytes());
        }
        if let Some(route) = &self.route {
            line.word(",\"route\":\"", route.as_bytes());
        }
    }

    /// Appends the time spent in each stage, in milliseconds. Stages that took less than a microsecond are left out.
    pub(super) fn write_times(&self, line: &mut Line<'_>) {
        // Constants with the comma, as for all members. They must be in the order of `Stage`.
        const KEYS: [&str; Stage::COUNT] = [
            ",\"admission\":",
            ",\"route\":",
            ",\"rate_limit\":",
            ",\"contract\":",
            ",\"idempotency\":",
            ",\"token\":",
            ",\"quota\":",
            ",\"audit\":",
            ",\"upstream\":",
        ];
        line.raw(b",\"ms\":{");
        // The first key goes without its comma.
        let mut comma = 1;
        for (key, took) in KEYS.iter().zip(&self.took) {
            let micros = took / 1000;
            if micros > 0 {
                line.thousandths(&key[comma..], micros);
                comma = 0;
            }
        }
        line.raw(b"}");
    }
}

// Only the id: the rest may contain values that the trail redacts, and a log line must not show them.
impl fmt::Debug for RequestFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Facts({})", self.id)
    }
}

impl Detail {
    pub(super) fn write(&self, line: &mut Line<'_>) {
        line.optional(",\"path\":", self.path.as_ref());
        if !self.names.is_empty() {
            line.any("names", &self.names);
        }
        if !self.errors.is_empty() {
            let told = |(pointer, code): &(String, &str)| json!({ "pointer": pointer, "code": code });
            line.any("errors", &self.errors.iter().map(told).collect::<Vec<_>>());
        }
    }
}
