//! Stage 9: send, replay once after a refused token, read, classify.
//!
//! An [`Exchange`] owns all that it needs: from the intent on it runs to its end or deadline whatever the
//! caller does, and its record is closed by it alone. It sends a request again in two cases only: not a
//! byte of it was written, or over HTTP/2 the upstream said that it was not processed and had sent nothing on its
//! stream; or the upstream refused the token and a different one is at hand.

use std::{
    future::Future,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body as _, Incoming};
use prometheus::IntCounterVec;
use thiserror::Error;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tokio_util::sync::ReusableBoxFuture;

use crate::{
    audit::{Answer, Record, StoredReply, withheld},
    clock,
    concurrency::Room,
    field_values::retry_after,
    idempotency::{Claim, Delivery, Finished, NotCommitted, Pending},
    log::OncePerSecond,
    model::{
        cause::Cause,
        code::Code,
        outcome::{Outcome, Retry},
        request_id::{FirstCall, RequestId},
    },
    rate_limit::Quota,
    reason::{Failures, Reason},
    result_rule::{Reply as Judged, Verdict},
    route::Route,
    secret::needles,
    token::{Cooldown, NoOther, Slot, Token},
    upstream::{
        breaker::{self, Breaker, Health, Passage},
        head::{Cleaned, Outbound, clean_reply},
        pool::{NoConnection, Reserved},
    },
};

/// As much of a reply is read before its head goes out, and decides the outcome.
const DECISIVE: usize = 64 * 1024;

/// What is common to all exchanges.
#[derive(Debug)]
pub struct Terms {
    /// The head of every upstream request.
    pub outbound: Outbound,
    /// Statuses that mean "token refused".
    pub refused_statuses: Vec<StatusCode>,
    /// Whether the upstream is left alone.
    pub breaker: Arc<Breaker>,
    /// The upstream's budget.
    pub quota: Quota,
    /// Where tokens come from: one slot per credential, in the configuration's order.
    pub slots: Vec<Arc<Slot>>,
    /// What failed so far.
    pub failures: Failures,
    /// Reply headers that pass to callers, beside those that always do.
    pub reply_headers: Vec<HeaderName>,
    /// What was withheld because it quotes a secret, by place.
    pub withheld: IntCounterVec,
}

/// What is counted of exchanges.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Of the breaker.
    pub breaker: breaker::Metrics,
    /// Requests that failed, by cause.
    pub failures: IntCounterVec,
    /// What was withheld because it quotes a secret, by place.
    pub withheld: IntCounterVec,
}

impl Terms {
    /// No connection was had for a request.
    #[cold]
    pub fn unreachable(&self, passage: &mut Passage, none: &NoConnection, id: RequestId) {
        if let NoConnection::Failed(reason) = none {
            self.breaker.judge(passage, Health::Down(reason.cause));
            self.failed(reason, id, []);
        }
    }

    /// Tells operators that a request failed. Neither the tokens that it was sent with may be quoted, nor those of the slots.
    #[cold]
    fn failed<'a>(&self, reason: &Reason, id: RequestId, sent_with: impl IntoIterator<Item = &'a Token>) {
        let held = self.slots.iter().filter_map(|slot| slot.last_token());
        let tokens: Vec<_> = held.chain(sent_with.into_iter().cloned()).collect();
        if let Some((error, times)) = self.failures.failed(reason, tokens.iter().map(Token::needles)) {
            tracing::warn!(cause = %reason.cause, error, %id, times, "the upstream failed");
        }
    }

    /// Counts and tells that something of a reply quotes a secret.
    fn withhold(&self, place: &'static str, id: RequestId, route: &str) {
        static QUOTED: OncePerSecond = OncePerSecond::new();
        self.withheld.with_label_values(&[place]).inc();
        if let Some(times) = QUOTED.times() {
            tracing::warn!(%id, route, place, times, "the upstream's reply quotes the credential, and was not passed on");
        }
    }

    fn request(
        &self,
        route: &Route,
        token: &Token,
        operator: &HeaderValue,
        body: &Bytes,
    ) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = route.target.clone();
        *request.headers_mut() = self.outbound.with(token, operator, body.len());
        request
    }
}

