//! The record of one request, and every record's form in the trail.

use std::{fmt, sync::Arc, time::Duration};

use http::HeaderValue;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{
    Audit, Kind, Permit, StoredReply, Unavailable,
    batch::Change,
    folds::Who,
    line::{Line, Second},
    unresolved::{self, UnresolvedList},
};
use crate::{
    clock,
    keyed_hash::{Hash, to_hex},
    log::requests::{self, Ended},
    model::{
        cause::Cause,
        code::Code,
        outcome::{Outcome, ResultCode},
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
    record: Record,
    seq: u64,
}

impl Queued {
    /// Waits until it is safe, for as long as an intent may take.
    pub async fn is_safe(&self) -> bool {
        self.record.audit.safe(self.seq, Duration::ZERO).await.is_ok()
    }
}

/// A record to be written.
pub(super) enum Entry<'a> {
    Intent {
        facts: &'a Facts,
        body_size: usize,
        /// The keyed digest of the body, in hex.
        digest: &'a [u8],
        /// Writes further members, as JSON text with a comma in front.
        further: &'a dyn Fn(&mut Vec<u8>),
    },
    Outcome {
        facts: &'a Facts,
        answer: &'a Answer,
    },
    Refusal(&'a Refusal),
    Event {
        name: &'static str,
        details: &'a Map<String, Value>,
    },
    /// The list of the unresolved, and the calls that it no longer has because it was too long.
    Unresolved {
        list: &'a UnresolvedList,
        forgotten: &'a [Uuid],
    },
    /// The outcome that a restart gives to an intent left without one.
    Doubt {
        id: Uuid,
    },
}

/// Why a request has a record without an intent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Why {
    /// The other side's failure is named.
    Refused(Code, Option<Cause>),
    /// It was answered from what is stored.
    Replayed,
    /// It was not meant to be sent.
    DryRun,
}

impl Why {
    fn told(self) -> (Outcome, Option<Code>, Option<Cause>) {
        match self {
            Self::Refused(code, cause) => (Outcome::NotSent, Some(code), cause),
            Self::Replayed => (Outcome::Replayed, None, None),
            Self::DryRun => (Outcome::NotSent, None, None),
        }
    }
}

/// One refusal, or several of one kind.
pub(super) struct Refusal {
    /// Of the first one, in microseconds since 1970.
    pub(super) time: u64,
    pub(super) facts: Box<Facts>,
    pub(super) why: Why,
    pub(super) status: u16,
    pub(super) count: u64,
    /// It counts refusals of several peers, of which the facts name the first.
    pub(super) several: bool,
}

/// Why a request was refused, beyond the code.
#[derive(Debug, Default)]
pub struct Detail {
    /// The path that was asked for.
    pub path: Option<String>,
    /// The names in the caller's certificate.
    pub names: Vec<String>,
    /// Where the body breaks the contract, and which keyword of it.
    pub errors: Vec<(String, &'static str)>,
}

impl Detail {
    fn write(&self, line: &mut Line<'_>) {
        line.optional(",\"path\":", self.path.as_ref());
        if !self.names.is_empty() {
            line.any("names", &self.names);
        }
        if !self.errors.is_empty() {
            let told = |(pointer, code): &(String, &str)| json!({ "pointer": pointer, "code": code });
            line.any("errors", &self.errors.iter().map(told).collect::<Vec<_>>());
        }
    }
}

/// What is known of a request.
pub(super) struct Facts {
    id: RequestId,
    peer: Peer,
    /// What stands in its place; `None`: the peer itself.
    peer_shown: Option<Option<HeaderValue>>,
    caller: Option<Arc<str>>,
    caller_id: Option<HeaderValue>,
    traceparent: Option<HeaderValue>,
    route: Option<Arc<str>>,
    operator: Option<HeaderValue>,
    /// An earlier call that this one repeats or equals.
    first: Option<FirstCall>,
    /// It repeats a call of unknown outcome by force.
    is_forced: bool,
    /// What further is told of it, if it is refused.
    detail: Option<Box<Detail>>,
    stage: Stage,
    /// In nanoseconds of this process.
    entered: u64,
    /// Nanoseconds by stage.
    spent: [u64; Stage::COUNT],
}

impl fmt::Debug for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Facts({})", self.id)
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

impl Answer {
    fn without_reply(outcome: Outcome, code: Code, status: u16) -> Self {
        Self {
            outcome,
            code: Some(code),
            cause: None,
            status: Some(status),
            upstream_status: None,
            upstream_id: None,
            result_code: None,
            attempts: 0,
            token_generation: 0,
            note: None,
            reply: None,
        }
    }
}

impl Facts {
    fn enter(&mut self, stage: Stage) {
        let now = clock::nanos();
        self.spent[self.stage as usize] += now.saturating_sub(self.entered);
        self.entered = now;
        self.stage = stage;
    }

