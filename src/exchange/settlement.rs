//! The end of an exchange: its record is closed, then its claim.

use std::time::Duration;

use tokio::time::Instant;

use super::{Failure, Told};
use crate::audit::{Answer, IntendedRecord, Names, Queued};
use crate::idempotency::{Claim, Delivery};
use crate::model::code::Code;
use crate::model::outcome::Outcome;

/// Puts the outcome on record. A call with a key is over only when that is committed; a success only when it is
/// delivered.
pub(super) fn finish(claim: Claim, record: IntendedRecord, answer: &Answer) -> Finished {
    let (queued, names) = record.finish(answer);
    if claim.is_keyed() {
        let pending = Pending { queued, names, answer: answer.clone(), claim };
        return Finished { delivery: None, pending: Some(Box::new(pending)) };
    }
    Finished { delivery: claim.end(answer, names), pending: None }
}

/// What the end of a call still waits for.
#[derive(Debug, Default)]
pub(super) struct Finished {
    /// A success, until its caller has it.
    pub(super) delivery: Option<Delivery>,
    /// A call with a key, until its outcome is committed.
    pub(super) pending: Option<Box<Pending>>,
}

/// Waits until the outcome is committed, where that matters.
pub(super) async fn committed(
    finished: Finished,
    deadline: Instant,
) -> Result<Option<Delivery>, NotCommitted> {
    match finished.pending {
        Some(pending) => pending.committed_by(deadline).await,
        None => Ok(finished.delivery),
    }
}

/// The end of a call with a key, while its outcome is not committed yet. The caller learns of it afterwards, so that
/// what it was told is what a restart reads.
#[derive(Debug)]
pub(super) struct Pending {
    queued: Queued,
    names: Names,
    answer: Answer,
    claim: Claim,
}

impl Pending {
    /// Hands on what the caller is to be told, once it is committed. If that takes too long, the caller is told to
    /// ask again, and the claim is settled later.
    pub(super) async fn settle(self, told: Told, deadline: Instant) -> Told {
        match self.committed_by(deadline).await {
            Ok(delivery) => told.map(|mut reply| {
                reply.delivery = delivery;
                reply
            }),
            Err(NotCommitted) => Err(Failure::not_on_record()),
        }
    }

    /// Settles the claim once its outcome is committed. Fails if that was not in time.
    pub(super) async fn committed_by(self, deadline: Instant) -> Result<Option<Delivery>, NotCommitted> {
        while !self.queued.is_safe().await {
            if Instant::now() >= deadline {
                tokio::spawn(async move {
                    while !self.queued.is_safe().await {}
                    drop(self.close()); // a success is undelivered: its caller was told to ask again
                });
                return Err(NotCommitted);
            }
        }
        Ok(self.close())
    }

    fn close(self) -> Option<Delivery> {
        self.claim.end(&self.answer, self.names)
    }
}

/// The outcome of a call with a key was not committed in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotCommitted;

impl Failure {
    /// The upstream has answered, and that can't be put on record.
    fn not_on_record() -> Self {
        let retry_after = Some(Duration::from_secs(1));
        Self { code: Code::RequestInProgress, outcome: Outcome::Unknown, cause: None, retry_after }
    }
}