/// One exchange with the upstream under one intent.
#[derive(Debug)]
pub struct Exchange {
    /// What is common to all exchanges.
    pub terms: Arc<Terms>,
    /// The route.
    pub route: Arc<Route>,
    /// Index of the credential.
    pub credential: usize,
    /// Its leave to meet the upstream.
    pub passage: Passage,
    /// The connection reserved before the intent.
    pub connection: Reserved,
    /// The token.
    pub token: Token,
    /// Who acts.
    pub operator: HeaderValue,
    /// The checked body.
    pub body: Bytes,
    /// The request's record; its intent is safe.
    pub record: Record,
    /// Its right to be sent.
    pub claim: Claim,
    /// The request's place under the bound on concurrent work.
    pub room: Room,
}

/// The upstream's reply, on its way to the caller.
#[derive(Debug)]
pub struct Reply {
    /// Its status.
    pub status: StatusCode,
    /// Its headers, cleaned.
    pub headers: HeaderMap,
    /// Its body.
    pub body: ReplyBody,
    /// What it means.
    pub outcome: Outcome,
    /// What a client may do about it.
    pub retry: Retry,
    /// The earlier call that this one repeats or equals.
    pub first: Option<FirstCall>,
    /// A success, until its caller has it.
    pub delivery: Option<Delivery>,
}

/// A reply's body.
#[derive(Debug)]
pub enum ReplyBody {
    /// Read whole.
    Whole(Bytes),
    /// Longer than what decides: handed on as it comes. Without a [`Piece::Last`] it broke off, and the
    /// caller's connection is aborted.
    Long(mpsc::Receiver<Piece>),
}

/// A piece of a long reply.
#[derive(Debug)]
pub enum Piece {
    /// More will come.
    More(Bytes),
    /// The end.
    Last(Bytes),
}

/// A long reply broke off.
#[derive(Clone, Copy, Debug, Error)]
#[error("the upstream's reply broke off")]
pub struct BrokenOff;

/// Why an exchange ended without a reply for the caller. The record is closed already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The code for the caller.
    pub code: Code,
    /// What became of the task.
    pub outcome: Outcome,
    /// Why, where the other side failed.
    pub cause: Option<Cause>,
    /// When the caller may come back, where repeating is safe.
    pub retry_after: Option<Duration>,
}

/// What the caller is to be told. In a box, since it is moved twenty times on its way.
pub type Told = Result<Box<Reply>, Failure>;

/// How far an exchange got, for the case that it ends without an answer.
#[derive(Debug)]
struct Progress {
    /// Attempts that were answered.
    answered: u32,
    /// Where the connection's counter stood before the last request, or behind the last answer.
    mark: u64,
    /// The answer that refused the token.
    refused: Option<StatusCode>,
    /// The token that was refused, if another one was sent behind it.
    first_token: Option<Token>,
    /// Another token does not help: a fresh one was refused too, or the same one was handed out again.
    is_rejected: bool,
    /// Why no other token could be had.
    no_token: Option<Cause>,
    /// The last answer. Here, since it would be moved with each step back.
    arrived: Option<Arrived>,
}

impl Progress {
    /// Why a token that was refused ends the exchange.
    fn refusal(&self) -> Code {
        if self.is_rejected { Code::CredentialRejected } else { Code::TokenUnavailable }
    }

    /// Whether the token was refused and no other one is at hand yet: what takes long then is the token endpoint. Bytes may
    /// yet leave, since the upstream may have refused the request before it had all of it.
    fn awaits_token(&self) -> bool {
        self.refused.is_some() && self.first_token.is_none()
    }
}

/// Why an attempt brought no answer.
#[derive(Debug)]
enum Broken {
    /// There is no connection, and nothing of this attempt was sent.
    Unreachable(NoConnection),
    /// It may have been sent.
    BrokeOff(Reason),
}

/// In a box, since each answer would be as large.
type NoAnswer = Box<Broken>;

