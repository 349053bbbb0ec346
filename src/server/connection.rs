//! One caller's connection: hyper's HTTP/1.1, under deadlines of the gateway's own.
//!
//! Guarantees that no phase of a connection lasts longer than its deadline, and settles whether a caller received the
//! reply that reports a success: see [`crate::idempotency::PendingDelivery`]. Does not bound the work on a request: the
//! stages do.
//!
//! hyper's `header_read_timeout` is also its keep-alive idle time-out, so it is not used. A small state, shared by
//! the socket, the service and the timer, tells a slow head from an idle connection.
//! (tests/hyper.rs: header_timeout_also_applies_to_an_idle_connection)

mod phase;
mod socket;
mod stream;

use std::convert::Infallible;
use std::error::Error as _;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;

use http::{HeaderValue, Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{HttpService, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::watch;

use crate::admission::Hosts;
use crate::clock::nanos_of;
use crate::concurrency::{ConnectionSlot, Stranger};
use crate::config;
use crate::gateway::{Gateway, RequestOrigin, ResponseBody};
use crate::model::peer::Peer;
use crate::server::Lifecycle;
use crate::server::handshake::shake_hands;
use crate::server::tls::{Certificate, Tls};
use phase::{ConnectionPhase, IdleTimer, Phase};
use socket::WatchedSocket;
pub(super) use socket::{LINGER_BYTES, LINGER_TIME};
pub use stream::CallerStream;

/// How long a head may take once the gateway stops, or on a connection over the cap, in nanoseconds.
pub(super) const STOP_HEADER: u64 = 1_000_000_000;

/// The reason by which a connection is counted that ends because unfinished heads and bodies hold all of their
/// budget.
const NO_ROOM: &str = "too_many_unfinished";

/// The `Connection` header of the last reply on a connection.
const CLOSE: HeaderValue = HeaderValue::from_static("close");

/// The deadlines of a connection, in nanoseconds, and the largest head, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// From the first byte of a head to its last one; from the start for a new connection.
    header: u64,
    /// Between two requests, and without progress while a reply is written.
    idle: u64,
    /// hyper answers a larger head with 431.
    max_head: usize,
}

impl Deadlines {
    /// The deadlines that a configuration sets.
    pub fn new(server: &config::Server) -> Self {
        let (header, idle) = (nanos_of(server.header_timeout), nanos_of(server.idle_timeout));
        Self { header, idle, max_head: server.max_head }
    }
}

/// A connection that was accepted and has a place.
pub(super) struct AcceptedConnection {
    pub(super) stream: CallerStream,
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) hosts: Arc<Hosts>,
    pub(super) peer: Peer,
    pub(super) slot: ConnectionSlot,
}

/// Serves a connection to its end. Its errors are counted and logged here, since nobody else can act on them.
pub(super) async fn serve(
    gateway: Arc<Gateway>,
    AcceptedConnection { stream, tls, hosts, peer, slot }: AcceptedConnection,
    mut deadlines: Deadlines,
    stop: watch::Receiver<Lifecycle>,
) {
    let over_connection_cap = slot.over_connection_cap;
    if over_connection_cap {
        deadlines.header = deadlines.header.min(STOP_HEADER);
    }
    let (stream, certificate) = match (stream, tls) {
        (CallerStream::Tcp(stream), Some(tls)) => {
            // Only these handshakes have a share of their own: elsewhere the peer is known by its address already.
            let unproven = tls.asks_for_certificates().then(|| gateway.limits.unproven(peer));
            let shaken = shake_hands(&tls, stream, deadlines.header, stop.clone(), unproven);
            // Boxed: the handshake is over before the first request, and its future would stay part of the
            // connection's.
            match Box::pin(shaken).await {
                Ok((stream, certificate)) => (CallerStream::Tls(stream), certificate),
                Err(error) => return error.report(peer, &gateway.metrics),
            }
        }
        (stream, _) => (stream, None),
    };
    // Asked for again at each request: a certificate that was revoked meanwhile has no names any more.
    let names = || certificate.as_ref().map(Certificate::names);
    let is_known = |names| gateway.state.load().admission.knows_name(names);
    // A certificate that names no caller makes its peer a stranger from here on.
    let Some(_stranger) = stranger(&gateway, names().is_none_or(is_known), peer) else { return };
    let phase = Arc::new(ConnectionPhase::new(gateway.limits.unfinished()));
    let socket = WatchedSocket::new(stream, phase.clone());
    let (gateway, hosts, phase) = (&*gateway, &*hosts, &*phase);
    let service = service_fn(|request| {
        phase.head_came(&request);
        let ConnectionPhase { presence, delivery, .. } = phase;
        answer(
            gateway,
            RequestOrigin { peer, names: names(), hosts, presence, delivery, over_connection_cap },
            phase,
            request,
        )
    });
    let builder = builder(over_connection_cap, deadlines.max_head);
    let connection = pin!(builder.serve_connection(TokioIo::new(socket), service));
    let ended = drive(gateway, connection, phase, deadlines, stop).await;
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "connection ended");
    }
}

