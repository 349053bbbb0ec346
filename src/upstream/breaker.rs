//! Circuit breaker for the upstream, shared by all workers.
//!
//! A request to an upstream that is down makes its caller wait, and may end with an unknown outcome. So after some
//! failures in a row the circuit opens, and requests are rejected before anything is sent. After a pause it is
//! half-open: one request passes as a probe. If the probe succeeds the circuit closes; if it fails, the pause doubles
//! (exponential back-off), up to 30 s.
//!
//! A result counts as a failure if it shows that no application answers: no connection, no reply in time, or status
//! 502, 503 or 504. A 500 or a refused token is a reply of the application, and counts as a success. A connection
//! that breaks during an exchange counts as neither.
//!
//! Guarantees that there is at most one probe at a time, and that a probe which ends without a result makes room for
//! the next one. It sends no probes of its own: without requests an open circuit stays open.

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

/// The longest pause, in nanoseconds. If the configured first pause is longer, no pause exceeds that one.
const LONGEST: u64 = 30_000_000_000;

/// The `Retry-After` of a request that is rejected while a probe is in flight.
// Short: the circuit closes at once if the probe succeeds.
const SOON: Duration = Duration::from_secs(1);

/// What the result of a request says about the upstream's health.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// An application replied.
    Up,
    /// No application replies, for this cause.
    Down(Cause),
    /// The result says nothing: for example, all connections were busy or the caller disconnected.
    Inconclusive,
}

impl Health {
    /// Returns what a reply with this status says.
    pub fn of(status: StatusCode) -> Self {
        match status {
            StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => {
                Self::Down(Cause::ReplyStatus)
            }
            _ => Self::Up,
        }
    }
}

/// The circuit is open: the request was rejected, and nothing was sent.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "the circuit breaker is open, since the upstream failed several times in a row (last: {}); nothing was sent. Call \
     again after Retry-After seconds",
    .cause.meaning()
)]
pub struct CircuitOpen {
    /// The cause of the last failure that counted.
    pub cause: Cause,
    /// How long until a request may pass as a probe.
    pub retry_after: Duration,
}

/// Metrics of the circuit breaker.
#[derive(Clone, Debug)]
pub struct CircuitMetrics {
    open: Gauge,
    suspensions: Counter,
}

impl CircuitMetrics {
    /// Registers the breaker's metrics.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        Self {
            open: registry.renamed(
                "upstream_suspended",
                "circuit_breaker_open",
                "1 while the circuit breaker is open: requests are refused, and the upstream is probed.",
            ),
            suspensions: registry
                .metric("upstream_suspensions_total", "How often the circuit breaker opened."),
        }
    }
}

/// The circuit breaker of the upstream, shared by all workers.
#[derive(Debug)]
pub struct Breaker {
    /// Whether the circuit is closed and no failure is counted. Requests then do not take the lock, for which all
    /// workers would contend.
    is_calm: AtomicBool,
    circuit: Mutex<Circuit>,
    metrics: CircuitMetrics,
}

/// Permission for one request to go to the upstream.
///
/// If the permit of a probe is dropped before [`Breaker::on_result`], the circuit stays open and the next request may
/// be the probe.
#[derive(Debug)]
pub struct CircuitPermit {
    /// The breaker, if this request is its probe and has no result yet.
    probe: Option<Arc<Breaker>>,
}

impl Breaker {
    /// A breaker with a closed circuit and no failure.
    pub fn new(upstream: &config::Upstream, metrics: CircuitMetrics) -> Self {
        let circuit = Circuit::new(upstream.breaker_failures, clock::nanos_of(upstream.breaker_pause));
        Self { is_calm: AtomicBool::new(true), circuit: Mutex::new(circuit), metrics }
    }

    /// Permits a request, as the probe if the circuit is half-open.
    ///
    /// # Errors
    ///
    /// Returns [`CircuitOpen`] while the circuit is open, and while another request probes.
    pub fn try_acquire(self: &Arc<Self>) -> Result<CircuitPermit, CircuitOpen> {
        // `Relaxed`: a worker that reads an old value lets one request pass, as if it had come a moment earlier.
        if self.is_calm.load(Ordering::Relaxed) {
            return Ok(CircuitPermit { probe: None });
        }
        let mut circuit = self.circuit();
        let passed = circuit.try_acquire(clock::nanos());
        let is_probe = passed.map_err(|retry_after| CircuitOpen { cause: circuit.cause, retry_after })?;
        Ok(CircuitPermit { probe: is_probe.then(|| self.clone()) })
    }

