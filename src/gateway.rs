//! The request function: [`Gateway::handle`], which answers every request, and `proxy`, which calls the stages in their order.
//!
//! The stages decide; this module only orders them, records what they decided, and makes the response. Errors become
//! responses in one place, and a panic ends one request only.

mod caller_ids;
mod drain_body;
mod dry_run;
mod refusal;
mod answer;

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{Method, Request, Response, Uri};
use hyper::body::Incoming;

use crate::admission::{Caller, Hosts};
use crate::audit::{Audit, OpenRecord};
use crate::concurrency::{InFlightPermit, Limits};
use crate::config::BareIds;
use crate::contract::body::receive;
use crate::contract::{BodyFault, Checked, CheckedBody};
use crate::disconnect::CallerPresence;
use crate::error::Error;
use crate::exchange::{Exchange, Exchanges, Reply};
use crate::idempotency::{Call, Claim, ClaimDecision, Idempotency, PendingDelivery, Replay};
use crate::keyed_hash::Hash;
use crate::metrics::{LimitKind, Metrics};
use crate::model::peer::Peer;
use crate::model::request_id::{FirstCall, RequestId};
use crate::model::stage::Stage;
use crate::model::trace_id::TraceId;
use crate::request_head::Inbound;
use crate::route::Routed;
use crate::state::{Route, State};
use crate::upstream::pool::Pool;
use crate::{clock, exchange};
pub use answer::ResponseBody;
use answer::{answer, name, refuse};
use caller_ids::can_be_echoed;
use drain_body::drain_body;
use refusal::{detail, name_denied};

/// The parts that one worker needs to answer requests.
#[derive(Debug)]
pub struct Gateway {
    /// The compiled configuration that is in effect.
    pub state: Arc<ArcSwap<State>>,
    /// The upstream connections of this worker.
    pub pool: Arc<Pool>,
    /// The exchanges on these connections.
    pub exchanges: Arc<Exchanges>,
    /// The audit trail.
    pub audit: Audit,
    /// Deduplication, shared by all workers.
    pub idempotency: Arc<Idempotency>,
    /// The bounds on concurrent work, shared by all workers.
    pub limits: Arc<Limits>,
    /// The metrics of the process.
    pub metrics: Arc<Metrics>,
}

impl Gateway {
    /// Answers one request. Cannot fail: an error becomes a response, and a panic becomes 500.
    ///
    /// Cancellation-safe: if this future is dropped, the record closes itself, and an exchange that has begun goes on.
    pub async fn handle(
        &self,
        from: RequestOrigin<'_>,
        request: Request<Incoming>,
    ) -> Response<ResponseBody> {
        let begin = clock::nanos();
        let mut record = self.audit.open(from.peer);
        let id = record.id();
        let (parts, mut body) = request.into_parts();
        let head = Inbound::read(&parts);
        let caller_id = head.caller_id.first.filter(|id| can_be_echoed(id));
        if let Some(id) = caller_id {
            record.caller_id(id.clone());
        }
        let parent = head.traceparent.only();
        let trace_id = parent.and_then(|parent| TraceId::of(parent.as_bytes()));
        if let Some(parent) = parent.filter(|_| trace_id.is_some()) {
            record.traceparent(parent.clone());
        }
        let proxied = {
            // One configuration for the whole request, whatever a reload swaps meanwhile.
            let state = &*self.state.load_full();
            let request =
                RequestParts { state, from, method: &parts.method, target: &parts.uri, head: &head };
            catch_panic(pin!(self.proxy(&request, &mut body, &mut record))).await
        };
        let mut response = match proxied.unwrap_or_else(|| Err(Error::internal(record.is_taken()))) {
            Ok(reply) => {
                self.metrics.replied(reply.outcome, took(begin), trace_id);
                answer(reply, &from)
            }
            Err(mut error) => {
                let stage = record.stage();
                if let Some(first) = error.first {
                    record.first(first);
                }
                if let Some(detail) = detail(&error, &from, &parts.uri) {
                    record.detail(detail);
                }
                record.refuse(error.code, error.cause);
                self.metrics.refused(stage, error.own_outcome(), error.code, took(begin), trace_id);
                tracing::debug!(%id, code = %error.code, %stage, detail = error.detail, "refused");
                // A connection that closes with unread bytes is reset, and the caller may lose the response. Boxed, since only
                // refusals need it and every request would carry its future.
                let is_drained = Box::pin(drain_body(&head, body)).await;
                // Behind an ambiguous request nothing is believed: others on the way may see another end of it.
                let keep_alive = is_drained && !from.over_connection_cap && !error.code.is_ambiguous();
                let retry = error.code.retry(error.outcome, head.idempotency_key.count > 0);
                if let Some(delivery) = error.delivery.take() {
                    from.delivery.put(*delivery, !from.presence.has_ended());
                }
                refuse(&error, stage, id, retry, keep_alive)
            }
        };
        name(response.headers_mut(), id, caller_id);
        response
    }

