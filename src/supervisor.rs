//! What must not end before the process does.
//!
//! Each long-lived thread and task holds a [`Vital`]. If one ends before the stop, by an error or a panic, the process drains,
//! closes the trail and exits with 70, so that whoever watches it starts another one.

use std::{fmt, future::Future, thread};

use thiserror::Error;
use tokio::sync::mpsc;

/// A thread or task ended that must not.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{what} ended: {why}")]
pub struct Ended {
    what: String,
    why: String,
}

/// Learns of what ends.
#[derive(Debug)]
pub(crate) struct Supervisor {
    sender: mpsc::UnboundedSender<Ended>,
    ended: mpsc::UnboundedReceiver<Ended>,
}

/// Held by a thread or a task that must not end. Dropped, it says that it did.
#[derive(Debug)]
pub(crate) struct Vital {
    what: String,
    why: Option<String>,
    /// `None`: it may end.
    sender: Option<mpsc::UnboundedSender<Ended>>,
}

impl Supervisor {
    pub(crate) fn new() -> Self {
        let (sender, ended) = mpsc::unbounded_channel();
        Self { sender, ended }
    }

    /// For a thread or a task of this name.
    pub(crate) fn vital(&self, what: impl Into<String>) -> Vital {
        Vital { what: what.into(), why: None, sender: Some(self.sender.clone()) }
    }

    /// Waits for the first one that ends.
    pub(crate) async fn ended(&mut self) -> Ended {
        match self.ended.recv().await {
            Some(ended) => ended,
            None => std::future::pending().await, // it holds a sender itself
        }
    }
}

impl Vital {
    /// Runs work that must not end.
    pub(crate) async fn run<F: Future>(self, work: F) -> F::Output {
        fault::beside(&self.what, work).await
    }

    /// It ended by an error.
    pub(crate) fn fail(mut self, error: impl fmt::Display) {
        self.why = Some(error.to_string());
    }

    /// It ended as it should.
    pub(crate) fn done(mut self) {
        self.sender = None;
    }
}

impl Drop for Vital {
    fn drop(&mut self) {
        let Some(sender) = self.sender.take() else { return };
        let by = if thread::panicking() { "a panic" } else { "it had nothing left to do" };
        let why = self.why.take().unwrap_or_else(|| by.to_owned());
        // Nobody listens once the process stops.
        let _ = sender.send(Ended { what: std::mem::take(&mut self.what), why });
    }
}

/// Faults that no test can make from outside. In a test build the file that `CCSQM_GATEWAY_FAULT_FILE` names says what is to
/// panic or to hang, as in `panic worker 0`.
pub(crate) mod fault {
    use std::{fs, future::Future, path::PathBuf, sync::LazyLock, thread, time::Duration};

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
