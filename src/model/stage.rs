//! The stages of a request.

words! {
    /// The stages of a request, in their order. The same words are in audit records, metric labels and problem documents.
    // The order is the security argument: nothing is read for a caller over its limit, no token is spent on a body that breaks
    // its contract, and nothing is sent before its intent is committed.
    #[derive(PartialOrd, Ord)]
    Stage {
        /// Takes a place among the concurrent requests, and identifies the caller.
        Admission = "admission",
        /// Finds the route, and checks that this caller may use it, as this operator.
        Route = "route",
        /// Applies the caller's own rate limit.
        RateLimit = "rate_limit",
        /// Receives the body and checks it against the route's contract.
        Contract = "contract",
        /// Deduplication: checks whether the same call was made before.
        Idempotency = "idempotency",
        /// Gets a usable token.
        Token = "token",
        /// Takes from the upstream's quota, which all callers share.
        Quota = "quota",
        /// Reserves a connection to the upstream and commits the intent.
        Audit = "audit",
        /// Sends the request, reads the reply and classifies it.
        Upstream = "upstream",
    }
}
