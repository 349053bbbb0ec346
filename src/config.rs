//! Configuration, validated: every value is of its final type and every reference resolves.
//!
//! Three types: raw (what stands where), validated (these), compiled ([`crate::state::State`]). All mistakes
//! are told at once, each with its place, key and reason.

mod raw;
mod table;
mod values;
mod peer;
pub mod named_files;
mod parse;
mod relations;
mod variables;
mod effective;
pub mod trail;

use std::{
    ffi::OsString,
    fmt,
    net::{Ipv6Addr, SocketAddr},
    num::NonZeroU32,
    path::{Path, PathBuf},
    sync::{
        PoisonError,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use http::{HeaderMap, HeaderName, StatusCode};
use serde_json::json;

use crate::{
    model::{durability::Durability, redaction::Shown},
    plain,
};
pub use effective::Access;
use named_files::NamedFiles;
use peer::meets_loopback;
pub use peer::{DNS, PeerRule, SPIFFE};
pub(crate) use relations::socket_path;
use table::Reading;

/// A whole configuration. Made only by [`Config::load`].
#[derive(Clone, Debug)]
pub struct Config {
    /// Where callers connect; at least one.
    pub listeners: Vec<Listener>,
    /// Where ops look.
    pub admin: Admin,
    /// Bounds and deadlines of the data plane.
    pub server: Server,
    /// The API behind the gateway.
    pub upstream: Upstream,
    /// How tokens are obtained.
    pub token: Token,
    /// App keys and secrets; at least one.
    pub credentials: Vec<Credential>,
    /// Who may call; at least one.
    pub callers: Vec<Caller>,
    /// The upstream's budget, shared by all callers.
    pub quota: Limit,
    /// The audit trail.
    pub audit: Audit,
    /// Calls that are repeated.
    pub idempotency: Idempotency,
    /// The built-in route and those of the file.
    pub routes: Vec<Route>,
    /// Logs.
    pub log: Log,
}

/// One mistake.
#[derive(Clone, Debug)]
pub struct Problem {
    place: raw::Place,
    key: String,
    reason: String,
}

/// All mistakes of a configuration; displayed one a line, as `file:line: key: reason`.
#[derive(Clone, Debug)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// One by one, in the order of their places.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.0.iter()
    }
}

impl Problem {
    /// For machines.
    pub fn to_json(&self) -> serde_json::Value {
        let (file, line) = match &self.place {
            raw::Place::File { path, line } => (Some(&**path), Some(line)),
            raw::Place::Variable(_) | raw::Place::Flag(_) => (None, None),
        };
        let place = self.place.to_string();
        json!({ "place": place, "file": file, "line": line, "key": self.key, "reason": self.reason })
    }
}

impl std::error::Error for Problems {}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            let line_break = if i == 0 { "" } else { "\n" };
            write!(f, "{line_break}{problem}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Problem {
    /// One line, whatever the file holds: a key may be quoted, long, and full of characters that are not plain.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, key, reason } = self;
        let cut = key.char_indices().nth(200).map_or(key.len(), |(at, _)| at);
        let line = plain::line(&format!("{place}: {}: {reason}", &key[..cut]));
        f.write_str(&line) // at once: standard error has no buffer
    }
}

/// The route that is there without being configured. A `contract_file` takes the place of its contract.
pub const BUILT_IN_ROUTE: &str = "appointQualityTask";

/// What a `loopback` caller means. Said in the README, by `check`, in the start log and at `/status`.
pub const LOOPBACK_NOTICE: &str = "a `loopback` caller is every process in this network namespace: other users, \
     host-network containers, whoever holds a port-forward, an app that can be made to send requests (SSRF). On a \
     shared host use a Unix socket with `uid:` callers.";

impl Config {
    /// Loads a file, then the environment (`CCSQM_GATEWAY__SECTION__KEY`), then `--set` flags, and validates it.
    /// Has `files` look at every file that the configuration names.
    pub fn load(
        path: &Path,
        overrides: &[(String, String)],
        environment: impl IntoIterator<Item = (OsString, OsString)>,
        files: &dyn NamedFiles,
    ) -> Result<Self, Problems> {
        let loaded = Self::load_with_keys(path, overrides, environment, files, Reading::default());
        loaded.map(|(config, _)| config)
    }

    /// The same on a thread of its own, for at most so long. Of a file that does not answer the problem is at the key that names it.
    pub fn load_in_time(
        path: &Path,
        overrides: &[(String, String)],
        environment: impl IntoIterator<Item = (OsString, OsString)>,
        files: &'static dyn NamedFiles,
        patience: Duration,
    ) -> Result<Self, Problems> {
        let environment: Vec<_> = environment.into_iter().collect();
        let (own_path, overrides) = (path.to_owned(), overrides.to_vec());
        let reading = Reading::default();
        let (done, result) = mpsc::channel();
        let load = {
            let reading = reading.clone();
            move || drop(done.send(Self::load_with_keys(&own_path, &overrides, environment, files, reading)))
        };
        let own =
            || (raw::Place::File { path: path.display().to_string().into(), line: 1 }, "file".to_owned());
        let problem = |(place, key), reason| Err(Problems(vec![Problem { place, key, reason }]));
        if let Err(error) = thread::Builder::new().name("configuration".into()).spawn(load) {
            return problem(own(), format!("cannot be read: {error}"));
        }
        match result.recv_timeout(patience) {
            Ok(result) => result.map(|(config, _)| config),
            Err(RecvTimeoutError::Timeout) => {
                let at = reading.lock().unwrap_or_else(PoisonError::into_inner).take();
                let reason = format!(
                    "does not answer within {} s: a pipe that nobody writes to, or a mount that is dead",
                    patience.as_secs()
                );
                problem(at.unwrap_or_else(own), reason)
            }
            Err(RecvTimeoutError::Disconnected) => problem(own(), "cannot be read: a panic".into()),
        }
    }

