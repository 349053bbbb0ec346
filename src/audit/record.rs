//! The record of one request, and every record's form in the trail.

use std::sync::Arc;

use bytes::Bytes;
use http::HeaderValue;
use jiff::Timestamp;
use serde_json::{Map, Value};
use tokio::time::Instant;
use uuid::Uuid;

use super::{
    Audit, Unavailable,
    chain::Keys,
    line::{Line, Second},
    queue::Who,
};
use crate::{
    admission::Peer,
    clock,
    error::{Code, Stage},
    outcome::Outcome,
};

/// The record of one request. Moved, never shared.
#[derive(Debug)]
pub struct Record {
    audit: Audit,
    id: Uuid,
    stage: Stage,
    open: Option<Facts>,
    step: Step,
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
    /// The status that the caller gets.
    pub status: Option<u16>,
    /// The upstream's status.
    pub upstream_status: Option<u16>,
    /// The upstream's result code.
    pub result_code: Option<String>,
    /// How often a request was sent.
    pub attempts: u32,
    /// Which token was used last.
    pub token_generation: u64,
    /// What else is to be said.
    pub note: Option<&'static str>,
}

/// A record on its way to the writer.
pub(super) enum Entry {
    Intent {
        time: Timestamp,
        facts: Facts,
        body: Bytes,
        members: Vec<u8>,
    },
    Outcome {
        time: Timestamp,
        facts: Facts,
        answer: Answer,
    },
    Refusal {
        time: Timestamp,
        facts: Facts,
        code: Code,
        status: u16,
        count: u64,
        /// It counts refusals of several peers, of which the facts name the first.
        several: bool,
    },
    Event {
        time: Timestamp,
        name: &'static str,
        details: Map<String, Value>,
    },
    /// The outcome that a restart gives to an intent left without one.
    Doubt {
        time: Timestamp,
        id: String,
    },
}

/// What is known of a request.
#[derive(Clone)]
pub(super) struct Facts {
    id: Uuid,
    peer: Peer,
    caller: Option<Arc<str>>,
    caller_id: Option<HeaderValue>,
    traceparent: Option<HeaderValue>,
    route: Option<Arc<str>>,
    operator: Option<HeaderValue>,
    stage: Stage,
    entered: Instant,
    /// Microseconds by stage.
    spent: [u32; Stage::COUNT],
}

impl std::fmt::Debug for Facts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Facts({})", self.id)
    }
}

impl Record {
    pub(super) fn open(audit: Audit, peer: Peer) -> Self {
        let id = Uuid::now_v7();
        let facts = Facts {
            id,
            peer,
            caller: None,
            caller_id: None,
            traceparent: None,
            route: None,
            operator: None,
            stage: Stage::Admission,
            entered: clock::now(),
            spent: [0; Stage::COUNT],
        };
        Self { audit, id, stage: Stage::Admission, open: Some(facts), step: Step::Open }
    }

    /// The request's id.
    pub fn id(&self) -> Uuid {
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
        self.set(|facts| facts.caller_id = Some(id));
    }

    /// The caller's `traceparent`.
    pub fn traceparent(&mut self, parent: HeaderValue) {
        self.set(|facts| facts.traceparent = Some(parent));
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
        self.set(|facts| facts.operator = Some(id));
    }

    fn set(&mut self, change: impl FnOnce(&mut Facts)) {
        if let Some(facts) = &mut self.open {
            change(facts);
        }
    }

    /// Closes the record of a request that was refused here. Does nothing to one that is closed or taken.
    pub fn refuse(&mut self, code: Code, status: u16) {
        let Some(mut facts) = self.open.take() else { return };
        facts.enter(self.stage);
        match self.step {
            Step::Open | Step::Taken => self.audit.shared.push_refusal(facts, code, status),
            Step::Intended => self.outcome(facts, Answer::without_reply(Outcome::NotSent, code, status)),
            Step::Exchanged => {
                let answer = Answer::without_reply(Outcome::Unknown, code, status);
                self.outcome(facts, Answer { note: Some("cut off"), ..answer });
            }
        }
    }

    fn outcome(&self, facts: Facts, answer: Answer) {
        self.audit.shared.push_outcome(facts, answer);
    }

    /// Queues the intent and waits until it is safe. `members` are further members of the record, as JSON
    /// text with a comma in front.
    pub async fn intent(&mut self, body: &Bytes, members: Vec<u8>) -> Result<(), Unavailable> {
        let facts = self.open.clone().ok_or(Unavailable)?;
        let shared = &self.audit.shared;
        let entry = Entry::Intent { time: Timestamp::now(), facts, body: body.clone(), members };
        let position = shared.push_intent(entry)?;
        self.step = Step::Intended;
        let safe = self.audit.lane.wait(&shared.safe, position, self.audit.deadline).await;
        safe.inspect_err(|_| shared.metrics.late.inc())
    }

    /// Hands the open record over to an exchange, which begins to send. What is left knows its id and stage
    /// and records nothing.
    pub fn take(&mut self) -> Self {
        self.step = Step::Taken;
        Self {
            audit: self.audit.clone(),
            id: self.id,
            stage: self.stage,
            open: self.open.take(),
            step: Step::Exchanged,
        }
    }

    /// Whether it was handed over.
    pub fn is_taken(&self) -> bool {
        self.step == Step::Taken
    }

    /// Closes the record with the outcome of its exchange.
    pub fn finish(mut self, answer: Answer) {
        if let Some(mut facts) = self.open.take() {
            facts.enter(self.stage);
            self.outcome(facts, answer);
        }
    }
}

