//! The metrics of the process, and how requests are counted. Every name begins with `ccsqm_gateway_`.
//!
//! A part of the gateway registers its own metrics in the same registry: see [`Parts`]. A test moves each
//! metric at least once.

use std::collections::HashSet;
use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::exemplar::HistogramWithExemplars;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use crate::changes::Changes;
use crate::concurrency::Limits;
use crate::model::code::Code;
use crate::model::outcome::Outcome;
use crate::model::stage::Stage;
use crate::model::trace_id::TraceId;
use crate::reason::Failures;
use crate::registry::{Format, Registry};
use crate::upstream::{breaker, pool};
use crate::{audit, clock, exchange, log, token};

/// The limits that a request is checked against.
#[derive(Clone, Copy, Debug)]
pub enum LimitKind {
    /// The caller's own rate limit.
    Caller,
    /// The shared quota of the upstream.
    Quota,
}

impl LimitKind {
    const ALL: [Self; 2] = [Self::Caller, Self::Quota];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Caller => "rate_limit",
            Self::Quota => "quota",
        }
    }
}

/// All metrics of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    /// Handles for requests that ended without a code of ours, by outcome.
    // Looked up once: finding a label set in a family takes a lock and a hash for each request.
    replied: [OnceLock<Counter>; Outcome::ALL.len()],
    duration: HistogramWithExemplars<TraceLabel>,
    limit_checks: [[Counter; 2]; LimitKind::ALL.len()],
    credentials_dropped: Counter,
    bare_ids: Family<CallerLabel, Counter>,
    /// The callers for which the first bare id was logged.
    bare_ids_reported: Mutex<HashSet<Arc<str>>>,
    connections_closed: Family<ReasonLabel, Counter>,
    connections: Gauge,
    in_flight: Gauge,
    keys: Gauge,
    quota_ratio: Gauge<f64, AtomicU64>,
    /// Deprecated; stays for one version.
    quota_percent: Gauge,
    log_lines_dropped: Counter,
    /// Failed TLS handshakes of callers.
    pub caller_tls: Failures,
    /// The results of changed files.
    pub changes: Changes,
}

// Enums and not texts: a lookup compares three numbers and allocates nothing.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    /// `None` for a reply of the upstream.
    code: Option<Code>,
    outcome: Outcome,
    stage: Stage,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CheckLabels {
    limit: &'static str,
    result: &'static str,
}

// Names of callers are from the configuration, so the number of label sets is bounded.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallerLabel {
    caller: Arc<str>,
}

// `'static`, so that no text of a peer can become a label and make the number of label sets grow.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// The label of an exemplar.
#[derive(Debug, EncodeLabelSet)]
struct TraceLabel {
    trace_id: TraceId,
}

/// The metrics that other parts of the gateway move.
#[derive(Clone)]
pub struct Parts {
    /// Of the token slots.
    pub token: token::TokenMetrics,
    /// Of the upstream pools.
    pub pool: pool::ConnectionMetrics,
    /// Of the exchanges with the upstream.
    pub upstream: exchange::ExchangeMetrics,
}

/// Upper bounds for the duration of requests, in seconds.
// From replies of the gateway itself, which take about a millisecond, to slow replies of the upstream.
const BUCKETS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

impl Parts {
    fn new(registry: &mut Registry, changes: Changes) -> Self {
        Self {
            token: token::TokenMetrics::new(registry, changes),
            pool: pool::ConnectionMetrics::new(registry),
            upstream: exchange::ExchangeMetrics {
                breaker: breaker::CircuitMetrics::new(registry),
                failures: registry.metric(
                    "upstream_failures_total",
                    "Requests that failed at the upstream or could not reach it, by cause.",
                ),
                withheld: registry.metric(
                    "withheld_total",
                    "Parts of the upstream's replies that were withheld because they quote a secret.",
                ),
            },
        }
    }
}

impl Metrics {
    /// Registers all metrics. Returns them with those that other parts move, and with those of the audit trail.
    pub fn new() -> (Self, Parts, audit::AuditMetrics) {
        let mut registry = Registry::new();
        let changes = Changes::new(&mut registry);
        let parts = Parts::new(&mut registry, changes.clone());
        let audit = audit::AuditMetrics::new(&mut registry);
        let metrics = Self {
            requests: registry.metric(
                "requests_total",
                "Answered requests, by the stage that they reached, outcome and error code.",
            ),
            replied: Default::default(),
            duration: registry.register(
                "request_duration_seconds",
                "Time from a request's head to its answer.",
                HistogramWithExemplars::new(BUCKETS.into_iter()),
            ),
            limit_checks: limit_checks(&mut registry),
            credentials_dropped: registry.metric(
                "credential_headers_dropped_total",
                "Headers of callers that looked like a credential. None is ever forwarded.",
            ),
            bare_ids: registry.metric(
                "bare_ids_total",
                "Ids of 2^53 and more that callers sent as bare numbers, refused ones included.",
            ),
            bare_ids_reported: Mutex::default(),
            connections_closed: registry
                .metric("connections_closed_total", "Caller connections that the gateway closed."),
            connections: registry.metric("connections", "Open caller connections."),
            in_flight: registry.metric("requests_in_flight", "Requests between head and answer."),
            keys: registry.metric("idempotency_keys", "Idempotency-Keys that are remembered."),
            quota_ratio: registry.metric(
                "quota_ratio",
                "The fraction of the quota that is available after 429s of the upstream, from 0 to 1.",
            ),
            quota_percent: registry
                .metric("quota_percent", "Deprecated: use ccsqm_gateway_quota_ratio. The same in percent."),
            log_lines_dropped: registry.metric(
                "log_lines_dropped_total",
                "Log lines that were dropped: stderr was not read in time, or could not be written.",
            ),
            caller_tls: Failures::new(
                registry
                    .metric("caller_tls_failures_total", "Callers' TLS handshakes that failed, by cause."),
            ),
            changes,
            registry,
        };
        (metrics, parts, audit)
    }

