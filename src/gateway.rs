//! The request function: [`Gateway::handle`], which always answers, and `proxy`, the stages in their order.

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use arc_swap::ArcSwap;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use serde_json::{Map, Value, json};
use tokio::time::timeout;

use crate::{
    admission::{Caller, Denied, Hosts},
    audit::{Audit, Detail, Record},
    clock,
    concurrency::Bounds,
    config::BareIds,
    contract::{Checked, CheckedBody, Violation, body::receive},
    disconnect::CallerPresence,
    error::Error,
    exchange::{BrokenOff, Exchange, Exchanges, Piece, Reply, ReplyBody},
    idempotency::{Begun, Call, DeliverySlot, Idempotency, Would},
    metrics::{Limit, Metrics},
    model::{
        code::Code,
        outcome::{Outcome, Retry},
        peer::Peer,
        request_id::{FirstCall, RequestId},
        stage::Stage,
    },
    request_head::Inbound,
    route::Routed,
    state::{Route, State},
    upstream::pool::{NoConnection, Pool},
};

/// What one worker needs to answer requests.
#[derive(Debug)]
pub struct Gateway {
    /// Everything compiled from the configuration that is in effect.
    pub state: Arc<ArcSwap<State>>,
    /// The upstream connections of this worker.
    pub pool: Arc<Pool>,
    /// The exchanges on them.
    pub exchanges: Arc<Exchanges>,
    /// The audit trail.
    pub audit: Audit,
    /// The calls of the window.
    pub idempotency: Arc<Idempotency>,
    /// The bounds on concurrent work.
    pub bounds: Arc<Bounds>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

/// How much of a refused body is read and thrown away, so that the connection stays usable.
const LINGER_BYTES: u64 = 256 * 1024;
const LINGER_TIME: Duration = Duration::from_secs(1);

/// So many names or violations of a refused request are on record, and so many characters of a name or path.
const MAX_DETAILS: usize = 5;
const MAX_DETAIL: usize = 128;

const OUTCOME: HeaderName = HeaderName::from_static("x-gateway-outcome");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-gateway-request-id");
const ERROR: HeaderName = HeaderName::from_static("x-gateway-error");
const RETRY: HeaderName = HeaderName::from_static("x-gateway-retry");
const FIRST: HeaderName = HeaderName::from_static("x-gateway-first-request-id");
const FIRST_OUTCOME: HeaderName = HeaderName::from_static("x-gateway-first-outcome");
const CALLER_ID: HeaderName = HeaderName::from_static("x-request-id");
const PROBLEM: HeaderValue = HeaderValue::from_static("application/problem+json");

/// The words of outcomes and of what a client may do, made once: each is looked at byte by byte.
static OUTCOMES: [HeaderValue; 6] = {
    const fn word(index: usize) -> HeaderValue {
        HeaderValue::from_static(Outcome::ALL[index].as_str())
    }
    [word(0), word(1), word(2), word(3), word(4), word(5)]
};
static RETRIES: [HeaderValue; 6] = {
    const fn word(index: usize) -> HeaderValue {
        HeaderValue::from_static(Retry::ALL[index].as_str())
    }
    [word(0), word(1), word(2), word(3), word(4), word(5)]
};

impl Gateway {
    /// Answers one request. Cannot fail: an error becomes a response, a panic becomes 500, and the record
    /// closes itself if the caller leaves before the intent. After the intent the exchange goes on without
    /// the caller.
    pub async fn handle(&self, from: Arrival<'_>, request: Request<Incoming>) -> Response<Answer> {
        let begin = clock::nanos();
        let mut record = self.audit.open(from.peer);
        let id = record.id();
        let (head, mut body) = request.into_parts();
        let inbound = Inbound::read(&head);
        let caller_id = inbound.caller_id.first.filter(|id| can_be_echoed(id));
        if let Some(id) = caller_id {
            record.caller_id(id.clone());
        }
        if let Some(parent) = inbound.traceparent.only().filter(|value| is_traceparent(value.as_bytes())) {
            record.traceparent(parent.clone());
        }
        let target = (&head.method, &head.uri);
        let proxied = {
            let state = self.state.load_full(); // one configuration for the whole request
            let proxied = pin!(self.proxy(&state, from, (target, &inbound), &mut body, &mut record));
            survive(proxied).await
        };
        let mut response = match proxied.unwrap_or_else(|| Err(Error::internal(record.is_taken()))) {
            Ok(reply) => {
                self.metrics.replied(reply.outcome, took(begin));
                answer(reply, &from)
            }
            Err(mut error) => {
                let stage = record.stage();
                if let Some(first) = error.first {
                    record.first(first);
                }
                if let Some(detail) = detail(&error, &from, &head.uri) {
                    record.detail(detail);
                }
                record.refuse_for(error.code, error.code.status().as_u16(), error.cause);
                self.metrics.refused(stage, error.own_outcome(), error.code, took(begin));
                tracing::debug!(%id, code = %error.code, %stage, detail = error.detail, "refused");
                let is_read = Box::pin(linger(&inbound, body)).await;
                let clean = is_read && !from.surplus && !error.code.is_ambiguous();
                let retry = error.code.retry(error.outcome, inbound.idempotency_key.count > 0);
                if let Some(delivery) = error.delivery.take() {
                    from.delivery.put(*delivery, !from.presence.has_ended());
                }
                refuse(&error, stage, id, retry, clean)
            }
        };
        let headers = response.headers_mut();
        headers.insert(REQUEST_ID, request_id(id));
        if let Some(id) = caller_id {
            headers.insert(CALLER_ID, id.clone());
        }
        response
    }