    /// Takes a request through the stages. The order of these lines, and of those of [`Self::enter`], is the security argument:
    /// nothing is looked up for a stranger, nothing is read for a caller over its limit, no token is spent on a bad body or on
    /// one that was sent before, and no request is sent before its intent is committed.
    // Each wait before the intent ends if the caller disconnects: it may call again, and a request that is sent after that would
    // have the task done twice. After the intent nothing is cancelled.
    //
    // The audit permit comes before the connection: of a crowd of requests a few at a time reserve one and record their intent,
    // so that connections that were used just now are used again. The breaker comes before the connection, or requests would
    // wait for an upstream that is known to be down. The connection comes before the intent, so that an intent means that the
    // request was about to be sent, and one that could not be is a plain refusal.
    //
    // The intent is made and awaited in two statements: in one, what it is written by would live across the wait and take 64
    // bytes of the 2 KiB that the future of a request may have.
    async fn proxy(
        &self,
        request: &RequestParts<'_>,
        body: &mut Incoming,
        record: &mut OpenRecord,
    ) -> Result<Box<Reply>, Error> {
        let RequestParts { state, from: RequestOrigin { presence, .. }, head, .. } = request;
        let entered = self.enter(request, record)?;
        let Routed { route, credential, operator, is_dry_run } = &entered.routed;
        record.enter(Stage::Contract);
        let received = receive(head, body, state.body, &self.limits).await?;
        let checked = self.check(&entered, received, record.id())?;

        record.enter(Stage::Idempotency);
        let digest = self.audit.keys().digest(checked.bytes());
        let call = entered.call(&digest, record.id());
        if *is_dry_run {
            return Box::pin(self.dry_run(request, &entered, call, &checked, record)).await;
        }
        let claim = match self.idempotency.begin(call, head)? {
            ClaimDecision::Claim(claim) => claim,
            ClaimDecision::Replay(replay) => return Ok(Box::new(replayed(replay, &route.exchange, record))),
        };
        let first = record_first(&claim, record);

        record.enter(Stage::Token);
        let token = presence.unless_disconnected(pin!(state.terms.slot(*credential).token())).await??;

        record.enter(Stage::Quota);
        self.count_limit(LimitKind::Quota, state.terms.quota.take())?;

        record.enter(Stage::Audit);
        let mut permit = presence.unless_disconnected(pin!(self.audit.permit())).await?;
        let mut circuit = state.terms.breaker.try_acquire()?;
        let pooled =
            presence.unless_disconnected(permit.release_while_pending(pin!(self.pool.reserve()))).await?;
        let connection = pooled.inspect_err(|err| state.terms.unreachable(&mut circuit, err, record.id()))?;
        let size = checked.bytes().len();
        let intent = record.intent(&permit, size, &digest, &self.members(&checked, &claim))?;
        let intended = intent.await?;
        drop(permit);
        let exchange = Exchange {
            terms: state.terms.clone(),
            route: route.exchange.clone(),
            credential: *credential,
            circuit_permit: circuit,
            connection,
            token,
            operator: (*operator).clone(),
            body: checked.bytes().clone(),
            claim: claim.sent(),
            record: intended.sent(),
            permit: entered.permit,
        };
        // After the exchange is built: a panic before this line has sent nothing, and both the response and the trail say so.
        record.enter(Stage::Upstream);
        let mut reply = presence.beside(self.exchanges.run(exchange)).await?;
        reply.first = first;
        Ok(reply)
    }

