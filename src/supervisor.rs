//! Supervision of long-lived threads and tasks: the process stops if one of them ends.
//!
//! Each of them holds a [`Vital`]. If one ends before the stop, by an error or a panic, the process drains,
//! closes the trail and exits with 70, so that a service manager starts another one. Nothing is restarted
//! within the process: a gateway without its audit writer or token fetcher would look healthy and fail every
//! call.
//!
//! A thread that hangs is not noticed here, but by [`crate::watchdog`].

use std::future::Future;
use std::{fmt, thread};

use thiserror::Error;
use tokio::sync::mpsc;

/// A thread or task has ended that must not end. `Display` gives its name and the reason.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{what} ended: {why}")]
pub struct UnexpectedEnd {
    what: String,
    why: String,
}

impl UnexpectedEnd {
    /// Makes and logs an [`UnexpectedEnd`] for something without a [`Vital`].
    pub(crate) fn logged(what: &str, why: &str) -> Self {
        let ended = Self { what: what.to_owned(), why: why.to_owned() };
        ended.log();
        ended
    }

    fn log(&self) {
        tracing::error!("{self}; the gateway stops");
    }
}

/// Receives the reports of all [`Vital`]s.
#[derive(Debug)]
pub(crate) struct Supervisor {
    vitals: Vitals,
    ended: mpsc::UnboundedReceiver<UnexpectedEnd>,
}

/// Makes a [`Vital`] for each thread and task.
#[derive(Clone, Debug)]
pub(crate) struct Vitals(mpsc::UnboundedSender<UnexpectedEnd>);

/// Held by a thread or task that must not end. Reports the end when it is dropped.
#[derive(Debug)]
pub(crate) struct Vital {
    what: String,
    why: Option<String>,
    /// Whether only a panic is reported.
    may_end: bool,
    vitals: Vitals,
}

impl Supervisor {
    /// A supervisor without threads and tasks yet.
    pub(crate) fn new() -> Self {
        let (sender, ended) = mpsc::unbounded_channel();
        Self { vitals: Vitals(sender), ended }
    }

    /// A maker of [`Vital`]s, for threads and tasks that are started later.
    pub(crate) fn vitals(&self) -> Vitals {
        self.vitals.clone()
    }

    /// A [`Vital`] for a thread or task of this name, which must not end.
    pub(crate) fn vital(&self, what: impl Into<String>) -> Vital {
        self.vitals.vital(what)
    }

    /// Waits for the first end, logs it and returns it. Cancellation safe.
    pub(crate) async fn ended(&mut self) -> UnexpectedEnd {
        match self.ended.recv().await {
            Some(ended) => {
                ended.log();
                ended
            }
            // Cannot happen: the supervisor holds a sender itself.
            None => std::future::pending().await,
        }
    }

    /// Returns the first end that has been reported, if there is one, and logs it.
    // Asked once after the drain: nobody waits for `ended` during a stop, and an end in that time must not exit
    // with 0.
    pub(crate) fn has_ended(&mut self) -> Option<UnexpectedEnd> {
        self.ended.try_recv().ok().inspect(UnexpectedEnd::log)
    }
}

impl Vitals {
    /// A [`Vital`] for a thread or task of this name, which must not end.
    pub(crate) fn vital(&self, what: impl Into<String>) -> Vital {
        Vital { what: what.into(), why: None, may_end: false, vitals: self.clone() }
    }

    /// A [`Vital`] for a thread or task of this name that may end at the stop, but not by a panic.
    pub(crate) fn until_stop(&self, what: impl Into<String>) -> Vital {
        let mut vital = self.vital(what);
        vital.may_end = true;
        vital
    }
}

impl Vital {
    /// Runs the work of a task, and reports its end or its panic.
    pub(crate) async fn run<F: Future>(self, work: F) -> F::Output {
        fault::beside(&self.what, work).await
    }

    /// Reports that the work ended by this error.
    pub(crate) fn fail(mut self, error: impl fmt::Display) {
        self.why = Some(error.to_string());
    }

    /// Ends the work without a report.
    pub(crate) fn done(mut self) {
        self.may_end = true;
    }
}

impl Drop for Vital {
    fn drop(&mut self) {
        // In `drop`, since a panic runs no other code of the task. `panicking` is true while the stack unwinds.
        let why = match self.why.take() {
            Some(why) => why,
            None if thread::panicking() => "a panic".to_owned(),
            None if self.may_end => return,
            None => "it had nothing left to do".to_owned(),
        };
        // The receiver is gone once the process stops, and an end is no news then.
        let _ = self.vitals.0.send(UnexpectedEnd { what: std::mem::take(&mut self.what), why });
    }
}

/// Fault injection for tests that cannot cause a fault from outside. In a debug build, the file that
/// `CCSQM_GATEWAY_FAULT_FILE` names says what is to panic or to hang, such as `panic worker 0`.
// Release builds ignore the variable, so that no file can stop a gateway that serves.
pub(crate) mod fault {
    use std::future::Future;
    use std::path::PathBuf;
    use std::sync::LazyLock;
    use std::time::Duration;
    use std::{fs, thread};

    /// How often the file is checked.
    const INTERVAL: Duration = Duration::from_millis(20);

    static FILE: LazyLock<Option<PathBuf>> = LazyLock::new(|| {
        let file = std::env::var_os("CCSQM_GATEWAY_FAULT_FILE").filter(|_| cfg!(debug_assertions));
        file.map(PathBuf::from)
    });

    /// Panics, or hangs the calling thread, if the file asks for that now. Does nothing in a release build.
    pub(crate) fn check(what: &str) {
        let Some(file) = &*FILE else { return };
        let is_asked =
            |verb| fs::read_to_string(file).is_ok_and(|fault| fault.strip_prefix(verb) == Some(what));
        assert!(!is_asked("panic "), "a test asked for it");
        while is_asked("hang ") {
            thread::sleep(INTERVAL);
        }
    }

    /// Runs work and checks the file beside it.
    pub(crate) async fn beside<F: Future>(what: &str, work: F) -> F::Output {
        // Without the variable the work runs by itself, so that a test build behaves like a release build.
        if FILE.is_none() {
            return work.await;
        }
        let checks = async {
            loop {
                check(what);
                tokio::time::sleep(INTERVAL).await;
            }
        };
        tokio::select! {
            output = work => output,
            () = checks => unreachable!("it goes on for ever"),
        }
    }
}