    /// Records the result of a request that was permitted.
    ///
    /// The first call for a probe ends the probe. Later calls with the same permit count as results of an ordinary
    /// request.
    pub fn on_result(&self, permit: &mut CircuitPermit, health: Health) {
        let is_probe = permit.probe.take().is_some();
        // The usual case: a success changes nothing while no failure is counted.
        if !is_probe && health == Health::Up && self.is_calm.load(Ordering::Relaxed) {
            return;
        }
        let mut circuit = self.circuit();
        let was_open = circuit.open.is_some();
        circuit.on_result(is_probe, health, clock::nanos());
        let is_open = circuit.open.is_some();
        // Under the lock, so that the flag never contradicts the state for longer than the lock is held.
        self.is_calm.store(!is_open && circuit.failures == 0, Ordering::Relaxed);
        if is_open == was_open {
            return;
        }
        self.metrics.open.set(is_open.into());
        // Nothing is logged under the lock: all workers take it while failures are counted.
        let cause = circuit.cause;
        drop(circuit);
        if is_open {
            self.metrics.suspensions.inc();
            tracing::warn!(
                %cause,
                "circuit breaker opened: the upstream failed several times in a row, last: {}; requests are refused \
                 until a probe succeeds",
                cause.meaning()
            );
        } else {
            tracing::info!("circuit breaker closed");
        }
    }

    /// Returns whether the circuit is open or half-open.
    pub fn is_open(&self) -> bool {
        self.circuit().open.is_some()
    }

    fn circuit(&self) -> MutexGuard<'_, Circuit> {
        self.circuit.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for CircuitPermit {
    fn drop(&mut self) {
        if let Some(breaker) = self.probe.take() {
            breaker.circuit().on_result(true, Health::Inconclusive, clock::nanos());
        }
    }
}

/// The state machine, without clock, lock and metrics. Times are in nanoseconds.
#[derive(Debug)]
struct Circuit {
    /// The number of failures in a row that opens the circuit; 0 turns the breaker off.
    threshold: u32,
    /// The pause between the opening of the circuit and the first probe.
    first_pause: u64,
    /// The number of failures in a row while the circuit is closed.
    failures: u32,
    /// The cause of the last failure that counted.
    cause: Cause,
    /// `None`: the circuit is closed.
    open: Option<Open>,
}

/// An open circuit; half-open from `until` on.
#[derive(Clone, Copy, Debug)]
struct Open {
    /// When the next probe may go.
    until: u64,
    /// The present pause, which doubles if the probe fails.
    pause: u64,
    /// Whether a probe is in flight.
    is_probed: bool,
}

impl Circuit {
    fn new(threshold: u32, first_pause: u64) -> Self {
        Self { threshold, first_pause, failures: 0, cause: Cause::Timeout, open: None }
    }

