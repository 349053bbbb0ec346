//! The sections of a configuration, as values of their final types.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use http::{HeaderMap, HeaderName, StatusCode};

use super::peer::meets_loopback;
use super::{PeerRule, ProxyUrl, Url};
use crate::model::durability::Durability;
use crate::model::redaction::Shown;
use crate::model::words;

/// One socket that callers connect to.
#[derive(Clone, Debug)]
pub struct Listener {
    /// Where it listens.
    pub address: ListenAddress,
    /// The names that `Host` may carry, lower case, without port. `None` on a Unix socket: any.
    pub hosts: Option<Vec<String>>,
    /// Somebody said that requests may cross the network unencrypted. Needed off loopback, unless there is TLS.
    pub allow_plaintext: bool,
    /// TLS, on a TCP listener.
    pub tls: Option<ListenerTls>,
}

impl Listener {
    pub(super) fn asks_for_certificates(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.client_ca_file.is_some())
    }

    pub(super) fn can_see(&self, peer: &PeerRule) -> bool {
        match (&self.address, peer) {
            (ListenAddress::Unix { .. }, PeerRule::Uid(_) | PeerRule::Gid(_)) => true,
            (ListenAddress::Unix { .. }, _)
            | (ListenAddress::Tcp(_), PeerRule::Uid(_) | PeerRule::Gid(_)) => false,
            (ListenAddress::Tcp(_), PeerRule::Certificate(_)) => self.asks_for_certificates(),
            (ListenAddress::Tcp(_), _) if self.asks_for_certificates() => false,
            (ListenAddress::Tcp(_), PeerRule::Loopback) => true,
            (ListenAddress::Tcp(address), PeerRule::Network(network)) => {
                !address.ip().is_loopback() || meets_loopback(network)
            }
        }
    }
}

/// `tls` of a listener: PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerTls {
    /// The certificate, and what leads from it to its root.
    pub cert_file: PathBuf,
    /// Its key.
    pub key_file: PathBuf,
    /// The CAs of callers' certificates. `None`: no certificate is asked for.
    pub client_ca_file: Option<PathBuf>,
    /// Which of their certificates are revoked.
    pub client_crl_file: Option<PathBuf>,
}

/// Where a listener listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// TCP.
    Tcp(SocketAddr),
    /// A Unix socket at this path, with these permission bits.
    Unix {
        /// The socket's path.
        path: PathBuf,
        /// Permission bits, such as `0o660`.
        mode: u32,
    },
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix { path, .. } => write!(f, "unix:{}", path.display()),
        }
    }
}

/// `[admin]`.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Where the admin listener listens.
    pub address: SocketAddr,
    /// Further names that `Host` may carry, lower case, without port.
    pub hosts: Vec<String>,
    /// Where the control socket is.
    pub control: Control,
}

/// `[admin] control`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// `control.sock` in the first of `$RUNTIME_DIRECTORY`, else in the audit directory.
    Default,
    /// There.
    Path(PathBuf),
    /// There is none.
    Off,
}

impl fmt::Display for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "unix:{}", path.display()),
            Self::Default => f.write_str("its default place"),
            Self::Off => f.write_str("no place"),
        }
    }
}

/// `[server]`. Caps are for all workers together.
#[derive(Clone, Debug)]
pub struct Server {
    /// Worker threads, 1 to 64.
    pub workers: usize,
    /// Open caller connections.
    pub max_connections: usize,
    /// Requests between head and answer.
    pub max_in_flight: usize,
    /// Bytes of one body.
    pub max_body: usize,
    /// Bytes of a head.
    pub max_head: usize,
    /// Bytes of all unfinished heads and bodies together, beyond the first 4 KiB of each.
    pub max_unfinished: usize,
    /// From the first byte of a head to its last.
    pub header_timeout: Duration,
    /// From the end of the head to the end of the body.
    pub body_timeout: Duration,
    /// Between two requests of one connection.
    pub idle_timeout: Duration,
    /// From the stop signal on, requests are still served for so long, on sockets of our own.
    pub drain_grace: Duration,
    /// From the stop signal to the end of the process.
    pub drain_timeout: Duration,
}