    /// Counts a request that the gateway answered itself, with the time that it took and the trace for its
    /// exemplar.
    pub fn refused(
        &self,
        stage: Stage,
        outcome: Outcome,
        code: Code,
        took: Duration,
        trace_id: Option<TraceId>,
    ) {
        self.requests.get_or_create(&RequestLabels { code: Some(code), outcome, stage }).inc();
        self.took(took, trace_id);
    }

    /// Counts a request that got an answer of the upstream, now or as a replay, or that was a dry run.
    pub fn replied(&self, outcome: Outcome, took: Duration, trace_id: Option<TraceId>) {
        // Only a dry run ends as `NotSent` without a code, after the quota.
        let stage = match outcome {
            Outcome::NotSent => Stage::Quota,
            Outcome::Replayed => Stage::Idempotency,
            Outcome::Succeeded | Outcome::Failed | Outcome::Refused | Outcome::Unknown => Stage::Upstream,
        };
        let labels = RequestLabels { code: None, outcome, stage };
        let handle = &self.replied[outcome as usize];
        handle.get_or_init(|| self.requests.get_or_create_owned(&labels)).inc();
        self.took(took, trace_id);
    }

    /// Observes how long an answered request took. If it has a trace, that becomes the exemplar of its bucket.
    fn took(&self, took: Duration, trace_id: Option<TraceId>) {
        // The wall clock is read only for a request with a trace.
        let at = trace_id.map(|_| clock::wall());
        self.duration.observe(took.as_secs_f64(), trace_id.map(|trace_id| TraceLabel { trace_id }), at);
    }

    /// Counts one check of a limit.
    pub fn limit_checked(&self, limit: LimitKind, passed: bool) {
        self.limit_checks[limit as usize][usize::from(passed)].inc();
    }

    /// Counts headers of a caller that looked like credentials and were dropped.
    pub fn credentials_dropped(&self, count: usize) {
        // Nearly always zero: adding nothing would still write to memory that all workers share.
        if count > 0 {
            self.credentials_dropped.inc_by(count as u64);
        }
    }

    /// Counts ids of 2^53 and more that a caller sent as bare numbers. Returns whether to log it: only for the
    /// first ones of a caller in this process, and if `is_of_interest`.
    pub fn bare_ids(&self, caller: &Arc<str>, count: usize, is_of_interest: bool) -> bool {
        self.bare_ids.get_or_create(&CallerLabel { caller: caller.clone() }).inc_by(count as u64);
        is_of_interest && {
            let mut reported = self.bare_ids_reported.lock().unwrap_or_else(PoisonError::into_inner);
            // Asked first: `insert` alone would need a clone of the name for each request.
            !reported.contains(caller) && reported.insert(caller.clone())
        }
    }

    /// Counts a connection of a caller that the gateway closed.
    pub fn connection_closed(&self, reason: &'static str) {
        self.connections_closed.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// Returns all metrics as text. `keys` is the number of remembered idempotency keys, `quota` the part of
    /// the quota that the upstream's 429s have left, from 0 to 1.
    ///
    /// Fails only if a metric cannot be formatted.
    pub fn render(
        &self,
        format: Format,
        limits: &Limits,
        keys: usize,
        quota: f64,
    ) -> Result<String, fmt::Error> {
        self.connections.set(i64::try_from(limits.connections()).unwrap_or(i64::MAX));
        self.in_flight.set(i64::try_from(limits.in_flight()).unwrap_or(i64::MAX));
        self.keys.set(i64::try_from(keys).unwrap_or(i64::MAX));
        self.quota_ratio.set(quota.min(1.0));
        self.quota_percent.set((quota * 100.0) as i64);
        // The log counts by itself, since it must not depend on the metrics. A counter cannot be set, so the
        // difference is added.
        self.log_lines_dropped.inc_by(log::dropped().saturating_sub(self.log_lines_dropped.get()));
        self.registry.encode(format)
    }
}

/// Registers the counters of limit checks: by limit, those that refused and those that passed.
fn limit_checks(registry: &mut Registry) -> [[Counter; 2]; LimitKind::ALL.len()] {
    let checks: Family<CheckLabels, Counter> = registry.metric("limit_checks_total", "Limit checks.");
    LimitKind::ALL.map(|limit| {
        let limit = limit.as_str();
        ["refused", "passed"].map(|result| checks.get_or_create_owned(&CheckLabels { limit, result }))
    })
}
