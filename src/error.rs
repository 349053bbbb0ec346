//! The only place where a failure becomes a status, a code and a text for the caller.
//!
//! Each stage has a small error of its own. This file maps all of them, by matches without a wildcard, so that a new failure
//! does not compile before it has a code. A text never contains a caller's value, a secret or an internal address.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;

use crate::admission::Denied;
use crate::audit::Unavailable;
use crate::concurrency::NoRoom;
use crate::contract::body::NotReceived;
use crate::contract::{BodyFault, Violation};
use crate::disconnect::CallerDisconnected;
use crate::exchange::Failure;
use crate::idempotency::{Delivery, Refusal, Refused};
use crate::model::cause::Cause;
use crate::model::code::Code;
use crate::model::outcome::{Outcome, Retry};
use crate::model::request_id::{FirstCall, RequestId};
use crate::model::stage::Stage;
use crate::rate_limit::{Exhausted, LimitExceeded};
use crate::reason::Reason;
use crate::route::NoRoute;
use crate::token::NoUsableToken;
use crate::upstream::breaker::CircuitOpen;
use crate::upstream::pool::NoConnection;

/// A failure, as it is reported to the caller.
#[derive(Debug)]
pub struct Error {
    /// The code.
    pub code: Code,
    /// What became of the task; of a duplicate, of the first call.
    pub outcome: Outcome,
    /// A text that says what is wrong and what to do.
    pub detail: String,
    /// The violations of the contract, up to its bound.
    pub violations: Vec<Violation>,
    /// The earlier call that this one repeats or equals.
    pub first: Option<FirstCall>,
    /// The cause, if the upstream, the token endpoint or the way to one of them failed.
    pub cause: Option<Cause>,
    /// How long the caller should wait before it calls again.
    pub retry_after: Option<Duration>,
    /// The delivery of the first call's success, if this answer reports that; to be handed over with it.
    pub delivery: Option<Box<Delivery>>,
}

impl Error {
    /// The failure of a request that was refused here, so that nothing was sent.
    fn not_sent(code: Code, detail: impl fmt::Display) -> Self {
        // 429 and 503 go away by themselves, so each has a `Retry-After`: without one a client may call in a loop.
        let busy = matches!(code.status().as_u16(), 429 | 503);
        Self {
            code,
            outcome: Outcome::NotSent,
            detail: detail.to_string(),
            violations: Vec::new(),
            first: None,
            cause: None,
            retry_after: busy.then_some(Duration::from_secs(1)),
            delivery: None,
        }
    }

    /// The outcome of this call itself, for metrics and the trail: a duplicate was not sent, whatever became of the first call.
    // The caller gets the first call's outcome. Counted by that, one task would be counted twice.
    pub fn own_outcome(&self) -> Outcome {
        if self.first.is_some() { Outcome::NotSent } else { self.outcome }
    }

    /// A fault of the gateway's own, such as a panic. `sent` says whether an exchange may have taken the request over.
    pub fn internal(sent: bool) -> Self {
        let outcome = if sent { Outcome::Unknown } else { Outcome::NotSent };
        let detail =
            "an internal error of the gateway; the operators find it in the log under this request id";
        Self { outcome, ..Self::not_sent(Code::Internal, detail) }
    }

    /// The problem document of the failure (RFC 9457), as JSON.
    pub fn problem(&self, stage: Stage, request_id: RequestId, retry: Retry) -> Bytes {
        // A URN, since it only identifies the problem: under a URL there should be documentation (RFC 9457, section 3.1.1).
        let mut problem = json!({
            "type": format!("urn:ccsqm-gateway:problem:{}", self.code),
            "title": self.code.title(),
            "status": self.code.status().as_u16(),
            "detail": self.detail,
            "code": self.code.as_str(),
            "stage": stage.as_str(),
            "outcome": self.outcome.as_str(),
            "retry": retry.as_str(),
            "request_id": request_id.to_string(),
        });
        if let Some(cause) = self.cause {
            problem["cause"] = cause.as_str().into();
        }
        if let Some(first) = self.first {
            problem["first_request_id"] = first.request_id().as_str().into();
            problem["first_outcome"] = first.outcome.as_str().into();
        }
        if !self.violations.is_empty() {
            problem["errors"] = self
                .violations
                .iter()
                .map(|v| json!({ "pointer": v.pointer, "code": v.code, "detail": v.detail }))
                .collect();
        }
        problem.to_string().into()
    }
}