    /// The way of a request. The order of these lines is the security argument: nothing is looked up for a
    /// stranger, nothing is read for a caller over its limit, no token is spent on a bad body or on one that was
    /// sent before, and nothing leaves before its intent is safe.
    async fn proxy(
        &self,
        state: &State,
        from: Arrival<'_>,
        (target, head): ((&Method, &Uri), &Inbound<'_>),
        body: &mut Incoming,
        record: &mut Record,
    ) -> Result<Box<Reply>, Error> {
        let room = self.bounds.request(from.surplus);
        let room = room.map_err(|none| name_denied(state, &from, record, none.into()))?;
        let known = state.admission.recognise((from.peer, from.names), from.hosts, head);
        let known = known.map_err(|denied| name_denied(state, &from, record, denied))?;
        let caller = known.caller();
        record.caller(caller.name.clone());
        let admitted = known.admit(head)?;
        self.metrics.credentials_dropped(head.credentials);

        record.enter(Stage::Route);
        let routed = state.routes.find(&admitted, target, head)?;
        let Route { contract, exchange: route, .. } = routed.route;
        record.route(route.name.clone());
        record.operator(routed.operator.clone());

        record.enter(Stage::RateLimit);
        let within = caller.limit.take();
        self.metrics.limit_checked(Limit::Caller, within.is_ok());
        within?;

        record.enter(Stage::Contract);
        let Checked { result, large_ids } =
            contract.check(receive(head, body, state.body, &self.bounds).await?, caller.bare_ids);
        if large_ids > 0 {
            self.large_ids(caller, &route.name, record.id(), large_ids);
        }
        let checked = result?;

        record.enter(Stage::Idempotency);
        let digest = self.audit.keys().digest(checked.bytes());
        let call = Call {
            caller: &caller.name,
            is_alone: caller.is_alone,
            max_keys: caller.max_keys,
            route: &route.name,
            operator: routed.operator,
            digest: &digest,
            id: record.id().uuid(),
        };
        if routed.is_dry_run {
            return Box::pin(self.rehearse(state, from, &routed, (call, head), &checked, record)).await;
        }
        let claim = match self.idempotency.begin(call, head)? {
            Begun::Claim(claim) => claim,
            Begun::Replay(replay) => {
                record.first(replay.first);
                let reply = Reply::replayed(replay, &route.result);
                record.replayed(reply.status.as_u16());
                return Ok(Box::new(reply));
            }
        };
        let first = claim.first();
        if let Some(first) = first {
            record.first(first);
        }
        if claim.is_forced() {
            record.forced();
        }

        record.enter(Stage::Token);
        let slot = &state.terms.slots[routed.credential];
        let token = from.presence.during(pin!(slot.token())).await??;

        record.enter(Stage::Quota);
        let within = state.terms.quota.take();
        self.metrics.limit_checked(Limit::Quota, within.is_ok());
        within?;

        record.enter(Stage::Audit);
        let mut permit = from.presence.during(pin!(self.audit.permit())).await?;
        let mut passage = state.terms.breaker.pass()?;
        let reserved = from.presence.during(permit.during(pin!(self.pool.reserve()))).await?;
        let unreachable = |none: &NoConnection| state.terms.unreachable(&mut passage, none, record.id());
        let connection = reserved.inspect_err(unreachable)?;
        let members = |line: &mut Vec<u8>| {
            checked.audit_members(&|parts| self.audit.keys().mark(parts), line);
            claim.audit_members(line);
        };
        record.intent(&permit, (checked.bytes().len(), &digest), &members).await?;
        drop(permit);

        record.enter(Stage::Upstream);
        let exchange = Exchange {
            terms: state.terms.clone(),
            route: route.clone(),
            credential: routed.credential,
            passage,
            connection,
            token,
            operator: routed.operator.clone(),
            body: checked.bytes().clone(),
            claim: claim.sent(),
            record: record.take(),
            room,
        };
        let mut reply = from.presence.beside(self.exchanges.run(exchange)).await?;
        reply.first = first;
        Ok(reply)
    }

    /// Counts ids of 2^53 and more that a caller sends as bare numbers, and warns of the first one.
    #[inline(never)]
    fn large_ids(&self, caller: &Caller, route: &str, id: RequestId, count: usize) {
        let is_first = self.metrics.bare_ids(&caller.name, count, caller.bare_ids != BareIds::Exact);
        if is_first {
            tracing::warn!(
                caller = &*caller.name, route, %id,
                "a caller sends ids above 2^53 as numbers, which lose digits in clients that hold numbers as doubles: let it \
                 send them as strings, or set its bare_ids to \"exact\" if it holds integers"
            );
        }
    }

    /// The rest of the way of a dry run, up to the quota: all that could refuse it is asked, nothing is spent or
    /// remembered, and the answer is what would be sent.
    async fn rehearse(
        &self,
        state: &State,
        from: Arrival<'_>,
        routed: &Routed<'_, Route>,
        (call, head): (Call<'_>, &Inbound<'_>),
        body: &CheckedBody,
        record: &mut Record,
    ) -> Result<Box<Reply>, Error> {
        let would = self.idempotency.look(call, head)?;

        record.enter(Stage::Token);
        let slot = &state.terms.slots[routed.credential];
        let token = from.presence.during(pin!(slot.token())).await??;

        record.enter(Stage::Quota);
        state.terms.quota.look()?;

        let size = body.bytes().len();
        let headers = state.terms.outbound.with(&token, routed.operator, size);
        let (would, first) = match would {
            Would::BeSent(first) => ("be sent", first),
            Would::BeReplayed(first) => ("be answered as the first call with its key was", Some(first)),
        };
        record.dry_run(StatusCode::OK.as_u16());
        let answer = json!({
            "dry_run": true,
            "would": would,
            "first_request_id": first.map(|first| first.request_id().to_string()),
            "first_outcome": first.map(|first| first.outcome.as_str()),
            "caller": call.caller,
            "route": call.route,
            "credential": slot.name(),
            "request": {
                "method": "POST",
                "target": routed.route.exchange.target.path(),
                "headers": masked(&headers),
                "body_size": size,
            },
        });
        let headers =
            HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
        let body = ReplyBody::Whole(answer.to_string().into());
        let retry = Retry::unchanged(head.idempotency_key.count > 0);
        let (status, outcome) = (StatusCode::OK, Outcome::NotSent);
        Ok(Box::new(Reply { status, headers, body, outcome, retry, first, delivery: None }))
    }
}

/// A head for people to see.
fn masked(headers: &HeaderMap) -> Map<String, Value> {
    let shown = |value: &HeaderValue| {
        if value.is_sensitive() { "***".into() } else { String::from_utf8_lossy(value.as_bytes()).into() }
    };
    headers.iter().map(|(name, value)| (name.to_string(), Value::String(shown(value)))).collect()
}

/// Where a request comes from.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'a> {
    /// Who is at the other end of the connection.
    pub peer: Peer,
    /// The names in its certificate, on a listener that asks for one.
    pub names: Option<&'a [String]>,
    /// The names of the listener.
    pub hosts: &'a Hosts,
    /// Whether the caller is still there.
    pub presence: &'a CallerPresence,
    /// Where the connection keeps the success that an answer tells of.
    pub delivery: &'a DeliverySlot,
    /// The connection is over the cap: its one request is refused.
    pub surplus: bool,
}

/// A response's body.
#[derive(Debug)]
pub struct Answer {
    content: Content,
    /// Its connection ends behind it.
    ends_connection: bool,
}

impl Answer {
    /// Whether the connection ends behind it, as its head says.
    pub fn ends_connection(&self) -> bool {
        self.ends_connection
    }
}

#[derive(Debug)]
enum Content {
    /// All there is.
    Whole(Option<Bytes>),
    /// Pieces of a long reply; `None` behind the last one.
    Long(Option<tokio::sync::mpsc::Receiver<Piece>>),
}

impl Body for Answer {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        match &mut self.get_mut().content {
            Content::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Content::Long(pieces) => {
                let Some(coming) = pieces else { return Poll::Ready(None) };
                Poll::Ready(Some(match ready!(coming.poll_recv(cx)) {
                    Some(Piece::More(bytes)) => Ok(Frame::data(bytes)),
                    Some(Piece::Last(bytes)) => {
                        *pieces = None;
                        Ok(Frame::data(bytes))
                    }
                    None => Err(BrokenOff),
                }))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.content, Content::Whole(None) | Content::Long(None))
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Content::Long(_) => SizeHint::default(),
        }
    }
}

