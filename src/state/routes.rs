//! Compiles the routes of a configuration, contracts included.
//!
//! Reads contract files, so it may block: a reload runs it on the blocking pool.

use std::sync::Arc;

use http::Uri;
use thiserror::Error;

use crate::config::Config;
use crate::contract::{BadSchema, Contract};
use crate::exchange::Cooldown;
use crate::model::index::CredentialIndex;
use crate::result_rule::ResultRule;
use crate::route::{AccessRule, Routes};
use crate::{config, exchange, files};

/// A compiled route.
#[derive(Debug)]
pub struct Route {
    access: AccessRule,
    /// The contract that a body must keep.
    pub contract: Contract,
    /// The part of the route that an exchange needs.
    pub exchange: Arc<exchange::UpstreamRoute>,
}

impl AsRef<AccessRule> for Route {
    fn as_ref(&self) -> &AccessRule {
        &self.access
    }
}

/// Why a route could not be compiled.
#[derive(Debug, Error)]
pub enum RouteError {
    /// The contract file could not be read.
    #[error("route {route}: contract {path}: {source}")]
    Read {
        /// The route's name.
        route: String,
        /// The contract's file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The contract's schema has something that the checker does not know.
    #[error("route {route}: contract {path}: {source}")]
    Schema {
        /// The route's name.
        route: String,
        /// The contract's file.
        path: String,
        /// Where and why.
        source: BadSchema,
    },
}

/// Compiles the routes of a configuration, contracts included. A route that `old` has under the same name goes on with that one's
/// cool-downs.
///
/// Blocks while contract files are read. Fails at the first contract that cannot be read or compiled.
pub fn compile(config: &Config, old: Option<&Routes<Route>>) -> Result<Routes<Route>, RouteError> {
    let compiled = |raw: &config::Route| {
        let known = old.and_then(|old| old.iter().find(|route| *route.access.name == *raw.name));
        // A reload cannot change credentials, so that the old list fits. Without it each reload would begin anew to fetch tokens
        // that are refused anyway.
        let cooldowns = match known {
            Some(known) => known.exchange.cooldowns.clone(),
            None => config.credentials.iter().map(|_| Arc::default()).collect(),
        };
        Route::new(raw, config, cooldowns)
    };
    config.routes.iter().map(compiled).collect()
}

impl Route {
    fn new(raw: &config::Route, config: &Config, cooldowns: Vec<Arc<Cooldown>>) -> Result<Self, RouteError> {
        let name: Arc<str> = raw.name.as_str().into();
        // Resolved to indices here, so that a request compares no names.
        let credential_of = |caller: &config::Caller| {
            let name = raw.credential.as_ref().unwrap_or(&caller.credential);
            let credential = config.credentials.iter().position(|credential| credential.name == *name)?;
            let may_use = caller.routes.contains(&raw.name);
            may_use.then_some(CredentialIndex(credential))
        };
        let credentials = config.callers.iter().map(credential_of).collect();
        Ok(Self {
            contract: contract(raw)?.redacted(|name| config.audit.redaction(name)),
            exchange: Arc::new(exchange::UpstreamRoute {
                name: name.clone(),
                target: target(&raw.path),
                result: ResultRule::new(&raw.result_field, &raw.success_codes),
                timeout: raw.timeout.unwrap_or(config.upstream.timeout),
                cooldowns,
            }),
            access: AccessRule { name, path: raw.path.clone(), frozen: raw.frozen, credentials },
        })
    }
}

/// The contract of a route, built in or from its file.
fn contract(raw: &config::Route) -> Result<Contract, RouteError> {
    let route = raw.name.clone();
    let (path, text) = match raw.contract() {
        config::ContractSource::BuiltIn => ("built in".to_owned(), Contract::APPOINT_QUALITY_TASK.to_owned()),
        config::ContractSource::File(path) => {
            let shown = path.display().to_string();
            match files::read_text(&path) {
                Ok(text) => (shown, text),
                Err(source) => return Err(RouteError::Read { route, path: shown, source }),
            }
        }
    };
    Contract::compile(&text).map_err(|source| RouteError::Schema { route, path, source })
}

#[expect(clippy::expect_used, reason = "validation allows plain path characters only")]
fn target(path: &str) -> Uri {
    path.parse().expect("a validated path")
}
