//! Metrics, made and registered in one step. Each name starts with `ccsqm_gateway_`.

use prometheus::core::Collector;
use prometheus::{
    Error, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

/// A counter.
pub(crate) fn counter(registry: &Registry, name: &str, help: &str) -> Result<IntCounter, Error> {
    registered(registry, IntCounter::with_opts(options(name, help)))
}

/// Counters, by labels.
pub(crate) fn counters(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntCounterVec, Error> {
    registered(registry, IntCounterVec::new(options(name, help), labels))
}

/// A gauge.
pub(crate) fn gauge(registry: &Registry, name: &str, help: &str) -> Result<IntGauge, Error> {
    registered(registry, IntGauge::with_opts(options(name, help)))
}

/// Gauges, by labels.
pub(crate) fn gauges(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntGaugeVec, Error> {
    registered(registry, IntGaugeVec::new(options(name, help), labels))
}

/// A histogram of seconds.
pub(crate) fn histogram(
    registry: &Registry,
    name: &str,
    help: &str,
    buckets: &[f64],
) -> Result<Histogram, Error> {
    let options = HistogramOpts::from(options(name, help)).buckets(buckets.into());
    registered(registry, Histogram::with_opts(options))
}

fn options(name: &str, help: &str) -> Opts {
    Opts::new(format!("ccsqm_gateway_{name}"), help)
}

/// A metric of another kind.
pub(crate) fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    made: Result<C, Error>,
) -> Result<C, Error> {
    let metric = made?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}
