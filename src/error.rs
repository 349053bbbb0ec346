//! The only place where a failure becomes a status, a code and a text.
//!
//! Each step has a small error of its own; this file maps all of them, by matches without a wildcard, so
//! that a new failure does not compile until somebody decided how it is told. A detail never holds a
//! caller's value, a secret or an internal address.

use std::{fmt, time::Duration};

use bytes::Bytes;
use http::StatusCode;
use serde_json::json;

use crate::{
    admission::Denied,
    audit::{FirstCall, RequestId, Unavailable},
    cause::{Cause, Reason},
    contract::{Fault, Violation, body::NotReceived},
    idempotency::{Delivery, Refusal, Refused},
    model::outcome::{Outcome, Retry},
    rate_limit::{Exhausted, Spent},
    route::NoRoute,
    server::connection::Left,
    token::TokenError,
    upstream::{Failure, breaker::Suspended, pool::NoConnection},
};

/// The stages of a request, in their order. The same words appear in audit records, metric labels and
/// problem documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Room for it, and who calls.
    Admission,
    /// Which route, and may this caller use it.
    Route,
    /// The caller's own limit.
    RateLimit,
    /// The body against the route's contract.
    Contract,
    /// Whether the same call was made before.
    Idempotency,
    /// A usable token.
    Token,
    /// The upstream's budget, shared by all callers.
    Quota,
    /// Upstream connection reserved, intent made safe.
    Audit,
    /// Send, read, classify.
    Upstream,
}

impl Stage {
    /// How many stages there are.
    pub const COUNT: usize = 9;

    /// All stages, in the order in which a request meets them.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Admission,
        Self::Route,
        Self::RateLimit,
        Self::Contract,
        Self::Idempotency,
        Self::Token,
        Self::Quota,
        Self::Audit,
        Self::Upstream,
    ];

    /// The word used in problems, audit records and metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Admission => "admission",
            Self::Route => "route",
            Self::RateLimit => "rate_limit",
            Self::Contract => "contract",
            Self::Idempotency => "idempotency",
            Self::Token => "token",
            Self::Quota => "quota",
            Self::Audit => "audit",
            Self::Upstream => "upstream",
        }
    }
}

/// Why the gateway itself answered. One word per cause; stable, callers may match on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// The gateway is stopping.
    Draining,
    /// A bound on concurrent work is reached.
    Overloaded,
    /// The head breaks a rule that keeps requests unambiguous.
    HeadInvalid,
    /// `Host` is not one of the listener's names.
    HostUnknown,
    /// The request comes from a browser.
    BrowserRefused,
    /// No configured caller matches this peer.
    CallerDenied,
    /// A header is missing that this caller's requests must carry.
    HeaderMissing,
    /// The caller, or the route, is refused for now.
    Frozen,
    /// No route has this path.
    RouteUnknown,
    /// The route exists, the method is another.
    MethodNotAllowed,
    /// Absolute-form, query, or a path that is not in its plain spelling.
    TargetInvalid,
    /// This caller may not use this route.
    RouteDenied,
    /// This caller may not act as this operator.
    OperatorDenied,
    /// The caller's own limit is spent.
    RateLimited,
    /// The body is larger than `max_body`.
    BodyTooLarge,
    /// Not `application/json` in UTF-8, or content-coded.
    MediaTypeUnsupported,
    /// An `Expect` other than `100-continue`.
    ExpectationFailed,
    /// The body did not arrive in time.
    BodyTimeout,
    /// The body ended early, or its framing is not plain.
    BodyIncomplete,
    /// The body has trailer fields.
    Trailers,
    /// The body is not strict JSON.
    BodyNotJson,
    /// The body breaks the route's contract.
    ContractViolation,
    /// `Idempotency-Key` or `Idempotency-Force` breaks its rules, or a key is needed.
    IdempotencyKeyInvalid,
    /// The key stands for another call.
    IdempotencyMismatch,
    /// The first call with this key is not over.
    RequestInProgress,
    /// Nobody knows what became of the first call with this key.
    OutcomeUnknown,
    /// An equal call is at work, of unknown outcome, or done without its caller having learnt of it.
    DuplicateSuspected,
    /// No call can be remembered: too many are, or those before the start are still being read.
    IdempotencyUnavailable,
    /// No usable token, and none came in time.
    TokenUnavailable,
    /// The token endpoint refuses the credential.
    CredentialRefused,
    /// The shared quota is spent.
    QuotaExhausted,
    /// The upstream failed too often and is left alone.
    UpstreamSuspended,
    /// No connection to the upstream.
    UpstreamUnreachable,
    /// The intent could not be made safe.
    AuditUnavailable,
    /// No answer within the exchange's deadline.
    UpstreamTimeout,
    /// The answer broke off or is not HTTP.
    UpstreamBroken,
    /// The upstream refuses every token we can get.
    CredentialRejected,
    /// The caller went away before its request was sent. Never answered, only recorded.
    CallerLeft,
    /// A fault of the gateway's own.
    Internal,
}

