//! The record of one request: an open record until its intent is queued, an intended one from then on.
//!
//! Each record is closed exactly once. A drop closes a record that is not closed yet:
//!
//! | dropped | written |
//! |---|---|
//! | [`OpenRecord`] | a refusal, `caller_left` |
//! | [`IntendedRecord`] | outcome `not_sent`, `caller_left`, or `internal` in a panic |
//! | [`IntendedRecord`] after [`IntendedRecord::sent`] | outcome `unknown`, `internal` |
//!
//! Only a committed intent gives an [`IntendedRecord`], and an exchange needs one to send anything.

use std::sync::Arc;
use std::thread;

use http::HeaderValue;

use super::entry::{Entry, RefusalReason};
use super::facts::RequestFacts;
use super::line::Line;
use super::{Audit, Detail, Permit, StoredReply, Unavailable};
use crate::keyed_hash::{Hash, to_hex};
use crate::model::cause::Cause;
use crate::model::code::Code;
use crate::model::outcome::{Outcome, ResultCode};
use crate::model::peer::Peer;
use crate::model::request_id::{FirstCall, RequestId};
use crate::model::stage::Stage;

/// The record of a request without an intent. After the intent is queued it still knows the id and the stage, and
/// writes nothing any more.
#[derive(Debug)]
pub struct OpenRecord {
    id: RequestId,
    stage: Stage,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    audit: Audit,
    facts: Box<RequestFacts>,
}

/// The record of a request whose intent is queued. It is moved, never shared: its owner alone decides its outcome.
#[derive(Debug)]
pub struct IntendedRecord {
    audit: Audit,
    facts: Box<RequestFacts>,
    /// Whether its outcome is queued.
    is_closed: bool,
}

/// How an exchange with the upstream ended. The fields become members of the outcome's record.
#[derive(Clone, Debug)]
pub struct ExchangeResult {
    /// Whether the upstream executed what the call asked for.
    pub outcome: Outcome,
    /// The code of the gateway's own answer; `None` if the caller gets the upstream's reply.
    pub code: Option<Code>,
    /// The cause, if the upstream or the token endpoint failed.
    pub cause: Option<Cause>,
    /// The HTTP status that the caller gets.
    pub status: Option<u16>,
    /// The HTTP status of the upstream.
    pub upstream_status: Option<u16>,
    /// The upstream's own request id.
    pub upstream_id: Option<HeaderValue>,
    /// The result code in the upstream's reply.
    pub result_code: Option<ResultCode>,
    /// How many requests were sent to the upstream.
    pub attempts: u32,
    /// The generation of the token that was used last.
    pub token_generation: u64,
    /// A remark for readers of the trail.
    pub note: Option<&'static str>,
    /// The reply, stored so that a call with an idempotency key can be answered again.
    pub reply: Option<Arc<StoredReply>>,
}

/// The names of a request's caller and route, as far as they were known.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// The caller's name in the configuration.
    pub caller: Option<Arc<str>>,
    /// The route's name in the configuration.
    pub route: Option<Arc<str>>,
}

/// A record whose outcome is queued and may not be committed yet.
#[derive(Debug)]
pub struct Queued {
    /// The closed record, kept for its handle on the trail.
    record: IntendedRecord,
    seq: u64,
}

impl Queued {
    /// Waits until the outcome is committed, for at most the deadline of an intent. Returns whether it is.
    /// Cancellation safe; may be called again after false.
    pub async fn is_committed(&self) -> bool {
        self.record.audit.committed_within(self.seq, 0).await.is_ok()
    }
}

impl OpenRecord {
    pub(super) fn new(audit: Audit, peer: Peer) -> Self {
        let id = RequestId::new();
        let facts = Box::new(RequestFacts::new(id, peer, audit.redacted_peer(peer)));
        Self { id, stage: Stage::Admission, open: Some(Open { audit, facts }) }
    }

    /// The request's id.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The stage that the request has reached.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Whether the record has reached the stage at which an exchange owns the request. A panic from then on must not
    /// be reported as `not_sent`.
    pub fn is_taken(&self) -> bool {
        self.stage == Stage::Upstream
    }

