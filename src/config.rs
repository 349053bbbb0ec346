//! Configuration, validated: every value is of its final type and every reference resolves.
//!
//! Three types: layers (what stands where), validated (these), compiled ([`crate::state::State`]). All mistakes are told at once,
//! each with its place, key and reason. The layers are merged by the `config` crate (`source`), read table by table with serde
//! (`reader`, into the types of `sections`), completed and checked (`parse` has the order).

mod source;
mod context;
mod reader;
mod values;
mod forms;
mod peer;
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
pub use effective::Access;
use named_files::NamedFiles;
use peer::meets_loopback;
pub use peer::{DNS, PeerRule, SPIFFE};
pub use problems::{Problem, Problems};
pub(crate) use relations::socket_path;
use schemars::JsonSchema;
pub use sections::{
    Admin, Audit, BareIds, Caller, ContractSource, Control, Credential, Http2, Idempotency, IdentityFiles,
    Limit, ListenAddress, Listener, ListenerTls, Log, LogFormat, LogRequests, LoginFiles, Quota, Rate,
    RefusalBudget, Route, SecretSource, Server, Token, Upstream, WithoutKey,
};
use serde::Serialize;
pub use urls::{ProxyUrl, Url};

/// A whole configuration. Made only by [`Config::load`].
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(title = "Configuration of ccsqm-gateway", deny_unknown_fields, extend("required" = ["upstream", "credentials", "callers"]))]
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
    pub quota: Quota,
    /// The audit trail.
    pub audit: Audit,
    /// Calls that are repeated.
    pub idempotency: Idempotency,
    /// Logs.
    pub log: Log,
    /// The built-in route and those of the file.
    pub routes: Vec<Route>,
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
            || (source::Place::File { path: path.display().to_string().into(), line: 1 }, "file".to_owned());
        let problem =
            |(place, key), reason| Err(Problems(vec![Problem { place, key, reason, written: None }]));
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
        let layers = source::read(Some(path), overrides, &environment)?;
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
        parse::admin_address(source::read(path, &[], &environment)?, files)
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

#[cfg(test)]
mod tests;
