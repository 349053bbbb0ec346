//! The circuit breaker: an upstream that is down is left alone for a while.
//!
//! A request that meets a dead upstream holds its caller up, and may leave its task in doubt; so after some failures
//! in a row further ones are refused before anything is sent. Failures are what says that nobody is at work there: no
//! connection, no answer in time, 502, 503, 504. A 500 or a refused token is an answer. After a pause one request
//! goes as a probe: it ends the suspension, or doubles the pause.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::StatusCode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use thiserror::Error;

use crate::model::cause::Cause;
use crate::registry::Registry;
use crate::{clock, config};

/// The longest pause, in nanoseconds.
const LONGEST: u64 = 30_000_000_000;

/// When to come back while a probe is under way.
const SOON: Duration = Duration::from_secs(1);

/// What an attempt told of the upstream's health.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Somebody answered.
    Up,
    /// Nobody is at work there.
    Down(Cause),
    /// It told nothing.
    Unclear,
}

impl Health {
    /// What an answer tells.
    pub fn of(status: StatusCode) -> Self {
        match status {
            StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => {
                Self::Down(Cause::ReplyStatus)
            }
            _ => Self::Up,
        }
    }
}

/// The upstream is left alone.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "the upstream failed several times in a row (last: {}) and is left alone for a moment; nothing was sent. Call again after Retry-After seconds",
    .cause.meaning()
)]
pub struct Suspended {
    /// Why it failed last.
    pub cause: Cause,
    /// When to come back.
    pub retry_after: Duration,
}

/// What is told of the breaker.
#[derive(Clone, Debug)]
pub struct Metrics {
    open: Gauge,
    suspensions: Counter,
}

impl Metrics {
    /// Registers the breaker's metrics.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        Self {
            open: registry.renamed(
                "upstream_suspended",
                "circuit_breaker_open",
                "1 while the circuit breaker is open: requests are refused, and the upstream is probed.",
            ),
            suspensions: registry
                .metric("upstream_suspensions_total", "How often the upstream was left alone."),
        }
    }
}

/// The breaker of the upstream, for all workers.
#[derive(Debug)]
pub struct Breaker {
    /// No failure is counted and nothing is suspended: nobody needs the lock.
    is_calm: AtomicBool,
    circuit: Mutex<Circuit>,
    metrics: Metrics,
}

/// A request's leave to meet the upstream. A probe that is dropped without a verdict told nothing.
#[derive(Debug)]
pub struct Passage {
    /// The breaker whose probe it is.
    probe: Option<Arc<Breaker>>,
}

impl Breaker {
    /// A breaker that has seen no failure.
    pub fn new(upstream: &config::Upstream, metrics: Metrics) -> Self {
        let circuit = Circuit::new(upstream.breaker_failures, clock::nanos_of(upstream.breaker_pause));
        Self { is_calm: AtomicBool::new(true), circuit: Mutex::new(circuit), metrics }
    }

    /// Lets a request pass, or says when to come back.
    pub fn pass(self: &Arc<Self>) -> Result<Passage, Suspended> {
        if self.is_calm.load(Ordering::Relaxed) {
            return Ok(Passage { probe: None });
        }
        let mut circuit = self.circuit();
        let passed = circuit.pass(clock::nanos());
        let is_probe = passed.map_err(|retry_after| Suspended { cause: circuit.cause, retry_after })?;
        Ok(Passage { probe: is_probe.then(|| self.clone()) })
    }

    /// A request that passed has told something.
    pub fn judge(&self, passage: &mut Passage, health: Health) {
        let is_probe = passage.probe.take().is_some();
        if !is_probe && health == Health::Up && self.is_calm.load(Ordering::Relaxed) {
            return;
        }
        let mut circuit = self.circuit();
        let was_open = circuit.open.is_some();
        circuit.judge(is_probe, health, clock::nanos());
        let is_open = circuit.open.is_some();
        self.is_calm.store(!is_open && circuit.failures == 0, Ordering::Relaxed);
        if is_open == was_open {
            return;
        }
        self.metrics.open.set(is_open.into());
        let cause = circuit.cause;
        drop(circuit);
        if is_open {
            self.metrics.suspensions.inc();
            tracing::warn!(
                %cause,
                "the upstream failed several times in a row, and last {}: requests are refused, and it is probed",
                cause.meaning()
            );
        } else {
            tracing::info!("the upstream answers again");
        }
    }

    /// Whether the upstream is left alone.
    pub fn is_suspended(&self) -> bool {
        self.circuit().open.is_some()
    }

    fn circuit(&self) -> MutexGuard<'_, Circuit> {
        self.circuit.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        if let Some(breaker) = self.probe.take() {
            breaker.circuit().judge(true, Health::Unclear, clock::nanos());
        }
    }
}

/// The state of the breaker, a pure one. Times are in nanoseconds.
#[derive(Debug)]
struct Circuit {
    /// So many failures in a row suspend; 0: none do.
    threshold: u32,
    first_pause: u64,
    /// In a row.
    failures: u32,
    /// Of the last failure.
    cause: Cause,
    open: Option<Open>,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    until: u64,
    pause: u64,
    is_probed: bool,
}

impl Circuit {
    fn new(threshold: u32, first_pause: u64) -> Self {
        Self { threshold, first_pause, failures: 0, cause: Cause::Timeout, open: None }
    }

