//! What is counted of a token's life.

use prometheus::{IntCounterVec, IntGaugeVec, Registry};

use crate::changes::Changes;
use crate::registry::{counters, gauges};

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
        let counters = |name, help| counters(registry, name, help, &["credential", "result"]);
        let gauges = |name, help| gauges(registry, name, help, &["credential"]);
        Ok(Self {
            changes,
            fetches: counters("token_fetches_total", "Calls of the token endpoint, by result.")?,
            reloads: counters("token_secret_reloads_total", "Changed secrets that were tried, by result.")?,
            generation: gauges("token_generation", "Counts the different tokens since the start.")?,
            usable: gauges("token_usable", "Whether there is a usable token.")?,
            contested: gauges(
                "token_contested",
                "Whether somebody else ends this gateway's tokens by fetching others with the same app key.",
            )?,
            skew: gauges("token_skew_seconds", "The endpoint's clock minus ours.")?,
        })
    }
}
