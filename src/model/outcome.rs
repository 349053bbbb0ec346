//! What became of the task, and what a client may do about it: the words of the wire.

use std::fmt;

use http::StatusCode;
use smallvec::SmallVec;

/// The outcome of a request, sent as `x-gateway-outcome` and recorded in the audit trail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Refused here; nothing reached the upstream. Safe to repeat once the cause is gone.
    NotSent,
    /// 200 and the route's success code. No need to repeat.
    Succeeded,
    /// The upstream answered that it did not do it. Repeat after mending the values.
    Failed,
    /// The upstream refused the credential or the rate: taken as not applied (RFC 9110 §15.5.2 and the
    /// vendor's page). Repeat later.
    Refused,
    /// Bytes may have arrived and no clear answer came. Repeat only after a look.
    Unknown,
    /// The stored answer of the first call with the same `Idempotency-Key`. No need to repeat.
    Replayed,
}

impl Outcome {
    /// All outcomes, in the order in which the documentation lists them.
    pub const ALL: [Self; 6] =
        [Self::NotSent, Self::Succeeded, Self::Failed, Self::Refused, Self::Unknown, Self::Replayed];

    /// The word used in headers, audit records and metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotSent => "not_sent",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Refused => "refused",
            Self::Unknown => "unknown",
            Self::Replayed => "replayed",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a client may do about an answer, sent as `x-gateway-retry`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Retry {
    /// Send the call again unchanged, after `Retry-After` or with back-off.
    Safe,
    /// Send the call again with the same `Idempotency-Key`, after `Retry-After` or with back-off; never without it.
    SameKey,
    /// Change the body, path or headers first; with a key, take a new one.
    AfterCorrection,
    /// Not now, and not by the caller's doing: the operators must act. At most once an hour.
    Later,
    /// The task may be done: look at the cloud before anything is sent again.
    CheckFirst,
    /// The task is done.
    NotNeeded,
}

impl Retry {
    /// All words, in the order in which the documentation lists them.
    pub const ALL: [Self; 6] =
        [Self::Safe, Self::SameKey, Self::AfterCorrection, Self::Later, Self::CheckFirst, Self::NotNeeded];

    /// The word used in headers and problems.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Safe => "safe",
            Self::SameKey => "same-key",
            Self::AfterCorrection => "after-correction",
            Self::Later => "later",
            Self::CheckFirst => "check-first",
            Self::NotNeeded => "not-needed",
        }
    }

    /// For a call that did not reach the upstream and may be sent again. A key stays, since the first call may
    /// have taken effect before it was lost.
    pub const fn unchanged(is_keyed: bool) -> Self {
        if is_keyed { Self::SameKey } else { Self::Safe }
    }

    /// For a reply of the upstream that is passed on. Of refusals only 429 goes away by itself.
    pub const fn of_reply(outcome: Outcome, status: StatusCode, is_keyed: bool) -> Self {
        match outcome {
            Outcome::Succeeded | Outcome::Replayed => Self::NotNeeded,
            Outcome::Failed => Self::AfterCorrection,
            Outcome::Unknown => Self::CheckFirst,
            Outcome::Refused if status.as_u16() != 429 => Self::Later,
            Outcome::Refused | Outcome::NotSent => Self::unchanged(is_keyed),
        }
    }
}

/// The text of a result code: a few bytes in place, more on the heap.
pub type ResultCode = SmallVec<[u8; 24]>;