impl Broken {
    fn unreachable(none: NoConnection) -> NoAnswer {
        Box::new(Self::Unreachable(none))
    }

    fn broke_off(reason: Reason) -> NoAnswer {
        Box::new(Self::BrokeOff(reason))
    }
}

/// An answer whose head and first bytes are read.
#[derive(Debug)]
struct Arrived {
    version: Version,
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
    /// The rest, if there is more than [`DECISIVE`] bytes.
    rest: Option<Incoming>,
}

impl Exchange {
    /// Returns the status of the answer, which is with the progress.
    async fn attempts(&mut self, progress: &mut Progress) -> Result<StatusCode, NoAnswer> {
        let first = self.attempt(progress).await?;
        if self.is_refusal(first) { Box::pin(self.replay(first, progress)).await } else { Ok(first) }
    }

    /// The token was refused: sends once more, if there is a different one.
    #[cold]
    async fn replay(&mut self, first: StatusCode, progress: &mut Progress) -> Result<StatusCode, NoAnswer> {
        progress.refused = Some(first);
        if let Some(first) = &mut progress.arrived {
            first.rest = None; // nobody reads it: its connection closes, and the replay takes a new one
        }
        let refused = self.token.generation();
        // Looked at before another fetch may end it.
        let had_worked = self.cooldown().has_accepted(refused) && self.slot().has_left_alone(refused);
        let Some(token) = self.another_token(had_worked, progress).await else { return Ok(first) };
        progress.first_token = Some(std::mem::replace(&mut self.token, token));
        self.terms.quota.overdraw(); // a replay is a request, too
        let second = self.attempt(progress).await?;
        progress.is_rejected = self.is_refusal(second);
        if progress.is_rejected {
            self.cooldown().rejected();
        } else if had_worked && second.is_success() {
            self.slot().was_ended(refused); // the same call succeeds, so that it was the token
        }
        Ok(second)
    }

    /// Another token than the one that was refused. A cool-down causes no fetch.
    async fn another_token(&self, had_worked: bool, progress: &mut Progress) -> Option<Token> {
        let refused = self.token.generation();
        if let Some(token) = self.slot().newer(refused) {
            return Some(token);
        }
        if !self.cooldown().may_fetch(refused) {
            progress.is_rejected = true;
            return None;
        }
        match self.slot().replace(refused, had_worked).await {
            Ok(token) => return Some(token),
            Err(NoOther::Failed(cause)) => progress.no_token = Some(cause),
            Err(NoOther::Same) => {
                progress.is_rejected = true;
                self.cooldown().rejected();
            }
        }
        None
    }

    /// Where another token comes from.
    fn slot(&self) -> &Slot {
        &self.terms.slots[self.credential]
    }

    /// Whether a refused token causes a fetch.
    fn cooldown(&self) -> &Cooldown {
        self.route.cooldown(self.credential)
    }

    fn is_refusal(&self, status: StatusCode) -> bool {
        self.terms.refused_statuses.contains(&status)
    }

    /// Sends once and reads the answer. A connection that dies before a byte was written is replaced, once.
    async fn attempt(&mut self, progress: &mut Progress) -> Result<StatusCode, NoAnswer> {
        let mut fresh = false;
        loop {
            if self.connection.is_stale() {
                self.connection.reconnect().await.map_err(Broken::unreachable)?;
                fresh = true;
            }
            progress.mark = self.connection.written();
            let sent = match self.connection.ready().await {
                Ok(()) => {
                    let Self { terms, route, token, operator, body, connection, .. } = &mut *self;
                    connection.send(|| terms.request(route, token, operator, body)).await
                }
                Err(error) => Err(error),
            };
            match sent {
                Ok(response) => {
                    if response.status().is_informational() {
                        let text = format!("status {}: no other protocol was asked for", response.status());
                        return Err(Broken::broke_off(Reason::new(Cause::ReplyUnreadable, text)));
                    }
                    let arrived = progress.arrived.insert(Arrived::new(response));
                    arrived.read().await?;
                    let status = arrived.status;
                    progress.mark = self.connection.written();
                    progress.answered += 1;
                    return Ok(status);
                }
                Err(error) if self.connection.written() != progress.mark => {
                    return Err(Broken::broke_off(error.reason()));
                }
                Err(error) if fresh => return Err(Broken::unreachable(error.reason().into())),
                Err(_) => {
                    self.connection.reconnect().await.map_err(Broken::unreachable)?;
                    fresh = true;
                }
            }
        }
    }

