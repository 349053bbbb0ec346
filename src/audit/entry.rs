//! The form of each kind of record in the trail.
//!
//! A record begins with its number, time and kind. Its members follow, and at the end the links of the hash chain.
//! [`Entry::begin`] needs the number, and so is called while the queue is locked. [`Entry::members`] takes longer. For
//! intents, and for outcomes that are not brief ([`Entry::is_brief`]), it is called before the queue is locked.

use serde_json::{Map, Value};
use uuid::Uuid;

use super::batch::ListChange;
use super::facts::RequestFacts;
use super::line::{Line, Second};
use super::unresolved_calls::UnresolvedList;
use super::{ExchangeResult, unresolved_calls};
use crate::clock;
use crate::model::cause::Cause;
use crate::model::code::Code;
use crate::model::outcome::Outcome;
use crate::model::request_id::RequestId;

/// A record to be queued.
pub(super) enum Entry<'a> {
    Intent {
        facts: &'a RequestFacts,
        body_size: usize,
        /// The keyed digest of the body, in hex.
        digest: &'a [u8],
        /// Appends further members, as JSON text with a comma in front.
        further: &'a dyn Fn(&mut Vec<u8>),
    },
    Outcome {
        facts: &'a RequestFacts,
        answer: &'a ExchangeResult,
    },
    NotForwarded(&'a NotForwarded),
    Event {
        name: &'static str,
        details: &'a Map<String, Value>,
    },
    /// The list of unresolved calls, and the calls that were removed from it because it was too long.
    Unresolved {
        list: &'a UnresolvedList,
        forgotten: &'a [Uuid],
    },
    /// The outcome `unknown` that crash recovery gives to an intent without one.
    UnknownOutcome {
        id: Uuid,
    },
}

/// The kinds of records, as the member `kind` names them.
#[derive(Clone, Copy, Debug)]
pub(super) enum RecordKind {
    Intent,
    Outcome,
    NotForwarded,
    Event,
}

impl RecordKind {
    pub(super) const ALL: [Self; 4] = [Self::Intent, Self::Outcome, Self::NotForwarded, Self::Event];

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Intent => "intent",
            Self::Outcome => "outcome",
            Self::NotForwarded => "refusal",
            Self::Event => "event",
        }
    }
}

/// Why a request has a record without an intent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum RefusalReason {
    /// It was refused. The cause is set if the upstream or the token endpoint failed.
    Refused(Code, Option<Cause>),
    /// It was answered with a stored reply.
    Replayed,
    /// It was a dry run, which is never sent.
    DryRun,
}

impl RefusalReason {
    /// Returns the outcome, code and cause that the record states.
    pub(super) fn outcome(self) -> (Outcome, Option<Code>, Option<Cause>) {
        match self {
            Self::Refused(code, cause) => (Outcome::NotSent, Some(code), cause),
            Self::Replayed => (Outcome::Replayed, None, None),
            Self::DryRun => (Outcome::NotSent, None, None),
        }
    }
}

/// A refusal, or an aggregate of refusals of one kind.
pub(super) struct NotForwarded {
    /// The time of the first refusal, in microseconds since 1970.
    pub(super) time: u64,
    pub(super) facts: Box<RequestFacts>,
    pub(super) reason: RefusalReason,
    pub(super) status: u16,
    pub(super) count: u64,
    /// Whether it may count refusals of several peers. The facts then name the first one.
    pub(super) several: bool,
}

