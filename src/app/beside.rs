//! Work beside the requests: reads the trail after the start, and looks at the clock and the threads once a second.

use std::time::Duration;
use std::{io, thread};

use tokio::time::sleep;

use super::App;
use crate::audit::Audit;
use crate::log;
use crate::supervisor::{Vital, Vitals};

/// How often the wall clock is looked at, and whether the threads of trail and log are there.
const LOOK: Duration = Duration::from_secs(1);

/// Looks at the wall clock once a second, and whether the threads of trail and log are there.
pub(super) async fn look(audit: Audit, vitals: Vitals) {
    let looks = async {
        loop {
            sleep(LOOK).await;
            audit.look_at_clock();
            log::requests::fold_up();
            if !audit.is_written() {
                return vitals.vital("the audit writer");
            }
            if log::has_ended() {
                return vitals.vital("the log");
            }
        }
    };
    let gone = vitals.until_stop("the look at clock and threads").run(looks).await;
    gone.fail("a panic");
}

/// Reads what was there before the start, beside everything else: calls without a key are served meanwhile.
pub(super) fn read_past(app: &App, vital: Vital) -> io::Result<()> {
    let (idempotency, settings) = (app.idempotency.clone(), app.config.idempotency.clone());
    let (directory, audit) = (app.config.audit.directory.clone(), app.audit.clone());
    let read = move || {
        idempotency.rebuild(&settings, &directory, &audit);
        if let Err(error) = audit.verify_past(&directory) {
            tracing::error!(%error, "the audit trail cannot be read");
        }
        vital.done();
    };
    thread::Builder::new().name("past".into()).spawn(read).map(drop)
}