    /// Classifies an answer, records the outcome and hands the answer on. Returns what must be safe before, too.
    #[inline(always)] // or what it takes is moved once more
    fn conclude(
        self,
        arrived: Arrived,
        progress: &Progress,
        deadline: Instant,
    ) -> (Told, Option<Box<Pending>>) {
        let Arrived { version, status, mut headers, mut body, mut rest } = arrived;
        let judged = Judged { status, body: &body, truncated: rest.is_some() };
        let Verdict { outcome, mut result_code } = self.route.result.classify(judged);
        // A proxy in front can answer anything; a result code comes from behind the check of the token.
        let answered_by_business = result_code.is_some();
        let rejected = match progress.refused {
            Some(_) if self.is_refusal(status) => Some(progress.refusal()),
            _ => (status == StatusCode::UNAUTHORIZED).then_some(Code::CredentialRejected),
        };
        let is_quoted = |text: &[u8]| quotes(text, &self.token, progress.first_token.as_ref());
        let (is_withheld, mut is_cut) = (is_quoted(&body), false);
        if is_withheld {
            result_code = result_code.filter(|code| code.len() < needles::SHORTEST);
            body = withheld(self.route.result.field(), result_code.as_deref());
            is_cut = rest.take().is_some(); // nobody reads it, so that its connection closes
            self.withhold("body");
        }
        let Cleaned { upstream_id, quoting } =
            clean_reply(&mut headers, &self.terms.reply_headers, answered_by_business, |value| {
                is_quoted(value.as_bytes())
            });
        if quoting > 0 {
            self.withhold("header");
        }
        if is_withheld {
            describe_withheld(&mut headers);
        }
        let cause = failure((status, outcome), rejected, progress);
        match cause {
            Some(cause) => self.tell_answer(cause, status, progress),
            None => self.terms.failures.succeeded(),
        }
        let mut answer = Answer {
            outcome,
            code: rejected,
            cause,
            status: Some(rejected.map_or(status, Code::status).as_u16()),
            upstream_status: Some(status.as_u16()),
            upstream_id,
            result_code,
            attempts: progress.answered,
            token_generation: self.token.generation(),
            note: is_withheld.then_some("the reply quoted the credential and was withheld"),
            reply: None,
        };
        if let Some(code) = rejected {
            let retry_after = Some(self.cooldown().remaining().unwrap_or(DEFAULT_RETRY));
            let finished = self.claim.finish(self.record, &Answer { outcome: Outcome::Refused, ..answer });
            let failure = Failure { code, outcome: Outcome::Refused, cause, retry_after };
            return (Err(failure), finished.pending);
        }
        if self.claim.is_keyed() && matches!(outcome, Outcome::Succeeded | Outcome::Failed) {
            answer.reply = StoredReply::new(status, &headers, &body).filter(|_| rest.is_none()).map(Arc::new);
        }
        if answered_by_business {
            self.cooldown().accepted(self.token.generation());
        }
        if status == StatusCode::TOO_MANY_REQUESTS {
            self.terms.quota.shrink(retry_after(&headers).unwrap_or(DEFAULT_RETRY));
        }
        settle_retry_after(outcome, &mut headers);
        let retry = Retry::of_reply(outcome, status, self.claim.is_keyed());
        let mut finished = Finished::default();
        if !states_length(&headers, length(&body, rest.as_ref())) {
            headers.remove(header::CONTENT_LENGTH);
        }
        let body = match rest {
            None => {
                finished = self.claim.finish(self.record, &answer);
                if !is_cut {
                    self.connection.give_back();
                }
                ReplyBody::Whole(body)
            }
            Some(rest) => {
                let (sender, receiver) = mpsc::channel(1);
                let open = Some((self.record, answer, self.claim));
                let tail = Tail {
                    version,
                    rest,
                    terms: self.terms,
                    route: self.route,
                    token: self.token,
                    first_token: progress.first_token.clone(),
                    sender: Some(sender),
                    open,
                    _room: self.room,
                };
                tokio::spawn(tail.run(body, self.connection, deadline));
                ReplyBody::Long(receiver)
            }
        };
        let Finished { delivery, pending } = finished;
        (Ok(Box::new(Reply { status, headers, body, outcome, retry, first: None, delivery })), pending)
    }