impl From<Denied> for Error {
    fn from(denied: Denied) -> Self {
        let code = match &denied {
            Denied::NoRoom(NoRoom::Draining) => Code::Draining,
            Denied::NoRoom(NoRoom::Overloaded) => Code::Overloaded,
            Denied::Head(_) => Code::HeadInvalid,
            Denied::Host => Code::HostUnknown,
            Denied::Browser => Code::BrowserRefused,
            Denied::Caller => Code::CallerDenied,
            Denied::HeaderMissing(_) => Code::HeaderMissing,
            Denied::Frozen => Code::Frozen,
        };
        Self::not_sent(code, denied)
    }
}

impl From<NoRoute> for Error {
    fn from(no_route: NoRoute) -> Self {
        let code = match &no_route {
            NoRoute::Target(_) => Code::TargetInvalid,
            NoRoute::Unknown(_) => Code::RouteUnknown,
            NoRoute::Method => Code::MethodNotAllowed,
            NoRoute::Denied(_) => Code::RouteDenied,
            NoRoute::Frozen => Code::Frozen,
            NoRoute::Operator => Code::OperatorDenied,
        };
        Self::not_sent(code, no_route)
    }
}

impl From<LimitExceeded> for Error {
    fn from(exceeded: LimitExceeded) -> Self {
        let retry_after = Some(exceeded.retry_after);
        Self { retry_after, ..Self::not_sent(Code::RateLimited, exceeded) }
    }
}

impl From<Exhausted> for Error {
    fn from(exhausted: Exhausted) -> Self {
        let retry_after = Some(exhausted.retry_after());
        Self { retry_after, ..Self::not_sent(Code::QuotaExhausted, exhausted) }
    }
}

impl From<NotReceived> for Error {
    fn from(not_received: NotReceived) -> Self {
        let code = match not_received {
            NotReceived::Expectation => Code::ExpectationFailed,
            NotReceived::MediaType | NotReceived::MediaTypes | NotReceived::ContentCoding => {
                Code::MediaTypeUnsupported
            }
            NotReceived::TooLarge(_) => Code::BodyTooLarge,
            // The budget of unfinished bytes is used up: the gateway's fault, not the caller's, so it may call again.
            NotReceived::NoRoom => Code::Overloaded,
            NotReceived::Timeout(_) => Code::BodyTimeout,
            NotReceived::Incomplete => Code::BodyIncomplete,
            NotReceived::Trailers => Code::Trailers,
        };
        Self::not_sent(code, not_received)
    }
}

