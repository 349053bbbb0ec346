//! The claim of a call: its right to be sent, from the decision that the call is new until the call has ended in both tables.
//!
//! Whatever happens to the call, its claim ends exactly once: by [`Claim::end`], or by its `Drop`.

use std::fmt;
use std::sync::Arc;

use uuid::Uuid;

use super::claims::{KeyedCompletion, StoredResult};
use super::delivery::Delivery;
use super::duplicates::{Completion, First, Forced, InDoubtKind};
use super::{Idempotency, now};
use crate::audit::{ExchangeResult, Names};
use crate::keyed_hash::{KeyedFingerprint, push_hex};
use crate::model::outcome::Outcome;
use crate::model::request_id::FirstCall;

/// A call's right to be sent.
///
/// A claim that is dropped before [`Claim::sent`] releases its key. One that is dropped after that leaves a call of unknown
/// outcome.
pub struct Claim {
    pub(super) table: Arc<Idempotency>,
    pub(super) id: Uuid,
    /// The fingerprint: equal for equal bodies, operators and routes.
    pub(super) print: KeyedFingerprint,
    /// The hash under which the call is compared with equal ones; `None` if `without_key` compares no calls.
    pub(super) call_hash: Option<KeyedFingerprint>,
    pub(super) key: Option<KeyedFingerprint>,
    /// An equal call that came first, if this one is sent all the same.
    pub(super) first: Option<First>,
    /// The call that this one repeats by force.
    // In a box, since few calls have one: without it the future of each request exceeded its budget of 2 KiB by eight bytes.
    pub(super) forced: Option<Box<Forced>>,
    pub(super) step: ExchangeStep,
}

/// How far a claim has come. Decides what its `Drop` does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum ExchangeStep {
    Claimed,
    Sent,
    Ended,
}

impl Claim {
    /// Returns the equal call that came before this one, if there is one. This call is sent all the same, and its reply names
    /// that one.
    pub fn first(&self) -> Option<FirstCall> {
        self.first.map(FirstCall::from)
    }

    /// Whether the call repeats another one by `Idempotency-Force`.
    pub fn is_forced(&self) -> bool {
        self.forced.is_some()
    }

    /// Appends the members `key`, `print` and `forced` of the intent to `line`, as JSON with a comma before each.
    pub fn audit_members(&self, line: &mut Vec<u8>) {
        // By hand, since hashes are hex and ids are plain: nothing can need an escape.
        let mut member = |name: &[u8], value: &KeyedFingerprint| {
            line.extend_from_slice(name);
            push_hex(value, line);
            line.push(b'"');
        };
        if let Some(key) = &self.key {
            member(b",\"key\":\"", key);
        }
        // Also without a key: a restart finds equal calls by it, even if the configuration hides the operator.
        member(b",\"print\":\"", &self.print);
        if let Some(Forced { id, .. }) = self.forced.as_deref() {
            line.extend_from_slice(format!(",\"forced\":\"{id}\"").as_bytes());
        }
    }

    /// Marks the call as sent: from now on, dropping the claim leaves a call of unknown outcome. To be called when the exchange
    /// takes over the call.
    #[must_use]
    pub fn sent(mut self) -> Self {
        self.step = ExchangeStep::Sent;
        self
    }

    /// Whether the call has a key, so that its outcome must be committed before its caller learns of it.
    pub fn is_keyed(&self) -> bool {
        self.key.is_some()
    }

    /// Ends the call in both tables. Its record must have been closed, and also committed if the call has a key.
    ///
    /// Returns the [`Delivery`] of a success; dropping it before it is handed over makes the success undelivered. Returns `None`
    /// for any other outcome, and if `without_key` compares no calls.
    pub fn end(mut self, answer: &ExchangeResult, names: Names) -> Option<Delivery> {
        let mut result = None;
        if self.is_keyed() {
            // The reply first: a repetition that comes now finds the key in flight, and never a key that ended without its reply.
            if let Some(reply) = &answer.reply {
                self.table.replies.insert(self.id, reply.clone());
            }
            let (is_success, code) = (answer.outcome == Outcome::Succeeded, answer.result_code.as_ref());
            result = answer.status.map(|status| StoredResult {
                is_success,
                status,
                result_code: code.map(|code| code[..].into()),
                is_resolved: false,
            });
        }
        self.end_in_tables(answer.outcome, result, names)
    }

    /// Ends the call in both tables. Returns the delivery of a success.
    fn end_in_tables(
        &mut self,
        outcome: Outcome,
        result: Option<StoredResult>,
        names: Names,
    ) -> Option<Delivery> {
        self.step = ExchangeStep::Ended;
        if let Some(key) = self.key {
            let completion = match outcome {
                Outcome::NotSent | Outcome::Refused => KeyedCompletion::NotDone,
                // Without a status there is nothing to replay.
                Outcome::Succeeded | Outcome::Failed => {
                    result.map_or(KeyedCompletion::Unknown, KeyedCompletion::Ended)
                }
                Outcome::Unknown | Outcome::Replayed => KeyedCompletion::Unknown,
            };
            self.table.claims().end(key, self.id, completion, now());
        }
        // This call repeated by force a call with another key, which must not be forced under that key as well. If this call was
        // not done, that call is in doubt as before and may be forced again.
        if let Some(&Forced { id, key: Some(key) }) = self.forced.as_deref()
            && self.key != Some(key)
            && matches!(outcome, Outcome::Succeeded | Outcome::Unknown | Outcome::Replayed)
        {
            self.table.set_superseded(key, id, true);
        }
        let call_hash = self.call_hash?;
        let completion = match outcome {
            // The call stays at work among the duplicates until the delivery is settled: only then it is known whether its caller
            // has the answer.
            Outcome::Succeeded => {
                let forced = self.forced.as_deref().map(|forced| forced.id);
                return Some(Delivery::of_own_answer(
                    &self.table,
                    call_hash,
                    self.id,
                    self.key,
                    forced,
                    names,
                ));
            }
            Outcome::NotSent | Outcome::Refused | Outcome::Failed => Completion::NotDone,
            Outcome::Unknown | Outcome::Replayed => Completion::InDoubt(InDoubtKind::Unknown),
        };
        self.table.duplicates().end(call_hash, self.id, completion, now());
        None
    }
}

// Ends the claim if `end` was not reached: the caller disconnected, a panic, a task that a stop drops. After `sent`, bytes may
// have left, so that nothing but `unknown` is true.
impl Drop for Claim {
    fn drop(&mut self) {
        let outcome = match self.step {
            ExchangeStep::Claimed => Outcome::NotSent,
            ExchangeStep::Sent => Outcome::Unknown,
            ExchangeStep::Ended => return,
        };
        self.end_in_tables(outcome, None, Names::default());
    }
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Claim({})", self.id)
    }
}