    pub(super) fn who(&self) -> Who {
        match (&self.caller, self.peer) {
            (Some(caller), _) => Who::Caller(caller.clone()),
            (None, Peer::Tcp(address)) => Who::Address(address.ip()),
            (None, Peer::Unix { uid, .. }) => Who::Uid(uid),
        }
    }

    /// Logs that the request is over.
    fn tell(&self, outcome: Outcome, code: Option<Code>, cause: Option<Cause>, status: u16) {
        if requests::may_have_line(outcome, code, status) {
            let (id, caller, route) = (self.id, self.caller.as_ref(), self.route.as_deref());
            Ended { id, caller, route, outcome, code, cause, status, took: &self.spent }.tell();
        }
    }

    /// Who asked for what.
    fn write(&self, line: &mut Line<'_>) {
        self.write_briefly(line);
        match &self.peer_shown {
            None => line.word(",\"peer\":\"", self.peer.text(&mut [0; Peer::TEXT])),
            Some(Some(hidden)) => line.word(",\"peer\":\"", hidden),
            Some(None) => {}
        }
        if let Some(operator) = &self.operator {
            line.word(",\"operator\":\"", operator);
        }
        if let Some(first) = &self.first {
            line.word(",\"first\":\"", *first.request_id().as_bytes());
            line.word(",\"first_outcome\":\"", first.outcome.as_str());
        }
        line.optional(",\"caller_id\":", self.caller_id.as_ref());
        line.optional(",\"traceparent\":", self.traceparent.as_ref());
    }

    /// As much as tells which intent an outcome belongs to, and whose it is.
    fn write_briefly(&self, line: &mut Line<'_>) {
        line.word(",\"id\":\"", *self.id.as_bytes());
        // Names and operators are of plain characters, as validated.
        if let Some(caller) = &self.caller {
            line.word(",\"caller\":\"", caller.as_bytes());
        }
        if let Some(route) = &self.route {
            line.word(",\"route\":\"", route.as_bytes());
        }
    }