// The caller gets the violations, the trail only their places: see `gateway/refusal.rs`.
impl From<BodyFault> for Error {
    fn from(fault: BodyFault) -> Self {
        match fault {
            BodyFault::NotJson(not_json) => Self::not_sent(Code::BodyNotJson, not_json),
            BodyFault::Violations(found) => {
                let detail = match found.total {
                    1 => "the body breaks the route's contract in one place, which `errors` lists".to_owned(),
                    total if total > found.list.len() => {
                        format!(
                            "the body breaks the route's contract in {total} places; `errors` lists the first {}",
                            found.list.len()
                        )
                    }
                    total => {
                        format!(
                            "the body breaks the route's contract in {total} places, which `errors` lists"
                        )
                    }
                };
                Self { violations: found.list, ..Self::not_sent(Code::ContractViolation, detail) }
            }
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        let Refusal { reason, delivery } = refusal;
        let code = match &reason {
            Refused::Key(_) | Refused::NoKey => Code::IdempotencyKeyInvalid,
            Refused::Mismatch(_) => Code::IdempotencyMismatch,
            Refused::InProgress(_) => Code::RequestInProgress,
            Refused::Unknown(_) => Code::OutcomeUnknown,
            Refused::Duplicate(_) | Refused::Done(_) => Code::DuplicateSuspected,
            Refused::NoMoreKeys
            | Refused::NoMoreKeysOfCaller
            | Refused::TooManyInDoubt
            | Refused::NoMoreSuccesses
            | Refused::Lost
            | Refused::Rebuilding => Code::IdempotencyUnavailable,
        };
        let (first, error) = (reason.first(), Self::not_sent(code, reason));
        // A duplicate is the first call once more, so that its outcome is the first one's: `not_sent` would invite to repeat the
        // task. A mismatch is another call, which was not sent.
        let named = first.filter(|_| code != Code::IdempotencyMismatch);
        let outcome = named.map_or(Outcome::NotSent, |first| first.outcome);
        let error = Self { outcome, first, delivery, ..error };
        // The only unknown outcome with a `Retry-After`: with its key the caller asks for the answer, and sends nothing.
        match code {
            Code::RequestInProgress => Self { retry_after: Some(Duration::from_secs(1)), ..error },
            _ => error,
        }
    }
}

impl From<NoUsableToken> for Error {
    fn from(error: NoUsableToken) -> Self {
        match error {
            NoUsableToken::Unavailable { cause, retry_after } => Self {
                cause: Some(cause),
                retry_after: Some(retry_after),
                ..Self::not_sent(
                    Code::TokenUnavailable,
                    format!(
                        "the gateway got no token in time (the token endpoint: {}); nothing was sent. Call again later",
                        cause.meaning()
                    ),
                )
            },
            NoUsableToken::CredentialRefused { retry_after } => Self {
                cause: Some(Cause::TokenRefused),
                retry_after: Some(retry_after),
                ..Self::not_sent(
                    Code::CredentialRefused,
                    "the token endpoint refuses the gateway's credential; nothing was sent. Tell the operators of the gateway",
                )
            },
        }
    }
}

// No one may be left to read it. It is for the trail, and for a caller that has closed only its sending side.
impl From<CallerDisconnected> for Error {
    fn from(left: CallerDisconnected) -> Self {
        Self::not_sent(Code::CallerLeft, left)
    }
}

impl From<CircuitOpen> for Error {
    fn from(open: CircuitOpen) -> Self {
        let (cause, retry_after) = (Some(open.cause), Some(open.retry_after));
        Self { cause, retry_after, ..Self::not_sent(Code::UpstreamSuspended, open) }
    }
}

impl From<NoConnection> for Error {
    fn from(none: NoConnection) -> Self {
        match none {
            NoConnection::Busy => Self::not_sent(
                Code::Overloaded,
                "all connections to the upstream are busy; nothing was sent. Call again shortly",
            ),
            // Only the word of the cause: the reason's text may contain an internal address, and is for the log.
            NoConnection::Failed(Reason { cause, .. }) => {
                let detail = format!(
                    "no connection to the upstream ({}); nothing was sent. Call again later",
                    cause.meaning()
                );
                Self { cause: Some(cause), ..Self::not_sent(Code::UpstreamUnreachable, detail) }
            }
        }
    }
}

// Nothing was sent: the gateway does not forward what it could not record. A stuck disk may still write the intent later; then
// the next start lists the call as one of unknown outcome.
impl From<Unavailable> for Error {
    fn from(_: Unavailable) -> Self {
        Self::not_sent(
            Code::AuditUnavailable,
            "the call could not be recorded in the audit trail, so it was not sent. Call again later; if this error \
             persists, tell the operators of the gateway",
        )
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let Failure { code, outcome, cause, retry_after } = failure;
        let why = cause.map_or("all connections are busy", Cause::meaning);
        let detail = match (code, outcome) {
            (Code::CredentialRejected, _) => "the upstream refuses the gateway's token, and a fresh one, too: the service may not be \
                                              purchased, or the account may be blocked (vendor's page, status 401). Tell the operators of \
                                              the gateway"
                .to_owned(),
            (Code::TokenUnavailable, _) => format!(
                "the upstream refused the gateway's token, and the call could not be sent with another one ({why}); nothing was \
                 done"
            ),
            (Code::RequestInProgress, _) => "the upstream has answered, but its answer cannot be recorded at the moment: \
                 call again with the same Idempotency-Key"
                .to_owned(),
            (_, Outcome::Unknown) => format!(
                "the request may have reached the upstream, but no clear answer came ({why}). Check in the cloud whether \
                 the task is assigned before you repeat the call"
            ),
            (Code::Overloaded, _) => "all connections to the upstream are busy; nothing was sent. Call again shortly".to_owned(),
            _ => format!("nothing was sent, or the upstream said that it did not process it ({why})"),
        };
        let error = Self::not_sent(code, detail);
        // `not_sent` may be repeated soon. Of other outcomes only the exchange knows whether a repetition is safe.
        let soon = error.retry_after.filter(|_| outcome == Outcome::NotSent);
        Self { outcome, cause, retry_after: retry_after.or(soon), ..error }
    }
}
