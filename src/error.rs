//! The only place where a failure becomes a status, a code and a text.

use std::fmt;

use http::StatusCode;

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
    pub const COUNT: usize = 8;

    /// All stages, in the order in which a request meets them.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Admission,
        Self::Route,
        Self::RateLimit,
        Self::Contract,
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
    /// The body ended early.
    BodyIncomplete,
    /// The body is not strict JSON.
    BodyNotJson,
    /// The body breaks the route's contract.
    ContractViolation,
    /// No usable token, and none came in time.
    TokenUnavailable,
    /// The token endpoint refuses the credential.
    CredentialRefused,
    /// The shared quota is spent.
    QuotaExhausted,
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
    /// The caller went away before the intent. Never sent, only recorded.
    CallerLeft,
    /// A fault of the gateway's own.
    Internal,
}

impl Code {
    /// The word used in problems, `x-gateway-error`, audit records and metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Overloaded => "overloaded",
            Self::HeadInvalid => "head_invalid",
            Self::HostUnknown => "host_unknown",
            Self::BrowserRefused => "browser_refused",
            Self::CallerDenied => "caller_denied",
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
            Self::BodyNotJson => "body_not_json",
            Self::ContractViolation => "contract_violation",
            Self::TokenUnavailable => "token_unavailable",
            Self::CredentialRefused => "credential_refused",
            Self::QuotaExhausted => "quota_exhausted",
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
            Self::HeadInvalid | Self::TargetInvalid | Self::BodyIncomplete | Self::BodyNotJson => {
                StatusCode::BAD_REQUEST
            }
            Self::BrowserRefused | Self::CallerDenied | Self::RouteDenied | Self::OperatorDenied => {
                StatusCode::FORBIDDEN
            }
            Self::RouteUnknown => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::MediaTypeUnsupported => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::ExpectationFailed => StatusCode::EXPECTATION_FAILED,
            Self::HostUnknown => StatusCode::MISDIRECTED_REQUEST,
            Self::ContractViolation => StatusCode::UNPROCESSABLE_ENTITY,
            Self::RateLimited | Self::QuotaExhausted => StatusCode::TOO_MANY_REQUESTS,
            Self::CallerLeft | Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::CredentialRefused
            | Self::UpstreamUnreachable
            | Self::UpstreamBroken
            | Self::CredentialRejected => StatusCode::BAD_GATEWAY,
            Self::Draining | Self::Overloaded | Self::TokenUnavailable | Self::AuditUnavailable => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::UpstreamTimeout => StatusCode::GATEWAY_TIMEOUT,
        }
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