impl Code {
    /// All codes, in the order of the stages.
    pub const ALL: [Self; 39] = [
        Self::Draining,
        Self::Overloaded,
        Self::HeadInvalid,
        Self::HostUnknown,
        Self::BrowserRefused,
        Self::CallerDenied,
        Self::HeaderMissing,
        Self::Frozen,
        Self::RouteUnknown,
        Self::MethodNotAllowed,
        Self::TargetInvalid,
        Self::RouteDenied,
        Self::OperatorDenied,
        Self::RateLimited,
        Self::BodyTooLarge,
        Self::MediaTypeUnsupported,
        Self::ExpectationFailed,
        Self::BodyTimeout,
        Self::BodyIncomplete,
        Self::Trailers,
        Self::BodyNotJson,
        Self::ContractViolation,
        Self::IdempotencyKeyInvalid,
        Self::IdempotencyMismatch,
        Self::RequestInProgress,
        Self::OutcomeUnknown,
        Self::DuplicateSuspected,
        Self::IdempotencyUnavailable,
        Self::TokenUnavailable,
        Self::CredentialRefused,
        Self::QuotaExhausted,
        Self::UpstreamSuspended,
        Self::UpstreamUnreachable,
        Self::AuditUnavailable,
        Self::UpstreamTimeout,
        Self::UpstreamBroken,
        Self::CredentialRejected,
        Self::CallerLeft,
        Self::Internal,
    ];