/// The caller left before the intent was safe, or an exchange was cut off.
impl Drop for Record {
    fn drop(&mut self) {
        let code = if self.step == Step::Exchanged { Code::Internal } else { Code::CallerLeft };
        self.refuse(code, code.status().as_u16());
    }
}

impl Answer {
    fn without_reply(outcome: Outcome, code: Code, status: u16) -> Self {
        Self {
            outcome,
            code: Some(code),
            status: Some(status),
            upstream_status: None,
            result_code: None,
            attempts: 0,
            token_generation: 0,
            note: None,
        }
    }
}

impl Facts {
    fn enter(&mut self, stage: Stage) {
        let now = clock::now();
        let spent = u32::try_from(now.duration_since(self.entered).as_micros()).unwrap_or(u32::MAX);
        let total = &mut self.spent[self.stage as usize];
        *total = total.saturating_add(spent);
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

    fn write(&self, line: &mut Line<'_>) {
        line.word(",\"id\":", self.id.hyphenated().encode_lower(&mut Uuid::encode_buffer()));
        line.optional(",\"caller\":", self.caller.as_deref());
        line.text(",\"peer\":", self.peer.text(&mut [0; Peer::TEXT]));
        line.optional(",\"caller_id\":", self.caller_id.as_ref());
        line.optional(",\"traceparent\":", self.traceparent.as_ref());
        line.optional(",\"operator\":", self.operator.as_ref());
        line.optional(",\"route\":", self.route.as_deref());
    }

    /// Milliseconds by stage, of those that took any time.
    fn write_times(&self, line: &mut Line<'_>) {
        const KEYS: [&str; Stage::COUNT] = [
            "\"admission\":",
            "\"route\":",
            "\"rate_limit\":",
            "\"contract\":",
            "\"token\":",
            "\"quota\":",
            "\"audit\":",
            "\"upstream\":",
        ];
        line.raw(b",\"ms\":{");
        let mut comma = "";
        for (key, spent) in KEYS.into_iter().zip(self.spent).filter(|(_, spent)| *spent > 0) {
            line.raw(comma.as_bytes());
            line.thousandths(key, spent);
            comma = ",";
        }
        line.raw(b"}");
    }
}

impl Entry {
    /// An event of now; `details` is an object.
    pub(super) fn event(name: &'static str, details: Value) -> Self {
        let details = if let Value::Object(details) = details { details } else { Map::new() };
        Self::Event { time: Timestamp::now(), name, details }
    }

    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Intent { .. } => "intent",
            Self::Outcome { .. } | Self::Doubt { .. } => "outcome",
            Self::Refusal { .. } => "refusal",
            Self::Event { .. } => "event",
        }
    }

    fn time(&self) -> Timestamp {
        match self {
            Self::Intent { time, .. }
            | Self::Outcome { time, .. }
            | Self::Refusal { time, .. }
            | Self::Event { time, .. }
            | Self::Doubt { time, .. } => *time,
        }
    }

    /// The record as JSON, but for its links and closing brace.
    pub(super) fn format(&self, seq: u64, keys: &Keys, second: &mut Second, text: &mut Vec<u8>) {
        let mut line = Line(text);
        line.number("{\"seq\":", seq);
        line.time(",\"time\":", self.time(), second);
        line.word(",\"kind\":", self.kind());
        match self {
            Self::Intent { facts, body, members, .. } => {
                facts.write(&mut line);
                line.raw(members);
                line.number(",\"body_size\":", body.len() as u64);
                line.raw(b",\"digest\":\"");
                keys.digest(body, line.0);
                line.raw(b"\"");
            }
            Self::Outcome { facts, answer, .. } => {
                facts.write(&mut line);
                answer.write(facts.stage, &mut line);
                facts.write_times(&mut line);
            }
            Self::Refusal { facts, code, status, count, several, .. } => {
                facts.write(&mut line);
                line.word(",\"outcome\":", Outcome::NotSent.as_str());
                line.word(",\"code\":", code.as_str());
                line.word(",\"stage\":", facts.stage.as_str());
                line.number(",\"status\":", u64::from(*status));
                if *count > 1 {
                    line.number(",\"count\":", *count);
                }
                line.optional(",\"peers\":", several.then_some("several"));
            }
            Self::Event { name, details, .. } => {
                line.text(",\"event\":", name.as_bytes());
                for (key, value) in details {
                    line.any(key, value);
                }
            }
            Self::Doubt { id, .. } => {
                line.text(",\"id\":", id.as_bytes());
                line.text(",\"outcome\":", Outcome::Unknown.as_str().as_bytes());
                line.text(",\"note\":", b"the process ended between intent and outcome");
            }
        }
    }
}

impl Answer {
    fn write(&self, stage: Stage, line: &mut Line<'_>) {
        line.word(",\"outcome\":", self.outcome.as_str());
        line.optional(",\"code\":", self.code.map(Code::as_str));
        line.word(",\"stage\":", stage.as_str());
        if let Some(status) = self.status {
            line.number(",\"status\":", u64::from(status));
        }
        if let Some(status) = self.upstream_status {
            line.number(",\"upstream_status\":", u64::from(status));
        }
        line.optional(",\"result_code\":", self.result_code.as_ref());
        line.number(",\"attempts\":", u64::from(self.attempts));
        line.number(",\"token_generation\":", self.token_generation);
        line.optional(",\"note\":", self.note);
    }
}
