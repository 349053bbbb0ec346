//! What must not end before the process does.
//!
//! Each long-lived thread and task holds a [`Vital`]. If one ends before the stop, by an error or a panic, the process drains,
//! closes the trail and exits with 70, so that whoever watches it starts another one.

use std::future::Future;
use std::{fmt, thread};

use thiserror::Error;
use tokio::sync::mpsc;

/// A thread or task ended that must not.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{what} ended: {why}")]
pub struct Ended {
    what: String,
    why: String,
}

impl Ended {
    /// Logs that something ended.
    pub(crate) fn logged(what: &str, why: &str) -> Self {
        let ended = Self { what: what.to_owned(), why: why.to_owned() };
        ended.log();
        ended
    }

    fn log(&self) {
        tracing::error!("{self}; the gateway stops");
    }
}

/// Learns of what ends.
#[derive(Debug)]
pub(crate) struct Supervisor {
    vitals: Vitals,
    ended: mpsc::UnboundedReceiver<Ended>,
}

/// Makes a [`Vital`] for each thread and task.
#[derive(Clone, Debug)]
pub(crate) struct Vitals(mpsc::UnboundedSender<Ended>);

/// Held by a thread or a task that must not end. Dropped, it says that it did.
#[derive(Debug)]
pub(crate) struct Vital {
    what: String,
    why: Option<String>,
    /// Only a panic is reported.
    may_end: bool,
    vitals: Vitals,
}

impl Supervisor {
    pub(crate) fn new() -> Self {
        let (sender, ended) = mpsc::unbounded_channel();
        Self { vitals: Vitals(sender), ended }
    }

    /// For threads and tasks to be started.
    pub(crate) fn vitals(&self) -> Vitals {
        self.vitals.clone()
    }

    /// For a thread or a task of this name.
    pub(crate) fn vital(&self, what: impl Into<String>) -> Vital {
        self.vitals.vital(what)
    }

    /// Waits for the first one that ends, and logs it.
    pub(crate) async fn ended(&mut self) -> Ended {
        match self.ended.recv().await {
            Some(ended) => {
                ended.log();
                ended
            }
            None => std::future::pending().await, // it holds a sender itself
        }
    }

    /// Returns the first one that has ended, if there is one, and logs it.
    pub(crate) fn has_ended(&mut self) -> Option<Ended> {
        self.ended.try_recv().ok().inspect(Ended::log)
    }
}

impl Vitals {
    /// For a thread or a task of this name, which must not end.
    pub(crate) fn vital(&self, what: impl Into<String>) -> Vital {
        Vital { what: what.into(), why: None, may_end: false, vitals: self.clone() }
    }

    /// For one of this name that may end at the stop, but never by a panic.
    pub(crate) fn until_stop(&self, what: impl Into<String>) -> Vital {
        let mut vital = self.vital(what);
        vital.may_end = true;
        vital
    }
}

impl Vital {
    /// Runs its work.
    pub(crate) async fn run<F: Future>(self, work: F) -> F::Output {
        fault::beside(&self.what, work).await
    }

    /// It ended by an error.
    pub(crate) fn fail(mut self, error: impl fmt::Display) {
        self.why = Some(error.to_string());
    }

    /// It ended as it should.
    pub(crate) fn done(mut self) {
        self.may_end = true;
    }
}

impl Drop for Vital {
    fn drop(&mut self) {
        let why = match self.why.take() {
            Some(why) => why,
            None if thread::panicking() => "a panic".to_owned(),
            None if self.may_end => return,
            None => "it had nothing left to do".to_owned(),
        };
        // Nobody listens once the process stops.
        let _ = self.vitals.0.send(Ended { what: std::mem::take(&mut self.what), why });
    }
}

/// Faults that no test can make from outside. In a test build the file that `CCSQM_GATEWAY_FAULT_FILE` names says what is to
/// panic or to hang, as in `panic worker 0`.
pub(crate) mod fault {
    use std::future::Future;
    use std::path::PathBuf;
    use std::sync::LazyLock;
    use std::time::Duration;
    use std::{fs, thread};

    const LOOK: Duration = Duration::from_millis(20);

    static FILE: LazyLock<Option<PathBuf>> = LazyLock::new(|| {
        let file = std::env::var_os("CCSQM_GATEWAY_FAULT_FILE").filter(|_| cfg!(debug_assertions));
        file.map(PathBuf::from)
    });

    /// Panics, or hangs the thread, if a test asks for it now.
    pub(crate) fn look(what: &str) {
        let Some(file) = &*FILE else { return };
        let is_asked =
            |verb| fs::read_to_string(file).is_ok_and(|fault| fault.strip_prefix(verb) == Some(what));
        assert!(!is_asked("panic "), "a test asked for it");
        while is_asked("hang ") {
            thread::sleep(LOOK);
        }
    }

    /// The work, during which a test may ask.
    pub(crate) async fn beside<F: Future>(what: &str, work: F) -> F::Output {
        if FILE.is_none() {
            return work.await;
        }
        let asked = async {
            loop {
                look(what);
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            output = work => output,
            () = asked => unreachable!("it goes on for ever"),
        }
    }
}
