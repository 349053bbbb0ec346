//! Metrics, in the text format. Each name starts with `ccsqm_gateway_`; each is moved by some test.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use prometheus::{Encoder, Histogram, IntCounter, IntCounterVec, IntGauge, Registry, TextEncoder};

use crate::changes::Changes;
use crate::concurrency::Bounds;
use crate::model::code::Code;
use crate::model::outcome::Outcome;
use crate::model::stage::Stage;
use crate::reason::Failures;
use crate::registry::{counter, counters, gauge, histogram};
use crate::upstream::{breaker, pool};
use crate::{audit, exchange, log, token};

/// The limits that a request is checked against.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    /// The caller's own.
    Caller,
    /// The shared quota.
    Quota,
}

impl Limit {
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
    requests: IntCounterVec,
    /// The handles of requests that ended without a code of ours, by outcome.
    replied: [OnceLock<IntCounter>; Outcome::ALL.len()],
    duration: Histogram,
    limit_checks: [[IntCounter; 2]; Limit::ALL.len()],
    credentials_dropped: IntCounter,
    bare_ids: IntCounterVec,
    /// The callers of which the first bare id was told.
    bare_ids_told: Mutex<HashSet<Arc<str>>>,
    connections_closed: IntCounterVec,
    connections: IntGauge,
    in_flight: IntGauge,
    keys: IntGauge,
    quota_percent: IntGauge,
    log_lines_dropped: IntCounter,
    /// Callers' TLS handshakes that failed.
    pub caller_tls: Failures,
    /// What came of changes of files.
    pub changes: Changes,
}

/// The metrics of the parts, made in the same registry.
#[derive(Clone)]
pub struct Parts {
    /// Of the token slots.
    pub token: token::Metrics,
    /// Of the upstream pools.
    pub pool: pool::Metrics,
    /// Of the exchanges with the upstream.
    pub upstream: exchange::Metrics,
}

/// Of how long requests take, in seconds.
const BUCKETS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

impl Parts {
    fn new(registry: &Registry, changes: Changes) -> Result<Self, prometheus::Error> {
        let failures = "Requests that the upstream failed, or that could not reach it, by cause.";
        let withheld = "What of the upstream's replies was withheld because it quotes a secret.";
        Ok(Self {
            token: token::Metrics::new(registry, changes)?,
            pool: pool::Metrics::new(registry)?,
            upstream: exchange::Metrics {
                breaker: breaker::Metrics::new(registry)?,
                failures: counters(registry, "upstream_failures_total", failures, &["cause"])?,
                withheld: counters(registry, "withheld_total", withheld, &["place"])?,
            },
        })
    }
}

impl Metrics {
    /// Registers everything.
    pub fn new() -> Result<(Self, Parts, audit::Metrics), prometheus::Error> {
        let registry = Registry::new();
        let counter = |name, help| counter(&registry, name, help);
        let counters = |name, help, labels: &[&str]| counters(&registry, name, help, labels);
        let gauge = |name, help| gauge(&registry, name, help);
        let limit_checks = counters("limit_checks_total", "Limit checks.", &["limit", "result"])?;
        let checks = |limit: Limit, result| limit_checks.with_label_values(&[limit.as_str(), result]);
        let caller_tls = "Callers' TLS handshakes that failed, by cause.";
        let changes = Changes::new(&registry)?;
        let (parts, audit) = (Parts::new(&registry, changes.clone())?, audit::Metrics::new(&registry)?);
        let metrics = Self {
            requests: counters(
                "requests_total",
                "Answered requests, by the stage that they reached, outcome and error code.",
                &["stage", "outcome", "code"],
            )?,
            replied: Default::default(),
            duration: histogram(
                &registry,
                "request_duration_seconds",
                "From the head to the answer.",
                &BUCKETS,
            )?,
            limit_checks: Limit::ALL.map(|limit| ["refused", "passed"].map(|result| checks(limit, result))),
            credentials_dropped: counter(
                "credential_headers_dropped_total",
                "Headers of callers that looked like a credential. None is ever forwarded.",
            )?,
            bare_ids: counters(
                "bare_ids_total",
                "Ids of 2^53 and more that callers sent as bare numbers, refused ones included.",
                &["caller"],
            )?,
            bare_ids_told: Mutex::default(),
            connections_closed: counters(
                "connections_closed_total",
                "Caller connections that the gateway closed.",
                &["reason"],
            )?,
            connections: gauge("connections", "Open caller connections.")?,
            in_flight: gauge("requests_in_flight", "Requests between head and answer.")?,
            keys: gauge("idempotency_keys", "Idempotency-Keys that are remembered.")?,
            quota_percent: gauge("quota_percent", "How much of the quota the upstream's 429s have left.")?,
            log_lines_dropped: counter(
                "log_lines_dropped_total",
                "Log lines that are missing on stderr: nobody read it in time, or it could not be written.",
            )?,
            caller_tls: Failures::new(counters("caller_tls_failures_total", caller_tls, &["cause"])?),
            changes,
            registry: registry.clone(),
        };
        Ok((metrics, parts, audit))
    }

