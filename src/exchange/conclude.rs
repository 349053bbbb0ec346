//! The end of an exchange: classifies the reply, or decides the outcome if there is none, closes the record, and builds the
//! answer for the caller.
//!
//! Guarantees that no text that quotes a token, the app key or the app secret is passed to the caller or stored. Secrets of
//! fewer than 16 bytes are not searched for: they would be found by chance.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use hyper::body::{Body as _, Incoming};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::attempt::BufferedReply;
use super::reply::{JSON, substitute};
use super::settlement::{Finished, UncommittedResult, finish};
use super::streaming::StreamedReply;
use super::{Exchange, ExchangeReply, Failure, Progress, RelayedBody, Reply};
use crate::audit::{ExchangeResult, StoredReply};
use crate::field_values::retry_after;
use crate::model::cause::Cause;
use crate::model::code::Code;
use crate::model::outcome::{Outcome, ResultCode, Retry};
use crate::reason::Reason;
use crate::result_rule::{Classification, ReplyView};
use crate::secret::needles;
use crate::token::Token;
use crate::upstream::breaker::Health;
use crate::upstream::head::{Cleaned, clean_reply};

/// `Retry-After` for a refusal that names no time.
const DEFAULT_RETRY: Duration = Duration::from_secs(30);

/// What a reply means.
struct Conclusion {
    outcome: Outcome,
    result_code: Option<ResultCode>,
    /// Whether the service itself has answered, not a proxy in front of it.
    is_from_business: bool,
    /// The code for the caller, if the reply refuses the token.
    rejected: Option<Code>,
    /// The cause, if the reply is a failure of the upstream.
    cause: Option<Cause>,
    upstream_id: Option<HeaderValue>,
    /// Whether the body quoted the credential and was replaced.
    is_withheld: bool,
    /// Whether the rest of the reply was dropped unread, so that the connection cannot be used again.
    is_cut: bool,
}

impl Exchange {
    /// Classifies a reply, closes the record and builds the caller's answer. The record of a long reply is closed by its
    /// [`StreamedReply`]. If the second value is `Some`, the answer must wait until that result is committed.
    // Inlined, or its large arguments would be moved once more.
    #[inline(always)]
    pub(super) fn conclude(
        self,
        mut arrived: BufferedReply,
        progress: &Progress,
        deadline: Instant,
    ) -> (ExchangeReply, Option<Box<UncommittedResult>>) {
        let (status, conclusion) = (arrived.status, self.interpret(&mut arrived, progress));
        let Conclusion { outcome, rejected, cause, is_from_business, is_cut, .. } = conclusion;
        let mut answer = self.answer(status, conclusion, progress);
        if let Some(code) = rejected {
            let retry_after = Some(self.cooldown().remaining().unwrap_or(DEFAULT_RETRY));
            let finished =
                finish(self.claim, self.record, &ExchangeResult { outcome: Outcome::Refused, ..answer });
            let failure = Failure { code, outcome: Outcome::Refused, cause, retry_after };
            return (Err(failure), finished.uncommitted);
        }
        let BufferedReply { version, mut headers, body, rest, .. } = arrived;
        let is_keyed = self.claim.is_keyed();
        if is_keyed && rest.is_none() && matches!(outcome, Outcome::Succeeded | Outcome::Failed) {
            answer.reply = StoredReply::new(status, &headers, &body).map(Arc::new);
        }
        if is_from_business {
            self.cooldown().accepted(self.token.generation());
        }
        if status == StatusCode::TOO_MANY_REQUESTS {
            self.terms.quota.throttle(retry_after(&headers).unwrap_or(DEFAULT_RETRY));
        }
        settle_headers(outcome, &mut headers, length(&body, rest.as_ref()));
        let retry = Retry::of_reply(outcome, status, is_keyed);
        let (body, Finished { delivery, uncommitted }) = match rest {
            None => {
                let finished = finish(self.claim, self.record, &answer);
                if !is_cut {
                    self.connection.release();
                }
                (RelayedBody::Whole(body), finished)
            }
            Some(rest) => {
                let (sender, receiver) = mpsc::channel(1);
                let tail = StreamedReply {
                    version,
                    rest,
                    terms: self.terms,
                    route: self.route,
                    token: self.token,
                    first_token: progress.first_token.clone(),
                    sender: Some(sender),
                    open: Some((self.record, answer, self.claim)),
                    _permit: self.permit,
                };
                tokio::spawn(tail.run(body, self.connection, deadline));
                (RelayedBody::Long(receiver), Finished::default())
            }
        };
        (Ok(Box::new(Reply { status, headers, body, outcome, retry, first: None, delivery })), uncommitted)
    }

