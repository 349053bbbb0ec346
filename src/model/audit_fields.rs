//! The member names of audit records that the gateway itself uses.

/// The members that a contract may not record under the same name: all of intents and of the list of unresolved calls, and most
/// of outcomes.
// A contract writes its members into the same JSON object. With an equal name a caller's body could forge, say, an outcome, and a
// restart reads outcomes from the trail.
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

/// The members of the gateway's own that the configuration may redact, beside those of contracts.
// Others are not offered: deduplication after a restart, and the hash chain, read many of them.
pub const REDACTABLE: [&str; 4] = ["operator", "peer", "caller_id", "traceparent"];
