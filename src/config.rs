//! Validated configuration: every value has its final type, and every reference resolves.
//!
//! A configuration goes through three forms: layers, which say where each value comes from; validated, the types of
//! this module; and compiled, [`crate::state::State`]. The module `source` merges the layers with the `config` crate.
//! `reader` reads them table by table with serde into the types of `sections`. `parse` runs these steps and the checks
//! in order. All mistakes are reported at once, each with its place, key and reason. Only [`Config::load`] and
//! [`Config::load_in_time`] return a [`Config`].
//!
//! This module opens the configuration file and no other. The caller passes in a [`named_files::NamedFiles`], which
//! checks the files that the configuration names.

mod source;
mod context;
mod reader;
mod values;
mod forms;
mod peer_rule;
mod urls;
mod sections;
mod defaults;
mod complete;
mod files;
mod problems;
pub mod named_files;
mod parse;
mod relations;
mod variables;
mod effective;
pub mod trail;

use std::ffi::OsString;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use context::Reading;
pub use effective::CredentialUser;
use named_files::NamedFiles;
use peer_rule::meets_loopback;
pub use peer_rule::{DNS, PeerRule, SPIFFE};
pub use problems::{Problem, Problems};
pub(crate) use relations::socket_path;
use schemars::JsonSchema;
pub use sections::{
    Admin, Audit, BareIds, Caller, ContractSource, Control, Credential, Http2, Idempotency, IdentityFiles,
    ListenAddress, Listener, ListenerTls, Log, LogFormat, LogRequests, LoginFiles, Quota, Rate, RateLimit,
    RefusalBudget, Route, SecretSource, Server, Token, Upstream, WithoutKey,
};
use serde::Serialize;
pub use urls::{ProxyUrl, Url};

/// A whole, validated configuration.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(title = "Configuration of ccsqm-gateway", deny_unknown_fields, extend("required" = ["upstream", "credentials", "callers"]))]
pub struct Config {
    /// The listeners that callers connect to. Default: one on 127.0.0.1:8080.
    pub listeners: Vec<Listener>,
    /// The admin listener, with `/livez`, `/readyz`, `/metrics` and `/status`, and the control socket.
    pub admin: Admin,
    /// Worker threads, and bounds and deadlines of callers' connections and requests.
    pub server: Server,
    /// The API that requests are forwarded to: address, connections, circuit breaker, TLS, proxy and headers.
    pub upstream: Upstream,
    /// How tokens are fetched.
    pub token: Token,
    /// App keys and secrets, named by file or variable; at least one.
    pub credentials: Vec<Credential>,
    /// The callers, each with its peer, operator, credential, routes and limits; at least one.
    pub callers: Vec<Caller>,
    /// The rate limit of the upstream, shared by all callers.
    pub quota: Quota,
    /// The audit trail: where it is, when a record is committed, and how long it is kept.
    pub audit: Audit,
    /// Deduplication of repeated calls, with and without an `Idempotency-Key`.
    pub idempotency: Idempotency,
    /// Log level, format, and which requests have a log line.
    pub log: Log,
    /// The routes. One for `appointQualityTask` is built in.
    pub routes: Vec<Route>,
}

/// The name of the built-in route, which exists without being configured. A `[[routes]]` table of this name may replace
/// its contract, credential, timeout and `frozen`.
pub const BUILT_IN_ROUTE: &str = "appointQualityTask";

/// A warning for operators about `loopback` callers. `check`, the start log and `/status` show it if the configuration
/// has such a caller: see [`Config::trusts_loopback`].
pub const LOOPBACK_NOTICE: &str = "a `loopback` caller is every process in this network namespace: processes of other \
     users, host-network containers, users of a port-forward, an app that can be tricked into sending requests (SSRF). \
     On a shared host use a Unix socket with `uid:` callers.";