    /// Tells operators that an answer is a failure.
    #[cold]
    fn tell_answer(&self, cause: Cause, status: StatusCode, progress: &Progress) {
        let what = match cause {
            Cause::TokenRejected => "refuses a fresh token",
            Cause::ReplyStatus => "is out of service",
            Cause::ReplyUnreadable => "answers nothing that tells what became of the task",
            _ => "refuses the token, and no other one can be had",
        };
        self.tell(&Reason::new(cause, format!("the upstream {what}: status {status}")), progress);
    }

    /// Tells operators that the exchange failed.
    #[cold]
    fn tell(&self, reason: &Reason, progress: &Progress) {
        let tokens = progress.first_token.iter().chain([&self.token]);
        self.terms.failed(reason, self.record.id(), tokens);
    }

    /// Counts and tells that something of a reply quotes a secret.
    #[cold]
    fn withhold(&self, place: &'static str) {
        self.terms.withhold(place, self.record.id(), &self.route.name);
    }

    /// Records an exchange that took too long. A fetch of another token that did is told by its fetcher.
    #[cold]
    fn time_out(self, progress: &Progress) -> (Told, Option<Box<Pending>>) {
        if !progress.awaits_token() {
            let text = format!("no answer within {:?}", self.route.timeout);
            self.tell(&Reason::new(Cause::Timeout, text), progress);
        }
        self.fail(progress, Code::UpstreamTimeout, Some(Cause::Timeout))
    }

    /// Records an exchange that brought no answer. Without a cause all connections were busy.
    fn fail(self, progress: &Progress, code: Code, cause: Option<Cause>) -> (Told, Option<Box<Pending>>) {
        let sent = !progress.awaits_token() && self.connection.written() > progress.mark;
        let (code, outcome) = match (sent, progress.refused) {
            (true, _) => (code, Outcome::Unknown),
            (false, Some(_)) => (progress.refusal(), Outcome::Refused),
            (false, None) if cause.is_none() => (Code::Overloaded, Outcome::NotSent),
            (false, None) => (Code::UpstreamUnreachable, Outcome::NotSent),
        };
        let answer = Answer {
            outcome,
            code: Some(code),
            cause,
            status: Some(code.status().as_u16()),
            upstream_status: progress.refused.filter(|_| !sent).map(|status| status.as_u16()),
            upstream_id: None,
            result_code: None,
            attempts: progress.answered + u32::from(sent),
            token_generation: self.token.generation(),
            note: None,
            reply: None,
        };
        let Finished { pending, .. } = self.claim.finish(self.record, &answer);
        let retry_after = (outcome == Outcome::Refused).then_some(DEFAULT_RETRY);
        (Err(Failure { code, outcome, cause, retry_after }), pending)
    }
}

impl Broken {
    /// What it tells of the upstream's health.
    fn health(&self) -> Health {
        match self {
            Self::Unreachable(NoConnection::Failed(reason)) => Health::Down(reason.cause),
            Self::Unreachable(NoConnection::Busy) | Self::BrokeOff(_) => Health::Unclear,
        }
    }

    /// The code for what may have been sent, and why; without a reason all connections were busy.
    fn told(&self) -> (Code, Option<&Reason>) {
        match self {
            Self::Unreachable(NoConnection::Failed(reason)) => (Code::UpstreamUnreachable, Some(reason)),
            Self::Unreachable(NoConnection::Busy) => (Code::Overloaded, None),
            Self::BrokeOff(reason) => (Code::UpstreamBroken, Some(reason)),
        }
    }
}

