//! The record of one request, and every record's form in the trail.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::time::timeout;
use uuid::Uuid;

use super::{Audit, Unavailable, chain::Keys, queue::Who};
use crate::{
    admission::Peer,
    error::{Code, Stage},
    outcome::Outcome,
};

/// The record of one request. Moved, never shared.
#[derive(Debug)]
pub struct Record {
    audit: Audit,
    id: Uuid,
    stage: Stage,
    open: Option<Box<Facts>>,
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
        facts: Box<Facts>,
        body: Bytes,
        members: Vec<u8>,
    },
    Outcome {
        time: Timestamp,
        facts: Box<Facts>,
        answer: Answer,
    },
    Refusal {
        time: Timestamp,
        facts: Box<Facts>,
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
    caller_id: Option<String>,
    traceparent: Option<String>,
    route: Option<Arc<str>>,
    operator: Option<String>,
    stage: Stage,
    entered: Instant,
    spent: [Duration; Stage::COUNT],
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
            entered: Instant::now(),
            spent: [Duration::ZERO; Stage::COUNT],
        };
        Self { audit, id, stage: Stage::Admission, open: Some(Box::new(facts)), step: Step::Open }
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
    pub fn caller_id(&mut self, id: String) {
        self.set(|facts| facts.caller_id = Some(id));
    }

    /// The caller's `traceparent`.
    pub fn traceparent(&mut self, parent: String) {
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
    pub fn operator(&mut self, id: String) {
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

    fn outcome(&self, facts: Box<Facts>, answer: Answer) {
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
        let mut safe = shared.safe.subscribe();
        match timeout(self.audit.deadline, safe.wait_for(|safe| *safe >= position)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => {
                shared.metrics.late.inc();
                Err(Unavailable)
            }
        }
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
        let now = Instant::now();
        self.spent[self.stage as usize] += now.duration_since(self.entered);
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

    fn write(&self, line: &mut Vec<u8>) {
        member(line, "id", &self.id.to_string());
        optional(line, "caller", self.caller.as_deref());
        member(line, "peer", &self.peer.to_string());
        optional(line, "caller_id", self.caller_id.as_ref());
        optional(line, "traceparent", self.traceparent.as_ref());
        optional(line, "operator", self.operator.as_ref());
        optional(line, "route", self.route.as_deref());
    }

    /// Milliseconds by stage.
    fn milliseconds(&self) -> Map<String, Value> {
        let reached = Stage::ALL.iter().zip(self.spent).take(self.stage as usize + 1);
        reached.map(|(stage, spent)| (stage.as_str().to_owned(), json!(millis(spent)))).collect()
    }
}

/// Milliseconds with three decimals.
fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
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
    pub(super) fn format(&self, seq: u64, keys: &Keys, line: &mut Vec<u8>) {
        line.extend_from_slice(format!("{{\"seq\":{seq}").as_bytes());
        member(line, "time", &format!("{:.6}", self.time()));
        member(line, "kind", self.kind());
        match self {
            Self::Intent { facts, body, members, .. } => {
                facts.write(line);
                line.extend_from_slice(members);
                member(line, "body_size", &body.len());
                member(line, "digest", &keys.digest(body));
            }
            Self::Outcome { facts, answer, .. } => {
                facts.write(line);
                member(line, "outcome", answer.outcome.as_str());
                optional(line, "code", answer.code.map(Code::as_str));
                member(line, "stage", facts.stage.as_str());
                optional(line, "status", answer.status);
                optional(line, "upstream_status", answer.upstream_status);
                optional(line, "result_code", answer.result_code.as_ref());
                member(line, "attempts", &answer.attempts);
                member(line, "token_generation", &answer.token_generation);
                optional(line, "note", answer.note);
                member(line, "ms", &facts.milliseconds());
            }
            Self::Refusal { facts, code, status, count, several, .. } => {
                facts.write(line);
                member(line, "outcome", Outcome::NotSent.as_str());
                member(line, "code", code.as_str());
                member(line, "stage", facts.stage.as_str());
                member(line, "status", status);
                optional(line, "count", (*count > 1).then_some(count));
                optional(line, "peers", several.then_some("several"));
            }
            Self::Event { name, details, .. } => {
                member(line, "event", name);
                for (key, value) in details {
                    member(line, key, value);
                }
            }
            Self::Doubt { id, .. } => {
                member(line, "id", id);
                member(line, "outcome", Outcome::Unknown.as_str());
                member(line, "note", "the process ended between intent and outcome");
            }
        }
    }
}

fn member(line: &mut Vec<u8>, key: &str, value: &(impl Serialize + ?Sized)) {
    line.push(b',');
    // Writing strings, numbers and maps of them into memory cannot fail.
    let _ = serde_json::to_writer(&mut *line, key);
    line.push(b':');
    let _ = serde_json::to_writer(line, value);
}

fn optional(line: &mut Vec<u8>, key: &str, value: Option<impl Serialize>) {
    if let Some(value) = value {
        member(line, key, &value);
    }
}
