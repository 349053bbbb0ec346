//! The stages of a request.

words! {
    /// The stages of a request, in their order. The same words appear in audit records, metric labels and
    /// problem documents.
    #[derive(PartialOrd, Ord)]
    Stage {
        /// Room for it, and who calls.
        Admission = "admission",
        /// Which route, and may this caller use it.
        Route = "route",
        /// The caller's own limit.
        RateLimit = "rate_limit",
        /// The body against the route's contract.
        Contract = "contract",
        /// Whether the same call was made before.
        Idempotency = "idempotency",
        /// A usable token.
        Token = "token",
        /// The upstream's budget, shared by all callers.
        Quota = "quota",
        /// Upstream connection reserved, intent made safe.
        Audit = "audit",
        /// Send, read, classify.
        Upstream = "upstream",
    }
}