/// Why an answer is a failure, if it is one.
fn failure(
    (status, outcome): (StatusCode, Outcome),
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

/// Whether a text quotes a token, or what it was fetched with: the present one, or the one that was refused before it.
fn quotes(text: &[u8], token: &Token, first_token: Option<&Token>) -> bool {
    token.needles().are_in(text) || first_token.is_some_and(|token| token.needles().are_in(text))
}

/// The head of a reply whose body was withheld: what stands in its place is JSON of another length.
#[cold]
fn describe_withheld(headers: &mut HeaderMap) {
    for name in
        [header::CONTENT_LENGTH, header::CONTENT_ENCODING, header::CONTENT_LANGUAGE, header::CONTENT_RANGE]
    {
        headers.remove(name);
    }
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
}

/// When to come back after a refusal that names no time.
const DEFAULT_RETRY: Duration = Duration::from_secs(30);

/// `Retry-After` stands on every refusal and never on an unknown outcome: generic clients obey it, and
/// would assign twice.
fn settle_retry_after(outcome: Outcome, headers: &mut HeaderMap) {
    match outcome {
        Outcome::Unknown => drop(headers.remove(header::RETRY_AFTER)),
        Outcome::Refused if !headers.contains_key(header::RETRY_AFTER) => {
            headers.insert(header::RETRY_AFTER, DEFAULT_RETRY.as_secs().into());
        }
        Outcome::Refused | Outcome::NotSent | Outcome::Succeeded | Outcome::Failed | Outcome::Replayed => {}
    }
}

/// How long a body is. Of one that is not read to its end this is known only if its `Content-Length` frames it.
fn length(body: &Bytes, rest: Option<&Incoming>) -> Option<u64> {
    let more = rest.map_or(Some(0), |rest| rest.size_hint().exact());
    more.map(|more| body.len() as u64 + more)
}

/// Whether the head states just this length, in one plain number, so that it can pass. A reply may state several, or one that
/// means nothing beside `Transfer-Encoding` (RFC 9112, section 6.3).
fn states_length(headers: &HeaderMap, known: Option<u64>) -> bool {
    let Some(known) = known.filter(|known| *known > 0) else { return false };
    // A reply has few headers: to look at them is less than to hash a name.
    let mut stated = headers.iter().filter(|(name, _)| **name == header::CONTENT_LENGTH);
    let (first, more) = (stated.next(), stated.next());
    let mut digits = itoa::Buffer::new();
    more.is_none() && first.is_some_and(|(_, first)| first == digits.format(known))
}

impl Arrived {
    /// An answer of which nothing but the head is read.
    fn new(response: Response<Incoming>) -> Self {
        let (head, rest) = response.into_parts();
        let (version, status, headers) = (head.version, head.status, head.headers);
        Self { version, status, headers, body: Bytes::new(), rest: Some(rest) }
    }

    /// Reads the body to its end, or as far as it decides.
    async fn read(&mut self) -> Result<(), NoAnswer> {
        let mut more = BytesMut::new();
        while let Some(rest) = &mut self.rest {
            // Of a body whose length is known, nothing comes behind its last byte.
            let frame = if rest.is_end_stream() { None } else { rest.frame().await };
            let Some(frame) = frame else {
                if !is_whole(rest, self.version) {
                    return Err(Broken::broke_off(cut_short()));
                }
                self.rest = None;
                break;
            };
            let frame = frame.map_err(|error| Broken::broke_off(Reason::of_exchange(&error)))?;
            let Ok(data) = frame.into_data() else { continue };
            if self.body.is_empty() {
                self.body = data; // the common case: one piece, passed on without a copy
            } else {
                more.extend_from_slice(&data);
            }
            if self.body.len() + more.len() > DECISIVE {
                break;
            }
        }
        if !more.is_empty() {
            self.body = [&self.body[..], &more].concat().into();
        }
        Ok(())
    }
}

/// A reply ended before its end.
fn cut_short() -> Reason {
    Reason::new(Cause::ReplyCut, "the stream of the reply was reset before its end")
}

/// Whether a body without a next frame has come to its end. Over HTTP/2 hyper ends it, too, when the stream is reset or
/// denied by a GOAWAY with the reason NO_ERROR, at whatever byte.
fn is_whole(body: &Incoming, version: Version) -> bool {
    version != Version::HTTP_2 || body.is_end_stream()
}

/// The rest of a long reply. Reads on when the caller is gone, so that the record says how it ended.
struct Tail {
    version: Version,
    rest: Incoming,
    terms: Arc<Terms>,
    route: Arc<Route>,
    token: Token,
    first_token: Option<Token>,
    /// `None` once the caller is gone or does not take what comes.
    sender: Option<mpsc::Sender<Piece>>,
    /// The record, what it will say, and the claim; `None` once they are closed.
    open: Option<(Record, Answer, Claim)>,
    _room: Room,
}

impl Tail {
    /// Holds back as much as may begin a secret that is quoted, and at least one byte, so that the outcome is recorded
    /// before the last one. It searches when as much again has come, so that small pieces do
    /// not make it search the same bytes over and over.
    async fn run(mut self, first: Bytes, connection: Reserved, deadline: Instant) {
        let first_token = self.first_token.as_ref().map_or(0, |token| token.needles().longest());
        let kept = self.token.needles().longest().max(first_token).max(1);
        let mut held = BytesMut::from(first);
        loop {
            if held.len() >= 2 * kept {
                if quotes(&held, &self.token, self.first_token.as_ref()) {
                    return self.cut_off(deadline).await;
                }
                let piece = held.split_to(held.len() - kept).freeze();
                self.hand_on(Piece::More(piece), deadline).await;
                clock::refresh(); // pieces may come without a pause, and the search takes time
            }
            match timeout_at(deadline, self.rest.frame()).await {
                Ok(Some(Ok(frame))) => held.extend_from_slice(&frame.into_data().unwrap_or_default()),
                Ok(None) if is_whole(&self.rest, self.version) => {
                    if quotes(&held, &self.token, self.first_token.as_ref()) {
                        return self.cut_off(deadline).await;
                    }
                    let finished = self.close(self.not_taken());
                    connection.give_back();
                    // If it fails, the caller sees the reply break off, and asks again with its key.
                    if let Ok(delivery) = committed(finished, deadline).await {
                        self.hand_on(Piece::Last(held.freeze()), deadline).await;
                        self.settle(delivery);
                    }
                    return;
                }
                broken => {
                    let reason = match broken {
                        Ok(Some(Err(error))) => Reason::of_exchange(&error),
                        Ok(_) => cut_short(),
                        Err(_) => Reason::new(Cause::Timeout, "the reply did not end in time"),
                    };
                    if let Some((record, answer, _)) = &mut self.open {
                        answer.cause = Some(reason.cause);
                        let tokens = self.first_token.iter().chain([&self.token]);
                        self.terms.failed(&reason, record.id(), tokens);
                    }
                    let broken = "the reply broke off behind its first 64 KiB";
                    let finished = self.close(self.not_taken().or(Some(broken)));
                    self.settle(committed(finished, deadline).await.ok().flatten());
                    return;
                }
            }
        }
    }

    /// What has come quotes a secret: nothing more is handed on.
    #[cold]
    async fn cut_off(mut self, deadline: Instant) {
        if let Some((record, ..)) = &self.open {
            self.terms.withhold("tail", record.id(), &self.route.name);
        }
        let finished = self.close(Some("the reply quoted the credential and was cut off"));
        self.settle(committed(finished, deadline).await.ok().flatten());
    }

    fn not_taken(&self) -> Option<&'static str> {
        self.sender.is_none().then_some("the caller did not take all of the reply")
    }

    /// A piece that is lost must be the last one that is tried: the caller shall see the break.
    async fn hand_on(&mut self, piece: Piece, deadline: Instant) {
        let Some(sender) = &self.sender else { return };
        if !matches!(timeout_at(deadline, sender.send(piece)).await, Ok(Ok(()))) {
            self.sender = None;
        }
    }

    fn close(&mut self, note: Option<&'static str>) -> Finished {
        let Some((record, answer, claim)) = self.open.take() else { return Finished::default() };
        claim.finish(record, &Answer { note, ..answer })
    }

    /// The head, which a caller that took the rest has, tells of the success.
    fn settle(&self, delivery: Option<Delivery>) {
        if let Some(mut delivery) = delivery.filter(|_| self.sender.is_some()) {
            delivery.hand_over();
        }
    }
}

