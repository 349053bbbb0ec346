//! What is known of a request, and how the records of it tell that.

use std::fmt;
use std::sync::Arc;

use http::HeaderValue;
use serde_json::json;

use super::folds::Who;
use super::line::Line;
use crate::clock;
use crate::log::requests;
use crate::log::requests::Ended;
use crate::model::cause::Cause;
use crate::model::code::Code;
use crate::model::outcome::Outcome;
use crate::model::peer::Peer;
use crate::model::request_id::{FirstCall, RequestId};
use crate::model::stage::Stage;

/// What is known of a request.
pub(super) struct Facts {
    pub(super) id: RequestId,
    pub(super) peer: Peer,
    /// What stands in its place; `None`: the peer itself.
    pub(super) peer_shown: Option<Option<HeaderValue>>,
    pub(super) caller: Option<Arc<str>>,
    pub(super) caller_id: Option<HeaderValue>,
    pub(super) traceparent: Option<HeaderValue>,
    pub(super) route: Option<Arc<str>>,
    pub(super) operator: Option<HeaderValue>,
    /// An earlier call that this one repeats or equals.
    pub(super) first: Option<FirstCall>,
    /// It repeats a call of unknown outcome by force.
    pub(super) is_forced: bool,
    /// What further is told of it, if it is refused.
    pub(super) detail: Option<Box<Detail>>,
    pub(super) stage: Stage,
    /// In nanoseconds of this process.
    pub(super) entered: u64,
    /// Nanoseconds by stage.
    pub(super) spent: [u64; Stage::COUNT],
}

/// Why a request was refused, beyond the code.
#[derive(Debug, Default)]
pub struct Detail {
    /// The path that was asked for.
    pub path: Option<String>,
    /// The names in the caller's certificate.
    pub names: Vec<String>,
    /// Where the body breaks the contract, and which keyword of it.
    pub errors: Vec<(String, &'static str)>,
}

impl Facts {
    pub(super) fn new(id: RequestId, peer: Peer, peer_shown: Option<Option<HeaderValue>>) -> Self {
        Self {
            id,
            peer,
            peer_shown,
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
            spent: [0; Stage::COUNT],
        }
    }

    pub(super) fn enter(&mut self, stage: Stage) {
        let now = clock::nanos();
        self.spent[self.stage as usize] += now.saturating_sub(self.entered);
        self.entered = now;
        self.stage = stage;
    }

    pub(super) fn who(&self) -> Who {
        match (&self.caller, self.peer) {
            (Some(caller), _) => Who::Caller(caller.clone()),
            (None, Peer::Tcp(address)) => Who::Address(address.ip()),
            (None, Peer::Unix { uid, .. }) => Who::Uid(uid),
        }
    }

    /// Logs that the request is over.
    pub(super) fn tell(&self, outcome: Outcome, code: Option<Code>, cause: Option<Cause>, status: u16) {
        if requests::may_have_line(outcome, code, status) {
            let (id, caller, route) = (self.id, self.caller.as_ref(), self.route.as_deref());
            Ended { id, caller, route, outcome, code, cause, status, took: &self.spent }.tell();
        }
    }

    /// Who asked for what.
    pub(super) fn write(&self, line: &mut Line<'_>) {
        self.write_briefly(line);
        match &self.peer_shown {
            None => line.word(",\"peer\":\"", self.peer.text(&mut [0; Peer::TEXT])),
            Some(Some(hidden)) => line.word(",\"peer\":\"", hidden),
            Some(None) => {}
        }
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

    /// As much as tells which intent an outcome belongs to, and whose it is.
    pub(super) fn write_briefly(&self, line: &mut Line<'_>) {
        line.word(",\"id\":\"", *self.id.as_bytes());
        // Names and operators are of plain characters, as validated.
        if let Some(caller) = &self.caller {
            line.word(",\"caller\":\"", caller.as_bytes());
        }
        if let Some(route) = &self.route {
            line.word(",\"route\":\"", route.as_bytes());
        }
    }

    /// Milliseconds by stage, of those that took any time.
    pub(super) fn write_times(&self, line: &mut Line<'_>) {
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
        let mut comma = 1; // none before the first one
        for (key, spent) in KEYS.iter().zip(&self.spent) {
            let micros = spent / 1000;
            if micros > 0 {
                line.thousandths(&key[comma..], micros);
                comma = 0;
            }
        }
        line.raw(b"}");
    }
}

impl fmt::Debug for Facts {
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
