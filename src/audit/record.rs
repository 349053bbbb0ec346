//! The record of one request: open until its intent is queued, intended from then on.
//!
//! Whichever is dropped closes itself. An open one is a rejection, since its caller left. An intended one has the outcome
//! `not_sent`, or `unknown` if an exchange had it.

use std::sync::Arc;
use std::thread;

use http::HeaderValue;

use super::entry::{Entry, Why};
use super::facts::Facts;
use super::line::Line;
use super::{Audit, Detail, Permit, StoredReply, Unavailable};
use crate::keyed_hash::{Hash, to_hex};
use crate::model::cause::Cause;
use crate::model::code::Code;
use crate::model::outcome::{Outcome, ResultCode};
use crate::model::peer::Peer;
use crate::model::request_id::{FirstCall, RequestId};
use crate::model::stage::Stage;

/// The record of a request without an intent. Behind the intent it still knows id and stage, and records nothing.
#[derive(Debug)]
pub struct OpenRecord {
    id: RequestId,
    stage: Stage,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    audit: Audit,
    facts: Box<Facts>,
}

/// The record of a request whose intent is queued. Moved, never shared.
#[derive(Debug)]
pub struct IntendedRecord {
    audit: Audit,
    facts: Box<Facts>,
    /// It has its outcome.
    is_closed: bool,
}

/// How an exchange ended.
#[derive(Clone, Debug)]
pub struct Answer {
    /// What became of the task.
    pub outcome: Outcome,
    /// The gateway's own code, if it has one to say.
    pub code: Option<Code>,
    /// Why, where the upstream or the token endpoint failed.
    pub cause: Option<Cause>,
    /// The status that the caller gets.
    pub status: Option<u16>,
    /// The upstream's status.
    pub upstream_status: Option<u16>,
    /// The upstream's own id of the request.
    pub upstream_id: Option<HeaderValue>,
    /// The upstream's result code.
    pub result_code: Option<ResultCode>,
    /// How often a request was sent.
    pub attempts: u32,
    /// Which token was used last.
    pub token_generation: u64,
    /// What else is to be said.
    pub note: Option<&'static str>,
    /// What is kept of the reply, if the call has a key.
    pub reply: Option<Arc<StoredReply>>,
}

/// Whose request a record was of.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// The caller.
    pub caller: Option<Arc<str>>,
    /// The route.
    pub route: Option<Arc<str>>,
}

/// A record that waits to be written.
#[derive(Debug)]
pub struct Queued {
    /// Closed, and with the way to its trail.
    record: IntendedRecord,
    seq: u64,
}

impl Queued {
    /// Waits until it is safe, for as long as an intent may take.
    pub async fn is_safe(&self) -> bool {
        self.record.audit.safe(self.seq, 0).await.is_ok()
    }
}

impl OpenRecord {
    pub(super) fn new(audit: Audit, peer: Peer) -> Self {
        let id = RequestId::new();
        let facts = Box::new(Facts::new(id, peer, audit.hides_peer(peer)));
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

    /// Whether an exchange may have taken the request over.
    pub fn is_taken(&self) -> bool {
        self.stage == Stage::Upstream
    }

    /// The request goes on to the next stage.
    pub fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        self.set(|_, facts| facts.enter(stage));
    }

    /// The caller's own id of the request.
    pub fn caller_id(&mut self, id: HeaderValue) {
        self.set(|audit, facts| facts.caller_id = audit.show(2, id));
    }

    /// The caller's `traceparent`.
    pub fn traceparent(&mut self, parent: HeaderValue) {
        self.set(|audit, facts| facts.traceparent = audit.show(3, parent));
    }

    /// Who calls.
    pub fn caller(&mut self, name: Arc<str>) {
        self.set(|_, facts| facts.caller = Some(name));
    }

    /// Which route.
    pub fn route(&mut self, name: Arc<str>) {
        self.set(|_, facts| facts.route = Some(name));
    }

    /// Who acts.
    pub fn operator(&mut self, id: HeaderValue) {
        self.set(|audit, facts| facts.operator = audit.show(0, id));
    }

    /// Sets the earlier call that this one repeats or equals.
    pub fn first(&mut self, first: FirstCall) {
        self.set(|_, facts| facts.first = Some(first));
    }