    /// The stages that need no body: admission, route and rate limit.
    fn enter<'a>(&self, request: &RequestParts<'a>, record: &mut OpenRecord) -> Result<Entered<'a>, Error> {
        // Room first: under overload a refusal must cost less than the request.
        let &RequestParts { state, ref from, method, target, head } = request;
        let permit = self.limits.request(from.over_connection_cap);
        let permit = permit.map_err(|none| name_denied(state, from, record, none.into()))?;
        let known = state.admission.identify(from.peer, from.names, from.hosts, head);
        let known = known.map_err(|denied| name_denied(state, from, record, denied))?;
        let caller = known.caller();
        // Before it is admitted, so that a refusal of a frozen caller is recorded as that caller's.
        record.caller(caller.name.clone());
        let admitted = known.admit(head)?;
        self.metrics.credentials_dropped(head.credentials);

        record.enter(Stage::Route);
        let routed = state.routes.find(&admitted, method, target, head)?;
        record.route(routed.route.exchange.name.clone());
        record.operator(routed.operator.clone());

        record.enter(Stage::RateLimit);
        self.count_limit(LimitKind::Caller, caller.limit.take())?;
        Ok(Entered { permit, caller, routed })
    }

    /// Checks the body against the contract of its route. Fails with all violations.
    #[inline]
    fn check(&self, entered: &Entered<'_>, body: Bytes, id: RequestId) -> Result<CheckedBody, BodyFault> {
        let Checked { result, large_ids } =
            entered.routed.route.contract.check(body, entered.caller.bare_ids);
        if large_ids > 0 {
            self.large_ids(entered, id, large_ids);
        }
        result
    }

    /// Counts whether a limit let a request pass, and returns `within`.
    #[inline]
    fn count_limit<E>(&self, limit: LimitKind, within: Result<(), E>) -> Result<(), E> {
        self.metrics.limit_checked(limit, within.is_ok());
        within
    }

    /// What the intent says about body and claim, as JSON members with a comma in front of each.
    fn members(&self, checked: &CheckedBody, claim: &Claim) -> impl Fn(&mut Vec<u8>) {
        move |line| {
            checked.audit_members(&|parts| self.audit.keys().fingerprint(parts), line);
            claim.audit_members(line);
        }
    }

    /// Counts ids above 2^53 that a caller sends as bare numbers, and warns of the first one.
    // JavaScript holds numbers as doubles: 954645333549048833 would arrive as …8800, which is another task.
    #[inline(never)]
    fn large_ids(&self, Entered { caller, routed, .. }: &Entered<'_>, id: RequestId, count: usize) {
        if self.metrics.bare_ids(&caller.name, count, caller.bare_ids != BareIds::Exact) {
            let route = &*routed.route.exchange.name;
            tracing::warn!(
                caller = &*caller.name, route, %id,
                "a caller sends ids above 2^53 as numbers, which lose digits in clients that store numbers as doubles: \
                 let it send them as strings, or, if it stores them as integers, set its bare_ids to \"exact\""
            );
        }
    }
}

/// A request whose head was read, and the configuration that applies to it.
struct RequestParts<'a> {
    state: &'a State,
    from: RequestOrigin<'a>,
    method: &'a Method,
    target: &'a Uri,
    head: &'a Inbound<'a>,
}

/// A request that passed the stages that need no body.
struct Entered<'a> {
    permit: InFlightPermit,
    caller: &'a Arc<Caller>,
    routed: Routed<'a, Route>,
}

impl<'a> Entered<'a> {
    /// The call for deduplication.
    fn call(&self, digest: &'a Hash, id: RequestId) -> Call<'a> {
        Call {
            caller: &self.caller.name,
            is_alone: self.caller.is_alone,
            max_keys: self.caller.max_keys,
            route: &self.routed.route.exchange.name,
            operator: self.routed.operator,
            digest,
            id: id.uuid(),
        }
    }
}

/// Records which earlier call this one repeats or equals, and whether by force. Returns that call.
fn record_first(claim: &Claim, record: &mut OpenRecord) -> Option<FirstCall> {
    let first = claim.first();
    if let Some(first) = first {
        record.first(first);
    }
    if claim.is_forced() {
        record.forced();
    }
    first
}

/// Answers a call as the first one with its key was answered.
#[cold]
fn replayed(replay: Replay, route: &exchange::UpstreamRoute, record: &mut OpenRecord) -> Reply {
    record.first(replay.first);
    let reply = Reply::replayed(replay, &route.result);
    record.replayed(reply.status.as_u16());
    reply
}

/// Where a request comes from.
#[derive(Clone, Copy, Debug)]
pub struct RequestOrigin<'a> {
    /// The other end of the connection, as the kernel names it.
    pub peer: Peer,
    /// The names in the peer's certificate; `None` on a listener that asks for none.
    pub names: Option<&'a [String]>,
    /// The names that the listener answers to.
    pub hosts: &'a Hosts,
    /// Whether the caller is still connected.
    pub presence: &'a CallerPresence,
    /// The connection's slot for a success that is on its way to the caller.
    pub delivery: &'a PendingDelivery,
    /// The connection is over the cap, so its one request is refused.
    pub over_connection_cap: bool,
}

/// The time since `begin`, which is in nanoseconds of this process.
fn took(begin: u64) -> Duration {
    Duration::from_nanos(clock::nanos() - begin)
}

/// Runs a future; `None` if it panics. The panic ends this request only.
// Unwind-safe: the future is not polled again, and what it shares with others is valid after each step that can panic.
fn catch_panic<F: Future>(mut future: Pin<&mut F>) -> impl Future<Output = Option<F::Output>> {
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

    /// Every connection holds such a future, and every request moves it.
    #[test]
    fn request_future_stays_within_its_size_budget() {
        // A change that makes a future larger shows here, before it shows in a benchmark.
        let handle =
            |gateway: &'static Gateway, from: RequestOrigin<'static>, request| gateway.handle(from, request);
        let bytes = size(handle);
        assert!(bytes <= 2 * 1024, "{bytes} bytes");
        let exchange = size_of::<Exchange>();
        assert!(exchange <= 448, "{exchange} bytes");
    }
}
