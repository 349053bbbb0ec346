//! The sections of a configuration, as values of their final types.

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
use super::peer::meets_loopback;
use crate::model::durability::Durability;
use crate::model::redaction::Shown;
use crate::model::words;

/// Makes a table of the file: its keys, the type of each, the form in which it is written if serde knows none, and its default.
macro_rules! section {
    ($(#[$of_all:meta])* $name:ident {
        $($(#[$of_one:meta])* $key:ident: $type:ty $(as $form:literal)? = $default:expr,)+
    }) => {
        #[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
        #[serde(default, deny_unknown_fields)]
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
    /// One socket that callers connect to.
    #[schemars(extend("required" = Listener::REQUIRED))]
    Listener {
        /// Where it listens.
        address: ListenAddress as "As::<Listen>" = ListenAddress::Tcp((Ipv4Addr::LOCALHOST, 8080).into()),
        /// Permission bits of a Unix socket, such as `0o660`.
        mode: Option<u32> as "As::<Maybe<Mode>>" = None,
        /// The names that `Host` may carry, lower case, without port. `None` on a Unix socket: any.
        hosts: Option<Vec<String>> as "As::<Maybe<Each<Host>>>" = None,
        /// Requests may cross the network unencrypted: needed off loopback, unless there is TLS. `None` on a Unix socket.
        allow_plaintext: Option<bool> = None,
        /// TLS, on a TCP listener.
        tls: Option<ListenerTls> = None,
    }
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

section! {
    /// `tls` of a listener: PEM files.
    #[derive(PartialEq, Eq)]
    #[schemars(extend("required" = ListenerTls::REQUIRED))]
    ListenerTls {
        /// The certificate, and what leads from it to its root.
        cert_file: PathBuf as "As::<FilePath>" = PathBuf::new(),
        /// Its key.
        key_file: PathBuf as "As::<FilePath>" = PathBuf::new(),
        /// The CAs of callers' certificates. `None`: no certificate is asked for.
        client_ca_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// Which of their certificates are revoked.
        client_crl_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
    }
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

section! {
    /// `[admin]`.
    Admin {
        /// Where the admin listener listens.
        address: SocketAddr as "As::<AdminAddress>" = (Ipv4Addr::LOCALHOST, 9090).into(),
        /// Further names that `Host` may carry, lower case, without port.
        hosts: Vec<String> as "As::<Each<Host>>" = Vec::new(),
        /// Where the control socket is.
        control: Control as "As::<ControlSocket>" = Control::Default,
    }
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

section! {
    /// `[server]`. Caps are for all workers together.
    Server {
        /// Worker threads, 1 to 64.
        workers: usize as "As::<Workers>" = 1,
        /// Open caller connections.
        max_connections: usize as "As::<Whole<1, 1_000_000>>" = 4096,
        /// Requests between head and answer.
        max_in_flight: usize as "As::<Whole<1, 100_000>>" = 1024,
        /// Bytes of one body.
        max_body: usize as "As::<Size<KIB, { 16 * MIB }, usize>>" = 256 << 10,
        /// Bytes of a head.
        max_head: usize as "As::<Size<{ 8 * KIB }, { 64 * KIB }, usize>>" = 16 << 10,
        /// Bytes of all unfinished heads and bodies together, beyond the first 4 KiB of each.
        max_unfinished: usize as "As::<Size<MIB, { 16 * GIB }, usize>>" = 32 << 20,
        /// From the first byte of a head to its last.
        header_timeout: Duration as "As::<Period<100, { 5 * MINUTE }>>" = Duration::from_secs(10),
        /// From the end of the head to the end of the body.
        body_timeout: Duration as "As::<Period<100, { 5 * MINUTE }>>" = Duration::from_secs(10),
        /// Between two requests of one connection.
        idle_timeout: Duration as "As::<Period<100, HOUR>>" = Duration::from_secs(60),
        /// From the stop signal on, requests are still served for so long, on sockets of our own.
        drain_grace: Duration as "As::<Period<0, { 5 * MINUTE }>>" = Duration::from_secs(1),
        /// From the stop signal to the end of the process.
        drain_timeout: Duration as "As::<Period<0, { 10 * MINUTE }>>" = Duration::from_secs(10),
    }
}

section! {
    /// `[[callers]]`.
    #[schemars(extend("required" = Caller::REQUIRED))]
    Caller {
        /// Its name, unique.
        name: String as "As::<Name>" = String::new(),
        /// Which peers it is.
        peer: PeerRule as "As::<Peer>" = PeerRule::Loopback,
        /// The operator it acts as (`x-UserId`).
        operator_id: String as "As::<Name>" = String::new(),
        /// Other operators that it may name in `x-userid`.
        operators: Vec<String> as "As::<Each<Name>>" = Vec::new(),
        /// Name of the credential used for it.
        credential: String = String::new(),
        /// Names of the routes it may use.
        routes: Vec<String> = Vec::new(),
        /// How often it may call.
        rate_limit: Rate as "As::<PerTime>" = Rate::per_second(20),
        /// Requests that may come at once.
        burst: u32 as "As::<Whole<1, 1_000_000, u32>>" = 40,
        /// A header that its requests must carry, whatever its value.
        require_header: Option<HeaderName> as "As::<Maybe<RequiredHeader>>" = None,
        /// Which ids it may send as bare numbers.
        bare_ids: BareIds = BareIds::default(),
        /// The most Idempotency-Keys that it may hold; `None`: half of all, or all if there is no other caller.
        max_keys: Option<usize> as "As::<Maybe<Whole<1, 10_000_000>>>" = None,
        /// Its requests are refused for now.
        frozen: bool = false,
    }
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

section! {
    /// `[quota]`.
    Quota {
        /// How often the upstream may be called.
        rate: Rate as "As::<PerTime>" = Rate::per_second(50),
        /// Requests that may come at once.
        burst: u32 as "As::<Whole<1, 1_000_000, u32>>" = 100,
    }
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
    fn per_second(count: u32) -> Self {
        Self { count: NonZeroU32::new(count).unwrap_or(NonZeroU32::MIN), period: Duration::from_secs(1) }
    }

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

section! {
    /// `[audit]`.
    Audit {
        /// The directory of the segments; made when missing, mode 0700.
        directory: PathBuf as "As::<FilePath>" = PathBuf::from("audit"),
        /// Directory and key are not made when they are missing: `audit init` made them.
        must_exist: bool = false,
        /// When a record is safe.
        durability: Durability = Durability::default(),
        /// Bytes after which a new segment begins.
        segment_size: u64 as "As::<Size<{ 64 * KIB }, GIB>>" = 64 << 20,
        /// How long records are kept, at least; `None`: for ever.
        retain: Option<Duration> as "As::<Retain>" = Some(Duration::from_secs(30 * 86_400)),
        /// Beyond so many bytes segments are removed before that; `None`: never.
        max_size: Option<u64> as "As::<MaxSize>" = None,
        /// Bytes that refusals of peers that are no callers may take an hour.
        stranger_refusals: u64 as "As::<Size<{ 64 * KIB }, GIB>>" = 4 << 20,
        /// The same for callers.
        caller_refusals: u64 as "As::<Size<{ 64 * KIB }, GIB>>" = 64 << 20,
        /// The chain's key. `None`: one is made in the directory.
        key_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// How members of a record are written; others are written in clear.
        fields: BTreeMap<String, Shown> = BTreeMap::new(),
    }
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
    /// That of the configuration.
    fn default() -> Self {
        Audit::default().refusals()
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

section! {
    /// `[idempotency]`.
    Idempotency {
        /// How long a key is remembered.
        window: Duration as "As::<Period<HOUR, { 7 * DAY }>>" = Duration::from_secs(86400),
        /// So many keys at once; further ones are refused.
        max_keys: usize as "As::<Whole<1, 10_000_000>>" = 1_000_000,
        /// Somebody set `max_keys`. Else it follows the callers' own.
        #[serde(skip)]
        is_max_keys_set: bool = false,
        /// Bytes of stored answers that are kept in memory.
        reply_memory: u64 as "As::<Size<{ 64 * KIB }, { 16 * GIB }>>" = 64 << 20,
        /// What becomes of calls without a key.
        without_key: WithoutKey = WithoutKey::Guard,
        /// How long an equal call without a key is looked for.
        fingerprint_window: Duration as "As::<Period<SECOND, DAY>>" = Duration::from_secs(600),
    }
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

section! {
    /// `[log]`.
    Log {
        /// `error`, `warn`, `info`, `debug` or `trace`, or a filter such as `info,ccsqm_gateway::token=debug`.
        level: String as "As::<Level>" = "info".into(),
        /// How a line looks.
        format: LogFormat = LogFormat::Auto,
        /// Which requests have a line.
        requests: LogRequests = LogRequests::Failures,
    }
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