    /// Classifies a reply, and removes from it what the caller must not see.
    // A quoted secret is searched for after the classification, on the original body: the outcome must be that of the reply that
    // came, not of its stand-in. A result code that is shorter than any searched text cannot hold one; a longer one could.
    #[inline]
    fn interpret(&self, arrived: &mut BufferedReply, progress: &Progress) -> Conclusion {
        let BufferedReply { status, headers, body, rest, .. } = arrived;
        let view = ReplyView { status: *status, body, truncated: rest.is_some() };
        let Classification { outcome, mut result_code } = self.route.result.classify(view);
        // A proxy in front of the service can send any status. A result code shows that the service itself has answered, and so
        // that the token was accepted.
        let is_from_business = result_code.is_some();
        let rejected = match progress.refused {
            Some(_) if self.is_refusal(*status) => Some(progress.refusal()),
            _ => (*status == StatusCode::UNAUTHORIZED).then_some(Code::CredentialRejected),
        };
        let is_quoted = |text: &[u8]| quotes(text, &self.token, progress.first_token.as_ref());
        let (is_withheld, mut is_cut) = (is_quoted(body), false);
        if is_withheld {
            result_code = result_code.filter(|code| code.len() < needles::SHORTEST);
            *body = substitute(self.route.result.field(), result_code.as_deref(), "withheld", None);
            // Dropped unread, since none of it may pass. That closes its connection.
            is_cut = rest.take().is_some();
            self.withhold("body");
        }
        let is_quoting = |value: &HeaderValue| is_quoted(value.as_bytes());
        let Cleaned { upstream_id, quoting } =
            clean_reply(headers, &self.terms.reply_headers, is_from_business, is_quoting);
        if quoting > 0 {
            self.withhold("header");
        }
        if is_withheld {
            describe_withheld(headers);
        }
        let cause = failure(*status, outcome, rejected, progress);
        match cause {
            Some(cause) => self.report_failure(cause, *status, progress),
            None => self.terms.failures.succeeded(),
        }
        Conclusion {
            outcome,
            result_code,
            is_from_business,
            rejected,
            cause,
            upstream_id,
            is_withheld,
            is_cut,
        }
    }

    /// Builds the result for the record. Its field `reply`, the reply to store, is `None`.
    #[inline]
    fn answer(&self, status: StatusCode, conclusion: Conclusion, progress: &Progress) -> ExchangeResult {
        ExchangeResult {
            outcome: conclusion.outcome,
            code: conclusion.rejected,
            cause: conclusion.cause,
            status: Some(conclusion.rejected.map_or(status, Code::status).as_u16()),
            upstream_status: Some(status.as_u16()),
            upstream_id: conclusion.upstream_id,
            result_code: conclusion.result_code,
            attempts: progress.answered,
            token_generation: self.token.generation(),
            note: conclusion.is_withheld.then_some("the reply quoted the credential and was withheld"),
            reply: None,
        }
    }

    /// Reports to operators that a reply is a failure.
    #[cold]
    fn report_failure(&self, cause: Cause, status: StatusCode, progress: &Progress) {
        let what = match cause {
            Cause::TokenRejected => "refuses a fresh token",
            Cause::ReplyStatus => "is out of service",
            Cause::ReplyUnreadable => "sent an answer that does not say what became of the task",
            _ => "refuses the token, and no other one is available",
        };
        self.report(&Reason::new(cause, format!("the upstream {what}: status {status}")), progress);
    }

    /// Reports to operators that the exchange failed.
    #[cold]
    pub(super) fn report(&self, reason: &Reason, progress: &Progress) {
        let tokens = progress.first_token.iter().chain([&self.token]);
        self.terms.failed(reason, self.record.id(), tokens);
    }

    /// Counts and reports that a part of a reply quotes a secret.
    #[cold]
    fn withhold(&self, place: &'static str) {
        self.terms.withhold(place, self.record.id(), &self.route.name);
    }

    /// Records an exchange that did not end by its deadline.
    #[cold]
    pub(super) fn time_out(self, progress: &Progress) -> (ExchangeReply, Option<Box<UncommittedResult>>) {
        // A token endpoint that is too slow is reported by the fetcher.
        if !progress.awaits_token() {
            let text = format!("no answer within {:?}", self.route.timeout);
            self.report(&Reason::new(Cause::Timeout, text), progress);
        }
        self.fail(progress, Code::UpstreamTimeout, Some(Cause::Timeout))
    }