impl Config {
    /// Returns the configuration of the file at `path`, overridden by the environment (`CCSQM_GATEWAY__SECTION__KEY`),
    /// then by `overrides`, the keys and values of `--set` flags. `files` checks every file that the configuration
    /// names. Fails with all mistakes, at least one.
    ///
    /// Blocks while it reads files, and for ever if a file does not answer. A start therefore uses
    /// [`Config::load_in_time`].
    pub fn load(
        path: &Path,
        overrides: &[(String, String)],
        environment: impl IntoIterator<Item = (OsString, OsString)>,
        files: &dyn NamedFiles,
    ) -> Result<Self, Problems> {
        let loaded = Self::load_with_keys(path, overrides, environment, files, Reading::default());
        loaded.map(|(config, _)| config)
    }

    /// Runs [`Config::load`] on a thread of its own, and waits for the result for at most `patience`. If a file does
    /// not answer within that time, the error has the key that names this file, and the thread keeps running.
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
        let own = || {
            (
                source::ConfigLocation::File { path: path.display().to_string().into(), line: 1 },
                "file".to_owned(),
            )
        };
        let problem =
            |(location, key), reason| Err(Problems(vec![Problem { location, key, reason, written: None }]));
        if let Err(error) = thread::Builder::new().name("configuration".into()).spawn(load) {
            return problem(own(), format!("cannot be read: {error}"));
        }
        match result.recv_timeout(patience) {
            Ok(result) => result.map(|(config, _)| config),
            Err(RecvTimeoutError::Timeout) => {
                // The thread that hangs holds no lock here: it sets the key before it opens the file.
                let at = reading.lock().unwrap_or_else(PoisonError::into_inner).take();
                let reason = format!(
                    "does not answer within {} s: it may be a pipe without a writer, or a dead mount",
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
        let layers = source::read(Some(path), overrides, &environment)?;
        // Absolute from here on, so that a message names a file in full: its reader may not know the working
        // directory.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        parse::validate(layers, path.parent().unwrap_or(Path::new(".")), files, reading)
    }

    /// Returns the address of the admin listener, as the file at `path`, if one is given, and the environment set it.
    ///
    /// Other settings and the named files are not checked: they may have changed after the gateway that runs was
    /// started. Fails if the file cannot be read, if the address is invalid, or if a line of the file is not TOML,
    /// since that line may be the one with the address.
    pub fn admin_address(
        path: Option<&Path>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
        files: &dyn NamedFiles,
    ) -> Result<SocketAddr, Problems> {
        let environment: Vec<_> = environment.into_iter().collect();
        parse::admin_address(source::read(path, &[], &environment)?, files)
    }

    /// The listeners at which the caller's peer can connect and be identified.
    fn listeners_of(&self, caller: &Caller) -> impl Iterator<Item = &Listener> {
        self.listeners.iter().filter(|listener| listener.can_see(&caller.peer))
    }

    /// Whether a socket at this address must be bound with `IPV6_V6ONLY`. That is so for `[::]` if another socket has
    /// an IPv4 address with the same port: without the option, `[::]` would also receive IPv4 connections (RFC 3493
    /// section 5.3).
    pub fn is_only_v6(&self, address: SocketAddr) -> bool {
        let is_v4 = |other: SocketAddr| other.port() == address.port() && other.ip().to_canonical().is_ipv4();
        let listeners = self.listeners.iter().filter_map(|listener| match listener.address {
            ListenAddress::Tcp(other) => Some(other),
            ListenAddress::Unix { .. } => None,
        });
        let mut others = listeners.chain([self.admin.address]);
        address.ip() == Ipv6Addr::UNSPECIFIED && address.port() != 0 && others.any(is_v4)
    }

    /// Whether any caller is identified by a loopback address alone, so that [`LOOPBACK_NOTICE`] must be shown.
    pub fn trusts_loopback(&self) -> bool {
        self.callers.iter().any(|caller| caller.peer.networks().iter().any(meets_loopback))
    }
}

#[cfg(test)]
mod tests;
