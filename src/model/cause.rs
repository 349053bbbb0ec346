//! Why a step on the way to the cloud, or a caller's TLS handshake, failed: one word, the same in problem, trail, metric, `/status`
//! and log.

use std::fmt;

use serde::{Serialize, Serializer};

/// The cause of a failure. Stable: callers and alerts may match on its word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The name does not resolve.
    Dns,
    /// Without TLS nothing is sent beyond loopback, and the name leads there.
    NotLoopback,
    /// Nobody listens at the address.
    Refused,
    /// There is no way to the address.
    Unreachable,
    /// It took too long.
    Timeout,
    /// The other side closed or reset the connection.
    Reset,
    /// The gateway's own machine denies it: it has no file, port or memory left, or a rule of its own forbids the way.
    Local,
    /// The certificate is of no root that is trusted, or is revoked or malformed; or there is none.
    TlsUntrusted,
    /// The certificate has expired, or is not valid yet.
    TlsExpired,
    /// The certificate is for another name.
    TlsName,
    /// The other side refuses the gateway's own certificate, or wants one.
    TlsIdentity,
    /// No TLS, or none that both sides speak.
    TlsProtocol,
    /// The proxy opens no tunnel.
    ProxyRefused,
    /// The proxy wants credentials, or refuses the gateway's.
    ProxyCredentials,
    /// The proxy's answer is not one to CONNECT, or not within bounds.
    ProxyUnreadable,
    /// The proxy closed the connection before its answer was whole.
    ProxyCut,
    /// The upstream says that it did not process the request, or allows none.
    NotProcessed,
    /// The answer is not HTTP, or not within bounds.
    ReplyUnreadable,
    /// The answer broke off.
    ReplyCut,
    /// The upstream answered with 502, 503 or 504.
    ReplyStatus,
    /// The upstream refuses a token that was just fetched.
    TokenRejected,
    /// The token endpoint refuses the credential.
    TokenRefused,
    /// The token endpoint answered with a status that may pass.
    TokenStatus,
    /// The token endpoint's answer holds no usable token.
    TokenUnreadable,
}

impl Cause {
    /// How many there are.
    pub const COUNT: usize = 24;

    /// All of them.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Dns,
        Self::NotLoopback,
        Self::Refused,
        Self::Unreachable,
        Self::Timeout,
        Self::Reset,
        Self::Local,
        Self::TlsUntrusted,
        Self::TlsExpired,
        Self::TlsName,
        Self::TlsIdentity,
        Self::TlsProtocol,
        Self::ProxyRefused,
        Self::ProxyCredentials,
        Self::ProxyUnreadable,
        Self::ProxyCut,
        Self::NotProcessed,
        Self::ReplyUnreadable,
        Self::ReplyCut,
        Self::ReplyStatus,
        Self::TokenRejected,
        Self::TokenRefused,
        Self::TokenStatus,
        Self::TokenUnreadable,
    ];

    /// The word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Dns => "dns",
            Self::NotLoopback => "not_loopback",
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
            Self::Timeout => "timeout",
            Self::Reset => "reset",
            Self::Local => "local",
            Self::TlsUntrusted => "tls_untrusted",
            Self::TlsExpired => "tls_expired",
            Self::TlsName => "tls_name",
            Self::TlsIdentity => "tls_identity",
            Self::TlsProtocol => "tls_protocol",
            Self::ProxyRefused => "proxy_refused",
            Self::ProxyCredentials => "proxy_credentials",
            Self::ProxyUnreadable => "proxy_unreadable",
            Self::ProxyCut => "proxy_cut",
            Self::NotProcessed => "not_processed",
            Self::ReplyUnreadable => "reply_unreadable",
            Self::ReplyCut => "reply_cut",
            Self::ReplyStatus => "reply_status",
            Self::TokenRejected => "token_rejected",
            Self::TokenRefused => "token_refused",
            Self::TokenStatus => "token_status",
            Self::TokenUnreadable => "token_unreadable",
        }
    }

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

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Cause {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}
