//! The record of one request.

use std::{sync::Arc, time::Duration};

use http::HeaderValue;

use super::{
    Answer, Audit, Detail, Permit, Unavailable,
    entry::{Entry, Why},
    facts::Facts,
};
use crate::{
    clock,
    keyed_hash::{Hash, to_hex},
    model::{
        cause::Cause,
        code::Code,
        outcome::Outcome,
        peer::Peer,
        request_id::{FirstCall, RequestId},
        stage::Stage,
    },
};

/// The record of one request. Moved, never shared.
#[derive(Debug)]
pub struct Record {
    audit: Audit,
    id: RequestId,
    stage: Stage,
    step: Step,
    open: Option<Box<Facts>>,
}

/// How far a record got: what it means that it is closed without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// No intent was queued.
    Open,
    /// The intent is queued, and nobody sends yet.
    Intended,
    /// An exchange owns it: bytes may be on their way.
    Exchanged,
    /// It was handed over to an exchange, and this is what is left.
    Taken,
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
    record: Record,
    seq: u64,
}

impl Queued {
    /// Waits until it is safe, for as long as an intent may take.
    pub async fn is_safe(&self) -> bool {
        self.record.audit.safe(self.seq, Duration::ZERO).await.is_ok()
    }
}

impl Record {
    pub(super) fn open(audit: Audit, peer: Peer) -> Self {
        let id = RequestId::new();
        let facts = Facts {
            id,
            peer,
            peer_shown: audit.hides_peer(peer),
            caller: None,
            caller_id: None,
            traceparent: None,
            route: None,
            operator: None,
            first: None,
            is_forced: false,
            detail: None,
            stage: Stage::Admission,
            entered: clock::nanos(),
            spent: [0; Stage::COUNT],
        };
        Self { audit, id, stage: Stage::Admission, step: Step::Open, open: Some(Box::new(facts)) }
    }

    /// The request's id.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The stage that the request has reached.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// The request goes on to the next stage.
    pub fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        if let Some(facts) = &mut self.open {
            facts.enter(stage);
        }
    }

    /// The caller's own id of the request.
    pub fn caller_id(&mut self, id: HeaderValue) {
        let id = self.audit.show(2, id);
        self.set(|facts| facts.caller_id = id);
    }

    /// The caller's `traceparent`.
    pub fn traceparent(&mut self, parent: HeaderValue) {
        let parent = self.audit.show(3, parent);
        self.set(|facts| facts.traceparent = parent);
    }

    /// Who calls.
    pub fn caller(&mut self, name: Arc<str>) {
        self.set(|facts| facts.caller = Some(name));
    }

    /// Which route.
    pub fn route(&mut self, name: Arc<str>) {
        self.set(|facts| facts.route = Some(name));
    }

    /// Who acts.
    pub fn operator(&mut self, id: HeaderValue) {
        let id = self.audit.show(0, id);
        self.set(|facts| facts.operator = id);
    }

    /// Sets the earlier call that this one repeats or equals.
    pub fn first(&mut self, first: FirstCall) {
        self.set(|facts| facts.first = Some(first));
    }

    /// The call repeats one of unknown outcome by force.
    pub fn forced(&mut self) {
        self.set(|facts| facts.is_forced = true);
    }

    /// What further is told of the request, which is to be refused.
    pub fn detail(&mut self, detail: Box<Detail>) {
        self.set(|facts| facts.detail = Some(detail));
    }

    fn set(&mut self, change: impl FnOnce(&mut Facts)) {
        if let Some(facts) = &mut self.open {
            change(facts);
        }
    }

    /// Closes the record of a request that was refused here. Does nothing to one that is closed or taken.
    pub fn refuse(&mut self, code: Code, status: u16) {
        self.refuse_for(code, status, None);
    }

    /// The same, of a request that was refused since the other side failed.
    pub fn refuse_for(&mut self, code: Code, status: u16, cause: Option<Cause>) {
        let Some(mut facts) = self.open.take() else { return };
        facts.enter(self.stage);
        match self.step {
            Step::Open | Step::Taken => self.push_refusal(facts, Why::Refused(code, cause), status),
            Step::Intended => {
                let answer = Answer::without_reply(Outcome::NotSent, code, status);
                self.outcome(&facts, &Answer { cause, ..answer });
            }
            Step::Exchanged => {
                let answer = Answer::without_reply(Outcome::Unknown, code, status);
                self.outcome(&facts, &Answer { note: Some("cut off"), ..answer });
            }
        }
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
        if let Some(mut facts) = self.open.take() {
            facts.enter(self.stage);
            self.push_refusal(facts, why, status);
        }
    }

    fn push_refusal(&self, facts: Box<Facts>, why: Why, status: u16) {
        let (outcome, code, cause) = why.told();
        facts.tell(outcome, code, cause, status);
        self.audit.shared().push_refusal(facts, why, status);
    }

    fn outcome(&self, facts: &Facts, answer: &Answer) -> u64 {
        facts.tell(answer.outcome, answer.code, answer.cause, answer.status.unwrap_or_default());
        self.audit.shared().push_outcome(&Entry::Outcome { facts, answer })
    }

    /// Queues the intent of a body of this size and digest, and waits until it is safe. `further` writes further
    /// members of the record, as JSON text with a comma in front.
    pub fn intent<'a>(
        &'a mut self,
        permit: &Permit<'_>,
        (body_size, digest): (usize, &Hash),
        further: &dyn Fn(&mut Vec<u8>),
    ) -> impl Future<Output = Result<(), Unavailable>> + use<'a> {
        // Not within the future, which would carry the arguments along.
        let queued = self.queue_intent(body_size, digest, further);
        let (audit, waited) = (&self.audit, permit.waited);
        async move { audit.safe(queued?, waited).await.inspect_err(|_| audit.shared().metrics.late.inc()) }
    }

    fn queue_intent(
        &mut self,
        body_size: usize,
        digest: &Hash,
        further: &dyn Fn(&mut Vec<u8>),
    ) -> Result<u64, Unavailable> {
        let facts = self.open.as_ref().ok_or(Unavailable)?;
        let entry = Entry::Intent { facts, body_size, digest: &to_hex(digest), further };
        let queued = self.audit.shared().push_intent(&entry)?;
        self.step = Step::Intended;
        Ok(queued)
    }

    /// Hands the open record over to an exchange, which begins to send. What is left knows its id and stage
    /// and records nothing.
    pub fn take(&mut self) -> Self {
        self.step = Step::Taken;
        let (audit, open) = (self.audit.clone(), self.open.take());
        Self { audit, id: self.id, stage: self.stage, step: Step::Exchanged, open }
    }

    /// Whether it was handed over.
    pub fn is_taken(&self) -> bool {
        self.step == Step::Taken
    }

    /// Closes the record with the outcome of its exchange. `None` if it was closed before.
    pub fn finish(mut self, answer: &Answer) -> Option<(Queued, Names)> {
        let mut facts = self.open.take()?;
        facts.enter(self.stage);
        let seq = self.outcome(&facts, answer);
        let names = Names { caller: facts.caller, route: facts.route };
        Some((Queued { record: self, seq }, names))
    }
}

/// The caller left before the intent was safe, or an exchange was cut off.
impl Drop for Record {
    fn drop(&mut self) {
        if self.open.is_none() {
            return;
        }
        let code = if self.step == Step::Exchanged { Code::Internal } else { Code::CallerLeft };
        self.refuse(code, code.status().as_u16());
    }
}