/// `[upstream]`.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// Scheme, host and port of the API; its path prefix is empty.
    pub base_url: Url,
    /// Connect and TLS together; also the longest wait for a free connection.
    pub connect_timeout: Duration,
    /// The whole exchange, replay included.
    pub timeout: Duration,
    /// A pooled connection idle for longer is not used.
    pub idle_timeout: Duration,
    /// Connections, all workers together.
    pub max_connections: usize,
    /// So many failures in a row suspend it; 0: none do.
    pub breaker_failures: u32,
    /// How long it is left alone, the first time.
    pub breaker_pause: Duration,
    /// Which versions of HTTP are offered to it.
    pub http2: Http2,
    /// PEM roots that replace the system's.
    pub ca_file: Option<PathBuf>,
    /// The gateway's own certificate.
    pub identity: Option<IdentityFiles>,
    /// The proxy on the way to it, and to the token endpoint.
    pub proxy: Option<ProxyUrl>,
    /// Who the gateway is to that proxy.
    pub proxy_login: Option<LoginFiles>,
    /// Static headers of every upstream request.
    pub headers: HeaderMap,
    /// Further reply headers that pass to callers.
    pub reply_headers: Vec<HeaderName>,
}

/// A certificate, with what leads from it to its root, and its key: PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityFiles {
    /// The certificate.
    pub cert_file: PathBuf,
    /// Its key.
    pub key_file: PathBuf,
}

/// A user and a password: files that hold nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoginFiles {
    /// The user's name.
    pub user: PathBuf,
    /// The password.
    pub password: PathBuf,
}

words! {
    /// Whether HTTP/2 is spoken with the upstream.
    Http2 {
        /// Never: HTTP/1.1.
        Off = "off",
        /// Over TLS, where the upstream picks it; else HTTP/1.1.
        Auto = "auto",
    }
}

/// `[token]`.
#[derive(Clone, Debug)]
pub struct Token {
    /// The token endpoint.
    pub url: Url,
    /// What `X-Token-Expire` asks for and what counts when the reply names no lifetime. `None`: not asked for.
    pub lifetime: Option<Duration>,
    /// One call of the token endpoint.
    pub timeout: Duration,
    /// The longest that a request waits for a token.
    pub wait: Duration,
    /// Upstream statuses that mean "token refused".
    pub refused_statuses: Vec<StatusCode>,
}

/// `[[credentials]]`.
#[derive(Clone, Debug)]
pub struct Credential {
    /// Its name, unique.
    pub name: String,
    /// Where the app key is.
    pub app_key: SecretSource,
    /// Where the app secret is.
    pub app_secret: SecretSource,
}

/// Where a secret is kept. Never the secret itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// The file's content, trailing newline trimmed.
    File(PathBuf),
    /// The variable's value.
    Env(String),
}

/// `[[callers]]`.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Its name, unique.
    pub name: String,
    /// Which peers it is.
    pub peer: PeerRule,
    /// The operator it acts as (`x-UserId`).
    pub operator_id: String,
    /// Other operators that it may name in `x-userid`.
    pub operators: Vec<String>,
    /// Name of the credential used for it.
    pub credential: String,
    /// Names of the routes it may use.
    pub routes: Vec<String>,
    /// Its own limit.
    pub rate_limit: Limit,
    /// A header that its requests must carry, whatever its value.
    pub require_header: Option<HeaderName>,
    /// Which ids it may send as bare numbers.
    pub bare_ids: BareIds,
    /// The most Idempotency-Keys that it may hold; `None`: half of all, or all if there is no other caller.
    pub max_keys: Option<usize>,
    /// Its requests are refused for now.
    pub frozen: bool,
}

words! {
    /// Which ids a caller may send as bare numbers, where a contract says `x-refuseRounded`.
    #[derive(Default)]
    BareIds {
        /// Those that do not look as if a client had rounded them.
        #[default]
        Detect = "detect",
        /// All: the caller holds them as integers.
        Exact = "exact",
        /// None.
        Refuse = "refuse",
    }
}

/// A rate with a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Requests per `period`.
    pub count: NonZeroU32,
    /// One second, minute or hour.
    pub period: Duration,
    /// Requests that may come at once.
    pub burst: NonZeroU32,
}