    /// The call repeats one of unknown outcome by force.
    pub fn forced(&mut self) {
        self.set(|_, facts| facts.is_forced = true);
    }

    /// What further is told of the request, which is to be refused.
    pub fn detail(&mut self, detail: Box<Detail>) {
        self.set(|_, facts| facts.detail = Some(detail));
    }

    fn set(&mut self, change: impl FnOnce(&Audit, &mut Facts)) {
        if let Some(Open { audit, facts }) = &mut self.open {
            change(audit, facts);
        }
    }

    /// Closes the record of a request that was refused, perhaps since the other side failed. Does nothing to one that is closed
    /// or intended.
    pub fn refuse(&mut self, code: Code, cause: Option<Cause>) {
        self.close(Why::Refused(code, cause), code.status().as_u16());
    }

    /// Closes the record of a request that was answered from what is stored.
    pub fn replayed(&mut self, status: u16) {
        self.close(Why::Replayed, status);
    }

    /// Closes the record of a dry run.
    pub fn dry_run(&mut self, status: u16) {
        self.close(Why::DryRun, status);
    }

    fn close(&mut self, why: Why, status: u16) {
        let Some(Open { audit, mut facts }) = self.open.take() else { return };
        facts.enter(self.stage);
        let (outcome, code, cause) = why.told();
        facts.tell(outcome, code, cause, status);
        audit.shared().push_refusal(facts, why, status);
    }

    /// Queues the intent of a body of this size and digest. The future waits until it is safe. `further` writes further
    /// members of the record, as JSON text with a comma in front.
    pub fn intent(
        &mut self,
        permit: &Permit<'_>,
        body_size: usize,
        digest: &Hash,
        further: &dyn Fn(&mut Vec<u8>),
    ) -> Result<impl Future<Output = Result<IntendedRecord, Unavailable>> + use<>, Unavailable> {
        // Not within the future, which would carry the arguments along.
        let Open { audit, facts } = self.open.as_ref().ok_or(Unavailable)?;
        let entry = Entry::Intent { facts, body_size, digest: &to_hex(digest), further };
        let (seq, waited) = (audit.shared().push_intent(&entry)?, permit.waited);
        let Open { audit, facts } = self.open.take().ok_or(Unavailable)?;
        let mut record = IntendedRecord { audit, facts, is_closed: false };
        Ok(async move {
            if record.audit.safe(seq, waited).await.is_ok() {
                return Ok(record);
            }
            record.audit.shared().metrics.late.inc();
            record.close(&Answer::without_reply(Outcome::NotSent, Code::AuditUnavailable));
            Err(Unavailable)
        })
    }
}

/// The future of the request was dropped before the intent was queued: its caller left.
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

    /// From now on an exchange has it: bytes may be on their way.
    pub fn sent(mut self) -> Self {
        self.facts.enter(Stage::Upstream);
        self
    }

    /// Closes the record with the outcome of its exchange.
    pub fn finish(mut self, answer: &Answer) -> (Queued, Names) {
        let seq = self.close(answer);
        let names = Names { caller: self.facts.caller.take(), route: self.facts.route.take() };
        (Queued { record: self, seq }, names)
    }

    fn close(&mut self, answer: &Answer) -> u64 {
        self.is_closed = true;
        let (audit, facts) = (&self.audit, &mut *self.facts);
        facts.enter(facts.stage);
        facts.tell(answer.outcome, answer.code, answer.cause, answer.status.unwrap_or_default());
        audit.shared().push_outcome(&Entry::Outcome { facts, answer })
    }
}

/// The future of the request or of its exchange was dropped: its caller left, it was cut off by a stop, or it panicked.
impl Drop for IntendedRecord {
    fn drop(&mut self) {
        if self.is_closed {
            return;
        }
        let answer = match self.facts.stage {
            Stage::Upstream => {
                Answer { note: Some("cut off"), ..Answer::without_reply(Outcome::Unknown, Code::Internal) }
            }
            _ if thread::panicking() => Answer::without_reply(Outcome::NotSent, Code::Internal),
            _ => Answer::without_reply(Outcome::NotSent, Code::CallerLeft),
        };
        self.close(&answer);
    }
}

impl Answer {
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
