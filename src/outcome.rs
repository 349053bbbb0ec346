//! What became of the task: the one word that tells a caller whether repeating the call is safe.

use std::fmt;

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
}

impl Outcome {
    /// All outcomes, in the order in which the documentation lists them.
    pub const ALL: [Self; 5] = [Self::NotSent, Self::Succeeded, Self::Failed, Self::Refused, Self::Unknown];

    /// The word used in headers, audit records and metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotSent => "not_sent",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Refused => "refused",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
