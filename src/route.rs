//! Stage 2: which route, and may this caller use it as this operator.
//!
//! A route is found by the exact bytes of its path: no decoding, no normalising, no prefix. What matches
//! nothing is refused, never forwarded.

use std::{collections::HashMap, sync::Arc, time::Duration};

use foldhash::fast::RandomState;
use http::{HeaderValue, Method, Uri};
use thiserror::Error;

use crate::{
    admission::{Admitted, Caller},
    config,
    contract::{Contract, SchemaError},
    files,
    request_head::Inbound,
    result_rule::ResultRule,
    token::Cooldown,
};

/// A compiled route.
#[derive(Debug)]
pub struct Route {
    /// Its name in the configuration, the audit trail and the metrics.
    pub name: Arc<str>,
    /// Its path, the same on both sides.
    pub path: String,
    /// The same path as the upstream request's target.
    pub target: Uri,
    /// What a body must be.
    pub contract: Contract,
    /// How a reply says what became of the task.
    pub result: ResultRule,
    /// The longest that an exchange may take.
    pub timeout: Duration,
    /// Its requests are refused for now.
    frozen: bool,
    /// By credential.
    cooldowns: Vec<Arc<Cooldown>>,
    /// With which credential each caller may use this route, by the caller's index.
    access: Vec<Option<usize>>,
}

/// A route that the caller may use, as the operator it may act as.
#[derive(Debug)]
pub struct Routed<'a> {
    /// The route.
    pub route: &'a Arc<Route>,
    /// Who acts, for `x-UserId`.
    pub operator: &'a HeaderValue,
    /// Index of the credential.
    pub credential: usize,
    /// Nothing is to be sent.
    pub is_dry_run: bool,
}

/// In front of a route's path it makes a dry run of a request. A path, since a header could be lost on the way, and
/// the task assigned.
pub const DRY_RUN: &str = "/.gateway/dry-run";

/// Why no route was found, or not for this caller.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum NoRoute {
    /// The target is not a plain path.
    #[error("{0}")]
    Target(&'static str),
    /// No route has this path.
    #[error("no route has this path; you may use: {}", .0.join(", "))]
    Unknown(Vec<String>),
    /// The path is right, the method is not.
    #[error("this route takes POST only")]
    Method,
    /// The caller's `routes` do not list it.
    #[error("this caller may not use this route; you may use: {}", .0.join(", "))]
    Denied(Vec<String>),
    /// The route is `frozen`.
    #[error("the operators of the gateway have frozen this route, so that nothing is sent on it; ask them")]
    Frozen,
    /// The operator in `x-userid` is not one of the caller's.
    #[error(
        "this caller may not act as the operator in x-userid; leave the header out, or ask the operators of the gateway to add it"
    )]
    Operator,
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
    /// The contract's schema is not one that the checker understands.
    #[error("route {route}: contract {path}: {source}")]
    Schema {
        /// The route's name.
        route: String,
        /// The contract's file.
        path: String,
        /// Where and why.
        source: SchemaError,
    },
}

/// All routes, by exact path.
#[derive(Debug)]
pub struct Routes(HashMap<String, Arc<Route>, RandomState>);

impl Routes {
    /// Compiles the routes of a configuration, contracts included.
    /// Those that `old` has, too, go on with what is known of their credentials.
    pub fn new(config: &config::Config, old: Option<&Self>) -> Result<Self, RouteError> {
        let mut routes = HashMap::with_hasher(RandomState::default());
        for raw in &config.routes {
            let known = old.and_then(|old| old.iter().find(|route| *route.name == *raw.name));
            let cooldowns: Vec<Arc<Cooldown>> = match known {
                Some(known) => known.cooldowns.clone(),
                None => config.credentials.iter().map(|_| Arc::default()).collect(),
            };
            let access_of = |caller: &config::Caller| {
                let name = raw.credential.as_ref().unwrap_or(&caller.credential);
                let credential = config.credentials.iter().position(|credential| credential.name == *name)?;
                let may_use = caller.routes.contains(&raw.name);
                may_use.then_some(credential)
            };
            let access = config.callers.iter().map(access_of).collect();
            let route = Route::new(raw, config, cooldowns, access)?;
            routes.insert(raw.path.clone(), Arc::new(route));
        }
        Ok(Self(routes))
    }