/// Names the caller of a request that is denied before it was asked for, so that the trail holds it against that caller and not
/// against strangers.
#[cold]
fn name_denied(state: &State, from: &Arrival<'_>, record: &mut Record, denied: Denied) -> Denied {
    if let Some(caller) = state.admission.who((from.peer, from.names)) {
        record.caller(caller.name.clone());
    }
    denied
}

/// What the trail tells of a refusal beyond its code: enough to mend it, and of the body places only.
#[cold]
fn detail(error: &Error, from: &Arrival<'_>, target: &Uri) -> Option<Box<Detail>> {
    let cut = |text: &str| text.chars().take(MAX_DETAIL).collect::<String>();
    let detail = match error.code {
        Code::CallerDenied if from.names.is_some_and(|names| !names.is_empty()) => {
            let names = from.names.unwrap_or_default().iter().take(MAX_DETAILS).map(|name| cut(name));
            Detail { names: names.collect(), ..Detail::default() }
        }
        Code::RouteUnknown
        | Code::RouteDenied
        | Code::MethodNotAllowed
        | Code::TargetInvalid
        | Code::OperatorDenied
        | Code::Frozen => Detail { path: Some(cut(target.path())), ..Detail::default() },
        Code::ContractViolation => {
            let first = error.violations.iter().take(MAX_DETAILS);
            let errors = first.map(|Violation { pointer, code, .. }| {
                // The name of an unknown member is the caller's text: its parent's place says enough.
                let is_unknown = *code == "additionalProperties";
                let parent = pointer.rsplit_once('/').filter(|_| is_unknown).map(|(parent, _)| parent);
                (parent.unwrap_or(pointer).to_owned(), *code)
            });
            let errors = errors.collect();
            Detail { errors, ..Detail::default() }
        }
        _ => return None,
    };
    Some(Box::new(detail))
}

