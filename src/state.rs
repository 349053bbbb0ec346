//! Everything compiled from the configuration: immutable, shared by all workers.

mod routes;

use std::collections::HashMap;
use std::sync::Arc;

use crate::admission::Admission;
use crate::config::Config;
use crate::contract::body;
use crate::exchange;
use crate::exchange::Terms;
use crate::rate_limit::Quota;
use crate::reason::Failures;
use crate::route::Routes;
use crate::token::Slot;
use crate::upstream::breaker::Breaker;
use crate::upstream::head::Outbound;
use http::HeaderValue;

pub use routes::{Route, RouteError, compile as compile_routes};

/// One configuration, compiled.
#[derive(Debug)]
pub struct State {
    /// Whom the gateway knows.
    pub admission: Admission,
    /// The routes.
    pub routes: Routes<Route>,
    /// Bounds of a body.
    pub body: body::Bounds,
    /// What is common to all exchanges.
    pub terms: Arc<Terms>,
    /// Whether a loopback address alone makes a caller.
    pub trusts_loopback: bool,
}

impl State {
    /// Compiles a configuration.
    pub fn new(
        config: &Config,
        slots: Vec<Arc<Slot>>,
        metrics: exchange::Metrics,
    ) -> Result<Self, RouteError> {
        Ok(Self {
            admission: Admission::new(&config.callers, &HashMap::new()),
            routes: routes::compile(config, None)?,
            body: body::Bounds { size: config.server.max_body, time: config.server.body_timeout },
            terms: Arc::new(Terms {
                outbound: Outbound::new(authority(config), &config.upstream.static_headers()),
                refused_statuses: config.token.refused_statuses.clone(),
                breaker: Arc::new(Breaker::new(&config.upstream, metrics.breaker)),
                failures: Failures::new(metrics.failures),
                quota: Quota::new(config.quota.limit()),
                slots,
                reply_headers: config.upstream.reply_headers.clone(),
                withheld: metrics.withheld,
            }),
            trusts_loopback: config.trusts_loopback(),
        })
    }

    /// A configuration that takes the place of this one, with its compiled routes. All that is remembered goes on.
    pub fn successor(&self, config: &Config, routes: Routes<Route>) -> Self {
        self.terms.quota.set(config.quota.limit());
        Self {
            admission: Admission::new(&config.callers, &self.admission.limits()),
            routes,
            body: self.body,
            terms: self.terms.clone(),
            trusts_loopback: config.trusts_loopback(),
        }
    }
}

#[expect(clippy::expect_used, reason = "validation allows host names and addresses only")]
fn authority(config: &Config) -> HeaderValue {
    HeaderValue::from_str(&config.upstream.base_url.authority()).expect("a validated host")
}
