//! The threads that serve callers: each has a runtime, a pool and a queue of intents of its own.

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
use crate::server::{Listen, Stop};
use crate::supervisor::{Ended, Vital, Vitals, fault};
use crate::watchdog::Watchdog;
use crate::{clock, server};

/// A worker that has not ended so long after the drain hangs.
const WORKERS_END: Duration = Duration::from_secs(3);

/// What all workers begin and end by.
#[derive(Clone)]
pub(super) struct WorkerTerms {
    pub(super) stopped: watch::Receiver<Stop>,
    /// How long callers are still served once a stop begins, so that they can look elsewhere.
    pub(super) grace: Duration,
    pub(super) watchdog: Arc<Watchdog>,
    /// Set once every thread is there, so that a start that fails has served nobody.
    pub(super) may_begin: watch::Receiver<bool>,
    /// Counts the workers that accept connections.
    pub(super) accepts: watch::Sender<usize>,
    pub(super) vitals: Vitals,
}

/// A worker: its thread, and all that runs on it.
pub(super) struct Worker {
    pub(super) number: usize,
    pub(super) gateway: Arc<Gateway>,
    pub(super) deadlines: Deadlines,
    /// How long it may take to end once the stop is there.
    pub(super) drain: Duration,
    pub(super) terms: WorkerTerms,
}

/// For a task of a worker.
pub(super) fn of_worker(vitals: &Vitals, number: usize, what: &str) -> Vital {
    vitals.until_stop(format!("{what} of worker {number}"))
}

impl Worker {
    /// Starts its thread.
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

    /// Runs as long as its connections and the exchanges that outlived theirs do.
    fn run(self, name: &str, listeners: Vec<Listen>) -> io::Result<()> {
        let runtime = runtime(self.gateway.audit.clone())?;
        let work = AssertUnwindSafe(|| runtime.block_on(fault::beside(name, self.serve(listeners))));
        let served = panic::catch_unwind(work).unwrap_or_else(|_| Err(io::Error::other("a panic")));
        runtime.shutdown_background(); // a resolver that hangs must not hold the stop
        served
    }

    async fn serve(self, listeners: Vec<Listen>) -> io::Result<()> {
        let Self { number, gateway, deadlines, drain, terms } = self;
        let WorkerTerms { stopped, watchdog, mut may_begin, accepts, vitals, .. } = terms;
        if may_begin.wait_for(|may_begin| *may_begin).await.is_err() {
            return Ok(());
        }
        let listeners = listeners.into_iter().map(|listener| listener()).collect::<io::Result<_>>()?;
        let beats = of_worker(&vitals, number, "the watchdog").run(watchdog.clone().beat(number));
        tokio::spawn(beats);
        accepts.send_modify(|accepting| *accepting += 1);
        let vital = move |what: &str| of_worker(&vitals, number, what);
        serve_until_drained(gateway, listeners, deadlines, stopped, drain, vital).await;
        watchdog.retire(number);
        Ok(())
    }
}

/// The runtime of the present thread, which is a worker's from now on. The clock is read once a turn, and what a turn put
/// into the queue of the trail is written when it ends.
fn runtime(audit: Audit) -> io::Result<Runtime> {
    Audit::defer_wake_ups();
    clock::turns();
    let park = move || {
        audit.flush();
        clock::next_turn();
    };
    Builder::new_current_thread().enable_all().on_thread_park(park).build()
}

/// A worker runs as long as its connections and the exchanges that outlived theirs do. The process waits
/// for at most `drain_timeout`, and so does each worker; then its runtime drops what is left, and each
/// record closes itself.
async fn serve_until_drained(
    gateway: Arc<Gateway>,
    listeners: Vec<server::Listener>,
    deadlines: Deadlines,
    mut stopped: watch::Receiver<Stop>,
    drain: Duration,
    vital: impl Fn(&str) -> Vital + Send + 'static,
) {
    let bounds = gateway.bounds.clone();
    let served = tokio::spawn(server::run(gateway, listeners, deadlines, stopped.clone(), vital));
    let _ = stopped.wait_for(|stop| *stop == Stop::Now).await;
    let idle = async {
        let _ = served.await;
        while bounds.in_flight() > 0 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    let _ = timeout(drain, idle).await;
}

/// Waits until the workers have ended, as they do soon after the drain. Returns the first one that has not: it hangs.
pub(super) fn join(workers: &[JoinHandle<()>]) -> Option<Ended> {
    let end = std::time::Instant::now() + WORKERS_END;
    let hangs = |worker: &JoinHandle<()>| !worker.is_finished();
    while workers.iter().any(hangs) && std::time::Instant::now() < end {
        thread::sleep(Duration::from_millis(1));
    }
    let worker = workers.iter().position(hangs)?;
    Some(Ended::logged(&format!("worker {worker}"), "it hangs, and is not waited for"))
}

/// A worker's part of a cap that is for all workers together.
pub(super) fn share(total: usize, workers: usize, worker: usize) -> usize {
    total / workers + usize::from(worker < total % workers)
}
