//! Why the gateway itself answered: one word, its status, its title, and what a client may do.

use http::StatusCode;

use super::outcome::{Outcome, Retry};

words! {
    /// Why the gateway itself answered. One word per cause; stable, callers may match on it.
    Code {
        /// The gateway is stopping.
        Draining = "draining",
        /// A bound on concurrent work is reached.
        Overloaded = "overloaded",
        /// The head breaks a rule that keeps requests unambiguous.
        HeadInvalid = "head_invalid",
        /// `Host` is not one of the listener's names.
        HostUnknown = "host_unknown",
        /// The request comes from a browser.
        BrowserRefused = "browser_refused",
        /// No configured caller matches this peer.
        CallerDenied = "caller_denied",
        /// A header is missing that this caller's requests must carry.
        HeaderMissing = "header_missing",
        /// The caller, or the route, is refused for now.
        Frozen = "frozen",
        /// No route has this path.
        RouteUnknown = "route_unknown",
        /// The route exists, the method is another.
        MethodNotAllowed = "method_not_allowed",
        /// Absolute-form, query, or a path that is not in its plain spelling.
        TargetInvalid = "target_invalid",
        /// This caller may not use this route.
        RouteDenied = "route_denied",
        /// This caller may not act as this operator.
        OperatorDenied = "operator_denied",
        /// The caller's own limit is spent.
        RateLimited = "rate_limited",
        /// The body is larger than `max_body`.
        BodyTooLarge = "body_too_large",
        /// Not `application/json` in UTF-8, or content-coded.
        MediaTypeUnsupported = "media_type_unsupported",
        /// An `Expect` other than `100-continue`.
        ExpectationFailed = "expectation_failed",
        /// The body did not arrive in time.
        BodyTimeout = "body_timeout",
        /// The body ended early, or its framing is not plain.
        BodyIncomplete = "body_incomplete",
        /// The body has trailer fields.
        Trailers = "trailers",
        /// The body is not strict JSON.
        BodyNotJson = "body_not_json",
        /// The body breaks the route's contract.
        ContractViolation = "contract_violation",
        /// `Idempotency-Key` or `Idempotency-Force` breaks its rules, or a key is needed.
        IdempotencyKeyInvalid = "idempotency_key_invalid",
        /// The key stands for another call.
        IdempotencyMismatch = "idempotency_mismatch",
        /// The first call with this key is not over.
        RequestInProgress = "request_in_progress",
        /// Nobody knows what became of the first call with this key.
        OutcomeUnknown = "outcome_unknown",
        /// An equal call is at work, of unknown outcome, or done without its caller having learnt of it.
        DuplicateSuspected = "duplicate_suspected",
        /// No call can be remembered: too many are, or those before the start are still being read.
        IdempotencyUnavailable = "idempotency_unavailable",
        /// No usable token, and none came in time.
        TokenUnavailable = "token_unavailable",
        /// The token endpoint refuses the credential.
        CredentialRefused = "credential_refused",
        /// The shared quota is spent.
        QuotaExhausted = "quota_exhausted",
        /// The upstream failed too often and is left alone.
        UpstreamSuspended = "upstream_suspended",
        /// No connection to the upstream.
        UpstreamUnreachable = "upstream_unreachable",
        /// The intent could not be made safe.
        AuditUnavailable = "audit_unavailable",
        /// No answer within the exchange's deadline.
        UpstreamTimeout = "upstream_timeout",
        /// The answer broke off or is not HTTP.
        UpstreamBroken = "upstream_broken",
        /// The upstream refuses every token we can get.
        CredentialRejected = "credential_rejected",
        /// The caller went away before its request was sent. Its answer is read by nobody; it is on record.
        CallerLeft = "caller_left",
        /// A fault of the gateway's own.
        Internal = "internal",
    }
}

impl Code {
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