/// `[audit]`.
#[derive(Clone, Debug)]
pub struct Audit {
    /// The directory of the segments; made when missing, mode 0700.
    pub directory: PathBuf,
    /// Directory and key are not made when they are missing: `audit init` made them.
    pub must_exist: bool,
    /// When a record is safe.
    pub durability: Durability,
    /// Bytes after which a new segment begins.
    pub segment_size: u64,
    /// How long records are kept, at least; `None`: for ever.
    pub retain: Option<Duration>,
    /// Beyond so many bytes segments are removed before that; `None`: never.
    pub max_size: Option<u64>,
    /// How many bytes refusals may take an hour.
    pub refusals: RefusalBudget,
    /// The chain's key. `None`: one is made in the directory.
    pub key_file: Option<PathBuf>,
    /// How members of a record are written; others are written in clear.
    pub fields: Vec<(String, Shown)>,
}

/// How many bytes refusals may take an hour.
#[derive(Clone, Copy, Debug)]
pub struct RefusalBudget {
    /// Those of all who are no callers.
    pub strangers: u64,
    /// Those of all callers, with calls that were replayed or not meant to be sent.
    pub callers: u64,
}

impl Default for RefusalBudget {
    /// What the configuration begins with.
    fn default() -> Self {
        Self { strangers: 4 << 20, callers: 64 << 20 }
    }
}

impl Audit {
    /// How a member is written.
    pub fn shown(&self, name: &str) -> Shown {
        self.fields.iter().find(|(other, _)| other == name).map_or(Shown::Clear, |(_, shown)| *shown)
    }
}

/// `[idempotency]`.
#[derive(Clone, Debug)]
pub struct Idempotency {
    /// How long a key is remembered.
    pub window: Duration,
    /// So many keys at once; further ones are refused.
    pub max_keys: usize,
    /// Somebody set `max_keys`. Else it follows the callers' own.
    pub is_max_keys_set: bool,
    /// Bytes of stored answers that are kept in memory.
    pub reply_memory: u64,
    /// What becomes of calls without a key.
    pub without_key: WithoutKey,
    /// How long an equal call without a key is looked for.
    pub fingerprint_window: Duration,
}

words! {
    /// What becomes of a call without a key that equals an earlier one.
    WithoutKey {
        /// Refused while the first is at work or in doubt; flagged after it succeeded.
        Guard = "guard",
        /// Refused after it succeeded, too.
        Block = "block",
        /// Flagged.
        Warn = "warn",
        /// Nothing.
        Off = "off",
        /// Any call without a key is refused.
        RequireKey = "require_key",
    }
}

/// `[[routes]]`.
#[derive(Clone, Debug)]
pub struct Route {
    /// Its name, unique.
    pub name: String,
    /// The exact path, the same on both sides.
    pub path: String,
    /// The contract's JSON Schema.
    pub contract: ContractSource,
    /// The member of the reply that holds the result code.
    pub result_field: String,
    /// Result codes that mean success.
    pub success_codes: Vec<String>,
    /// Credential that replaces the caller's on this route.
    pub credential: Option<String>,
    /// Replaces `upstream.timeout` on this route.
    pub timeout: Option<Duration>,
    /// Its requests are refused for now.
    pub frozen: bool,
}

/// Where a contract comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ContractSource {
    /// `appointQualityTask`, embedded in the binary.
    BuiltIn,
    /// A JSON Schema file.
    File(PathBuf),
}

/// `[log]`.
#[derive(Clone, Debug)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug` or `trace`, or a filter such as `info,ccsqm_gateway::token=debug`.
    pub level: String,
    /// How a line looks.
    pub format: LogFormat,
    /// Which requests have a line.
    pub requests: LogRequests,
}

words! {
    /// Which requests have a log line.
    #[repr(u8)]
    LogRequests {
        /// None.
        Off = "off",
        /// Those of outcome `unknown`, `failed` or `refused`, and those that got a 5xx.
        Failures = "failures",
        /// All.
        All = "all",
    }
}

words! {
    /// How a log line looks.
    LogFormat {
        /// Text on a terminal, JSON elsewhere.
        Auto = "auto",
        /// For people.
        Text = "text",
        /// For machines.
        Json = "json",
    }
}