    /// A request was answered by the gateway itself.
    pub fn refused(&self, stage: Stage, outcome: Outcome, code: Code, took: Duration) {
        self.requests.with_label_values(&[stage.as_str(), outcome.as_str(), code.as_str()]).inc();
        self.duration.observe(took.as_secs_f64());
    }

    /// An answer of the upstream was passed on, now or again; or a dry run ended.
    pub fn replied(&self, outcome: Outcome, took: Duration) {
        let stage = match outcome {
            Outcome::NotSent => Stage::Quota,
            Outcome::Replayed => Stage::Idempotency,
            Outcome::Succeeded | Outcome::Failed | Outcome::Refused | Outcome::Unknown => Stage::Upstream,
        };
        let labels = [stage.as_str(), outcome.as_str(), ""];
        let handle = &self.replied[outcome as usize];
        handle.get_or_init(|| self.requests.with_label_values(&labels)).inc();
        self.duration.observe(took.as_secs_f64());
    }

    /// A limit was asked.
    pub fn limit_checked(&self, limit: Limit, passed: bool) {
        self.limit_checks[limit as usize][usize::from(passed)].inc();
    }

    /// So many headers of a caller looked like credentials.
    pub fn credentials_dropped(&self, count: usize) {
        if count > 0 {
            self.credentials_dropped.inc_by(count as u64);
        }
    }

    /// A caller sent so many ids of 2^53 and more as bare numbers. Returns whether it is to be told, since none of this
    /// caller was in this process.
    pub fn bare_ids(&self, caller: &Arc<str>, count: usize, is_of_interest: bool) -> bool {
        self.bare_ids.with_label_values(&[caller]).inc_by(count as u64);
        is_of_interest && {
            let mut told = self.bare_ids_told.lock().unwrap_or_else(PoisonError::into_inner);
            !told.contains(caller) && told.insert(caller.clone())
        }
    }

    /// The gateway closed a caller's connection.
    pub fn connection_closed(&self, reason: &'static str) {
        self.connections_closed.with_label_values(&[reason]).inc();
    }

    /// The text format.
    pub fn render(&self, bounds: &Bounds, keys: usize, quota: f64) -> Result<Vec<u8>, prometheus::Error> {
        self.connections.set(i64::try_from(bounds.connections()).unwrap_or(i64::MAX));
        self.in_flight.set(i64::try_from(bounds.in_flight()).unwrap_or(i64::MAX));
        self.keys.set(i64::try_from(keys).unwrap_or(i64::MAX));
        self.quota_percent.set((quota * 100.0) as i64);
        self.log_lines_dropped.inc_by(log::dropped().saturating_sub(self.log_lines_dropped.get()));
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}
