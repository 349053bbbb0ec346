//! A call's right to be sent, from the decision that it is new to its end.

use std::fmt;
use std::sync::Arc;

use uuid::Uuid;

use super::claims::{Ending, How};
use super::delivery::Delivery;
use super::duplicates::{Completion, DoubtKind, First, Forced};
use super::{Idempotency, now};
use crate::audit::{Answer, Names};
use crate::keyed_hash::{Mark, push_hex};
use crate::model::outcome::Outcome;
use crate::model::request_id::FirstCall;

/// A call's right to be sent. Dropped before it was sent, it gives its key back; dropped after that, what became
/// of it is unknown.
pub struct Claim {
    pub(super) table: Arc<Idempotency>,
    pub(super) id: Uuid,
    /// Equal for equal bodies, operators and routes.
    pub(super) print: Mark,
    /// Under which equal calls are looked for; `None`: they are not.
    pub(super) mark: Option<Mark>,
    pub(super) key: Option<Mark>,
    /// An equal one that came first; this one is sent all the same.
    pub(super) first: Option<First>,
    /// The call of unknown outcome that this one repeats; there seldom is one.
    pub(super) forced: Option<Box<Forced>>,
    pub(super) step: Step,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Claimed,
    Sent,
    Ended,
}

impl Claim {
    /// An equal call that came before this one: it goes out, and is flagged.
    pub fn first(&self) -> Option<FirstCall> {
        self.first.map(FirstCall::from)
    }

    /// Whether it repeats a call of unknown outcome by force.
    pub fn is_forced(&self) -> bool {
        self.forced.is_some()
    }

    /// What the intent says of it, as JSON members with a comma in front of each.
    pub fn audit_members(&self, line: &mut Vec<u8>) {
        let mut member = |name: &[u8], mark: &Mark| {
            line.extend_from_slice(name);
            push_hex(mark, line);
            line.push(b'"');
        };
        if let Some(key) = &self.key {
            member(b",\"key\":\"", key);
        }
        member(b",\"print\":\"", &self.print);
        if let Some(Forced { id, .. }) = self.forced.as_deref() {
            line.extend_from_slice(format!(",\"forced\":\"{id}\"").as_bytes());
        }
    }

    /// From now on it may be on its way.
    #[must_use]
    pub fn sent(mut self) -> Self {
        self.step = Step::Sent;
        self
    }

    /// Whether its answer is kept.
    pub fn is_keyed(&self) -> bool {
        self.key.is_some()
    }

    /// The call is over, and its record closed; of a call with a key the record is committed, and its reply is kept. Returns
    /// what a success still waits for.
    pub fn end(mut self, answer: &Answer, names: Names) -> Option<Delivery> {
        let mut ending = None;
        if self.is_keyed() {
            if let Some(reply) = &answer.reply {
                self.table.replies.insert(self.id, reply.clone());
            }
            let (is_success, code) = (answer.outcome == Outcome::Succeeded, answer.result_code.as_ref());
            ending = answer.status.map(|status| Ending {
                is_success,
                status,
                result_code: code.map(|code| code[..].into()),
                is_resolved: false,
            });
        }
        self.end_in_tables(answer.outcome, ending, names)
    }

    /// Ends the call in the tables. Returns what a success still waits for.
    fn end_in_tables(&mut self, outcome: Outcome, ending: Option<Ending>, names: Names) -> Option<Delivery> {
        self.step = Step::Ended;
        if let Some(key) = self.key {
            let how = match outcome {
                Outcome::NotSent | Outcome::Refused => How::NotDone,
                Outcome::Succeeded | Outcome::Failed => ending.map_or(How::Unknown, How::Ended),
                Outcome::Unknown | Outcome::Replayed => How::Unknown,
            };
            self.table.claims().end(key, self.id, how, now());
        }
        if let Some(&Forced { id, key: Some(key) }) = self.forced.as_deref()
            && self.key != Some(key)
            && matches!(outcome, Outcome::Succeeded | Outcome::Unknown | Outcome::Replayed)
        {
            self.table.set_superseded(key, id, true);
        }
        let mark = self.mark?;
        let completion = match outcome {
            Outcome::Succeeded => {
                let forced = self.forced.as_deref().map(|forced| forced.id);
                return Some(Delivery::of_own_answer(&self.table, mark, self.id, self.key, forced, names));
            }
            Outcome::NotSent | Outcome::Refused | Outcome::Failed => Completion::NotDone,
            Outcome::Unknown | Outcome::Replayed => Completion::Doubt(DoubtKind::Unknown),
        };
        self.table.duplicates().end(mark, self.id, completion, now());
        None
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let outcome = match self.step {
            Step::Claimed => Outcome::NotSent,
            Step::Sent => Outcome::Unknown,
            Step::Ended => return,
        };
        self.end_in_tables(outcome, None, Names::default());
    }
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Claim({})", self.id)
    }
}