    /// The word used in problems, `x-gateway-error`, audit records and metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Overloaded => "overloaded",
            Self::HeadInvalid => "head_invalid",
            Self::HostUnknown => "host_unknown",
            Self::BrowserRefused => "browser_refused",
            Self::CallerDenied => "caller_denied",
            Self::HeaderMissing => "header_missing",
            Self::Frozen => "frozen",
            Self::RouteUnknown => "route_unknown",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::TargetInvalid => "target_invalid",
            Self::RouteDenied => "route_denied",
            Self::OperatorDenied => "operator_denied",
            Self::RateLimited => "rate_limited",
            Self::BodyTooLarge => "body_too_large",
            Self::MediaTypeUnsupported => "media_type_unsupported",
            Self::ExpectationFailed => "expectation_failed",
            Self::BodyTimeout => "body_timeout",
            Self::BodyIncomplete => "body_incomplete",
            Self::Trailers => "trailers",
            Self::BodyNotJson => "body_not_json",
            Self::ContractViolation => "contract_violation",
            Self::IdempotencyKeyInvalid => "idempotency_key_invalid",
            Self::IdempotencyMismatch => "idempotency_mismatch",
            Self::RequestInProgress => "request_in_progress",
            Self::OutcomeUnknown => "outcome_unknown",
            Self::DuplicateSuspected => "duplicate_suspected",
            Self::IdempotencyUnavailable => "idempotency_unavailable",
            Self::TokenUnavailable => "token_unavailable",
            Self::CredentialRefused => "credential_refused",
            Self::QuotaExhausted => "quota_exhausted",
            Self::UpstreamSuspended => "upstream_suspended",
            Self::UpstreamUnreachable => "upstream_unreachable",
            Self::AuditUnavailable => "audit_unavailable",
            Self::UpstreamTimeout => "upstream_timeout",
            Self::UpstreamBroken => "upstream_broken",
            Self::CredentialRejected => "credential_rejected",
            Self::CallerLeft => "caller_left",
            Self::Internal => "internal",
        }
    }

    /// The status that the caller gets.
    pub const fn status(self) -> StatusCode {
        match self {
            Self::HeadInvalid
            | Self::TargetInvalid
            | Self::BodyIncomplete
            | Self::Trailers
            | Self::BodyNotJson
            | Self::IdempotencyKeyInvalid => StatusCode::BAD_REQUEST,
            Self::RequestInProgress | Self::OutcomeUnknown | Self::DuplicateSuspected => StatusCode::CONFLICT,
            Self::BrowserRefused
            | Self::CallerDenied
            | Self::HeaderMissing
            | Self::Frozen
            | Self::RouteDenied
            | Self::OperatorDenied => StatusCode::FORBIDDEN,
            Self::RouteUnknown => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::MediaTypeUnsupported => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::ExpectationFailed => StatusCode::EXPECTATION_FAILED,
            Self::HostUnknown => StatusCode::MISDIRECTED_REQUEST,
            Self::ContractViolation | Self::IdempotencyMismatch => StatusCode::UNPROCESSABLE_ENTITY,
            Self::RateLimited | Self::QuotaExhausted => StatusCode::TOO_MANY_REQUESTS,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::CredentialRefused
            | Self::UpstreamUnreachable
            | Self::UpstreamBroken
            | Self::CredentialRejected => StatusCode::BAD_GATEWAY,
            Self::Draining
            | Self::Overloaded
            | Self::IdempotencyUnavailable
            | Self::TokenUnavailable
            | Self::UpstreamSuspended
            | Self::AuditUnavailable
            | Self::CallerLeft => StatusCode::SERVICE_UNAVAILABLE,
            Self::UpstreamTimeout => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// What a client may do after this code, given what became of the call. `is_keyed`: the call has an
    /// `Idempotency-Key`.
    pub const fn retry(self, outcome: Outcome, is_keyed: bool) -> Retry {
        match self {
            Self::Draining
            | Self::Overloaded
            | Self::RateLimited
            | Self::BodyTimeout
            | Self::BodyIncomplete
            | Self::IdempotencyUnavailable
            | Self::TokenUnavailable
            | Self::QuotaExhausted
            | Self::UpstreamSuspended
            | Self::UpstreamUnreachable
            | Self::AuditUnavailable
            | Self::CallerLeft => Retry::unchanged(is_keyed),
            Self::BrowserRefused
            | Self::CallerDenied
            | Self::Frozen
            | Self::RouteDenied
            | Self::OperatorDenied
            | Self::CredentialRefused
            | Self::CredentialRejected => Retry::Later,
            Self::HeadInvalid
            | Self::HostUnknown
            | Self::HeaderMissing
            | Self::RouteUnknown
            | Self::MethodNotAllowed
            | Self::TargetInvalid
            | Self::BodyTooLarge
            | Self::MediaTypeUnsupported
            | Self::ExpectationFailed
            | Self::Trailers
            | Self::BodyNotJson
            | Self::ContractViolation
            | Self::IdempotencyKeyInvalid
            | Self::IdempotencyMismatch => Retry::AfterCorrection,
            Self::RequestInProgress => Retry::SameKey,
            Self::OutcomeUnknown | Self::UpstreamTimeout | Self::UpstreamBroken => Retry::CheckFirst,
            Self::DuplicateSuspected if matches!(outcome, Outcome::Succeeded) => Retry::NotNeeded,
            Self::DuplicateSuspected => Retry::CheckFirst,
            Self::Internal if matches!(outcome, Outcome::Unknown) => Retry::CheckFirst,
            Self::Internal => Retry::unchanged(is_keyed),
        }
    }

    /// Whether somebody on the way may see another request in these bytes, or another end of it, than the gateway
    /// does: nothing behind it on its connection is believed (RFC 9112 §11.2).
    pub const fn is_ambiguous(self) -> bool {
        matches!(self, Self::HeadInvalid | Self::BodyIncomplete | Self::Trailers)
    }
}

impl Code {
    /// One line for people.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Draining => "The gateway is stopping",
            Self::Overloaded => "Too much work at once",
            Self::HeadInvalid => "The request's head is not valid",
            Self::HostUnknown => "Unknown host",
            Self::BrowserRefused => "Browsers are refused",
            Self::CallerDenied => "Unknown caller",
            Self::HeaderMissing => "A header is missing",
            Self::Frozen => "Frozen",
            Self::RouteUnknown => "Unknown path",
            Self::MethodNotAllowed => "Method not allowed",
            Self::TargetInvalid => "The request target is not valid",
            Self::RouteDenied => "Route not allowed for this caller",
            Self::OperatorDenied => "Operator not allowed for this caller",
            Self::RateLimited => "The caller's rate limit is spent",
            Self::BodyTooLarge => "The body is too large",
            Self::MediaTypeUnsupported => "Unsupported media type",
            Self::ExpectationFailed => "Unknown expectation",
            Self::BodyTimeout => "The body came too slowly",
            Self::BodyIncomplete => "The body is incomplete",
            Self::Trailers => "Trailers are refused",
            Self::BodyNotJson => "The body is not strict JSON",
            Self::ContractViolation => "The body breaks the contract",
            Self::IdempotencyKeyInvalid => "The idempotency key is not valid",
            Self::IdempotencyMismatch => "The idempotency key stands for another call",
            Self::RequestInProgress => "The first call with this key is still at work",
            Self::OutcomeUnknown => "What became of the call is unknown",
            Self::DuplicateSuspected => "An equal call was sent before",
            Self::IdempotencyUnavailable => "The call cannot be remembered at the moment",
            Self::TokenUnavailable => "No token at the moment",
            Self::CredentialRefused => "The token endpoint refuses the credential",
            Self::QuotaExhausted => "The shared quota is spent",
            Self::UpstreamSuspended => "The upstream is left alone for a moment",
            Self::UpstreamUnreachable => "The upstream cannot be reached",
            Self::AuditUnavailable => "The audit trail cannot be written",
            Self::UpstreamTimeout => "The upstream did not answer in time",
            Self::UpstreamBroken => "The upstream's answer broke off or cannot be read",
            Self::CredentialRejected => "The upstream refuses the credential",
            Self::CallerLeft => "The caller left",
            Self::Internal => "Internal error",
        }
    }
}

