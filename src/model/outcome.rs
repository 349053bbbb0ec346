//! What became of the task, and what a client may do about it: the words of the wire.

use http::StatusCode;
use smallvec::SmallVec;

words! {
    /// The outcome of a request, sent as `x-gateway-outcome` and recorded in the audit trail.
    Outcome {
        /// Refused here; nothing reached the upstream. Safe to repeat once the cause is gone.
        NotSent = "not_sent",
        /// 200 and the route's success code. No need to repeat.
        Succeeded = "succeeded",
        /// The upstream answered that it did not do it. Repeat after mending the values.
        Failed = "failed",
        /// The upstream refused the credential or the rate: taken as not applied (RFC 9110 §15.5.2 and the
        /// vendor's page). Repeat later.
        Refused = "refused",
        /// Bytes may have arrived and no clear answer came. Repeat only after a look.
        Unknown = "unknown",
        /// The stored answer of the first call with the same `Idempotency-Key`. No need to repeat.
        Replayed = "replayed",
    }
}

words! {
    /// What a client may do about an answer, sent as `x-gateway-retry`.
    Retry {
        /// Send the call again unchanged, after `Retry-After` or with back-off.
        Safe = "safe",
        /// Send the call again with the same `Idempotency-Key`, after `Retry-After` or with back-off; never without it.
        SameKey = "same-key",
        /// Change the body, path or headers first; with a key, take a new one.
        AfterCorrection = "after-correction",
        /// Not now, and not by the caller's doing: the operators must act. At most once an hour.
        Later = "later",
        /// The task may be done: look at the cloud before anything is sent again.
        CheckFirst = "check-first",
        /// The task is done.
        NotNeeded = "not-needed",
    }
}

impl Retry {
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
