//! Why a step on the way to the cloud, or a caller's TLS handshake, failed: one word, the same in problem, trail, metric, `/status`
//! and log.

words! {
    /// The cause of a failure. Stable: callers and alerts may match on its word.
    Cause {
        /// The name does not resolve.
        Dns = "dns",
        /// Without TLS nothing is sent beyond loopback, and the name leads there.
        NotLoopback = "not_loopback",
        /// Nobody listens at the address.
        Refused = "refused",
        /// There is no way to the address.
        Unreachable = "unreachable",
        /// It took too long.
        Timeout = "timeout",
        /// The other side closed or reset the connection.
        Reset = "reset",
        /// The gateway's own machine denies it: it has no file, port or memory left, or a rule of its own forbids the way.
        Local = "local",
        /// The certificate is of no root that is trusted, or is revoked or malformed; or there is none.
        TlsUntrusted = "tls_untrusted",
        /// The certificate has expired, or is not valid yet.
        TlsExpired = "tls_expired",
        /// The certificate is for another name.
        TlsName = "tls_name",
        /// The other side refuses the gateway's own certificate, or wants one.
        TlsIdentity = "tls_identity",
        /// No TLS, or none that both sides speak.
        TlsProtocol = "tls_protocol",
        /// The proxy opens no tunnel.
        ProxyRefused = "proxy_refused",
        /// The proxy wants credentials, or refuses the gateway's.
        ProxyCredentials = "proxy_credentials",
        /// The proxy's answer is not one to CONNECT, or not within bounds.
        ProxyUnreadable = "proxy_unreadable",
        /// The proxy closed the connection before its answer was whole.
        ProxyCut = "proxy_cut",
        /// The upstream says that it did not process the request, or allows none.
        NotProcessed = "not_processed",
        /// The answer is not HTTP, or not within bounds.
        ReplyUnreadable = "reply_unreadable",
        /// The answer broke off.
        ReplyCut = "reply_cut",
        /// The upstream answered with 502, 503 or 504.
        ReplyStatus = "reply_status",
        /// The upstream refuses a token that was just fetched.
        TokenRejected = "token_rejected",
        /// The token endpoint refuses the credential.
        TokenRefused = "token_refused",
        /// The token endpoint answered with a status that may pass.
        TokenStatus = "token_status",
        /// The token endpoint's answer holds no usable token.
        TokenUnreadable = "token_unreadable",
    }
}

impl Cause {
    /// What it means of the other side, *it*, in words that a caller may read.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Dns => "its name does not resolve",
            Self::NotLoopback => "its name leads beyond loopback, where nothing is sent without TLS",
            Self::Refused => "nobody listens at its address",
            Self::Unreachable => "there is no way to its address",
            Self::Timeout => "it took too long",
            Self::Reset => "it closed the connection",
            Self::Local => "the gateway's own machine denies the way to it",
            Self::TlsUntrusted => "its certificate is not trusted",
            Self::TlsExpired => "its certificate has expired, or is not valid yet",
            Self::TlsName => "its certificate is for another name",
            Self::TlsIdentity => "it refuses the gateway's own certificate, or wants one",
            Self::TlsProtocol => "it does not speak TLS, or none of the gateway's versions",
            Self::ProxyRefused => "the proxy on the way to it refuses",
            Self::ProxyCredentials => {
                "the proxy on the way to it wants credentials, or refuses the gateway's"
            }
            Self::ProxyUnreadable => "the proxy on the way to it gives no answer to CONNECT that can be read",
            Self::ProxyCut => "the proxy on the way to it closed the connection",
            Self::NotProcessed => "it takes no request at the moment",
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
