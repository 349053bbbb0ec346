//! Why the gateway itself answered: one word, with its status, its title and the advice to the client.
//!
//! The detailed text of an answer is not here; it depends on the failure.

use http::StatusCode;

use super::outcome::{Outcome, Retry};

words! {
    /// Why the gateway itself answered. The word is stable: callers may match on it.
    Code {
        /// The gateway is stopping.
        Draining = "draining",
        /// Load shedding: a bound on concurrent work is reached.
        Overloaded = "overloaded",
        /// The head breaks a rule that keeps requests unambiguous.
        HeadInvalid = "head_invalid",
        /// `Host` is not one of the listener's names.
        HostUnknown = "host_unknown",
        /// The request comes from a browser.
        BrowserRefused = "browser_refused",
        /// No configured caller matches this peer.
        CallerDenied = "caller_denied",
        /// A header is missing that this caller's requests must have.
        HeaderMissing = "header_missing",
        /// The configuration refuses this caller, or this route, for now.
        Frozen = "frozen",
        /// No route has this path.
        RouteUnknown = "route_unknown",
        /// The route has another method.
        MethodNotAllowed = "method_not_allowed",
        /// The target is in absolute form, has a query, or spells its path unusually.
        TargetInvalid = "target_invalid",
        /// This caller may not use this route.
        RouteDenied = "route_denied",
        /// This caller may not act as this operator.
        OperatorDenied = "operator_denied",
        /// The caller's own rate limit is exceeded.
        RateLimited = "rate_limited",
        /// The body is larger than `max_body`.
        BodyTooLarge = "body_too_large",
        /// The body is not `application/json` in UTF-8, or has a content coding.
        MediaTypeUnsupported = "media_type_unsupported",
        /// The request has an `Expect` other than `100-continue`.
        ExpectationFailed = "expectation_failed",
        /// The body did not arrive in time.
        BodyTimeout = "body_timeout",
        /// The body ended early, or its framing is not valid.
        BodyIncomplete = "body_incomplete",
        /// The body has trailer fields.
        Trailers = "trailers",
        /// The body is not strict JSON.
        BodyNotJson = "body_not_json",
        /// The body breaks the route's contract.
        ContractViolation = "contract_violation",
        /// `Idempotency-Key` or `Idempotency-Force` breaks its rules, or a key is needed.
        IdempotencyKeyInvalid = "idempotency_key_invalid",
        /// The key was used for another call.
        IdempotencyMismatch = "idempotency_mismatch",
        /// The first call with this key is still in progress, or its outcome is not committed yet.
        RequestInProgress = "request_in_progress",
        /// The outcome of the first call with this key is unknown.
        OutcomeUnknown = "outcome_unknown",
        /// An equal call is in progress, has an unknown outcome, or has succeeded. A success whose caller got the answer counts
        /// only under `block`.
        DuplicateSuspected = "duplicate_suspected",
        /// Deduplication cannot remember the call: its table is full, or the trail before the start is still being read, or is
        /// damaged.
        IdempotencyUnavailable = "idempotency_unavailable",
        /// There is no usable token, and none came in time.
        TokenUnavailable = "token_unavailable",
        /// The token endpoint refuses the credential.
        CredentialRefused = "credential_refused",
        /// The upstream's quota, which all callers share, is exceeded.
        QuotaExhausted = "quota_exhausted",
        /// The circuit breaker of the upstream is open.
        UpstreamSuspended = "upstream_suspended",
        /// There is no connection to the upstream.
        UpstreamUnreachable = "upstream_unreachable",
        /// The intent could not be committed to the audit trail.
        AuditUnavailable = "audit_unavailable",
        /// The upstream did not reply within the deadline of the exchange.
        UpstreamTimeout = "upstream_timeout",
        /// The upstream's reply broke off, or is not HTTP.
        UpstreamBroken = "upstream_broken",
        // Unlike `credential_refused`, which is the token endpoint's: here fetching a token works.
        /// The upstream refuses every token that the credential can get.
        CredentialRejected = "credential_rejected",
        // For the audit record: the answer itself reaches no one.
        /// The caller disconnected before its request was sent.
        CallerLeft = "caller_left",
        /// An error within the gateway.
        Internal = "internal",
    }
}