    /// Records an exchange that ended without a reply. `cause` is `None` if all connections were busy. `code` is used if bytes
    /// were sent; otherwise `progress` decides the code.
    pub(super) fn fail(
        self,
        progress: &Progress,
        code: Code,
        cause: Option<Cause>,
    ) -> (ExchangeReply, Option<Box<UncommittedResult>>) {
        // One byte is enough: the count of written bytes does not say how much of the request the upstream has processed.
        let sent = !progress.awaits_token() && self.connection.written() > progress.written_before;
        let (code, outcome) = match (sent, progress.refused) {
            (true, _) => (code, Outcome::Unknown),
            (false, Some(_)) => (progress.refusal(), Outcome::Refused),
            (false, None) if cause.is_none() => (Code::Overloaded, Outcome::NotSent),
            (false, None) => (Code::UpstreamUnreachable, Outcome::NotSent),
        };
        let answer = ExchangeResult {
            outcome,
            code: Some(code),
            cause,
            status: Some(code.status().as_u16()),
            // Of the last attempt only: a replay that was sent has no status, whatever the first attempt got.
            upstream_status: progress.refused.filter(|_| !sent).map(|status| status.as_u16()),
            upstream_id: None,
            result_code: None,
            attempts: progress.answered + u32::from(sent),
            token_generation: self.token.generation(),
            note: None,
            reply: None,
        };
        let Finished { uncommitted, .. } = finish(self.claim, self.record, &answer);
        let retry_after = (outcome == Outcome::Refused).then_some(DEFAULT_RETRY);
        (Err(Failure { code, outcome, cause, retry_after }), uncommitted)
    }
}

/// Returns the cause if the reply is a failure of the upstream, else `None`.
fn failure(
    status: StatusCode,
    outcome: Outcome,
    rejected: Option<Code>,
    progress: &Progress,
) -> Option<Cause> {
    match (rejected, Health::of(status), outcome) {
        (Some(Code::CredentialRejected), ..) => Some(Cause::TokenRejected),
        (Some(_), ..) => progress.no_token,
        (None, Health::Down(cause), _) => Some(cause),
        (None, _, Outcome::Unknown) => Some(Cause::ReplyUnreadable),
        (None, ..) => None,
    }
}

/// Whether a text quotes a token, or the app key or app secret that it was fetched with. Both tokens of the exchange count.
// An upstream that echoes a request, say in an error page, would otherwise hand the credential to a caller.
pub(super) fn quotes(text: &[u8], token: &Token, first_token: Option<&Token>) -> bool {
    token.needles().are_in(text) || first_token.is_some_and(|token| token.needles().are_in(text))
}

/// Makes the head of a reply fit the JSON that takes the place of a withheld body.
#[cold]
fn describe_withheld(headers: &mut HeaderMap) {
    for name in
        [header::CONTENT_LENGTH, header::CONTENT_ENCODING, header::CONTENT_LANGUAGE, header::CONTENT_RANGE]
    {
        headers.remove(name);
    }
    headers.insert(header::CONTENT_TYPE, JSON);
}

/// Sets `Content-Length` and `Retry-After` of a reply that passes.
// `Retry-After` is on every refusal, and never on an unknown outcome: generic clients obey it, and would assign the task twice.
fn settle_headers(outcome: Outcome, headers: &mut HeaderMap, length: Option<u64>) {
    if !states_length(headers, length) {
        headers.remove(header::CONTENT_LENGTH);
    }
    match outcome {
        Outcome::Unknown => drop(headers.remove(header::RETRY_AFTER)),
        Outcome::Refused if !headers.contains_key(header::RETRY_AFTER) => {
            headers.insert(header::RETRY_AFTER, DEFAULT_RETRY.as_secs().into());
        }
        Outcome::Refused | Outcome::NotSent | Outcome::Succeeded | Outcome::Failed | Outcome::Replayed => {}
    }
}

/// Returns the length of a body in bytes. `None` if the body is not read to its end and its head did not state how long it is.
fn length(body: &Bytes, rest: Option<&Incoming>) -> Option<u64> {
    let more = rest.map_or(Some(0), |rest| rest.size_hint().exact());
    more.map(|more| body.len() as u64 + more)
}

/// Whether the head states just this length, in one plain number, so that it may pass.
// A reply may state several lengths, or one that means nothing beside `Transfer-Encoding` (RFC 9112, section 6.3). When such a
// length was passed on, `10` gave a caller the first 10 bytes, a 200, and no sign that more was lost.
fn states_length(headers: &HeaderMap, known: Option<u64>) -> bool {
    let Some(known) = known.filter(|known| *known > 0) else { return false };
    // A reply has few headers. To compare their names costs less than to hash one.
    let mut stated = headers.iter().filter(|(name, _)| **name == header::CONTENT_LENGTH);
    let (first, more) = (stated.next(), stated.next());
    let mut digits = itoa::Buffer::new();
    more.is_none() && first.is_some_and(|(_, first)| first == digits.format(known))
}