    /// Milliseconds by stage, of those that took any time.
    fn write_times(&self, line: &mut Line<'_>) {
        const KEYS: [&str; Stage::COUNT] = [
            ",\"admission\":",
            ",\"route\":",
            ",\"rate_limit\":",
            ",\"contract\":",
            ",\"idempotency\":",
            ",\"token\":",
            ",\"quota\":",
            ",\"audit\":",
            ",\"upstream\":",
        ];
        line.raw(b",\"ms\":{");
        let mut comma = 1; // none before the first one
        for (key, spent) in KEYS.iter().zip(&self.spent) {
            let micros = spent / 1000;
            if micros > 0 {
                line.thousandths(&key[comma..], micros);
                comma = 0;
            }
        }
        line.raw(b"}");
    }
}

impl Entry<'_> {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Intent { .. } => Kind::Intent,
            Self::Outcome { .. } | Self::Doubt { .. } => Kind::Outcome,
            Self::Refusal(_) => Kind::Refusal,
            Self::Event { .. } | Self::Unresolved { .. } => Kind::Event,
        }
    }

    /// What it changes in the list of the unresolved.
    pub(super) fn change(&self) -> Change {
        match self {
            Self::Intent { facts, .. } => Change::Intent(facts.id.uuid()),
            Self::Outcome { facts, answer } => {
                let is_forced = facts.is_forced;
                Change::Outcome { id: facts.id.uuid(), outcome: answer.outcome, is_forced }
            }
            Self::Event { name, details } if unresolved::EVENTS.contains(name) => {
                let id = details.get("id").and_then(Value::as_str).and_then(|id| id.parse().ok());
                Change::Event { name, id }
            }
            Self::Unresolved { .. } => Change::Event { name: unresolved::LIST, id: None },
            // A doubt is of a start, which has put it on the list.
            Self::Event { .. } | Self::Refusal(_) | Self::Doubt { .. } => Change::None,
        }
    }

    /// Whether its members are short enough to be written while the queue is locked: all but a stored reply are.
    pub(super) fn is_brief(&self) -> bool {
        matches!(self, Self::Outcome { answer: Answer { reply: None, .. }, .. })
    }

    fn time(&self) -> u64 {
        if let Self::Refusal(refusal) = self { refusal.time } else { clock::unix_nanos() / 1000 }
    }

    /// What the record's line begins with: its number, time and kind.
    pub(super) fn begin(&self, seq: u64, second: &mut Second, text: &mut Vec<u8>) {
        let mut line = Line(text);
        line.number("{\"seq\":", seq);
        line.time(",\"time\":\"", self.time(), second);
        line.word(",\"kind\":\"", self.kind().as_str());
    }

    /// The members behind that, but for the links.
    pub(super) fn members(&self, text: &mut Vec<u8>) {
        let line = &mut Line(text);
        match self {
            Self::Intent { facts, body_size, digest, further } => {
                facts.write(line);
                further(line.0);
                line.number(",\"body_size\":", *body_size as u64);
                line.word(",\"digest\":\"", digest);
            }
            Self::Outcome { facts, answer } => {
                facts.write_briefly(line);
                answer.write(facts.stage, line);
                facts.write_times(line);
            }
            Self::Refusal(refusal) => refusal.write(line),
            Self::Event { name, details } => {
                line.text(",\"event\":", name.as_bytes());
                for (key, value) in *details {
                    line.any(key, value);
                }
            }
            Self::Unresolved { list, forgotten } => {
                line.text(",\"event\":", unresolved::LIST.as_bytes());
                line.any(unresolved::LIST, list);
                if !forgotten.is_empty() {
                    line.any("forgotten", forgotten);
                }
            }
            Self::Doubt { id } => {
                line.word(",\"id\":\"", *RequestId::from(*id).as_bytes());
                line.word(",\"outcome\":\"", Outcome::Unknown.as_str());
                line.word(",\"note\":\"", "the process ended between intent and outcome");
            }
        }
    }
}

impl Refusal {
    fn write(&self, line: &mut Line<'_>) {
        self.facts.write(line);
        let (outcome, code, cause) = self.why.told();
        let note = (self.why == Why::DryRun).then_some("dry run");
        line.word(",\"outcome\":\"", outcome.as_str());
        line.optional(",\"code\":", code.map(Code::as_str));
        line.optional(",\"cause\":", cause.map(Cause::as_str));
        line.optional(",\"note\":", note);
        line.word(",\"stage\":\"", self.facts.stage.as_str());
        line.number(",\"status\":", u64::from(self.status));
        if let Some(detail) = &self.facts.detail {
            detail.write(line);
        }
        if self.count > 1 {
            line.number(",\"count\":", self.count);
        }
        line.optional(",\"peers\":", self.several.then_some("several"));
    }
}

impl Answer {
    fn write(&self, stage: Stage, line: &mut Line<'_>) {
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