    /// Permits a request and returns whether it is a probe. If the request is rejected, the error is the time after
    /// which another one may pass.
    fn try_acquire(&mut self, now: u64) -> Result<bool, Duration> {
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

    /// Records a result. While the circuit is open, only the result of the probe counts: other requests began before
    /// the circuit opened.
    fn on_result(&mut self, is_probe: bool, health: Health, now: u64) {
        match (&mut self.open, is_probe, health) {
            // One success is enough. The upstream gets all requests at once, but each worker's pool bounds how many.
            (Some(_), true, Health::Up) => (self.open, self.failures) = (None, 0),
            (Some(open), true, Health::Down(cause)) => {
                self.cause = cause;
                // No jitter: there is one breaker for the process, so probes do not come in bursts.
                let pause = (open.pause * 2).min(LONGEST.max(self.first_pause));
                *open = Open { until: now + pause, pause, is_probed: false };
            }
            // The pause is not doubled, since nothing was learnt. The next request may probe at once.
            (Some(open), true, Health::Inconclusive) => open.is_probed = false,
            (None, _, Health::Up) => self.failures = 0,
            // Without the guard, a threshold of 0 would be reached by the first failure.
            (None, _, Health::Down(cause)) if self.threshold > 0 => {
                self.cause = cause;
                self.failures += 1;
                if self.failures >= self.threshold {
                    let pause = self.first_pause;
                    self.open = Some(Open { until: now + pause, pause, is_probed: false });
                }
            }
            // Listed without a wildcard, so that a new kind of health must be placed here.
            (Some(_), false, _) | (None, _, Health::Down(_) | Health::Inconclusive) => {}
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
    fn consecutive_failures_open_the_breaker_and_a_probe_closes_it() {
        let mut circuit = Circuit::new(3, PAUSE);
        // Four failures, but never three in a row.
        for health in [DOWN, DOWN, Health::Up, DOWN, DOWN] {
            assert_eq!(circuit.try_acquire(0), Ok(false));
            circuit.on_result(false, health, 0);
        }
        circuit.on_result(false, Health::Inconclusive, 0);
        assert_eq!(circuit.try_acquire(0), Ok(false), "the control");
        circuit.on_result(false, DOWN, 0);
        assert_eq!(circuit.try_acquire(PAUSE - 1), Err(Duration::from_nanos(1)));
        assert_eq!(circuit.try_acquire(PAUSE), Ok(true));
        assert_eq!(circuit.try_acquire(PAUSE), Err(SOON), "one probe");
        // A success of a request that began before the circuit opened must not close it.
        circuit.on_result(false, Health::Up, PAUSE);
        assert_eq!(circuit.try_acquire(PAUSE), Err(SOON));
        circuit.on_result(true, Health::Inconclusive, PAUSE);
        assert_eq!(circuit.try_acquire(PAUSE), Ok(true), "the next probe");
        circuit.on_result(true, DOWN, PAUSE);
        assert_eq!(circuit.try_acquire(3 * PAUSE - 1), Err(Duration::from_nanos(1)), "twice as long");
        assert_eq!(circuit.try_acquire(3 * PAUSE), Ok(true));
        circuit.on_result(true, Health::Up, 3 * PAUSE);
        assert_eq!(circuit.try_acquire(3 * PAUSE), Ok(false));
        // One failure after the circuit closed: with the old count it would open again at once.
        circuit.on_result(false, DOWN, 3 * PAUSE);
        assert_eq!(circuit.try_acquire(3 * PAUSE), Ok(false), "the count begins anew");
    }

    #[test]
    fn breaker_without_a_threshold_never_opens() {
        let mut circuit = Circuit::new(0, PAUSE);
        (0..1000).for_each(|_| circuit.on_result(false, DOWN, 0));
        assert_eq!(circuit.try_acquire(0), Ok(false));
    }

    #[derive(Clone, Copy, Debug)]
    enum Event {
        Pass(u64),
        Judge(usize, Health),
    }

    fn event() -> impl Strategy<Value = Event> {
        let health = prop_oneof![Just(Health::Up), Just(DOWN), Just(Health::Inconclusive)];
        prop_oneof![
            (0..2 * PAUSE).prop_map(Event::Pass),
            (any::<usize>(), health).prop_map(|(which, health)| Event::Judge(which, health)),
        ]
    }

    proptest! {
        /// However requests begin and end, there is one probe at a time, none before its time, and no pause beyond
        /// the bound. An upstream that answers probes always gets its circuit closed.
        #[test]
        fn half_open_breaker_allows_one_probe_and_always_a_next_one(events in prop::collection::vec(event(), 1..200)) {
            let (mut circuit, mut now) = (Circuit::new(2, PAUSE), 0);
            let mut under_way: Vec<bool> = Vec::new();
            for event in events {
                match event {
                    Event::Pass(later) => {
                        // Up to two pauses at a time, so that both sides of `until` are met often.
                        now += later;
                        if let Ok(is_probe) = circuit.try_acquire(now) {
                            prop_assert!(!is_probe || !under_way.contains(&true));
                            prop_assert!(!is_probe || circuit.open.is_some_and(|open| open.until <= now));
                            under_way.push(is_probe);
                        }
                    }
                    Event::Judge(which, health) if !under_way.is_empty() => {
                        let is_probe = under_way.swap_remove(which % under_way.len());
                        circuit.on_result(is_probe, health, now);
                    }
                    Event::Judge(..) => {}
                }
                prop_assert!(circuit.open.is_none_or(|open| open.until <= now + LONGEST));
                prop_assert!(circuit.open.is_none_or(|open| open.is_probed == under_way.contains(&true)));
            }
            // What is left ends without a result, as dropped requests do. The circuit must then let the next probe
            // pass.
            under_way.drain(..).for_each(|is_probe| circuit.on_result(is_probe, Health::Inconclusive, now));
            now += LONGEST;
            if circuit.try_acquire(now) == Ok(true) {
                circuit.on_result(true, Health::Up, now);
            }
            prop_assert_eq!(circuit.try_acquire(now), Ok(false));
        }
    }
}