    /// The routes, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Route>> {
        self.0.values()
    }

    /// Finds the route of a request and checks that this caller may use it as this operator.
    pub fn find<'a>(
        &'a self,
        admitted: &Admitted<'a>,
        (method, target): (&Method, &Uri),
        head: &Inbound<'_>,
    ) -> Result<Routed<'a>, NoRoute> {
        let caller = admitted.caller();
        let path = plain_path(target)?;
        let dry_run = path.strip_prefix(DRY_RUN);
        let (path, is_dry_run) = (dry_run.unwrap_or(path), dry_run.is_some());
        let route = self.0.get(path).ok_or_else(|| NoRoute::Unknown(self.usable_by(caller)))?;
        if *method != Method::POST {
            return Err(NoRoute::Method);
        }
        let credential =
            route.credential_of(caller).ok_or_else(|| NoRoute::Denied(self.usable_by(caller)))?;
        if route.frozen {
            return Err(NoRoute::Frozen);
        }
        let operator = acting_operator(caller, head)?;
        Ok(Routed { route, operator, credential, is_dry_run })
    }

    fn usable_by(&self, caller: &Caller) -> Vec<String> {
        let mut paths: Vec<_> = self
            .iter()
            .filter(|route| route.credential_of(caller).is_some())
            .map(|route| route.path.clone())
            .collect();
        paths.sort();
        paths
    }
}

impl Route {
    /// Whether refused tokens of this credential on this route still cause fetches.
    pub fn cooldown(&self, credential: usize) -> &Cooldown {
        &self.cooldowns[credential]
    }

    fn credential_of(&self, caller: &Caller) -> Option<usize> {
        *self.access.get(caller.index)?
    }

    fn new(
        raw: &config::Route,
        config: &config::Config,
        cooldowns: Vec<Arc<Cooldown>>,
        access: Vec<Option<usize>>,
    ) -> Result<Self, RouteError> {
        Ok(Self {
            name: raw.name.as_str().into(),
            path: raw.path.clone(),
            target: target(&raw.path),
            contract: compile(raw)?.shown(|name| config.audit.shown(name)),
            result: ResultRule::new(&raw.result_field, &raw.success_codes),
            timeout: raw.timeout.unwrap_or(config.upstream.timeout),
            frozen: raw.frozen,
            cooldowns,
            access,
        })
    }
}

fn compile(raw: &config::Route) -> Result<Contract, RouteError> {
    let route = raw.name.clone();
    let (path, text) = match &raw.contract {
        config::ContractSource::BuiltIn => ("built in".to_owned(), Contract::APPOINT_QUALITY_TASK.to_owned()),
        config::ContractSource::File(path) => {
            let shown = path.display().to_string();
            match files::read_text(path) {
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

/// The path of an origin-form target without a query. Exact bytes: an encoded or doubled slash is simply
/// another path.
fn plain_path(uri: &Uri) -> Result<&str, NoRoute> {
    if uri.scheme().is_some() || uri.authority().is_some() {
        return Err(NoRoute::Target(
            "the request target is a full URL, as clients send it to a proxy; is http_proxy set? Call the gateway itself, with a path",
        ));
    }
    if uri.query().is_some() {
        return Err(NoRoute::Target(
            "the request target has a query, which no route takes; send the path alone",
        ));
    }
    Ok(uri.path())
}

fn acting_operator<'a>(caller: &'a Caller, head: &Inbound<'_>) -> Result<&'a HeaderValue, NoRoute> {
    let Some(named) = head.operator.first else { return Ok(&caller.operator) };
    std::iter::once(&caller.operator)
        .chain(&caller.operators)
        .find(|allowed| *allowed == named)
        .ok_or(NoRoute::Operator)
}