    fn load_with_keys(
        path: &Path,
        overrides: &[(String, String)],
        environment: impl IntoIterator<Item = (OsString, OsString)>,
        files: &dyn NamedFiles,
        reading: Reading,
    ) -> Result<(Self, Vec<String>), Problems> {
        let environment: Vec<_> = environment.into_iter().collect();
        let layers = raw::read(Some(path), overrides, &environment)?;
        // What is said of a file names it whole.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        parse::validate(layers, path.parent().unwrap_or(Path::new(".")), files, reading)
    }

    /// Where the admin listener is, by the file, if one is named, and the environment. Looks at nothing else: what became of
    /// other settings or files after a start says nothing of the gateway that runs.
    pub fn admin_address(
        path: Option<&Path>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
        files: &dyn NamedFiles,
    ) -> Result<SocketAddr, Problems> {
        let environment: Vec<_> = environment.into_iter().collect();
        parse::admin_address(raw::read(path, &[], &environment)?, files)
    }

    /// The listeners at which a caller can be seen.
    fn listeners_of(&self, caller: &Caller) -> impl Iterator<Item = &Listener> {
        self.listeners.iter().filter(|listener| listener.can_see(&caller.peer))
    }

    /// Whether a socket at this address must leave IPv4 alone, since another one has the port there. `[::]` takes both otherwise.
    pub fn is_only_v6(&self, address: SocketAddr) -> bool {
        let is_v4 = |other: SocketAddr| other.port() == address.port() && other.ip().to_canonical().is_ipv4();
        let listeners = self.listeners.iter().filter_map(|listener| match listener.address {
            ListenAddress::Tcp(other) => Some(other),
            ListenAddress::Unix { .. } => None,
        });
        let mut others = listeners.chain([self.admin.address]);
        address.ip() == Ipv6Addr::UNSPECIFIED && address.port() != 0 && others.any(is_v4)
    }

    /// Whether any caller is known by a loopback address alone, so that [`LOOPBACK_NOTICE`] must be said.
    pub fn trusts_loopback(&self) -> bool {
        self.callers.iter().any(|caller| caller.peer.networks().iter().any(meets_loopback))
    }
}

impl Listener {
    fn asks_for_certificates(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.client_ca_file.is_some())
    }

    fn can_see(&self, peer: &PeerRule) -> bool {
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

impl Url {
    /// Host, and the port where it is not the scheme's own: what `Host` holds.
    pub fn authority(&self) -> String {
        let own = if self.tls { 443 } else { 80 };
        if self.port == own { bracketed(&self.host) } else { self.authority_with_port() }
    }

    /// Host and port.
    pub fn authority_with_port(&self) -> String {
        format!("{}:{}", bracketed(&self.host), self.port)
    }
}

/// A host as it stands in an authority.
fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

impl fmt::Display for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}:{}", bracketed(&self.host), self.port)
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix { path, .. } => write!(f, "unix:{}", path.display()),
        }
    }
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

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority(), self.path)
    }
}

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

/// An HTTP proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyUrl {
    /// Host name or address, IPv6 without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// Whether HTTP/2 is spoken with the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Http2 {
    /// Never: HTTP/1.1.
    Off,
    /// Over TLS, where the upstream picks it; else HTTP/1.1.
    Auto,
}

/// An `http` or `https` URL, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// `https`.
    pub tls: bool,
    /// Host name or address, IPv6 without brackets.
    pub host: String,
    /// Port, the scheme's own when the URL names none.
    pub port: u16,
    /// Path and query, `/` at least; for `base_url` without a trailing slash, so possibly empty.
    pub path: String,
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

/// Which ids a caller may send as bare numbers, where a contract says `x-refuseRounded`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BareIds {
    /// Those that do not look as if a client had rounded them.
    #[default]
    Detect,
    /// All: the caller holds them as integers.
    Exact,
    /// None.
    Refuse,
}

impl BareIds {
    /// All, with their words.
    pub const ALL: [(Self, &str); 3] =
        [(Self::Detect, "detect"), (Self::Exact, "exact"), (Self::Refuse, "refuse")];
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

/// What becomes of a call without a key that equals an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WithoutKey {
    /// Refused while the first is at work or in doubt; flagged after it succeeded.
    Guard,
    /// Refused after it succeeded, too.
    Block,
    /// Flagged.
    Warn,
    /// Nothing.
    Off,
    /// Any call without a key is refused.
    RequireKey,
}

impl WithoutKey {
    /// All, with their words.
    pub const ALL: [(Self, &str); 5] = [
        (Self::Guard, "guard"),
        (Self::Block, "block"),
        (Self::Warn, "warn"),
        (Self::Off, "off"),
        (Self::RequireKey, "require_key"),
    ];
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

/// Which requests have a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum LogRequests {
    /// None.
    Off,
    /// Those of outcome `unknown`, `failed` or `refused`, and those that got a 5xx.
    Failures,
    /// All.
    All,
}

impl LogRequests {
    /// As in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Failures => "failures",
            Self::All => "all",
        }
    }
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    /// For people.
    Text,
    /// For machines.
    Json,
}

#[cfg(test)]
mod tests;
