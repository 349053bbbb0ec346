//! Log lines about requests: for the failed ones, or for all. See `[log] requests`.
//!
//! Rate limit by aggregation: of failures of one caller with one code, ten a second have a line of their own.
//! The others of that second become one line with their number, so that an outage does not flood the log.
//! Strangers count as one caller, and their lines are always aggregated.

use std::collections::HashMap;
use std::mem;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::config::LogRequests;
use crate::model::cause::Cause;
use crate::model::code::Code;
use crate::model::outcome::Outcome;
use crate::model::request_id::RequestId;

/// How many requests of one caller and code have a line of their own each second.
const FULL: u64 = 10;

const SECOND: Duration = Duration::from_secs(1);

static MODE: AtomicU8 = AtomicU8::new(LogRequests::Off as u8);
// Under a lock and not per worker: the bound is for the process, and only failures get here unless all requests
// are logged.
static COUNTS: LazyLock<Mutex<SecondCounts>> = LazyLock::new(Mutex::default);

/// A request that has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FinishedRequest<'a> {
    pub(crate) id: RequestId,
    pub(crate) caller: Option<&'a Arc<str>>,
    pub(crate) route: Option<&'a str>,
    pub(crate) outcome: Outcome,
    pub(crate) code: Option<Code>,
    pub(crate) cause: Option<Cause>,
    /// The status code that the caller got.
    pub(crate) status: u16,
    /// The time of each stage, in nanoseconds.
    pub(crate) took: &'a [u64],
}

/// By caller and by code or outcome: how many requests there were, and whether they are failures.
type Counts = HashMap<(Option<Arc<str>>, &'static str), (u64, bool)>;

/// The requests of the present second.
#[derive(Debug)]
struct SecondCounts {
    since: Instant,
    counts: Counts,
}

impl Default for SecondCounts {
    fn default() -> Self {
        Self { since: Instant::now(), counts: HashMap::new() }
    }
}

impl SecondCounts {
    /// Returns the counts if their second is over, and begins a new one.
    fn over(&mut self) -> Option<Counts> {
        (self.since.elapsed() >= SECOND).then(|| mem::take(self).counts)
    }
}

/// Sets which requests have a line. Before the first call none has.
pub fn set(requests: LogRequests) {
    MODE.store(requests as u8, Ordering::Relaxed);
}

/// Whether a request that ended like this may have a line. Cheap: it is asked for every request.
pub(crate) fn may_have_line(outcome: Outcome, code: Option<Code>, status: u16) -> bool {
    match MODE.load(Ordering::Relaxed) {
        mode if mode == LogRequests::Off as u8 => false,
        mode if mode == LogRequests::All as u8 => true,
        _ => is_failure(outcome, code, status),
    }
}

/// Whether an operator may want to know the cause. A caller that disconnected got no answer and is not a
/// failure.
fn is_failure(outcome: Outcome, code: Option<Code>, status: u16) -> bool {
    let is_bad = matches!(outcome, Outcome::Unknown | Outcome::Failed | Outcome::Refused);
    is_bad || status >= 500 && code != Some(Code::CallerLeft)
}

/// Logs how many requests of the last second had no line of their own. Call it about once a second: otherwise
/// the number appears only with the next request.
pub(crate) fn flush() {
    let over = counts().over();
    over.into_iter().for_each(log_counts);
}

/// Logs the numbers of the present second. Call it at the end of the process.
pub fn finish() {
    let last = mem::take(&mut *counts()).counts;
    log_counts(last);
}

fn counts() -> MutexGuard<'static, SecondCounts> {
    COUNTS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn log_counts(counts: Counts) {
    for ((caller, code), (count, is_failure)) in counts {
        let Some(times) = count.checked_sub(FULL).filter(|times| *times > 0) else { continue };
        let caller = caller.as_deref();
        // The lock on the counts is released by now: logging takes the lock of the queue.
        if is_failure {
            tracing::warn!(caller, code, times, "more requests failed");
        } else {
            tracing::info!(caller, code, times, "more requests ended");
        }
    }
}

impl FinishedRequest<'_> {
    /// Logs the request, unless it is aggregated.
    // `cold`: by default only failures get here.
    #[cold]
    pub(crate) fn log(&self) {
        let Self { id, caller, route, outcome, code, cause, status, took } = *self;
        let is_failure = is_failure(outcome, code, status);
        // Also with `all`, strangers are aggregated: anyone can send requests without being a known caller, as
        // often as they like, and could fill the disk of the log.
        let is_aggregated = MODE.load(Ordering::Relaxed) != LogRequests::All as u8 || caller.is_none();
        if is_aggregated && !self.has_a_line(is_failure) {
            return;
        }
        let (caller, outcome, ms) =
            (caller.map(|caller| &**caller), outcome.as_str(), took.iter().sum::<u64>() / 1_000_000);
        let (code, cause) = (code.map(Code::as_str), cause.map(Cause::as_str));
        if is_failure {
            tracing::warn!(%id, caller, route, outcome, code, cause, status, ms, "a request failed");
        } else {
            tracing::info!(%id, caller, route, outcome, code, cause, status, ms, "a request ended");
        }
    }

    /// Counts the request, and returns whether it has a line of its own.
    fn has_a_line(&self, is_failure: bool) -> bool {
        let kind = self.code.map_or(self.outcome.as_str(), Code::as_str);
        let mut counts = counts();
        let over = counts.over();
        let (count, _) = counts.counts.entry((self.caller.cloned(), kind)).or_insert((0, is_failure));
        *count += 1;
        let has_a_line = *count <= FULL;
        drop(counts);
        over.into_iter().for_each(log_counts);
        has_a_line
    }
}
