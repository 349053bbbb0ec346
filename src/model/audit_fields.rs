//! The members of the trail's records.

/// Members that a contract may not name: those that intents, and calls on the list of the unresolved, have of their own, and most
/// of those of outcomes.
pub const MEMBERS: [&str; 33] = [
    "seq",
    "time",
    "kind",
    "id",
    "caller",
    "route",
    "peer",
    "operator",
    "first",
    "first_outcome",
    "caller_id",
    "traceparent",
    "body_size",
    "digest",
    "key",
    "print",
    "forced",
    "outcome",
    "code",
    "stage",
    "status",
    "upstream_status",
    "upstream_request_id",
    "result_code",
    "reply",
    "ms",
    "note",
    "event",
    "state",
    "superseded",
    "presumed",
    "prev",
    "hash",
];

/// Members of its own that a trail may hide, beside those of contracts.
pub const SHOWN: [&str; 4] = ["operator", "peer", "caller_id", "traceparent"];