    /// Whether a request that passes is a probe; when to come back, if none may.
    fn pass(&mut self, now: u64) -> Result<bool, Duration> {
        match &mut self.open {
            None => Ok(false),
            Some(open) if now < open.until => Err(Duration::from_nanos(open.until - now)),
            Some(open) if open.is_probed => Err(SOON),
            Some(open) => {
                open.is_probed = true;
                Ok(true)
            }
        }
    }

    /// What began before a suspension has no say in it.
    fn judge(&mut self, is_probe: bool, health: Health, now: u64) {
        match (&mut self.open, is_probe, health) {
            (Some(_), true, Health::Up) => (self.open, self.failures) = (None, 0),
            (Some(open), true, Health::Down(cause)) => {
                self.cause = cause;
                let pause = (open.pause * 2).min(LONGEST.max(self.first_pause));
                *open = Open { until: now + pause, pause, is_probed: false };
            }
            (Some(open), true, Health::Unclear) => open.is_probed = false,
            (None, _, Health::Up) => self.failures = 0,
            (None, _, Health::Down(cause)) if self.threshold > 0 => {
                self.cause = cause;
                self.failures += 1;
                if self.failures >= self.threshold {
                    let pause = self.first_pause;
                    self.open = Some(Open { until: now + pause, pause, is_probed: false });
                }
            }
            (Some(_), false, _) | (None, _, Health::Down(_) | Health::Unclear) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAUSE: u64 = 1_000_000_000;
    const DOWN: Health = Health::Down(Cause::Refused);

    #[test]
    fn only_failures_in_a_row_suspend_and_a_probe_ends_it() {
        let mut circuit = Circuit::new(3, PAUSE);
        for health in [DOWN, DOWN, Health::Up, DOWN, DOWN] {
            assert_eq!(circuit.pass(0), Ok(false));
            circuit.judge(false, health, 0);
        }
        circuit.judge(false, Health::Unclear, 0);
        assert_eq!(circuit.pass(0), Ok(false), "the control");
        circuit.judge(false, DOWN, 0);
        assert_eq!(circuit.pass(PAUSE - 1), Err(Duration::from_nanos(1)));
        assert_eq!(circuit.pass(PAUSE), Ok(true));
        assert_eq!(circuit.pass(PAUSE), Err(SOON), "one probe");
        circuit.judge(false, Health::Up, PAUSE); // from before
        assert_eq!(circuit.pass(PAUSE), Err(SOON));
        circuit.judge(true, Health::Unclear, PAUSE);
        assert_eq!(circuit.pass(PAUSE), Ok(true), "the next probe");
        circuit.judge(true, DOWN, PAUSE);
        assert_eq!(circuit.pass(3 * PAUSE - 1), Err(Duration::from_nanos(1)), "twice as long");
        assert_eq!(circuit.pass(3 * PAUSE), Ok(true));
        circuit.judge(true, Health::Up, 3 * PAUSE);
        assert_eq!(circuit.pass(3 * PAUSE), Ok(false));
        circuit.judge(false, DOWN, 3 * PAUSE);
        assert_eq!(circuit.pass(3 * PAUSE), Ok(false), "the count begins anew");
    }

    #[test]
    fn without_a_threshold_nothing_suspends() {
        let mut circuit = Circuit::new(0, PAUSE);
        (0..1000).for_each(|_| circuit.judge(false, DOWN, 0));
        assert_eq!(circuit.pass(0), Ok(false));
    }

    #[derive(Clone, Copy, Debug)]
    enum Event {
        Pass(u64),
        Judge(usize, Health),
    }

    fn event() -> impl Strategy<Value = Event> {
        let health = prop_oneof![Just(Health::Up), Just(DOWN), Just(Health::Unclear)];
        prop_oneof![
            (0..2 * PAUSE).prop_map(Event::Pass),
            (any::<usize>(), health).prop_map(|(which, health)| Event::Judge(which, health)),
        ]
    }

    proptest! {
        /// However requests begin and end: one probe at a time, none before its time, no pause beyond the bound, and
        /// an upstream that answers probes is never left alone for good.
        #[test]
        fn there_is_one_probe_at_a_time_and_always_a_next_one(events in prop::collection::vec(event(), 1..200)) {
            let (mut circuit, mut now) = (Circuit::new(2, PAUSE), 0);
            let mut under_way: Vec<bool> = Vec::new();
            for event in events {
                match event {
                    Event::Pass(later) => {
                        now += later;
                        if let Ok(is_probe) = circuit.pass(now) {
                            prop_assert!(!is_probe || !under_way.contains(&true));
                            prop_assert!(!is_probe || circuit.open.is_some_and(|open| open.until <= now));
                            under_way.push(is_probe);
                        }
                    }
                    Event::Judge(which, health) if !under_way.is_empty() => {
                        let is_probe = under_way.swap_remove(which % under_way.len());
                        circuit.judge(is_probe, health, now);
                    }
                    Event::Judge(..) => {}
                }
                prop_assert!(circuit.open.is_none_or(|open| open.until <= now + LONGEST));
                prop_assert!(circuit.open.is_none_or(|open| open.is_probed == under_way.contains(&true)));
            }
            under_way.drain(..).for_each(|is_probe| circuit.judge(is_probe, Health::Unclear, now));
            now += LONGEST;
            if circuit.pass(now) == Ok(true) {
                circuit.judge(true, Health::Up, now);
            }
            prop_assert_eq!(circuit.pass(now), Ok(false));
        }
    }
}
