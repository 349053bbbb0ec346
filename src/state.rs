//! The compiled configuration, shared by all workers. Immutable: a reload makes a successor and swaps the pointer.
//!
//! A request loads the pointer once and so sees one configuration. What must outlive a reload (limiters, cool-downs, breaker,
//! token slots) is shared with the successor by `Arc`.

mod routes;

use std::collections::HashMap;
use std::sync::Arc;

use crate::admission::Admission;
use crate::config::Config;
use crate::contract::body;
use crate::exchange;
use crate::exchange::ExchangeTerms;
use crate::rate_limit::Quota;
use crate::reason::Failures;
use crate::route::Routes;
use crate::token::Slot;
use crate::upstream::breaker::Breaker;
use crate::upstream::head::Outbound;
use http::HeaderValue;

pub use routes::{Route, RouteError, compile as compile_routes};

/// A compiled configuration.
#[derive(Debug)]
pub struct State {
    /// The callers.
    pub admission: Admission,
    /// The routes.
    pub routes: Routes<Route>,
    /// The bounds on a caller's body, in bytes and time.
    pub body: body::ReceiveLimits,
    /// The parts that all exchanges share.
    pub terms: Arc<ExchangeTerms>,
    /// Whether some caller is identified by a loopback address alone. `/status` then has a notice.
    pub trusts_loopback: bool,
}

impl State {
    /// Compiles the configuration of a start. Fails if a contract cannot be read or compiled.
    pub fn new(
        config: &Config,
        slots: Vec<Arc<Slot>>,
        metrics: exchange::ExchangeMetrics,
    ) -> Result<Self, RouteError> {
        Ok(Self {
            admission: Admission::new(&config.callers, &HashMap::new()),
            routes: routes::compile(config, None)?,
            body: body::ReceiveLimits { size: config.server.max_body, time: config.server.body_timeout },
            terms: Arc::new(ExchangeTerms {
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

    /// The state that takes the place of this one after a reload. `routes` are those of `config`, compiled with this state's as
    /// the old ones.
    ///
    /// Changes the rates of the quota and of callers' limiters at once, also for requests that still use this state: it must be
    /// called only for a configuration that will be put into effect.
    pub fn successor(&self, config: &Config, routes: Routes<Route>) -> Self {
        // In place, so that what is spent stays spent: with new limiters each reload would give every caller a full burst.
        self.terms.quota.set(config.quota.limit());
        Self {
            admission: Admission::new(&config.callers, &self.admission.limits()),
            routes,
            // A reload that changes these is refused before: they are bound to running connections and tasks.
            body: self.body,
            terms: self.terms.clone(),
            trusts_loopback: config.trusts_loopback(),
        }
    }
}

/// The value of `Host` in upstream requests.
#[expect(clippy::expect_used, reason = "validation allows host names and addresses only")]
fn authority(config: &Config) -> HeaderValue {
    HeaderValue::from_str(&config.upstream.base_url.authority()).expect("a validated host")
}
