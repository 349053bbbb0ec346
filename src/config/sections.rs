//! The sections of a configuration: for each table of the file its keys, types, forms, bounds and defaults.
//!
//! The doc comments of sections and keys are also the descriptions in `config/gateway.schema.json`, which editors
//! show. A test compares that file with the types.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
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
use super::peer_rule::meets_loopback;
use crate::model::durability::Durability;
use crate::model::redaction::Redaction;
use crate::model::words;

/// Declares a table of the file: for each key its type, the form in which it is written unless serde has one, and its
/// default.
macro_rules! section {
    ($(#[$of_all:meta])* $name:ident {
        $($(#[$of_one:meta])* $key:ident: $type:ty $(as $form:literal)? = $default:expr,)+
    }) => {
        #[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
        #[serde(default, deny_unknown_fields)]
        // One declaration for struct, default and serde attributes of a key, so that they cannot drift apart.
        $(#[$of_all])*
        pub struct $name {
            $($(#[$of_one])* $(#[serde(with = $form)])? pub $key: $type,)+
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($key: $default,)+ }
            }
        }
    };
}

mod outbound;

section! {
    /// A socket that callers connect to, `[[listeners]]`.
    #[schemars(extend("required" = Listener::REQUIRED))]
    Listener {
        /// The address with a port, or `unix:` and the path of a socket.
        address: ListenAddress as "As::<Listen>" = ListenAddress::Tcp((Ipv4Addr::LOCALHOST, 8080).into()),
        /// Permission bits of a Unix socket in octal, such as `0660`, which is the default.
        mode: Option<u32> as "As::<Maybe<Mode>>" = None,
        /// Names that `Host` may carry, without port; required unless the address is a loopback one. Not used on a Unix socket.
        hosts: Option<Vec<String>> as "As::<Maybe<Each<Host>>>" = None,
        /// Whether requests may cross the network unencrypted; must be true without TLS unless the address is a loopback one.
        allow_plaintext: Option<bool> = None,
        /// TLS, on a TCP listener. Default: none.
        tls: Option<ListenerTls> = None,
    }
}

impl Listener {
    /// The keys that a listener must have.
    pub(super) const REQUIRED: &[&str] = &["address"];

    /// Whether callers must show a certificate.
    pub(super) fn asks_for_certificates(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.client_ca_file.is_some())
    }

    /// Whether a peer that matches this rule can connect to this listener and be identified there.
    pub(super) fn can_see(&self, peer: &PeerRule) -> bool {
        match (&self.address, peer) {
            (ListenAddress::Unix { .. }, PeerRule::Uid(_) | PeerRule::Gid(_)) => true,
            (ListenAddress::Unix { .. }, _)
            | (ListenAddress::Tcp(_), PeerRule::Uid(_) | PeerRule::Gid(_)) => false,
            (ListenAddress::Tcp(_), PeerRule::Certificate(_)) => self.asks_for_certificates(),
            // With client CAs the certificate alone identifies a caller. An address must not, or it would be a way
            // around the certificate.
            (ListenAddress::Tcp(_), _) if self.asks_for_certificates() => false,
            (ListenAddress::Tcp(_), PeerRule::Loopback) => true,
            (ListenAddress::Tcp(address), PeerRule::Network(network)) => {
                // Packets from other hosts do not reach a loopback address.
                !address.ip().is_loopback() || meets_loopback(network)
            }
        }
    }
}

section! {
    /// `tls` of a listener: PEM files, read again when they change.
    #[derive(PartialEq, Eq)]
    #[schemars(extend("required" = ListenerTls::REQUIRED))]
    ListenerTls {
        /// The certificate, then the intermediate certificates up to its root.
        cert_file: PathBuf as "As::<FilePath>" = PathBuf::new(),
        /// The private key of the certificate.
        key_file: PathBuf as "As::<FilePath>" = PathBuf::new(),
        /// CAs of callers' certificates; each caller must then show a certificate of one of them. Default: none is requested.
        client_ca_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// Revocation lists of all CAs between a caller's certificate and its root. Default: none.
        client_crl_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
    }
}

impl ListenerTls {
    /// The keys that this table must have.
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

section! {
    /// `[admin]`: the admin listener and the control socket.
    Admin {
        /// The address of the admin listener, with a port.
        address: SocketAddr as "As::<AdminAddress>" = (Ipv4Addr::LOCALHOST, 9090).into(),
        /// Further names that `Host` may carry, without port, besides IP addresses, `localhost` and names of internal domains.
        hosts: Vec<String> as "As::<Each<Host>>" = Vec::new(),
        /// The path of the control socket, or `off`. Default: `control.sock` in `$RUNTIME_DIRECTORY`, else in `audit.directory`.
        control: Control as "As::<ControlSocket>" = Control::Default,
    }
}

/// Where the control socket is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// `control.sock` in the first directory of `$RUNTIME_DIRECTORY` (systemd), or in the audit directory if the
    /// variable is not set.
    Default,
    /// At this path.
    Path(PathBuf),
    /// Nowhere: there is no control socket.
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

section! {
    /// `[server]`: worker threads, bounds and deadlines. Bounds are for all workers together.
    Server {
        /// Worker threads, 1 to 64, or `auto`: the cores, at most 4 and at most `upstream.max_connections`.
        workers: usize as "As::<Workers>" = 1,
        /// The most open connections of callers; beyond it: 503 `overloaded`.
        max_connections: usize as "As::<Whole<1, 1_000_000>>" = 4096,
        /// The most requests in flight, counted from the head of a request to its reply; beyond it: 503 `overloaded`.
        max_in_flight: usize as "As::<Whole<1, 100_000>>" = 1024,
        /// The largest body, in bytes; beyond it: 413 `body_too_large`.
        max_body: usize as "As::<Size<KIB, { 16 * MIB }, usize>>" = 256 << 10,
        /// The largest request head, in bytes; beyond it: 431.
        max_head: usize as "As::<Size<{ 8 * KIB }, { 64 * KIB }, usize>>" = 16 << 10,
        /// The most bytes that all unfinished heads and bodies hold together, beyond the first 4 KiB of each.
        max_unfinished: usize as "As::<Size<MIB, { 16 * GIB }, usize>>" = 32 << 20,
        /// The longest time from the first byte of a head to its last; then the connection is closed.
        header_timeout: Duration as "As::<Period<100, { 5 * MINUTE }>>" = Duration::from_secs(10),
        /// The longest time from the end of the head to the end of the body; then 408 `body_timeout`.
        body_timeout: Duration as "As::<Period<100, { 5 * MINUTE }>>" = Duration::from_secs(10),
        /// The longest time between two requests of one connection; then it is closed.
        idle_timeout: Duration as "As::<Period<100, HOUR>>" = Duration::from_secs(60),
        /// How long new requests are accepted after the stop signal; 0 if all sockets are inherited. Less than `drain_timeout`.
        drain_grace: Duration as "As::<Period<0, { 5 * MINUTE }>>" = Duration::from_secs(1),
        /// The longest time from the stop signal to the end of the process.
        drain_timeout: Duration as "As::<Period<0, { 10 * MINUTE }>>" = Duration::from_secs(10),
    }
}

section! {
    /// `[[callers]]`: an app that may call.
    #[schemars(extend("required" = Caller::REQUIRED))]
    Caller {
        /// The name of the caller, unique.
        name: String as "As::<Name>" = String::new(),
        /// Which peers are this caller: `loopback`, a network, `uid:N`, `gid:N`, `spiffe://…` or `dns:…`.
        peer: PeerRule as "As::<Peer>" = PeerRule::Loopback,
        /// The operator that the caller acts as (`x-UserId`).
        operator_id: String as "As::<Name>" = String::new(),
        /// Other operators that the caller may name in `x-userid`.
        operators: Vec<String> as "As::<Each<Name>>" = Vec::new(),
        /// The name of the credential that the gateway uses for this caller.
        credential: String = String::new(),
        /// The names of the routes that the caller may use.
        routes: Vec<String> = Vec::new(),
        /// The rate at which the caller may call, such as `20/s`.
        rate_limit: Rate as "As::<PerTime>" = Rate::per_second(20),
        /// The most requests of the caller that may arrive at once.
        burst: u32 as "As::<Whole<1, 1_000_000, u32>>" = 40,
        /// A header that each request must carry, with any value; else 403 `header_missing`. Guards against SSRF. Default: none.
        require_header: Option<HeaderName> as "As::<Maybe<RequiredHeader>>" = None,
        /// Which ids the caller may send as numbers instead of strings, where a contract says `x-refuseRounded`.
        bare_ids: BareIds = BareIds::default(),
        /// The most Idempotency-Keys of the caller. Default: half of `idempotency.max_keys`, or all for the only caller.
        max_keys: Option<usize> as "As::<Maybe<Whole<1, 10_000_000>>>" = None,
        /// Whether its requests are refused for now, with 403 `frozen`.
        frozen: bool = false,
    }
}

words! {
    /// Which ids a caller may send as numbers, where a contract says `x-refuseRounded`. JavaScript rounds integers
    /// from 2^53 on.
    #[derive(Default)]
    BareIds {
        /// Those that JavaScript cannot have rounded.
        #[default]
        Detect = "detect",
        /// All: the caller keeps ids as integers, which are not rounded.
        Exact = "exact",
        /// No id, whatever its size.
        Refuse = "refuse",
    }
}

impl Caller {
    /// The keys that a caller must have.
    pub(super) const REQUIRED: &[&str] = &["name", "peer", "operator_id", "credential", "routes"];

    /// The caller's own rate limit.
    pub fn limit(&self) -> RateLimit {
        self.rate_limit.with_burst(self.burst)
    }
}

section! {
    /// `[quota]`: the rate limit of the upstream, shared by all callers.
    Quota {
        /// The rate at which the upstream may be called, such as `50/s`.
        rate: Rate as "As::<PerTime>" = Rate::per_second(50),
        /// The most requests that may be sent at once.
        burst: u32 as "As::<Whole<1, 1_000_000, u32>>" = 100,
    }
}

impl Quota {
    /// The rate limit of all callers together.
    pub fn limit(&self) -> RateLimit {
        self.rate.with_burst(self.burst)
    }
}

/// A rate: a number of times in each period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Times per `period`.
    pub count: NonZeroU32,
    /// One second, minute or hour.
    pub period: Duration,
}

impl Rate {
    /// Returns a rate per second. A `count` of 0 counts as 1.
    fn per_second(count: u32) -> Self {
        Self { count: NonZeroU32::new(count).unwrap_or(NonZeroU32::MIN), period: Duration::from_secs(1) }
    }

    /// Returns a limit with this rate and burst. A burst of 0, which the bounds of `burst` rule out, counts as 1.
    fn with_burst(self, burst: u32) -> RateLimit {
        let Self { count, period } = self;
        RateLimit { count, period, burst: NonZeroU32::new(burst).unwrap_or(NonZeroU32::MIN) }
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

/// A rate limit: a rate and a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// Requests per `period`.
    pub count: NonZeroU32,
    /// One second, minute or hour.
    pub period: Duration,
    /// The most requests that may arrive at once.
    pub burst: NonZeroU32,
}

section! {
    /// `[audit]`: the audit trail.
    Audit {
        /// The directory of the segments; created with mode 0700 if it is missing. Only one gateway at a time can use it.
        directory: PathBuf as "As::<FilePath>" = PathBuf::from("audit"),
        /// Whether a start fails if the directory or its key is missing, so that a lost trail is noticed. See `audit init`.
        must_exist: bool = false,
        /// When a record is committed: after its write (`kernel`), or after fdatasync, too (`disk`).
        durability: Durability = Durability::default(),
        /// The size at which a new segment begins, in bytes.
        segment_size: u64 as "As::<Size<{ 64 * KIB }, GIB>>" = 64 << 20,
        /// How long records are kept at least, or `forever`; at least `idempotency.window`.
        retain: Option<Duration> as "As::<Retain>" = Some(Duration::from_secs(30 * 86_400)),
        /// The size of the trail beyond which old segments are removed before `retain` has passed, or `none`.
        max_size: Option<u64> as "As::<MaxSize>" = None,
        /// Bytes that refusals of unknown peers may take in an hour; beyond it they are only counted.
        stranger_refusals: u64 as "As::<Size<{ 64 * KIB }, GIB>>" = 4 << 20,
        /// Bytes that refusals of callers, replays and dry runs may take in an hour; beyond it they are only counted.
        caller_refusals: u64 as "As::<Size<{ 64 * KIB }, GIB>>" = 64 << 20,
        /// The file of the key of the hash chain, at least 32 random bytes. Default: a random key, created in the directory.
        key_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// How members of a record are written: `clear`, `hmac` or `omit`. Members that are not named are written in clear.
        fields: BTreeMap<String, Redaction> = BTreeMap::new(),
    }
}

/// How many bytes refusals may take in an hour.
#[derive(Clone, Copy, Debug)]
pub struct RefusalBudget {
    /// Refusals of all unknown peers together.
    pub strangers: u64,
    /// Refusals of all callers together, with replays and dry runs.
    pub callers: u64,
}

impl Default for RefusalBudget {
    /// The budget of the default configuration.
    fn default() -> Self {
        Audit::default().refusals()
    }
}

impl Audit {
    /// Returns how a member of a record is written.
    pub fn redaction(&self, name: &str) -> Redaction {
        self.fields.get(name).copied().unwrap_or_default()
    }

    /// Returns how many bytes refusals may take in an hour.
    pub fn refusals(&self) -> RefusalBudget {
        RefusalBudget { strangers: self.stranger_refusals, callers: self.caller_refusals }
    }
}

section! {
    /// `[idempotency]`: deduplication of repeated calls.
    Idempotency {
        /// How long a key and its reply are remembered.
        window: Duration as "As::<Period<HOUR, { 7 * DAY }>>" = Duration::from_secs(86400),
        /// The most keys that are remembered at once; beyond it: 503 `idempotency_unavailable` for new ones.
        max_keys: usize as "As::<Whole<1, 10_000_000>>" = 1_000_000,
        /// Whether `max_keys` is set. If not, it is raised to the largest `max_keys` of a caller.
        #[serde(skip)]
        // Not a key of the file. A reload needs it: a default that changed with the callers must not count as a change
        // that needs a restart.
        is_max_keys_set: bool = false,
        /// The memory for stored replies, in bytes. Beyond it, the oldest are replayed without their body.
        reply_memory: u64 as "As::<Size<{ 64 * KIB }, { 16 * GIB }>>" = 64 << 20,
        /// What happens to a call without an Idempotency-Key if it equals an earlier call.
        without_key: WithoutKey = WithoutKey::Guard,
        /// How long after a success an equal call without a key is detected; at most `window`.
        fingerprint_window: Duration as "As::<Period<SECOND, DAY>>" = Duration::from_secs(600),
    }
}

words! {
    /// What happens to a call without an Idempotency-Key if it equals an earlier call.
    WithoutKey {
        /// Rejected while the earlier call is in flight, has an unknown outcome or is undelivered. Flagged after the
        /// earlier call succeeded.
        Guard = "guard",
        /// As `guard`, and also rejected after the earlier call succeeded.
        Block = "block",
        /// Flagged, never rejected.
        Warn = "warn",
        /// Nothing: equal calls are not detected.
        Off = "off",
        /// Each call without a key is rejected, whether it equals another one or not.
        RequireKey = "require_key",
    }
}

section! {
    /// `[log]`: log lines on stderr.
    Log {
        /// `error`, `warn`, `info`, `debug` or `trace`, or a filter such as `info,ccsqm_gateway::token=debug`.
        level: String as "As::<Level>" = "info".into(),
        /// Text or JSON: `auto` writes text on a terminal and JSON elsewhere.
        format: LogFormat = LogFormat::Auto,
        /// Which requests have a log line: none, those that failed, or all.
        requests: LogRequests = LogRequests::Failures,
    }
}

words! {
    /// Which requests have a log line.
    #[repr(u8)]
    LogRequests {
        /// No request.
        Off = "off",
        /// Requests with the outcome `unknown`, `failed` or `refused`, and requests that got a 5xx.
        Failures = "failures",
        /// All requests.
        All = "all",
    }
}

words! {
    /// The format of a log line.
    LogFormat {
        /// Text on a terminal, JSON elsewhere.
        Auto = "auto",
        /// Text, for people.
        Text = "text",
        /// JSON, one object a line, for programs.
        Json = "json",
    }
}
