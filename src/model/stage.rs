//! The stages of a request.

use std::fmt;

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

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
