//! Why deduplication refuses a call, and the text for its caller.
//!
//! A text says what to do next, and never invites to drop the key: without it the next call could be sent twice.

use thiserror::Error;
use uuid::Uuid;

use super::claims::{KeyDecision, StoredResult};
use super::delivery::Delivery;
use super::duplicates::{First, Rejection};
use super::key::BadKey;
use crate::model::outcome::Outcome;
use crate::model::request_id::{FirstCall, RequestId};

/// A refusal, with the delivery of the success that it reports.
#[derive(Debug)]
pub struct Refusal {
    /// Why the call is refused.
    pub reason: Refused,
    /// The delivery of the equal call's success, to be handed over with this answer. `None` unless the reason is
    /// [`Refused::Done`].
    // In a box: few refusals have one, and each would be as large.
    pub delivery: Option<Box<Delivery>>,
}

/// Why a call is refused. The text of its `Display` is for the caller.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Refused {
    /// A header breaks its rules.
    #[error(transparent)]
    Key(#[from] BadKey),
    /// There is no key, under `without_key = "require_key"`.
    #[error("an Idempotency-Key is required here: 1 to 255 visible characters, a new one for each task")]
    NoKey,
    /// The first call with this key is at work.
    #[error(
        "the first call with this Idempotency-Key is still in progress; call again with the same key in a second"
    )]
    InProgress(RequestId),
    /// The outcome of the first call with this key is unknown.
    #[error(
        "the first call with this Idempotency-Key may have reached the upstream, so this one was not sent. Check in the \
         cloud whether the task is assigned; if it is not, repeat the call with the same key and `Idempotency-Force: \
         {0}`; if that is refused, too, use a new key"
    )]
    Unknown(RequestId),
    /// The key belongs to a call with another body or operator.
    #[error("this Idempotency-Key was used for another body or operator; take a new key for a new task")]
    Mismatch(FirstCall),
    /// An equal call is at work, or its outcome is unknown.
    #[error(
        "an equal call (same body, same x-userid) is in progress or may have reached the upstream, so this one was not \
         sent. Check in the cloud whether the task is assigned; if it is not, or if you want it assigned twice, repeat \
         the call with `Idempotency-Force: {0}`"
    )]
    Duplicate(RequestId),
    /// An equal call succeeded. It is undelivered, or a person resolved it as done, or `without_key = "block"` still remembers
    /// it.
    #[error(
        "an equal call (same body, same x-userid) succeeded: the task is assigned, and this call was not sent. If you \
         want it assigned twice, repeat the call with `Idempotency-Force: {0}`"
    )]
    Done(RequestId),
    /// The table of keys is full until the oldest expires.
    #[error("no more Idempotency-Keys can be remembered at the moment; keep the key and call again later")]
    NoMoreKeys,
    /// This caller holds its share of keys.
    #[error(
        "this caller holds as many Idempotency-Keys as it may (half of all, or its `max_keys`); keep the key and call \
         again later"
    )]
    NoMoreKeysOfCaller,
    /// The table of doubts is full, or this caller's share of it.
    #[error(
        "too many calls have an unknown outcome, so another one could not be remembered and was not sent; the operators \
         of the gateway must resolve them"
    )]
    TooManyInDoubt,
    /// Under `block`: the table of successes of calls without a key is full, or this caller's share of it.
    #[error(
        "no more calls without an Idempotency-Key can be remembered at the moment, so a duplicate would not be noticed; \
         call again later, or give each task a key"
    )]
    NoMoreSuccesses,
    /// A part of the trail is lost, and the rest does not have the key.
    #[error(
        "a part of the audit trail is lost, so the gateway cannot know whether this Idempotency-Key was used. Keep the \
         key and call again later; the operators of the gateway must restore the trail or accept the loss"
    )]
    Lost,
    /// The trail is still being read.
    #[error(
        "earlier calls are still being read from the audit trail; call again in a moment, with the same key if it has one"
    )]
    Rebuilding,
}

impl Refused {
    /// The earlier call because of which this one is refused, and its outcome; `None` if there is no such call.
    pub fn first(&self) -> Option<FirstCall> {
        // `unknown` also while the first call is at work: `not_sent` would read as permission to repeat the task.
        let first = |id: &RequestId, outcome| Some(FirstCall { id: id.uuid(), outcome });
        match self {
            Self::InProgress(id) | Self::Unknown(id) | Self::Duplicate(id) => first(id, Outcome::Unknown),
            Self::Done(id) => first(id, Outcome::Succeeded),
            Self::Mismatch(call) => Some(*call),
            Self::Key(_)
            | Self::NoKey
            | Self::NoMoreKeys
            | Self::NoMoreKeysOfCaller
            | Self::TooManyInDoubt
            | Self::NoMoreSuccesses
            | Self::Lost
            | Self::Rebuilding => None,
        }
    }
}

impl<R: Into<Refused>> From<R> for Refusal {
    fn from(reason: R) -> Self {
        Self { reason: reason.into(), delivery: None }
    }
}

/// The refusal for a rejection by the table of equal calls.
pub(super) fn rejected(rejection: Rejection) -> Refused {
    match rejection {
        Rejection::Duplicate(First::Open(id)) => Refused::Duplicate(id.into()),
        Rejection::Duplicate(First::Succeeded(id)) => Refused::Done(id.into()),
        Rejection::Full => Refused::TooManyInDoubt,
        Rejection::FullOfSuccesses => Refused::NoMoreSuccesses,
    }
}

/// A decision of the claims that does not refuse the call.
pub(super) enum Passed {
    Begin { repeats: Option<Uuid> },
    Replay(Uuid, StoredResult),
}

/// Splits a decision of the claims into what passes and what is refused.
pub(super) fn passed(decision: KeyDecision) -> Result<Passed, Refused> {
    match decision {
        KeyDecision::Begin { repeats } => Ok(Passed::Begin { repeats }),
        KeyDecision::Replay(first, result) => Ok(Passed::Replay(first, result)),
        KeyDecision::InFlight(first) => Err(Refused::InProgress(first.into())),
        KeyDecision::Unknown(first) => Err(Refused::Unknown(first.into())),
        KeyDecision::Mismatch(first, result) => {
            let outcome = result.map_or(Outcome::Unknown, |result| result.outcome());
            Err(Refused::Mismatch(FirstCall { id: first, outcome }))
        }
        KeyDecision::Full => Err(Refused::NoMoreKeys),
        KeyDecision::ShareFull => Err(Refused::NoMoreKeysOfCaller),
    }
}
