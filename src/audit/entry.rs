//! Every record's form in the trail.

use serde_json::{Map, Value};
use uuid::Uuid;

use super::batch::Change;
use super::facts::Facts;
use super::line::{Line, Second};
use super::unresolved::UnresolvedList;
use super::{Answer, unresolved};
use crate::clock;
use crate::model::cause::Cause;
use crate::model::code::Code;
use crate::model::outcome::Outcome;
use crate::model::request_id::RequestId;

/// A record to be written.
pub(super) enum Entry<'a> {
    Intent {
        facts: &'a Facts,
        body_size: usize,
        /// The keyed digest of the body, in hex.
        digest: &'a [u8],
        /// Writes further members, as JSON text with a comma in front.
        further: &'a dyn Fn(&mut Vec<u8>),
    },
    Outcome {
        facts: &'a Facts,
        answer: &'a Answer,
    },
    Refusal(&'a Refusal),
    Event {
        name: &'static str,
        details: &'a Map<String, Value>,
    },
    /// The list of the unresolved, and the calls that it no longer has because it was too long.
    Unresolved {
        list: &'a UnresolvedList,
        forgotten: &'a [Uuid],
    },
    /// The outcome that a restart gives to an intent left without one.
    Doubt {
        id: Uuid,
    },
}

/// The kinds of records.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Intent,
    Outcome,
    Refusal,
    Event,
}

impl Kind {
    pub(super) const ALL: [Self; 4] = [Self::Intent, Self::Outcome, Self::Refusal, Self::Event];

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Intent => "intent",
            Self::Outcome => "outcome",
            Self::Refusal => "refusal",
            Self::Event => "event",
        }
    }
}

/// Why a request has a record without an intent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Why {
    /// The other side's failure is named.
    Refused(Code, Option<Cause>),
    /// It was answered from what is stored.
    Replayed,
    /// It was not meant to be sent.
    DryRun,
}

impl Why {
    pub(super) fn told(self) -> (Outcome, Option<Code>, Option<Cause>) {
        match self {
            Self::Refused(code, cause) => (Outcome::NotSent, Some(code), cause),
            Self::Replayed => (Outcome::Replayed, None, None),
            Self::DryRun => (Outcome::NotSent, None, None),
        }
    }
}

/// One refusal, or several of one kind.
pub(super) struct Refusal {
    /// Of the first one, in microseconds since 1970.
    pub(super) time: u64,
    pub(super) facts: Box<Facts>,
    pub(super) why: Why,
    pub(super) status: u16,
    pub(super) count: u64,
    /// It counts refusals of several peers, of which the facts name the first.
    pub(super) several: bool,
}

impl Entry<'_> {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Intent { .. } => Kind::Intent,
            Self::Outcome { .. } | Self::Doubt { .. } => Kind::Outcome,
            Self::Refusal(_) => Kind::Refusal,
            Self::Event { .. } | Self::Unresolved { .. } => Kind::Event,
        }
    }

    /// What it changes in the list of the unresolved.
    pub(super) fn change(&self) -> Change {
        match self {
            Self::Intent { facts, .. } => Change::Intent(facts.id.uuid()),
            Self::Outcome { facts, answer } => {
                let is_forced = facts.is_forced;
                Change::Outcome { id: facts.id.uuid(), outcome: answer.outcome, is_forced }
            }
            Self::Event { name, details } if unresolved::EVENTS.contains(name) => {
                let id = details.get("id").and_then(Value::as_str).and_then(|id| id.parse().ok());
                Change::Event { name, id }
            }
            Self::Unresolved { .. } => Change::Event { name: unresolved::LIST, id: None },
            // A doubt is of a start, which has put it on the list.
            Self::Event { .. } | Self::Refusal(_) | Self::Doubt { .. } => Change::None,
        }
    }

    /// Whether its members are short enough to be written while the queue is locked: all but a stored reply are.
    pub(super) fn is_brief(&self) -> bool {
        matches!(self, Self::Outcome { answer: Answer { reply: None, .. }, .. })
    }

    fn time(&self) -> u64 {
        if let Self::Refusal(refusal) = self { refusal.time } else { clock::unix_nanos() / 1000 }
    }

    /// What the record's line begins with: its number, time and kind.
    pub(super) fn begin(&self, seq: u64, second: &mut Second, text: &mut Vec<u8>) {
        let mut line = Line(text);
        line.number("{\"seq\":", seq);
        line.time(",\"time\":\"", self.time(), second);
        line.word(",\"kind\":\"", self.kind().as_str());
    }

    /// The members behind that, but for the links.
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
                facts.write_briefly(line);
                answer.write(facts.stage, line);
                facts.write_times(line);
            }
            Self::Refusal(refusal) => refusal.write(line),
            Self::Event { name, details } => {
                line.text(",\"event\":", name.as_bytes());
                for (key, value) in *details {
                    line.any(key, value);
                }
            }
            Self::Unresolved { list, forgotten } => {
                line.text(",\"event\":", unresolved::LIST.as_bytes());
                line.any(unresolved::LIST, list);
                if !forgotten.is_empty() {
                    line.any("forgotten", forgotten);
                }
            }
            Self::Doubt { id } => {
                line.word(",\"id\":\"", *RequestId::from(*id).as_bytes());
                line.word(",\"outcome\":\"", Outcome::Unknown.as_str());
                line.word(",\"note\":\"", "the process ended between intent and outcome");
            }
        }
    }
}

impl Refusal {
    fn write(&self, line: &mut Line<'_>) {
        self.facts.write(line);
        let (outcome, code, cause) = self.why.told();
        let note = (self.why == Why::DryRun).then_some("dry run");
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
