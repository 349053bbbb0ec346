//! Failures of the upstream, told to operators: counted, logged, and the last one for `/status`.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use prometheus::IntCounterVec;

use crate::{
    audit::RequestId,
    cause::{Cause, LastError, Reason, shown},
    log::OncePerSecond,
    secret::needles::Needles,
};

/// What failed so far.
#[derive(Debug)]
pub struct Failures {
    count: IntCounterVec,
    /// Each cause has a line a second.
    lines: [OncePerSecond; Cause::COUNT],
    /// The last one is not over.
    is_failing: AtomicBool,
    last: Mutex<Option<LastError>>,
}

impl Failures {
    /// None so far; `count` has one label, the cause.
    pub fn new(count: IntCounterVec) -> Self {
        let lines = [const { OncePerSecond::new() }; Cause::COUNT];
        Self { count, lines, is_failing: AtomicBool::new(false), last: Mutex::default() }
    }

    /// A request failed. `needles` are what must not be quoted.
    #[cold]
    pub fn failed<'a>(&self, reason: &Reason, id: RequestId, needles: impl IntoIterator<Item = &'a Needles>) {
        let (cause, text) = (reason.cause, shown(reason, needles));
        self.count.with_label_values(&[cause.as_str()]).inc();
        if let Some(times) = self.lines[cause as usize].times() {
            tracing::warn!(%cause, error = text, %id, times, "the upstream failed");
        }
        *self.lock() = Some(LastError::now(cause, text));
        self.is_failing.store(true, Ordering::Relaxed);
    }

    /// A request was answered.
    pub fn succeeded(&self) {
        if self.is_failing.load(Ordering::Relaxed) {
            self.end();
        }
    }

    #[cold]
    fn end(&self) {
        self.is_failing.store(false, Ordering::Relaxed);
        if let Some(last) = &mut *self.lock() {
            last.is_over();
        }
    }

    /// The last one.
    pub fn last(&self) -> Option<LastError> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<LastError>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