/// The settings of hyper for a caller's connection, which serves one request only if it is over the cap.
fn builder(over_connection_cap: bool, max_head: usize) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        // tests/hyper.rs: half_closed_caller_still_gets_its_response
        // Otherwise hyper drops the request's future when the caller closes its side, as `nc` and some clients do
        // with the request.
        .half_close(true)
        .keep_alive(!over_connection_cap)
        // One buffer and send(2) cost less than two and writev(2), as measured.
        .writev(false)
        // tests/hyper.rs: buffer_limit_alone_admits_a_head_of_nearly_twice_its_size
        .max_buf_size(max_head)
        // The bound above alone lets a head of nearly twice its size pass, as its bytes happen to come in.
        .max_header_size(max_head);
    builder
}

/// Takes a stranger's place for the connection of a peer that is no known caller. Returns `None` if strangers hold
/// all of theirs, and `Some(None)` for a known peer, which needs none.
pub(super) fn stranger(gateway: &Gateway, is_known: bool, peer: Peer) -> Option<Option<Stranger>> {
    if is_known {
        return Some(None);
    }
    let stranger = gateway.limits.stranger(peer);
    if stranger.is_none() {
        gateway.metrics.connection_closed("too_many_strangers");
    }
    stranger.map(Some)
}

/// Answers one request of a connection, and marks the last reply.
async fn answer(
    gateway: &Gateway,
    from: RequestOrigin<'_>,
    phase: &ConnectionPhase,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    let mut response = gateway.handle(from, request).await;
    if phase.must_end() {
        gateway.metrics.connection_closed(NO_ROOM);
    }
    // Checked after the request, so that a stop which began meanwhile is seen: the caller must not send another one.
    let is_last = gateway.limits.is_stopping() || phase.must_end();
    if is_last {
        response.headers_mut().insert(http::header::CONNECTION, CLOSE);
    }
    // hyper stops reading after the last reply. What the caller has sent by then would turn the close into a reset.
    phase.unread.store(is_last || response.body().ends_connection(), Ordering::Relaxed);
    // Before hyper writes the reply: a write error from here on belongs to this reply's delivery.
    phase.enter(Phase::Idle);
    Ok(response)
}

/// Drives a connection to its end, or until one of its phases has lasted too long. Fails as the connection does.
async fn drive<S>(
    gateway: &Gateway,
    mut connection: Pin<&mut http1::Connection<TokioIo<WatchedSocket>, S>>,
    phase: &ConnectionPhase,
    mut deadlines: Deadlines,
    mut stop: watch::Receiver<Lifecycle>,
) -> hyper::Result<()>
where
    S: HttpService<Incoming, ResBody = ResponseBody, Error = Infallible>,
{
    let mut timer = IdleTimer::new();
    let mut stopped = pin!(stop.wait_for(|stop| *stop == Lifecycle::Stopping));
    let (mut listens, mut stopping) = (false, false);
    poll_fn(|cx| {
        loop {
            // First of all: the poll reads what is there, and so moves the phase that is judged below.
            if let Poll::Ready(ended) = connection.as_mut().poll(cx) {
                return Poll::Ready(ended.inspect_err(|error| count_end(gateway, error)));
            }
            // The stop wakes this task once it was polled. Until it wakes, another poll tells nothing, and costs a
            // lock at each request.
            let asks = !stopping && (!listens || gateway.limits.is_stopping());
            listens = true;
            if !asks || stopped.as_mut().poll(cx).is_pending() {
                break;
            }
            // After the poll, which has read what is there. A new connection that has sent nothing is not closed,
            // since its request may be on the way: it gets a second for its head, and its reply is the last one.
            stopping = true;
            deadlines.header = deadlines.header.min(STOP_HEADER);
            if phase.is(Phase::Idle) {
                // tests/hyper.rs: graceful_shutdown_closes_an_idle_connection_at_once
                connection.as_mut().graceful_shutdown();
            }
        }
        if phase.is_overdue(&mut timer, deadlines, cx) {
            gateway.metrics.connection_closed(phase.reason());
            // Dropped, not shut down: a peer that is too slow need not be waited for again.
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    })
    .await
}

/// Counts a connection that ended because of what its caller sent.
#[cold]
fn count_end(gateway: &Gateway, error: &hyper::Error) {
    if error.is_parse() {
        gateway.metrics.connection_closed("head_invalid");
    } else if is_budget_exhausted(error) {
        gateway.metrics.connection_closed(NO_ROOM);
    }
}

/// Returns whether a connection ended because unfinished heads hold all of their budget.
// tests/hyper.rs: read_error_is_the_source_of_the_connection_error
fn is_budget_exhausted(error: &hyper::Error) -> bool {
    // `WatchedSocket` fails a read with this kind, which no socket does. hyper passes it on as the source of its own error.
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::OutOfMemory)
}
