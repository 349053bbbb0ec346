//! The sections of a configuration, as values of their final types.

mod outbound;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use http::HeaderName;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::forms::{
    AdminAddress, As, ControlSocket, DAY, Each, FilePath, GIB, HOUR, Host, KIB, Level, Listen, MIB, MINUTE,
    MaxSize, Maybe, Mode, Name, Peer, PerTime, Period, RequiredHeader, Retain, SECOND, Size, Whole, Workers,
};
pub use outbound::{
    ContractSource, Credential, Http2, IdentityFiles, LoginFiles, Route, SecretSource, Token, Upstream,
};

use super::PeerRule;
use super::peer::meets_loopback;
use crate::model::durability::Durability;
use crate::model::redaction::Shown;
use crate::model::words;

/// One socket that callers connect to.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(extend("required" = Listener::REQUIRED))]
pub struct Listener {
    /// Where it listens.
    #[serde(with = "As::<Listen>")]
    pub address: ListenAddress,
    /// Permission bits of a Unix socket, such as `0o660`.
    #[serde(with = "As::<Maybe<Mode>>")]
    pub mode: Option<u32>,
    /// The names that `Host` may carry, lower case, without port. `None` on a Unix socket: any.
    #[serde(with = "As::<Maybe<Each<Host>>>")]
    pub hosts: Option<Vec<String>>,
    /// Requests may cross the network unencrypted: needed off loopback, unless there is TLS. `None` on a Unix socket.
    pub allow_plaintext: Option<bool>,
    /// TLS, on a TCP listener.
    pub tls: Option<ListenerTls>,
}

impl Listener {
    /// The keys that it must have.
    pub(super) const REQUIRED: &[&str] = &["address"];

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
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(extend("required" = ListenerTls::REQUIRED))]
pub struct ListenerTls {
    /// The certificate, and what leads from it to its root.
    #[serde(with = "As::<FilePath>")]
    pub cert_file: PathBuf,
    /// Its key.
    #[serde(with = "As::<FilePath>")]
    pub key_file: PathBuf,
    /// The CAs of callers' certificates. `None`: no certificate is asked for.
    #[serde(with = "As::<Maybe<FilePath>>")]
    pub client_ca_file: Option<PathBuf>,
    /// Which of their certificates are revoked.
    #[serde(with = "As::<Maybe<FilePath>>")]
    pub client_crl_file: Option<PathBuf>,
}

impl ListenerTls {
    /// The keys that it must have.
    pub(super) const REQUIRED: &[&str] = &["cert_file", "key_file"];
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
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Admin {
    /// Where the admin listener listens.
    #[serde(with = "As::<AdminAddress>")]
    pub address: SocketAddr,
    /// Further names that `Host` may carry, lower case, without port.
    #[serde(with = "As::<Each<Host>>")]
    pub hosts: Vec<String>,
    /// Where the control socket is.
    #[serde(with = "As::<ControlSocket>")]
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
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// Worker threads, 1 to 64.
    #[serde(with = "As::<Workers>")]
    pub workers: usize,
    /// Open caller connections.
    #[serde(with = "As::<Whole<1, 1_000_000>>")]
    pub max_connections: usize,
    /// Requests between head and answer.
    #[serde(with = "As::<Whole<1, 100_000>>")]
    pub max_in_flight: usize,
    /// Bytes of one body.
    #[serde(with = "As::<Size<KIB, { 16 * MIB }, usize>>")]
    pub max_body: usize,
    /// Bytes of a head.
    #[serde(with = "As::<Size<{ 8 * KIB }, { 64 * KIB }, usize>>")]
    pub max_head: usize,
    /// Bytes of all unfinished heads and bodies together, beyond the first 4 KiB of each.
    #[serde(with = "As::<Size<MIB, { 16 * GIB }, usize>>")]
    pub max_unfinished: usize,
    /// From the first byte of a head to its last.
    #[serde(with = "As::<Period<100, { 5 * MINUTE }>>")]
    pub header_timeout: Duration,
    /// From the end of the head to the end of the body.
    #[serde(with = "As::<Period<100, { 5 * MINUTE }>>")]
    pub body_timeout: Duration,
    /// Between two requests of one connection.
    #[serde(with = "As::<Period<100, HOUR>>")]
    pub idle_timeout: Duration,
    /// From the stop signal on, requests are still served for so long, on sockets of our own.
    #[serde(with = "As::<Period<0, { 5 * MINUTE }>>")]
    pub drain_grace: Duration,
    /// From the stop signal to the end of the process.
    #[serde(with = "As::<Period<0, { 10 * MINUTE }>>")]
    pub drain_timeout: Duration,
}

/// `[[callers]]`.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(extend("required" = Caller::REQUIRED))]
pub struct Caller {
    /// Its name, unique.
    #[serde(with = "As::<Name>")]
    pub name: String,
    /// Which peers it is.
    #[serde(with = "As::<Peer>")]
    pub peer: PeerRule,
    /// The operator it acts as (`x-UserId`).
    #[serde(with = "As::<Name>")]
    pub operator_id: String,
    /// Other operators that it may name in `x-userid`.
    #[serde(with = "As::<Each<Name>>")]
    pub operators: Vec<String>,
    /// Name of the credential used for it.
    pub credential: String,
    /// Names of the routes it may use.
    pub routes: Vec<String>,
    /// How often it may call.
    #[serde(with = "As::<PerTime>")]
    pub rate_limit: Rate,
    /// Requests that may come at once.
    #[serde(with = "As::<Whole<1, 1_000_000, u32>>")]
    pub burst: u32,
    /// A header that its requests must carry, whatever its value.
    #[serde(with = "As::<Maybe<RequiredHeader>>")]
    pub require_header: Option<HeaderName>,
    /// Which ids it may send as bare numbers.
    pub bare_ids: BareIds,
    /// The most Idempotency-Keys that it may hold; `None`: half of all, or all if there is no other caller.
    #[serde(with = "As::<Maybe<Whole<1, 10_000_000>>>")]
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

impl Caller {
    /// The keys that it must have.
    pub(super) const REQUIRED: &[&str] = &["name", "peer", "operator_id", "credential", "routes"];

