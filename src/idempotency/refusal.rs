//! Why a call goes no further, and what its caller is told.

use thiserror::Error;
use uuid::Uuid;

use super::claims::{Ending, Verdict};
use super::delivery::Delivery;
use super::duplicates::{First, Rejection};
use super::key::BadKey;
use crate::model::outcome::Outcome;
use crate::model::request_id::{FirstCall, RequestId};

/// Why a call goes no further, and whose success the answer tells of.
#[derive(Debug)]
pub struct Refusal {
    /// Why.
    pub reason: Refused,
    /// To be settled once the answer is delivered, where it tells that the first call succeeded.
    pub delivery: Option<Box<Delivery>>,
}

/// Why a call goes no further.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Refused {
    /// The header breaks its rules.
    #[error(transparent)]
    Key(#[from] BadKey),
    /// `without_key = "require_key"`.
    #[error("an Idempotency-Key is needed here: 1 to 255 visible characters, another one for each task")]
    NoKey,
    /// The first call with this key is not over.
    #[error(
        "the first call with this Idempotency-Key is still at work; call again with the same key in a second"
    )]
    InProgress(RequestId),
    /// Nobody knows what became of the first call with this key.
    #[error(
        "the first call with this Idempotency-Key may have reached the upstream, so that this one was not sent: look in the \
         cloud whether the task is assigned; if it is not, repeat the call with the same key and `Idempotency-Force: {0}`; if \
         that is refused, too, take a new key"
    )]
    Unknown(RequestId),
    /// The key stands for another call.
    #[error("this Idempotency-Key was used for another body or operator; take a new key for a new task")]
    Mismatch(FirstCall),
    /// An equal call is at work or of unknown outcome.
    #[error(
        "an equal call (same body, same x-userid) is at work or may have reached the upstream, so that this one was not sent: \
         look in the cloud whether the task is assigned; if it is not, or if it is meant twice, repeat the call with \
         `Idempotency-Force: {0}`"
    )]
    Duplicate(RequestId),
    /// An equal call succeeded.
    #[error(
        "an equal call (same body, same x-userid) succeeded, so that the task is assigned and this one was not sent; if it is \
         meant twice, repeat the call with `Idempotency-Force: {0}`"
    )]
    Done(RequestId),
    /// No more keys within the window.
    #[error("no more Idempotency-Keys can be remembered at the moment; keep the key and call again later")]
    NoMoreKeys,
    /// No more keys of this caller within the window.
    #[error(
        "this caller holds as many Idempotency-Keys as it may (half of all, or its `max_keys`); keep the key and call \
         again later"
    )]
    NoMoreKeysOfCaller,
    /// No more calls of unknown outcome can be remembered.
    #[error(
        "too many calls are of unknown outcome, so that a further one could be lost; the operators must resolve them"
    )]
    NoMoreDoubts,
    /// No more successes of calls without a key, where they refuse equal calls.
    #[error(
        "no more calls without an Idempotency-Key can be remembered at the moment, so that an equal one could pass; call again \
         later, or give each task a key"
    )]
    NoMoreSuccesses,
    /// A part of the trail is lost, and the key is not in the rest.
    #[error(
        "a part of the audit trail is lost, so that nobody knows whether this Idempotency-Key was used; keep the key and call \
         again later; the operators must restore the trail or accept the loss"
    )]
    Lost,
    /// The trail is still read.
    #[error(
        "earlier calls are still being read from the audit trail; call again in a moment, with the same key if it has one"
    )]
    Rebuilding,
}

impl Refused {
    /// The call that stands in the way, and what became of it.
    pub fn first(&self) -> Option<FirstCall> {
        let first = |id: &RequestId, outcome| Some(FirstCall { id: id.uuid(), outcome });
        match self {
            Self::InProgress(id) | Self::Unknown(id) | Self::Duplicate(id) => first(id, Outcome::Unknown),
            Self::Done(id) => first(id, Outcome::Succeeded),
            Self::Mismatch(call) => Some(*call),
            Self::Key(_)
            | Self::NoKey
            | Self::NoMoreKeys
            | Self::NoMoreKeysOfCaller
            | Self::NoMoreDoubts
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

pub(super) fn rejected(rejection: Rejection) -> Refused {
    match rejection {
        Rejection::Duplicate(First::Open(id)) => Refused::Duplicate(id.into()),
        Rejection::Duplicate(First::Succeeded(id)) => Refused::Done(id.into()),
        Rejection::Full => Refused::NoMoreDoubts,
        Rejection::FullOfSuccesses => Refused::NoMoreSuccesses,
    }
}

/// A verdict that lets a call pass.
pub(super) enum Passed {
    Begin { doubt: Option<Uuid> },
    Replay(Uuid, Ending),
}

pub(super) fn passed(verdict: Verdict) -> Result<Passed, Refused> {
    match verdict {
        Verdict::Begin { doubt } => Ok(Passed::Begin { doubt }),
        Verdict::Replay(first, ending) => Ok(Passed::Replay(first, ending)),
        Verdict::InFlight(first) => Err(Refused::InProgress(first.into())),
        Verdict::Unknown(first) => Err(Refused::Unknown(first.into())),
        Verdict::Mismatch(first, ending) => {
            let outcome = ending.map_or(Outcome::Unknown, |ending| ending.outcome());
            Err(Refused::Mismatch(FirstCall { id: first, outcome }))
        }
        Verdict::Full => Err(Refused::NoMoreKeys),
        Verdict::ShareFull => Err(Refused::NoMoreKeysOfCaller),
    }
}
