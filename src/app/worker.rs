//! Worker threads: each has a runtime, a pool of upstream connections, and commit waiters of its own.
//!
//! A connection, its requests and their exchanges stay on the worker that accepted the connection.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use std::{io, panic, thread};

use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::audit::Audit;
use crate::gateway::Gateway;
use crate::server::connection::Deadlines;
use crate::server::{Lifecycle, Listen};
use crate::supervisor::{UnexpectedEnd, Vital, Vitals, fault};
use crate::watchdog::Watchdog;
use crate::{clock, server};

/// A worker that has not ended this long after the drain counts as hanging.
const WORKERS_END: Duration = Duration::from_secs(3);

/// What all workers begin and end by.
#[derive(Clone)]
pub(super) struct StopTerms {
    /// How far the stop has come.
    pub(super) stopped: watch::Receiver<Lifecycle>,
    /// How long callers are still served once a stop has begun, so that they can find another gateway.
    pub(super) grace: Duration,
    /// Learns from each worker that its event loop turns.
    pub(super) watchdog: Arc<Watchdog>,
    /// Set once all threads have started, so that a start which fails has served no request.
    pub(super) may_begin: watch::Receiver<bool>,
    /// How many workers accept connections.
    pub(super) accepts: watch::Sender<usize>,
    /// Makes a [`Vital`] for each task.
    pub(super) vitals: Vitals,
}

/// One worker, before its thread has started.
pub(super) struct Worker {
    pub(super) number: usize,
    pub(super) gateway: Arc<Gateway>,
    pub(super) deadlines: Deadlines,
    /// How long its requests in flight may take once no connection is accepted any more.
    pub(super) drain: Duration,
    pub(super) terms: StopTerms,
}

/// A [`Vital`] for a task of a worker: it may end at the stop, but not by a panic.
pub(super) fn of_worker(vitals: &Vitals, number: usize, what: &str) -> Vital {
    vitals.until_stop(format!("{what} of worker {number}"))
}

impl Worker {
    /// Starts the worker's thread.
    ///
    /// # Errors
    ///
    /// Fails if the thread cannot be started. Errors on the thread are reported to the supervisor.
    pub(super) fn start(self, listeners: Vec<Listen>) -> io::Result<JoinHandle<()>> {
        let name = format!("worker {}", self.number);
        let thread = thread::Builder::new().name(format!("worker-{}", self.number));
        let vital = self.terms.vitals.vital(name.clone());
        let run = move || match self.run(&name, listeners) {
            Ok(()) => vital.done(),
            Err(error) => vital.fail(error),
        };
        thread.spawn(run)
    }

    /// Runs the worker until its connections have closed and no exchange is in flight, or until its time is over.
    fn run(self, name: &str, listeners: Vec<Listen>) -> io::Result<()> {
        let runtime = runtime(self.gateway.audit.clone())?;
        // Nothing of the runtime is used after a panic, except to shut it down.
        let work = AssertUnwindSafe(|| runtime.block_on(fault::beside(name, self.serve(listeners))));
        let served = panic::catch_unwind(work).unwrap_or_else(|_| Err(io::Error::other("a panic")));
        // Also after a panic, and without a wait: a resolver that hangs must not hold up the stop.
        runtime.shutdown_background();
        served
    }

    /// Waits for the start, then accepts and serves connections until the stop.
    async fn serve(self, listeners: Vec<Listen>) -> io::Result<()> {
        let Self { number, gateway, deadlines, drain, terms } = self;
        let StopTerms { stopped, watchdog, mut may_begin, accepts, vitals, .. } = terms;
        // The sender is gone if the start failed. Then there is nothing to serve, and that is no error of this
        // worker.
        if may_begin.wait_for(|may_begin| *may_begin).await.is_err() {
            return Ok(());
        }
        // Here, and not where they were bound: tokio registers a socket with the runtime of the present thread.
        let listeners = listeners.into_iter().map(|listener| listener()).collect::<io::Result<_>>()?;
        let beats = of_worker(&vitals, number, "the watchdog").run(watchdog.clone().beat(number));
        tokio::spawn(beats);
        // Counted once the listeners are registered: a worker without them must not make the gateway ready.
        accepts.send_modify(|accepting| *accepting += 1);
        let vital = move |what: &str| of_worker(&vitals, number, what);
        serve_until_drained(gateway, listeners, deadlines, stopped, drain, vital).await;
        // A worker that has ended in order beats no more, and would count as hanging in a long drain.
        watchdog.mark_ended(number);
        Ok(())
    }
}

/// The runtime of the present thread, which is a worker's from now on.
///
/// The time is read once a turn of its event loop, and records of a turn are handed to the audit writer when it ends.
fn runtime(audit: Audit) -> io::Result<Runtime> {
    Audit::defer_wake_ups();
    clock::turns();
    // When the loop parks, all tasks of the turn have run. One wake-up of the writer then serves all their records
    // (group commit), and costs one system call instead of one a request.
    let park = move || {
        audit.flush();
        clock::next_turn();
    };
    Builder::new_current_thread().enable_all().on_thread_park(park).build()
}

/// Serves until the stop, then until nothing is in flight, for at most `drain`.
///
/// What is left then is dropped with the runtime, and each audit record closes itself.
async fn serve_until_drained(
    gateway: Arc<Gateway>,
    listeners: Vec<server::Listener>,
    deadlines: Deadlines,
    mut stopped: watch::Receiver<Lifecycle>,
    drain: Duration,
    vital: impl Fn(&str) -> Vital + Send + 'static,
) {
    let limits = gateway.limits.clone();
    let served = tokio::spawn(server::run(gateway, listeners, deadlines, stopped.clone(), vital));
    let _ = stopped.wait_for(|stop| *stop == Lifecycle::Stopping).await;
    // The end of the worker's connections is not enough: exchanges whose caller has disconnected go on, and the count
    // is one for all workers. It is polled, since nothing else needs a signal for it.
    let idle = async {
        let _ = served.await;
        while limits.in_flight() > 0 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    let _ = timeout(drain, idle).await;
}

/// Waits until the workers have ended, for [`WORKERS_END`] at most. Returns the first one that has not: it hangs.
pub(super) fn join(workers: &[JoinHandle<()>]) -> Option<UnexpectedEnd> {
    let end = std::time::Instant::now() + WORKERS_END;
    let hangs = |worker: &JoinHandle<()>| !worker.is_finished();
    while workers.iter().any(hangs) && std::time::Instant::now() < end {
        // `JoinHandle` has no wait with a bound, and `join` would never return for a worker that hangs.
        thread::sleep(Duration::from_millis(1));
    }
    let worker = workers.iter().position(hangs)?;
    Some(UnexpectedEnd::logged(&format!("worker {worker}"), "it hangs, and the gateway does not wait for it"))
}

/// One worker's part of a bound that holds for all workers together. The parts differ by 1 at most.
pub(super) fn share(total: usize, workers: usize, worker: usize) -> usize {
    total / workers + usize::from(worker < total % workers)
}