/// Passes the upstream's reply on.
fn answer(reply: Box<Reply>, from: &Arrival<'_>) -> Response<Answer> {
    let Reply { status, headers, body, outcome, retry, first, delivery } = *reply;
    let content = match body {
        ReplyBody::Whole(bytes) => Content::Whole(Some(bytes)),
        ReplyBody::Long(pieces) => Content::Long(Some(pieces)),
    };
    let mut response = Response::new(Answer { content, ends_connection: false });
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    say(response.headers_mut(), outcome, retry, first);
    if let Some(delivery) = delivery {
        from.delivery.put(delivery, !from.presence.has_ended());
    }
    response
}

/// Tells what became of the call and of the first one, and what the caller may do.
fn say(headers: &mut HeaderMap, outcome: Outcome, retry: Retry, first: Option<FirstCall>) {
    headers.insert(OUTCOME, OUTCOMES[outcome as usize].clone());
    headers.insert(RETRY, RETRIES[retry as usize].clone());
    if let Some(first) = first {
        headers.insert(FIRST, request_id(first.request_id()));
        headers.insert(FIRST_OUTCOME, OUTCOMES[first.outcome as usize].clone());
    }
}

/// Tells the caller of a failure.
fn refuse(error: &Error, stage: Stage, id: RequestId, retry: Retry, keep_alive: bool) -> Response<Answer> {
    let content = Content::Whole(Some(error.problem(stage, id, retry)));
    let mut response = Response::new(Answer { content, ends_connection: !keep_alive });
    *response.status_mut() = error.code.status();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, PROBLEM);
    say(headers, error.outcome, retry, error.first);
    headers.insert(ERROR, HeaderValue::from_static(error.code.as_str()));
    // Clients obey it, and a call whose outcome is unknown must not be repeated; but with the key of one at work it may.
    let may_repeat = error.outcome != Outcome::Unknown || error.code == Code::RequestInProgress;
    if let Some(wait) = error.retry_after.filter(|_| may_repeat) {
        headers.insert(header::RETRY_AFTER, whole_seconds(wait).into());
    }
    if error.code == Code::MethodNotAllowed {
        headers.insert(header::ALLOW, HeaderValue::from_static("POST"));
    }
    if !keep_alive {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// `Retry-After` counts in seconds, so that a part of one is a whole one, and none is none at all.
fn whole_seconds(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0).max(u64::from(wait.is_zero()))
}