/// Waits until the outcome is committed, where that matters.
async fn committed(finished: Finished, deadline: Instant) -> Result<Option<Delivery>, NotCommitted> {
    match finished.pending {
        Some(pending) => pending.committed_by(deadline).await,
        None => Ok(finished.delivery),
    }
}

/// Cut off by a stop: what the caller was told is what the record says.
impl Drop for Tail {
    fn drop(&mut self) {
        drop(self.close(Some("the gateway stopped while the reply was passed on")));
    }
}

/// The exchanges of one worker, and the boxes that they run in, which are used again.
#[derive(Debug, Default)]
pub struct Exchanges(Mutex<Vec<ReusableBoxFuture<'static, Told>>>);

/// So many boxes are kept.
const KEPT_BOXES: usize = 256;

impl Exchanges {
    /// Runs an exchange to its end or deadline. The caller of this future may drop it: see [`Detached`].
    pub fn run(self: &Arc<Self>, mut exchange: Exchange) -> Detached {
        // A block, not a function: that would hold its argument twice.
        let run = async move {
            let deadline = clock::now() + exchange.route.timeout;
            let mark = exchange.connection.written();
            let mut progress = Progress {
                answered: 0,
                mark,
                refused: None,
                first_token: None,
                is_rejected: false,
                no_token: None,
                arrived: None,
            };
            let mut timer = exchange.connection.take_timer();
            let status = timer.until(deadline, pin!(exchange.attempts(&mut progress))).await;
            let arrived = if let Some(Ok(_)) = status { progress.arrived.take() } else { None };
            exchange.connection.keep_timer(timer);
            let health = match &status {
                Some(Ok(status)) => Health::of(*status),
                Some(Err(broken)) => broken.health(),
                // It has answered; what took so long was another token.
                None if progress.awaits_token() => Health::Unclear,
                None => Health::Down(Cause::Timeout),
            };
            exchange.terms.breaker.judge(&mut exchange.passage, health);
            let (told, pending) = match (arrived, status) {
                (Some(arrived), _) => exchange.conclude(arrived, &progress, deadline),
                (None, Some(Err(broken))) => {
                    let (code, reason) = broken.told();
                    reason.into_iter().for_each(|reason| exchange.tell(reason, &progress));
                    exchange.fail(&progress, code, reason.map(|reason| reason.cause))
                }
                (None, _) => exchange.time_out(&progress),
            };
            match pending {
                None => told,
                Some(pending) => Box::pin(pending.settle(told, deadline)).await,
            }
        };
        let future = match self.boxes().pop() {
            Some(mut used) => {
                used.set(run);
                used
            }
            None => ReusableBoxFuture::new(run),
        };
        Detached { future: Some(future), exchanges: self.clone() }
    }

    fn boxes(&self) -> MutexGuard<'_, Vec<ReusableBoxFuture<'static, Told>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An exchange that nobody cancels: dropped before its end, it runs on by itself.
#[derive(Debug)]
pub struct Detached {
    future: Option<ReusableBoxFuture<'static, Told>>,
    exchanges: Arc<Exchanges>,
}

impl Future for Detached {
    type Output = Told;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(future) = self.future.as_mut() else { return Poll::Pending };
        let output = ready!(future.poll(cx));
        if let Some(used) = self.future.take() {
            let mut boxes = self.exchanges.boxes();
            if boxes.len() < KEPT_BOXES {
                boxes.push(used);
            }
        }
        Poll::Ready(output)
    }
}

impl Drop for Detached {
    fn drop(&mut self) {
        if let Some(future) = self.future.take()
            && !std::thread::panicking()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(future);
        }
    }
}
