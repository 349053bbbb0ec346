//! Background work: the reading of the trail after the start, and the checks that run once a second.

use std::time::Duration;
use std::{io, thread};

use tokio::time::sleep;

use super::App;
use crate::audit::Audit;
use crate::log;
use crate::supervisor::{Vital, Vitals};

/// How often the wall clock, the audit thread and the log thread are checked.
const CHECK: Duration = Duration::from_secs(1);

/// Once a second: compares the wall clock with *now*, writes the counts of aggregated log lines, and checks that the
/// audit thread and the log thread live.
///
/// Returns when one of the two has ended. Its `Vital` then reports that, and the process drains.
pub(super) async fn check_each_second(audit: Audit, vitals: Vitals) {
    let checks = async {
        loop {
            sleep(CHECK).await;
            audit.check_clock();
            log::requests::flush();
            if !audit.is_written() {
                // These threads hold no `Vital` themselves, so one is made in their name.
                return vitals.vital("the audit writer");
            }
            if log::has_ended() {
                return vitals.vital("the log");
            }
        }
    };
    let gone = vitals.until_stop("the check of clock and threads").run(checks).await;
    // Both threads run until they are closed, so a panic is all that ends them early.
    gone.fail("a panic");
}

/// Starts the thread that reads the trail of earlier runs: first for deduplication, then to verify its hash chain.
///
/// Requests are served meanwhile, except those that deduplication cannot decide yet: calls with a key, and under
/// `block` all calls, get 503.
///
/// # Errors
///
/// Fails if the thread cannot be started.
pub(super) fn read_past(app: &App, vital: Vital) -> io::Result<()> {
    let (idempotency, settings) = (app.idempotency.clone(), app.config.idempotency.clone());
    let (directory, audit) = (app.config.audit.directory.clone(), app.audit.clone());
    let read = move || {
        // First, since requests get 503 until it is done. The verification only finds damage.
        idempotency.rebuild(&settings, &directory, &audit);
        if let Err(error) = audit.verify_past(&directory) {
            // Logged only: deduplication has read what it needs by then, so this is no reason to stop serving.
            tracing::error!(%error, "the audit trail cannot be read");
        }
        vital.done();
    };
    thread::Builder::new().name("audit-verify".into()).spawn(read).map(drop)
}