/// Reads and throws away the rest of a refused body, within bounds. Says whether the connection is clean
/// for another request. A caller that waits for `100 Continue` is not asked to go on.
async fn linger(head: &Inbound<'_>, mut body: Incoming) -> bool {
    if body.is_end_stream() {
        return true;
    }
    if head.expects_continue || head.expects_more || body.size_hint().lower() > LINGER_BYTES {
        return false;
    }
    let drained = async {
        let mut left = LINGER_BYTES;
        while let Some(frame) = body.frame().await {
            let read =
                frame.ok().and_then(|frame| frame.into_data().ok()).map_or(0, |data| data.len() as u64);
            left = match left.checked_sub(read) {
                Some(left) if read > 0 => left,
                _ => return false,
            };
        }
        true
    };
    timeout(LINGER_TIME, drained).await.unwrap_or(false)
}

/// Whether a caller's own id of a request is one that can be echoed.
fn can_be_echoed(id: &HeaderValue) -> bool {
    let plain = id.as_bytes().iter().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(b));
    plain && (1..=128).contains(&id.len())
}

/// Whether it has the form of W3C Trace Context, level 1: version, trace, parent, flags; more only behind versions to come.
fn is_traceparent(value: &[u8]) -> bool {
    let (Some(known), more) = (value.get(..55), value.get(55..).unwrap_or_default()) else { return false };
    let is_hex = |part: &[u8]| part.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let parts = [&known[..2], &known[3..35], &known[36..52], &known[53..]];
    let [version, trace, parent, _] = parts;
    let is_zero = |part: &[u8]| part.iter().all(|byte| *byte == b'0');
    [2, 35, 52].iter().all(|place| known[*place] == b'-')
        && parts.into_iter().all(is_hex)
        && version != b"ff"
        && !is_zero(trace)
        && !is_zero(parent)
        && (more.is_empty() || version != b"00" && more.starts_with(b"-") && is_short_text(more))
}

