//! Settlement of an exchange: its record is closed, then its claim, and for a call with a key the commit is awaited in between.
//!
//! The order matters. Were the claim ended first, a repetition could get an answer that a crash then removes from the trail:
//! the next start would only know that the outcome is unknown.

use std::time::Duration;

use tokio::time::Instant;

use super::{ExchangeReply, Failure};
use crate::audit::{ExchangeResult, IntendedRecord, Names, Queued};
use crate::idempotency::{Claim, Delivery};
use crate::model::code::Code;
use crate::model::outcome::Outcome;

/// Queues the outcome for the trail, and ends the claim of a call without a key. Never waits.
// A call without a key does not wait for the commit: nothing is replayed for it, and after a crash its outcome is unknown, so
// that equal calls are refused.
pub(super) fn finish(claim: Claim, record: IntendedRecord, answer: &ExchangeResult) -> Finished {
    let (queued, names) = record.finish(answer);
    if claim.is_keyed() {
        let uncommitted = UncommittedResult { queued, names, answer: answer.clone(), claim };
        return Finished { delivery: None, uncommitted: Some(Box::new(uncommitted)) };
    }
    Finished { delivery: claim.end(answer, names), uncommitted: None }
}

/// What is still to do for a call whose outcome is queued.
#[derive(Debug, Default)]
pub(super) struct Finished {
    /// The delivery of a success without a key.
    pub(super) delivery: Option<Delivery>,
    /// A call with a key, whose outcome is not committed yet.
    // In a box: only calls with a key have it, and every exchange moved its 280 bytes.
    pub(super) uncommitted: Option<Box<UncommittedResult>>,
}

/// Waits until the outcome of a call with a key is committed, and returns the delivery of a success. Fails at the deadline.
pub(super) async fn committed(
    finished: Finished,
    deadline: Instant,
) -> Result<Option<Delivery>, NotCommitted> {
    match finished.uncommitted {
        Some(uncommitted) => uncommitted.committed_by(deadline).await,
        None => Ok(finished.delivery),
    }
}

/// A call with a key whose outcome is queued and not committed yet. Its caller gets the outcome only after the commit, so that a
/// restart reads the same outcome.
#[derive(Debug)]
pub(super) struct UncommittedResult {
    queued: Queued,
    names: Names,
    answer: ExchangeResult,
    claim: Claim,
}

impl UncommittedResult {
    /// Returns the caller's answer once the outcome is committed; at the deadline, a failure that asks the caller to call again
    /// with its key.
    pub(super) async fn release_when_committed(
        self,
        reply: ExchangeReply,
        deadline: Instant,
    ) -> ExchangeReply {
        match self.committed_by(deadline).await {
            Ok(delivery) => reply.map(|mut reply| {
                reply.delivery = delivery;
                reply
            }),
            Err(NotCommitted) => Err(Failure::not_on_record()),
        }
    }

    /// Ends the claim once the outcome is committed, and returns the delivery of a success. Fails at the deadline; the claim is
    /// then ended later, by a task of its own.
    pub(super) async fn committed_by(self, deadline: Instant) -> Result<Option<Delivery>, NotCommitted> {
        while !self.queued.is_committed().await {
            if Instant::now() >= deadline {
                // A task of its own, since the exchange ends here. Until the commit the key counts as at work.
                tokio::spawn(async move {
                    while !self.queued.is_committed().await {}
                    // Dropped, so that a success is undelivered: its caller only learnt that the call is in progress.
                    drop(self.close());
                });
                return Err(NotCommitted);
            }
        }
        Ok(self.close())
    }

    /// Ends the claim. The outcome must be committed.
    fn close(self) -> Option<Delivery> {
        self.claim.end(&self.answer, self.names)
    }
}

/// The error of an outcome that was not committed by its deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotCommitted;

impl Failure {
    /// The failure of a call that the upstream has answered, and whose outcome was not committed in time.
    // `Retry-After` although the outcome is unknown: a repetition with the same key only asks for the result, and sends nothing.
    fn not_on_record() -> Self {
        let retry_after = Some(Duration::from_secs(1));
        Self { code: Code::RequestInProgress, outcome: Outcome::Unknown, cause: None, retry_after }
    }
}