impl Code {
    /// Returns the HTTP status of the answer.
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
            // RFC 9110, section 15.5.20: the connection is not for this host, so a client may try another one.
            Self::HostUnknown => StatusCode::MISDIRECTED_REQUEST,
            Self::ContractViolation | Self::IdempotencyMismatch => StatusCode::UNPROCESSABLE_ENTITY,
            Self::RateLimited | Self::QuotaExhausted => StatusCode::TOO_MANY_REQUESTS,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            // 502 also where the cloud said 401 or 403, which would tell callers that their own credentials are wrong.
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

    /// Returns the advice to the client after this code. `outcome`: that of the answer, for a duplicate that of the first call.
    /// `is_keyed`: the call has an `Idempotency-Key`.
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
            // Asking again with the key sends nothing to the upstream.
            Self::RequestInProgress => Retry::SameKey,
            Self::OutcomeUnknown | Self::UpstreamTimeout | Self::UpstreamBroken => Retry::CheckFirst,
            Self::DuplicateSuspected if matches!(outcome, Outcome::Succeeded) => Retry::NotNeeded,
            Self::DuplicateSuspected => Retry::CheckFirst,
            // After the intent the request may have been sent, even if the error is the gateway's own.
            Self::Internal if matches!(outcome, Outcome::Unknown) => Retry::CheckFirst,
            Self::Internal => Retry::unchanged(is_keyed),
        }
    }

    /// Whether the connection must be closed after this code, because a proxy on the way may see another request in these
    /// bytes, or another end of it, than the gateway does.
    // Request smuggling (RFC 9112, section 11.2): what follows on the connection could be the part of a body that an attacker
    // chose.
    pub const fn is_ambiguous(self) -> bool {
        matches!(self, Self::HeadInvalid | Self::BodyIncomplete | Self::Trailers)
    }

    /// Returns the title of the problem document (RFC 9457): one line for people, the same for each answer with this code.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Draining => "The gateway is stopping",
            Self::Overloaded => "Too much concurrent work",
            Self::HeadInvalid => "The request's head is not valid",
            Self::HostUnknown => "Unknown host",
            Self::BrowserRefused => "Browsers are refused",
            Self::CallerDenied => "Unknown caller",
            Self::HeaderMissing => "A header is missing",
            Self::Frozen => "The caller or the route is frozen",
            Self::RouteUnknown => "Unknown path",
            Self::MethodNotAllowed => "Method not allowed",
            Self::TargetInvalid => "The request target is not valid",
            Self::RouteDenied => "Route not allowed for this caller",
            Self::OperatorDenied => "Operator not allowed for this caller",
            Self::RateLimited => "The caller's rate limit is reached",
            Self::BodyTooLarge => "The body is too large",
            Self::MediaTypeUnsupported => "Unsupported media type",
            Self::ExpectationFailed => "Unknown expectation",
            Self::BodyTimeout => "The body came too slowly",
            Self::BodyIncomplete => "The body is incomplete",
            Self::Trailers => "Trailers are refused",
            Self::BodyNotJson => "The body is not strict JSON",
            Self::ContractViolation => "The body breaks the contract",
            Self::IdempotencyKeyInvalid => "The idempotency key is not valid",
            Self::IdempotencyMismatch => "The idempotency key was used for another call",
            Self::RequestInProgress => "The first call with this key is still in progress",
            Self::OutcomeUnknown => "The outcome of the first call is unknown",
            Self::DuplicateSuspected => "An equal call was sent before",
            Self::IdempotencyUnavailable => "The call cannot be remembered at the moment",
            Self::TokenUnavailable => "No token is available at the moment",
            Self::CredentialRefused => "The token endpoint refuses the credential",
            Self::QuotaExhausted => "The shared quota is used up",
            Self::UpstreamSuspended => "The circuit breaker of the upstream is open",
            Self::UpstreamUnreachable => "The upstream cannot be reached",
            Self::AuditUnavailable => "The audit trail cannot be written",
            Self::UpstreamTimeout => "The upstream did not answer in time",
            Self::UpstreamBroken => "The upstream's answer broke off or cannot be read",
            Self::CredentialRejected => "The upstream refuses the credential",
            Self::CallerLeft => "The caller closed the connection",
            Self::Internal => "Internal error",
        }
    }
}