    /// Enters the next stage. The time since the previous stage began is added to that stage.
    pub fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        self.set(|_, facts| facts.enter(stage));
    }

    /// Sets the caller's own id of the request, as the redaction of that field allows.
    pub fn caller_id(&mut self, id: HeaderValue) {
        self.set(|audit, facts| facts.caller_id = audit.redact(2, id));
    }

    /// Sets the caller's `traceparent`, as the redaction of that field allows.
    pub fn traceparent(&mut self, parent: HeaderValue) {
        self.set(|audit, facts| facts.traceparent = audit.redact(3, parent));
    }

    /// Sets the caller's name.
    pub fn caller(&mut self, name: Arc<str>) {
        self.set(|_, facts| facts.caller = Some(name));
    }

    /// Sets the route's name.
    pub fn route(&mut self, name: Arc<str>) {
        self.set(|_, facts| facts.route = Some(name));
    }

    /// Sets the operator on whose behalf the caller acts, as the redaction of that field allows.
    pub fn operator(&mut self, id: HeaderValue) {
        self.set(|audit, facts| facts.operator = audit.redact(0, id));
    }

    /// Sets the earlier call that this one repeats (by its key) or equals (by its bytes).
    pub fn first(&mut self, first: FirstCall) {
        self.set(|_, facts| facts.first = Some(first));
    }

    /// Marks the call as one that repeats a call of unknown outcome, as its caller demanded by `Idempotency-Force`.
    pub fn forced(&mut self) {
        self.set(|_, facts| facts.is_forced = true);
    }

    /// Sets the details of the refusal that follows.
    pub fn detail(&mut self, detail: Box<Detail>) {
        self.set(|_, facts| facts.detail = Some(detail));
    }

    fn set(&mut self, change: impl FnOnce(&Audit, &mut RequestFacts)) {
        if let Some(Open { audit, facts }) = &mut self.open {
            change(audit, facts);
        }
    }

    /// Closes the record as refused. `cause` is set if the upstream or the token endpoint failed. Does nothing if the
    /// record is closed or its intent is queued.
    pub fn refuse(&mut self, code: Code, cause: Option<Cause>) {
        self.close(RefusalReason::Refused(code, cause), code.status().as_u16());
    }

    /// Closes the record of a request that was answered with a stored reply.
    pub fn replayed(&mut self, status: u16) {
        self.close(RefusalReason::Replayed, status);
    }

    /// Closes the record of a dry run, which is never sent.
    pub fn dry_run(&mut self, status: u16) {
        self.close(RefusalReason::DryRun, status);
    }

    fn close(&mut self, reason: RefusalReason, status: u16) {
        let Some(Open { audit, mut facts }) = self.open.take() else { return };
        facts.enter(self.stage);
        let (outcome, code, cause) = reason.outcome();
        facts.log(outcome, code, cause, status);
        audit.shared().push_refusal(facts, reason, status);
    }

    /// Queues the intent. Returns a future that waits until the intent is committed, and then returns the intended
    /// record.
    ///
    /// `body_size` and `digest` are those of the request's body. `further` appends members to the record, as JSON text
    /// with a comma in front.
    ///
    /// Fails at once if the record is closed, or if the intent cannot be queued; the record then stays open. The future
    /// fails if the intent is not committed before its deadline. It then queues the outcome `not_sent`, and the intent
    /// may still be committed later.
    ///
    /// Dropping the future queues the outcome `not_sent`.
    pub fn intent(
        &mut self,
        permit: &Permit<'_>,
        body_size: usize,
        digest: &Hash,
        further: &dyn Fn(&mut Vec<u8>),
    ) -> Result<impl Future<Output = Result<IntendedRecord, Unavailable>> + use<>, Unavailable> {
        // Outside the future, so that the future does not hold the arguments. The record is only borrowed until the
        // intent is queued: if `further` panics or the queue is full, it stays open and can still be refused.
        let Open { audit, facts } = self.open.as_ref().ok_or(Unavailable)?;
        let entry = Entry::Intent { facts, body_size, digest: &to_hex(digest), further };
        let (seq, waited) = (audit.shared().push_intent(&entry)?, permit.waited);
        let Open { audit, facts } = self.open.take().ok_or(Unavailable)?;
        let mut record = IntendedRecord { audit, facts, is_closed: false };
        Ok(async move {
            if record.audit.committed_within(seq, waited).await.is_ok() {
                return Ok(record);
            }
            // The writer may still commit the intent later, so the intent needs an outcome now. Nothing can be sent
            // without an intended record, so `not_sent` is certain.
            record.audit.shared().metrics.late.inc();
            record.close(&ExchangeResult::without_reply(Outcome::NotSent, Code::AuditUnavailable));
            Err(Unavailable)
        })
    }
}

