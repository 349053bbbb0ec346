//! What is counted of a token's life.

use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry};

use crate::changes::Changes;

/// Counts of the token's life.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// What came of changed secrets.
    pub(super) changes: Changes,
    pub(super) fetches: IntCounterVec,
    pub(super) reloads: IntCounterVec,
    pub(super) generation: IntGaugeVec,
    pub(super) usable: IntGaugeVec,
    pub(super) contested: IntGaugeVec,
    pub(super) skew: IntGaugeVec,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &Registry, changes: Changes) -> Result<Self, prometheus::Error> {
        let opts = |name: &str, help: &str| Opts::new(format!("ccsqm_gateway_token_{name}"), help);
        let gauge = |name, help| IntGaugeVec::new(opts(name, help), &["credential"]);
        let fetches = opts("fetches_total", "Calls of the token endpoint, by result.");
        let reloads = opts("secret_reloads_total", "Changed secrets that were tried, by result.");
        let metrics = Self {
            changes,
            fetches: IntCounterVec::new(fetches, &["credential", "result"])?,
            reloads: IntCounterVec::new(reloads, &["credential", "result"])?,
            generation: gauge("generation", "Counts the different tokens since the start.")?,
            usable: gauge("usable", "Whether there is a usable token.")?,
            contested: gauge(
                "contested",
                "Whether somebody else ends this gateway's tokens by fetching others with the same app key.",
            )?,
            skew: gauge("skew_seconds", "The endpoint's clock minus ours.")?,
        };
        registry.register(Box::new(metrics.fetches.clone()))?;
        registry.register(Box::new(metrics.reloads.clone()))?;
        for gauge in [&metrics.generation, &metrics.usable, &metrics.contested, &metrics.skew] {
            registry.register(Box::new(gauge.clone()))?;
        }
        Ok(metrics)
    }
}