/// Visible ASCII, of 73 bytes at most: a value of 128 bytes in all.
fn is_short_text(text: &[u8]) -> bool {
    text.len() <= 73 && text.iter().all(u8::is_ascii_graphic)
}

#[expect(clippy::expect_used, reason = "a UUID is plain ASCII")]
fn request_id(id: RequestId) -> HeaderValue {
    thread_local! {
        /// A hundred ids share an allocation.
        static TEXT: RefCell<BytesMut> = RefCell::new(BytesMut::with_capacity(4096));
    }
    TEXT.with_borrow_mut(|text| {
        text.extend_from_slice(id.as_bytes());
        HeaderValue::from_maybe_shared(text.split().freeze()).expect("ASCII")
    })
}

fn took(begin: u64) -> Duration {
    Duration::from_nanos(clock::nanos() - begin)
}

/// Runs a future; `None` if it panics. The panic ends this request only.
fn survive<F: Future>(mut future: Pin<&mut F>) -> impl Future<Output = Option<F::Output>> {
    poll_fn(move |cx| {
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx)));
        polled.map_or(Poll::Ready(None), |poll| poll.map(Some))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size<A, B, C, F: Future>(_: impl FnOnce(A, B, C) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn traceparent_has_the_form_of_w3c() {
        let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        let good = format!("00-{trace}-{parent}-01");
        let ok = |text: &str| is_traceparent(text.as_bytes());
        assert!(ok(&good) && ok(&format!("cc{}-what-comes", &good[2..])));
        for bad in [
            "",
            "00",
            &good[1..],
            &good.to_uppercase(),
            &good.replace('-', "_"),
            &good.replace("00-4", "ff-4"),
            &good.replace(trace, &"0".repeat(32)),
            &good.replace(parent, &"0".repeat(16)),
            &format!("{good}-more"),
            &format!("cc{}more", &good[2..]),
            &format!("cc{}-\u{85}", &good[2..]),
            &format!("cc{}-{}", &good[2..], "x".repeat(73)),
        ] {
            assert!(!ok(bad), "{bad}");
        }
    }

    #[test]
    fn words_stand_in_the_places_of_what_they_mean() {
        assert!(Outcome::ALL.iter().all(|outcome| OUTCOMES[*outcome as usize] == outcome.as_str()));
        assert!(Retry::ALL.iter().all(|retry| RETRIES[*retry as usize] == retry.as_str()));
    }

    /// It is paid for by every connection, and moved by every request.
    #[test]
    fn the_request_future_stays_within_its_budget_of_bytes() {
        let handle =
            |gateway: &'static Gateway, from: Arrival<'static>, request| gateway.handle(from, request);
        let bytes = size(handle);
        assert!(bytes <= 2 * 1024, "{bytes} bytes");
        let exchange = size_of::<Exchange>();
        assert!(exchange <= 448, "{exchange} bytes");
    }
}