/// Closes an open record as refused: the request's future was dropped, because its caller disconnected.
impl Drop for OpenRecord {
    fn drop(&mut self) {
        self.refuse(Code::CallerLeft, None);
    }
}

impl IntendedRecord {
    /// The request's id.
    pub fn id(&self) -> RequestId {
        self.facts.id
    }

    /// Marks the record as owned by an exchange. From now on a drop closes it as `unknown`, since bytes may be on their
    /// way to the upstream.
    pub fn sent(mut self) -> Self {
        self.facts.enter(Stage::Upstream);
        self
    }

    /// Closes the record with the outcome of its exchange. Returns a [`Queued`] to wait for the commit of the outcome,
    /// and the names of caller and route.
    pub fn finish(mut self, answer: &ExchangeResult) -> (Queued, Names) {
        let seq = self.close(answer);
        let names = Names { caller: self.facts.caller.take(), route: self.facts.route.take() };
        (Queued { record: self, seq }, names)
    }

    fn close(&mut self, answer: &ExchangeResult) -> u64 {
        // First: a panic below must not make the drop queue a second outcome.
        self.is_closed = true;
        let (audit, facts) = (&self.audit, &mut *self.facts);
        facts.enter(facts.stage);
        facts.log(answer.outcome, answer.code, answer.cause, answer.status.unwrap_or_default());
        audit.shared().push_outcome(&Entry::Outcome { facts, answer })
    }
}

/// Closes a record that has no outcome yet: the future of the request or of its exchange was dropped. The caller
/// disconnected, a stop cut the exchange off, or the future panicked.
impl Drop for IntendedRecord {
    fn drop(&mut self) {
        if self.is_closed {
            return;
        }
        let answer = match self.facts.stage {
            // Whether the upstream received the request is not known here. `not_sent` would tell the caller that it
            // may send the task again.
            Stage::Upstream => ExchangeResult {
                note: Some("cut off"),
                ..ExchangeResult::without_reply(Outcome::Unknown, Code::Internal)
            },
            // A panic is a fault of the gateway, and the trail must not blame the caller for it.
            _ if thread::panicking() => ExchangeResult::without_reply(Outcome::NotSent, Code::Internal),
            _ => ExchangeResult::without_reply(Outcome::NotSent, Code::CallerLeft),
        };
        self.close(&answer);
    }
}

impl ExchangeResult {
    fn without_reply(outcome: Outcome, code: Code) -> Self {
        Self {
            outcome,
            code: Some(code),
            cause: None,
            status: Some(code.status().as_u16()),
            upstream_status: None,
            upstream_id: None,
            result_code: None,
            attempts: 0,
            token_generation: 0,
            note: None,
            reply: None,
        }
    }

    pub(super) fn write(&self, stage: Stage, line: &mut Line<'_>) {
        line.word(",\"outcome\":\"", self.outcome.as_str());
        line.optional(",\"code\":", self.code.map(Code::as_str));
        line.optional(",\"cause\":", self.cause.map(Cause::as_str));
        line.word(",\"stage\":\"", stage.as_str());
        if let Some(status) = self.status {
            line.number(",\"status\":", u64::from(status));
        }
        if let Some(status) = self.upstream_status {
            line.number(",\"upstream_status\":", u64::from(status));
        }
        line.optional(",\"upstream_request_id\":", self.upstream_id.as_ref());
        line.optional(",\"result_code\":", self.result_code.as_ref());
        line.number(",\"attempts\":", u64::from(self.attempts));
        line.number(",\"token_generation\":", self.token_generation);
        line.optional(",\"note\":", self.note);
        if let Some(reply) = &self.reply {
            line.any("reply", &**reply);
        }
    }
}
