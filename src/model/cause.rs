//! The cause of a failed connection, exchange or token fetch, or of a caller's failed TLS handshake: one word, the same in
//! problem documents, audit records, metrics, `/status` and log lines.
//!
//! The cause is for everybody, callers included. The full text, which may name addresses, is for operators only.

words! {
    /// The cause of a failure. Its word is stable: callers and alerts may match on it.
    Cause {
        /// The name does not resolve.
        Dns = "dns",
        /// The URL has no TLS, and its name resolves to no loopback address.
        NotLoopback = "not_loopback",
        /// Nobody listens at the address.
        Refused = "refused",
        /// The network has no route to the address.
        Unreachable = "unreachable",
        /// A deadline passed.
        Timeout = "timeout",
        /// The other side closed or reset the connection.
        Reset = "reset",
        /// The gateway's own machine refuses: it has no file descriptor, port or memory left, or a firewall rule of its own
        /// forbids the connection.
        Local = "local",
        /// No trusted root signed the certificate, or it is revoked, malformed or missing.
        TlsUntrusted = "tls_untrusted",
        /// The certificate has expired, or is not valid yet.
        TlsExpired = "tls_expired",
        /// The certificate is for another name.
        TlsName = "tls_name",
        /// The other side refuses the gateway's own certificate, or requires one.
        TlsIdentity = "tls_identity",
        /// The other side does not speak TLS, or no version or cipher suite of the gateway's.
        TlsProtocol = "tls_protocol",
        /// The proxy refused to open a tunnel.
        ProxyRefused = "proxy_refused",
        /// The proxy requires credentials, or refuses those of the gateway.
        ProxyCredentials = "proxy_credentials",
        /// The proxy's answer to CONNECT cannot be read, or exceeds a bound.
        ProxyUnreadable = "proxy_unreadable",
        /// The proxy closed the connection before its answer was complete.
        ProxyCut = "proxy_cut",
        /// The upstream reports that it did not process the request, or that it accepts none.
        NotProcessed = "not_processed",
        /// The reply is not HTTP, or exceeds a bound.
        ReplyUnreadable = "reply_unreadable",
        /// The connection closed before the reply was complete.
        ReplyCut = "reply_cut",
        /// The upstream replied with 502, 503 or 504.
        ReplyStatus = "reply_status",
        // `rejected` is the upstream's word on a token, `refused` the token endpoint's on the credential that would buy one.
        /// The upstream refuses a token that was just fetched.
        TokenRejected = "token_rejected",
        /// The token endpoint refuses the credential.
        TokenRefused = "token_refused",
        /// The token endpoint replied with an error after which a later fetch may succeed.
        TokenStatus = "token_status",
        /// The token endpoint's reply holds no usable token.
        TokenUnreadable = "token_unreadable",
    }
}

impl Cause {
    /// Returns half a sentence about the other side, *it*, for the text of a problem document. It names no address.
    pub const fn meaning(self) -> &'static str {
        // No `_` here: a new cause must get a text of its own.
        match self {
            Self::Dns => "its name does not resolve",
            Self::NotLoopback => {
                "its name resolves to no loopback address, and without TLS nothing is sent elsewhere"
            }
            Self::Refused => "nothing listens at its address",
            Self::Unreachable => "the network has no route to its address",
            Self::Timeout => "it took too long",
            Self::Reset => "it closed the connection",
            Self::Local => "the gateway's own machine refuses the connection to it",
            Self::TlsUntrusted => "its certificate is not trusted",
            Self::TlsExpired => "its certificate has expired, or is not valid yet",
            Self::TlsName => "its certificate is for another name",
            Self::TlsIdentity => "it refuses the gateway's own certificate, or wants one",
            Self::TlsProtocol => "it does not speak TLS, or none of the gateway's versions",
            Self::ProxyRefused => "the proxy on the way to it refuses to open a tunnel",
            Self::ProxyCredentials => {
                "the proxy on the way to it wants credentials, or refuses the gateway's"
            }
            Self::ProxyUnreadable => {
                "the proxy on the way to it sent an answer to CONNECT that cannot be read"
            }
            Self::ProxyCut => "the proxy on the way to it closed the connection",
            Self::NotProcessed => "it accepts no request at the moment",
            Self::ReplyUnreadable => "its answer cannot be read",
            Self::ReplyCut => "its answer broke off",
            Self::ReplyStatus => "it answers that it is out of service",
            Self::TokenRejected => "it refuses a token that was just fetched",
            Self::TokenRefused => "it refuses the credential",
            Self::TokenStatus => "it answers with an error",
            Self::TokenUnreadable => "its answer holds no usable token",
        }
    }
}