    /// Its own limit.
    pub fn limit(&self) -> Limit {
        self.rate_limit.with_burst(self.burst)
    }
}

/// `[quota]`.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Quota {
    /// How often the upstream may be called.
    #[serde(with = "As::<PerTime>")]
    pub rate: Rate,
    /// Requests that may come at once.
    #[serde(with = "As::<Whole<1, 1_000_000, u32>>")]
    pub burst: u32,
}

impl Quota {
    /// The limit of all callers together.
    pub fn limit(&self) -> Limit {
        self.rate.with_burst(self.burst)
    }
}

/// How often something may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Times per `period`.
    pub count: NonZeroU32,
    /// One second, minute or hour.
    pub period: Duration,
}

impl Rate {
    fn with_burst(self, burst: u32) -> Limit {
        let Self { count, period } = self;
        Limit { count, period, burst: NonZeroU32::new(burst).unwrap_or(NonZeroU32::MIN) }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.period.as_secs() {
            1 => "s",
            60 => "m",
            _ => "h",
        };
        write!(f, "{}/{unit}", self.count)
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
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Audit {
    /// The directory of the segments; made when missing, mode 0700.
    #[serde(with = "As::<FilePath>")]
    pub directory: PathBuf,
    /// Directory and key are not made when they are missing: `audit init` made them.
    pub must_exist: bool,
    /// When a record is safe.
    pub durability: Durability,
    /// Bytes after which a new segment begins.
    #[serde(with = "As::<Size<{ 64 * KIB }, GIB>>")]
    pub segment_size: u64,
    /// How long records are kept, at least; `None`: for ever.
    #[serde(with = "As::<Retain>")]
    pub retain: Option<Duration>,
    /// Beyond so many bytes segments are removed before that; `None`: never.
    #[serde(with = "As::<MaxSize>")]
    pub max_size: Option<u64>,
    /// Bytes that refusals of peers that are no callers may take an hour.
    #[serde(with = "As::<Size<{ 64 * KIB }, GIB>>")]
    pub stranger_refusals: u64,
    /// The same for callers.
    #[serde(with = "As::<Size<{ 64 * KIB }, GIB>>")]
    pub caller_refusals: u64,
    /// The chain's key. `None`: one is made in the directory.
    #[serde(with = "As::<Maybe<FilePath>>")]
    pub key_file: Option<PathBuf>,
    /// How members of a record are written; others are written in clear.
    pub fields: BTreeMap<String, Shown>,
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
        self.fields.get(name).copied().unwrap_or_default()
    }

    /// How many bytes refusals may take an hour.
    pub fn refusals(&self) -> RefusalBudget {
        RefusalBudget { strangers: self.stranger_refusals, callers: self.caller_refusals }
    }
}

/// `[idempotency]`.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Idempotency {
    /// How long a key is remembered.
    #[serde(with = "As::<Period<HOUR, { 7 * DAY }>>")]
    pub window: Duration,
    /// So many keys at once; further ones are refused.
    #[serde(with = "As::<Whole<1, 10_000_000>>")]
    pub max_keys: usize,
    /// Somebody set `max_keys`. Else it follows the callers' own.
    #[serde(skip)]
    pub is_max_keys_set: bool,
    /// Bytes of stored answers that are kept in memory.
    #[serde(with = "As::<Size<{ 64 * KIB }, { 16 * GIB }>>")]
    pub reply_memory: u64,
    /// What becomes of calls without a key.
    pub without_key: WithoutKey,
    /// How long an equal call without a key is looked for.
    #[serde(with = "As::<Period<SECOND, DAY>>")]
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

/// `[log]`.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug` or `trace`, or a filter such as `info,ccsqm_gateway::token=debug`.
    #[serde(with = "As::<Level>")]
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
