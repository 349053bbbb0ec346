//! How an exchange ended, as its outcome tells it.

use std::sync::Arc;

use http::HeaderValue;

use super::{StoredReply, line::Line};
use crate::model::{
    cause::Cause,
    code::Code,
    outcome::{Outcome, ResultCode},
    stage::Stage,
};

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

impl Answer {
    pub(super) fn without_reply(outcome: Outcome, code: Code) -> Self {
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
