//! The metrics of tokens: fetches, changed secrets, generation, usability, contest and clock skew, by credential.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use super::Slot;
use crate::changes::Changes;
use crate::registry::Registry;

/// The handles of these metrics. Clones share the counts.
#[derive(Clone, Debug)]
pub struct TokenMetrics {
    /// The results of changed files, which `/status` shows as well.
    pub(super) changes: Changes,
    pub(super) fetches: Family<ResultLabels, Counter>,
    pub(super) reloads: Family<ResultLabels, Counter>,
    pub(super) generation: Family<CredentialLabel, Gauge>,
    pub(super) usable: Family<CredentialLabel, Gauge>,
    pub(super) contested: Family<CredentialLabel, Gauge>,
    pub(super) skew: Family<CredentialLabel, Gauge>,
}

/// The label of a metric that each credential has once.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct CredentialLabel {
    credential: String,
}

/// The labels of a counter by credential and result.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ResultLabels {
    credential: String,
    // Never a text of the endpoint: each new value would be a new time series.
    result: &'static str,
}

impl CredentialLabel {
    pub(super) fn of(slot: &Slot) -> Self {
        Self { credential: slot.name.clone() }
    }
}

impl ResultLabels {
    pub(super) fn of(slot: &Slot, result: &'static str) -> Self {
        Self { credential: slot.name.clone(), result }
    }
}

impl TokenMetrics {
    /// Registers the metrics.
    pub(crate) fn new(registry: &mut Registry, changes: Changes) -> Self {
        Self {
            changes,
            fetches: registry.metric("token_fetches_total", "Calls of the token endpoint, by result."),
            reloads: registry
                .metric("token_secret_reloads_total", "Changed secrets that were tried, by result."),
            generation: registry
                .metric("token_generation", "Number of the current token, counted from the start."),
            usable: registry.metric("token_usable", "Whether there is a usable token."),
            contested: registry.metric(
                "token_contested",
                "Whether another client ends this gateway's tokens by fetching others with the same app key.",
            ),
            // For operators only: a life is relative to the request, so that a wrong clock of the endpoint changes none.
            skew: registry.metric("token_skew_seconds", "The token endpoint's clock minus the gateway's."),
        }
    }
}
