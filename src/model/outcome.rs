//! The outcome of a request, and what a client may do about it, in words of the wire.

use http::StatusCode;
use smallvec::SmallVec;

words! {
    /// The outcome of a request, sent as `x-gateway-outcome` and written to the audit trail.
    Outcome {
        /// Nothing was sent to the upstream. The call may be repeated once the cause is gone.
        NotSent = "not_sent",
        /// The upstream replied with 200 and the route's success code. Nothing to repeat.
        Succeeded = "succeeded",
        /// The upstream replied that it did not execute the task. The values must be corrected first.
        Failed = "failed",
        // A refused credential or rate counts as not executed, and may be repeated.
        /// The upstream refused the credential or the rate (RFC 9110, section 15.5.2, and the vendor's page). Repeat later.
        Refused = "refused",
        // Everything that is not certain: a wrong `failed` would let a task that is not idempotent be executed twice.
        /// Bytes may have reached the upstream, and no clear reply came. Check the cloud before anything is repeated.
        Unknown = "unknown",
        /// The gateway replayed the stored reply of the first call with the same `Idempotency-Key`. Nothing was sent.
        Replayed = "replayed",
    }
}

words! {
    /// What a client may do after an answer, sent as `x-gateway-retry`.
    Retry {
        /// Send the call again unchanged, after `Retry-After` or with back-off.
        Safe = "safe",
        /// Send the call again with the same `Idempotency-Key`, after `Retry-After` or with back-off; never without it.
        SameKey = "same-key",
        /// Change the body, path or headers first; a call with a key needs a new key.
        AfterCorrection = "after-correction",
        /// Wait until the operators have acted; try at most once an hour.
        Later = "later",
        /// The task may have been executed: check the cloud before anything is sent again.
        CheckFirst = "check-first",
        /// The task has been executed.
        NotNeeded = "not-needed",
    }
}

impl Retry {
    /// The advice for a call that may be sent again unchanged. `is_keyed`: it has an `Idempotency-Key`.
    pub const fn unchanged(is_keyed: bool) -> Self {
        // A client that drops its key loses the protection for an earlier try whose answer it never got.
        if is_keyed { Self::SameKey } else { Self::Safe }
    }

    /// The advice for a reply of the upstream that is passed on, by its outcome and status.
    pub const fn of_reply(outcome: Outcome, status: StatusCode, is_keyed: bool) -> Self {
        match outcome {
            Outcome::Succeeded | Outcome::Replayed => Self::NotNeeded,
            Outcome::Failed => Self::AfterCorrection,
            Outcome::Unknown => Self::CheckFirst,
            // A refused rate (429) ends by itself; a refused credential needs an operator.
            Outcome::Refused if status.as_u16() != 429 => Self::Later,
            Outcome::Refused | Outcome::NotSent => Self::unchanged(is_keyed),
        }
    }
}

/// The text of a result code, as the upstream sent it.
// The vendor's codes have 7 bytes, so 24 in place save an allocation per request.
pub type ResultCode = SmallVec<[u8; 24]>;