/// A failure as the caller is told of it.
#[derive(Debug)]
pub struct Error {
    /// Why.
    pub code: Code,
    /// What became of the task.
    pub outcome: Outcome,
    /// What is wrong and what to do.
    pub detail: String,
    /// All violations of the contract.
    pub violations: Vec<Violation>,
    /// The earlier call that this one repeats or equals.
    pub first: Option<FirstCall>,
    /// Why, where the other side failed.
    pub cause: Option<Cause>,
    /// When to come back.
    pub retry_after: Option<Duration>,
    /// The answer tells that the first call succeeded; to be settled once it is delivered.
    pub delivery: Option<Box<Delivery>>,
}

impl Error {
    /// A request that was refused here: nothing was sent.
    fn not_sent(code: Code, detail: impl fmt::Display) -> Self {
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

    /// What became of the call itself, for metrics and the trail: a duplicate was not sent, whatever became of the
    /// first call.
    pub fn own_outcome(&self) -> Outcome {
        if self.first.is_some() { Outcome::NotSent } else { self.outcome }
    }

    /// A fault of the gateway's own. Whether anything was sent is for the record to say: before the intent
    /// nothing was.
    pub fn internal(sent: bool) -> Self {
        let outcome = if sent { Outcome::Unknown } else { Outcome::NotSent };
        let detail = "a fault of the gateway's own; the operators find it in the log under this request id";
        Self { outcome, ..Self::not_sent(Code::Internal, detail) }
    }

    /// The document of RFC 9457.
    pub fn problem(&self, stage: Stage, request_id: RequestId, retry: Retry) -> Bytes {
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
            Denied::Draining => Code::Draining,
            Denied::Overloaded => Code::Overloaded,
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

impl From<Spent> for Error {
    fn from(spent: Spent) -> Self {
        let retry_after = Some(spent.retry_after);
        Self { retry_after, ..Self::not_sent(Code::RateLimited, spent) }
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
            NotReceived::NoRoom => Code::Overloaded,
            NotReceived::Timeout(_) => Code::BodyTimeout,
            NotReceived::Incomplete => Code::BodyIncomplete,
            NotReceived::Trailers => Code::Trailers,
        };
        Self::not_sent(code, not_received)
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::NotJson(not_json) => Self::not_sent(Code::BodyNotJson, not_json),
            Fault::Violations(found) => {
                let detail = match found.total {
                    1 => "the body breaks the route's contract in one place, which `errors` tells".to_owned(),
                    total if total > found.list.len() => {
                        format!(
                            "the body breaks the route's contract in {total} places; `errors` tells the first {}",
                            found.list.len()
                        )
                    }
                    total => {
                        format!(
                            "the body breaks the route's contract in {total} places, which `errors` tells"
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
            | Refused::NoMoreDoubts
            | Refused::NoMoreSuccesses
            | Refused::Lost
            | Refused::Rebuilding => Code::IdempotencyUnavailable,
        };
        let (first, error) = (reason.first(), Self::not_sent(code, reason));
        // A mismatch tells of this call; the others tell what became of the first one, which is this one, too.
        let told = first.filter(|_| code != Code::IdempotencyMismatch);
        let outcome = told.map_or(Outcome::NotSent, |first| first.outcome);
        let error = Self { outcome, first, delivery, ..error };
        match code {
            Code::RequestInProgress => Self { retry_after: Some(Duration::from_secs(1)), ..error },
            _ => error,
        }
    }
}

impl From<TokenError> for Error {
    fn from(error: TokenError) -> Self {
        match error {
            TokenError::Unavailable { cause, retry_after } => Self {
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
            TokenError::CredentialRefused { retry_after } => Self {
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

impl From<Left> for Error {
    fn from(left: Left) -> Self {
        Self::not_sent(Code::CallerLeft, left)
    }
}

impl From<Suspended> for Error {
    fn from(suspended: Suspended) -> Self {
        let (cause, retry_after) = (Some(suspended.cause), Some(suspended.retry_after));
        Self { cause, retry_after, ..Self::not_sent(Code::UpstreamSuspended, suspended) }
    }
}

impl From<NoConnection> for Error {
    fn from(none: NoConnection) -> Self {
        match none {
            NoConnection::Busy => Self::not_sent(
                Code::Overloaded,
                "all connections to the upstream are busy; nothing was sent. Call again shortly",
            ),
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

impl From<Unavailable> for Error {
    fn from(_: Unavailable) -> Self {
        Self::not_sent(
            Code::AuditUnavailable,
            "the call could not be put on record, so that it was not sent; call again later, and tell the operators of the gateway if that goes on",
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
            (Code::RequestInProgress, _) => "the upstream has answered, and that cannot be put on record at the moment: ask \
                                             again with the same Idempotency-Key"
                .to_owned(),
            (_, Outcome::Unknown) => format!(
                "the request may have reached the upstream and no clear answer came ({why}): look in the cloud whether the task is \
                 assigned before you repeat the call"
            ),
            (Code::Overloaded, _) => "all connections to the upstream are busy; nothing was sent. Call again shortly".to_owned(),
            _ => format!("nothing was sent, or the upstream said that it did not process it ({why})"),
        };
        let error = Self::not_sent(code, detail);
        let soon = error.retry_after.filter(|_| outcome == Outcome::NotSent);
        Self { outcome, cause, retry_after: retry_after.or(soon), ..error }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