impl Entry<'_> {
    pub(super) fn kind(&self) -> RecordKind {
        match self {
            Self::Intent { .. } => RecordKind::Intent,
            Self::Outcome { .. } | Self::UnknownOutcome { .. } => RecordKind::Outcome,
            Self::NotForwarded(_) => RecordKind::NotForwarded,
            Self::Event { .. } | Self::Unresolved { .. } => RecordKind::Event,
        }
    }

    /// Returns what the record changes in the list of unresolved calls.
    pub(super) fn change(&self) -> ListChange {
        match self {
            Self::Intent { facts, .. } => ListChange::Intent(facts.id.uuid()),
            Self::Outcome { facts, answer } => {
                let is_forced = facts.is_forced;
                ListChange::Outcome { id: facts.id.uuid(), outcome: answer.outcome, is_forced }
            }
            Self::Event { name, details } if unresolved_calls::EVENTS.contains(name) => {
                let id = details.get("id").and_then(Value::as_str).and_then(|id| id.parse().ok());
                ListChange::Event { name, id }
            }
            Self::Unresolved { .. } => ListChange::Event { name: unresolved_calls::LIST, id: None },
            // Crash recovery puts the call on the list itself before it queues a `Doubt`.
            Self::Event { .. } | Self::NotForwarded(_) | Self::UnknownOutcome { .. } => ListChange::None,
        }
    }

    /// Whether its members are short enough to be written while the queue is locked: those of an outcome without a
    /// stored reply.
    // Not those of an intent: it has redacted values, each of which may need a hash.
    pub(super) fn is_brief(&self) -> bool {
        matches!(self, Self::Outcome { answer: ExchangeResult { reply: None, .. }, .. })
    }

    // An aggregate has the time of its first refusal, and is queued up to an hour later.
    fn time(&self) -> u64 {
        if let Self::NotForwarded(refusal) = self { refusal.time } else { clock::unix_nanos() / 1000 }
    }

    /// Appends the beginning of the line: number, time and kind.
    pub(super) fn begin(&self, seq: u64, second: &mut Second, text: &mut Vec<u8>) {
        let mut line = Line(text);
        line.number("{\"seq\":", seq);
        line.time(",\"time\":\"", self.time(), second);
        line.word(",\"kind\":\"", self.kind().as_str());
    }

    /// Appends the members, without the beginning and the links.
    pub(super) fn members(&self, text: &mut Vec<u8>) {
        let line = &mut Line(text);
        match self {
            Self::Intent { facts, body_size, digest, further } => {
                facts.write(line);
                further(line.0);
                line.number(",\"body_size\":", *body_size as u64);
                line.word(",\"digest\":\"", digest);
            }
            Self::Outcome { facts, answer } => {
                // The intent has the rest. An outcome is written for each call, so that its length counts.
                facts.write_briefly(line);
                answer.write(facts.stage, line);
                facts.write_times(line);
            }
            Self::NotForwarded(refusal) => refusal.write(line),
            Self::Event { name, details } => {
                line.text(",\"event\":", name.as_bytes());
                for (key, value) in *details {
                    line.any(key, value);
                }
            }
            Self::Unresolved { list, forgotten } => {
                line.text(",\"event\":", unresolved_calls::LIST.as_bytes());
                line.any(unresolved_calls::LIST, list);
                if !forgotten.is_empty() {
                    line.any("forgotten", forgotten);
                }
            }
            Self::UnknownOutcome { id } => {
                line.word(",\"id\":\"", *RequestId::from(*id).as_bytes());
                line.word(",\"outcome\":\"", Outcome::Unknown.as_str());
                line.word(",\"note\":\"", "the process ended between intent and outcome");
            }
        }
    }
}

impl NotForwarded {
    fn write(&self, line: &mut Line<'_>) {
        self.facts.write(line);
        let (outcome, code, cause) = self.reason.outcome();
        let note = (self.reason == RefusalReason::DryRun).then_some("dry run");
        line.word(",\"outcome\":\"", outcome.as_str());
        line.optional(",\"code\":", code.map(Code::as_str));
        line.optional(",\"cause\":", cause.map(Cause::as_str));
        line.optional(",\"note\":", note);
        line.word(",\"stage\":\"", self.facts.stage.as_str());
        line.number(",\"status\":", u64::from(self.status));
        if let Some(detail) = &self.facts.detail {
            detail.write(line);
        }
        if self.count > 1 {
            line.number(",\"count\":", self.count);
        }
        line.optional(",\"peers\":", self.several.then_some("several"));
    }
}
