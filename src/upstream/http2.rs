//! HTTP/2 connections of one worker: each multiplexes many exchanges, one stream per exchange.
//!
//! Guarantees that
//!
//! * no stream is opened beyond the limit that the upstream announced;
//! * no stream is opened on a connection that is closed, idle for too long, verified with root certificates that are no
//!   longer in use, silent from a request to the end of its stream, or on which the upstream contradicted itself;
//! * a request counts as sent, unless hyper never wrote it, or the upstream said that it was not processed (RFC 9113
//!   §8.7 and §6.8) and did not contradict itself: [`super::frames`] says what a contradiction is.
//!
//! Does not dial, and does not bound the number of connections: the pool does both.

use std::error::Error as _;
use std::future::{Future, poll_fn};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use http::{Request, Response, Uri, header, uri};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{Notify, OwnedSemaphorePermit, watch};
use tokio::task::{AbortHandle, unconstrained, yield_now};

use super::frames::FrameReader;
use super::pool::{Counted, NoConnection, is_quiet};
use crate::clock;
use crate::log::OncePerSecond;
use crate::model::reply::MAX_HEAD;

/// The largest number of exchanges that share one connection, whatever the upstream allows. It bounds how many
/// requests one lost packet delays (TCP delivers in order), and how many get an unknown outcome when one connection
/// is lost.
const MAX_STREAMS: usize = 256;

/// The flow-control window of a stream, in bytes (RFC 9113 §5.2). The outcome is decided by at most this much of a reply,
/// and the upstream can send it without waiting for a WINDOW_UPDATE.
const STREAM_WINDOW: u32 = 64 * 1024;

/// The flow-control window of a connection, in bytes: room for all streams. With less, callers that read slowly could
/// use it up, and the replies to all others on the connection would stop.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MAX_STREAMS as u32;

/// Marks that the upstream has not announced its limit on streams yet. No SETTINGS frame can announce this value,
/// since limits have 32 bits. It is not `usize::MAX`: h2 takes that as the limit of an upstream that announces none.
// tests/hyper.rs: stream_limit_is_the_initial_one_until_settings_arrive
const UNTOLD: usize = usize::MAX - 1;

/// The HTTP/2 connections of one worker's pool.
#[derive(Debug)]
pub(super) struct Connections {
    /// The `:authority` of each request: what `Host` is over HTTP/1.1.
    authority: uri::Authority,
    open: Mutex<Vec<Arc<Connection>>>,
    /// The attempt to connect that was started last. All requests that need a connection wait for the same one
    /// (single flight).
    dialing: Mutex<Option<watch::Receiver<Dialing>>>,
    /// Signalled when a stream has ended, and when a connection was added.
    pub(super) freed: Notify,
    /// Whether the upstream picked HTTP/1.1 on the connection that was opened last.
    refused: AtomicBool,
}

/// State of an attempt to connect, as its waiters see it.
#[derive(Debug)]
pub(super) enum Dialing {
    UnderWay,
    /// It ended with a connection, which is in the pool.
    Done,
    /// It ended without one.
    Failed(NoConnection),
}

impl Connections {
    pub(super) fn new(authority: uri::Authority) -> Self {
        let (open, dialing, freed) = (Mutex::default(), Mutex::default(), Notify::new());
        Self { authority, open, dialing, freed, refused: AtomicBool::new(false) }
    }

    /// Returns whether to expect HTTP/2: the upstream did not pick HTTP/1.1 on the connection that was opened last.
    pub(super) fn is_available(&self) -> bool {
        !self.refused.load(Ordering::Relaxed)
    }

    /// Records which protocol the upstream picked on a new connection.
    pub(super) fn negotiated(&self, http2: bool) {
        // The last pick counts, not any earlier one: one name may lead to servers of both kinds, and a server may
        // be replaced by one that speaks HTTP/2.
        self.refused.store(!http2, Ordering::Relaxed);
    }

    /// Adds a connection that is open, and wakes all requests that wait for a stream.
    pub(super) fn add(&self, connection: Arc<Connection>) {
        self.open().push(connection);
        // All of them, since a connection has room for many streams. Requests in the queue wait for this signal only,
        // not for the attempt to connect.
        self.freed.notify_waiters();
    }

    /// Opens a stream on the first connection that has room, except `but`. Returns `None` if no connection has any.
    ///
    /// The first one is preferred, so that few connections carry many streams and the others reach the idle time-out.
    /// Connections that are no longer usable are removed on the way. `idle_timeout` is in nanoseconds; `generation`
    /// is that of the root certificates in use.
    pub(super) fn stream(
        &self,
        but: Option<&Weak<Connection>>,
        idle_timeout: u64,
        generation: u64,
    ) -> Option<RequestStream> {
        let mut open = self.open();
        let mut i = 0;
        while let Some(connection) = open.get(i) {
            if connection.is_unusable(idle_timeout, generation) {
                open.remove(i);
                continue;
            }
            // Compared by address. `but` holds a `Weak`, which keeps the allocation, so no other connection can have
            // that address.
            let is_other = but.is_none_or(|but| but.as_ptr() != Arc::as_ptr(connection));
            if let Some(stream) = is_other.then(|| connection.stream()).flatten() {
                return Some(stream);
            }
            i += 1;
        }
        None
    }

    /// Ends a stream. Returns its connection, on which other streams may go on.
    pub(super) fn release(&self, stream: RequestStream) -> Weak<Connection> {
        let connection = Arc::downgrade(&stream.connection);
        // A connection without a sign of life may belong to a server that is gone without a FIN. It gets no further
        // request; streams that are open on it run to their end.
        if stream.is_unresponsive() {
            self.open().retain(|open| !Arc::ptr_eq(open, &stream.connection));
        }
        // Before the signal: the last stream of a removed connection closes it and returns its permit, which a waiter
        // needs in order to dial.
        drop(stream);
        self.freed.notify_one();
        connection
    }

    /// Removes the connections that take no further stream: see [`Connection::is_unusable`]. Streams that are still
    /// open run to their end.
    pub(super) fn sweep(&self, idle_timeout: u64, generation: u64) {
        self.open().retain(|connection| !connection.is_unusable(idle_timeout, generation));
    }

    /// Turns a request into the form of HTTP/2 (RFC 9113 §8.3.1): without `Host`, with scheme and authority in the
    /// URI.
    pub(super) fn adapt(&self, mut request: Request<Full<Bytes>>) -> Request<Full<Bytes>> {
        let mut parts = std::mem::take(request.uri_mut()).into_parts();
        parts.scheme = Some(uri::Scheme::HTTPS);
        parts.authority = Some(self.authority.clone());
        // All three parts are there, so this is a URI. The default only avoids a panic path.
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
        request.headers_mut().remove(header::HOST);
        request
    }

    /// The attempt to connect that was started last; it may be over.
    pub(super) fn dialing(&self) -> MutexGuard<'_, Option<watch::Receiver<Dialing>>> {
        self.dialing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> MutexGuard<'_, Vec<Arc<Connection>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An open connection. The pool and each of its streams hold a reference. When the last one is dropped, the socket is
/// closed at once, whatever the upstream does.
#[derive(Debug)]
pub(super) struct Connection {
    /// The task that runs [`dispatch`]. After a GOAWAY it may end while bodies of replies are still to come.
    // tests/hyper.rs: goaway_ends_the_handover_while_streams_are_open
    dispatch: AbortHandle,
    _driver: Driver,
    /// A duplicate of the socket, to ask the kernel whether there is something to read.
    probe: OwnedFd,
    /// The number of the root certificates that the upstream was verified with: [`crate::connect::Connector::generation`].
    pub(super) generation: u64,
    reads: Arc<Reads>,
    /// The limit on streams that the upstream announced last.
    limit: Arc<AtomicUsize>,
    usage: Mutex<Usage>,
    /// Its permit under the pool's cap on connections.
    _permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct Usage {
    sender: http2::SendRequest<Full<Bytes>>,
    /// How many streams are open.
    streams: usize,
    /// When a stream ended last, or when the connection was opened, in nanoseconds of [`clock::nanos`].
    since: u64,
}

/// What the receiving side of a connection reports to its streams.
#[derive(Debug, Default)]
pub(super) struct Reads {
    /// The number of reads that returned bytes, the end of the input or an error. Only compared with an earlier value.
    count: AtomicU64,
    next: Notify,
    /// Whether the upstream contradicted itself, see [`super::frames`].
    contradicted: AtomicBool,
}

impl Reads {
    /// Returns whether the upstream contradicted itself. If so, its claims that a stream was not processed do not count.
    fn are_contradicted(&self) -> bool {
        self.contradicted.load(Ordering::Relaxed)
    }
}

/// The receiving side of one connection, between the socket and hyper.
#[derive(Debug, Default)]
pub(super) struct Received {
    reads: Arc<Reads>,
    frames: FrameReader,
}

impl Received {
    pub(super) fn reads(&self) -> Arc<Reads> {
        self.reads.clone()
    }

    /// Records the bytes of one read; none if the read returned the end of the input or an error.
    ///
    /// Must be called before hyper gets the bytes. If they contain a contradiction and hyper ends a stream because of
    /// them, the contradiction must already be recorded.
    pub(super) fn came(&mut self, bytes: &[u8]) {
        static CONTRADICTED: OncePerSecond = OncePerSecond::new();
        // `swap`, so that each connection is logged once, however many of its streams the upstream denies.
        if self.frames.read(bytes)
            && !self.reads.contradicted.swap(true, Ordering::Relaxed)
            && let Some(times) = CONTRADICTED.times()
        {
            tracing::warn!(
                times,
                "the upstream says that it did not process a request, but has answered on its HTTP/2 stream: requests \
                 that it refuses on this connection count as unknown, and are not sent again"
            );
        }
        self.reads.count.fetch_add(1, Ordering::Relaxed);
        self.reads.next.notify_one();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.dispatch.abort();
    }
}

impl Connection {
    /// Opens a connection: sends the preface and waits until the upstream has announced its limits. The caller bounds
    /// the wait.
    ///
    /// While streams are open, hyper sends a PING when nothing came for `patience`. If there is no answer within three
    /// times `patience`, hyper closes the connection. A shorter time could be used up by a stall of this process.
    ///
    /// # Errors
    ///
    /// Fails as hyper's handshake does, or if the connection breaks before the limits came.
    pub(super) async fn open(
        io: Counted,
        reads: Arc<Reads>,
        (probe, generation): (OwnedFd, u64),
        permit: OwnedSemaphorePermit,
        patience: Duration,
    ) -> Result<Self, hyper::Error> {
        let (driver, spawned) = (Driver::default(), Spawned::default());
        let spawn = Spawn { driver: driver.0.clone(), spawned: spawned.clone() };
        let (sender, mut connection) = http2::Builder::new(spawn)
            .timer(TokioTimer::new())
            .initial_max_send_streams(UNTOLD)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(MAX_HEAD as u32)
            .keep_alive_interval(patience)
            .keep_alive_timeout(3 * patience)
            .handshake(TokioIo::new(io))
            .await?;
        // Without this wait a burst of requests would open more streams than the upstream allows, and it would refuse
        // the rest. hyper offers no future for the SETTINGS, so its limit is compared after each read.
        while connection.current_max_send_streams() == UNTOLD {
            let came = reads.next.notified();
            let ended = poll_fn(|cx| match Pin::new(&mut connection).poll(cx) {
                Poll::Ready(ended) => Poll::Ready(Some(ended)),
                Poll::Pending => Poll::Ready(None),
            });
            match ended.await {
                Some(ended) => {
                    ended?;
                    // The connection ended in order. Its sender is closed, so that no stream will be sent on it.
                    break;
                }
                None => came.await,
            }
        }
        let limit = Arc::new(AtomicUsize::new(connection.current_max_send_streams()));
        // `unconstrained`: tokio gives each task a budget of operations per poll. This task works for up to 256 streams,
        // and with the budget of one task the last of them would be delayed.
        let dispatch = tokio::spawn(unconstrained(dispatch(connection, limit.clone(), spawned)));
        let usage = Mutex::new(Usage { sender, streams: 0, since: clock::nanos() });
        let dispatch = dispatch.abort_handle();
        Ok(Self { dispatch, _driver: driver, probe, generation, reads, limit, usage, _permit: permit })
    }

    /// Opens a stream, or returns `None` if the limit is reached. Nothing is sent yet, so a stream that is dropped
    /// unused costs the upstream nothing.
    pub(super) fn stream(self: &Arc<Self>) -> Option<RequestStream> {
        let mut usage = self.usage();
        let room = MAX_STREAMS.min(self.limit.load(Ordering::Relaxed));
        (usage.streams < room).then(|| {
            usage.streams += 1;
            RequestStream { connection: self.clone(), sent: 0, reads: 0 }
        })
    }

    /// Returns whether the connection takes no further stream: it is closed, the upstream contradicted itself on it, it
    /// has been idle for `idle_timeout` nanoseconds, or its root certificates are of another generation.
    fn is_unusable(&self, idle_timeout: u64, generation: u64) -> bool {
        let usage = self.usage();
        self.generation != generation
            || usage.sender.is_closed()
            || self.reads.are_contradicted()
            || usage.streams == 0 && clock::nanos().saturating_sub(usage.since) >= idle_timeout
    }

    fn usage(&self) -> MutexGuard<'_, Usage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Passes requests to h2 until the connection takes no more, then runs until each of them has an answer or an error.
///
/// It also polls the futures that hyper spawns, one for each request: a task for each would allocate 1.6 KB.
// tests/hyper.rs: sender_is_closed_before_a_goaway_returns_its_request
async fn dispatch(connection: Handover, limit: Arc<AtomicUsize>, spawned: Spawned) {
    let mut connection = Some(connection);
    // Measured: 62.2k instructions a request. A queue written for this, which reused its allocations, took 65.9k.
    let mut request_tasks = FuturesUnordered::new();
    poll_fn(|cx| {
        // The connection first, then the requests: a request that a GOAWAY gives back must find the connection closed
        // to new ones, or it would be tried there again.
        if let Some(open) = &mut connection {
            let polled = Pin::new(&mut *open).poll(cx);
            // At each poll, since SETTINGS may come at any time; hyper announces no change.
            limit.store(open.current_max_send_streams(), Ordering::Relaxed);
            if let Poll::Ready(ended) = polled {
                if let Err(error) = ended {
                    tracing::debug!(%error, "upstream connection ended");
                }
                connection = None;
            }
        }
        loop {
            request_tasks.extend(spawned.lock().unwrap_or_else(PoisonError::into_inner).drain(..));
            match request_tasks.poll_next_unpin(cx) {
                Poll::Ready(Some(())) => {}
                Poll::Ready(None) if connection.is_none() => return Poll::Ready(()),
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await;
}

/// One exchange's place on a connection. Dropping it makes room for another exchange.
#[derive(Debug)]
pub(super) struct RequestStream {
    pub(super) connection: Arc<Connection>,
    /// How many of the exchange's requests the upstream may have processed.
    pub(super) sent: u64,
    /// The value of [`Reads::count`] when the last request was sent.
    reads: u64,
}

impl RequestStream {
    /// Returns whether no request can be sent: the connection is closed, or the upstream contradicted itself.
    pub(super) fn is_closed(&self) -> bool {
        self.connection.usage().sender.is_closed() || self.connection.reads.are_contradicted()
    }

    /// Yields once to the event loop if something can be read, so that hyper notices a close by the upstream.
    ///
    /// Does nothing while other streams are open, since their traffic shows a close; otherwise it costs a system call.
    pub(super) async fn notice_close(&self) {
        // A server may close an idle connection at any time. A request that goes out just then would get an unknown
        // outcome, although the FIN was in the socket's buffer before.
        if self.connection.usage().streams == 1 && !is_quiet(&self.connection.probe) {
            yield_now().await;
        }
    }

    /// Sends a request. The future resolves to the head of the reply; it does not hold the request.
    ///
    /// Dropping the future does not unsend the request: it still counts in `sent`.
    pub(super) fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> impl Future<Output = Result<Response<Incoming>, Unanswered>> + use<> {
        // Counted before hyper has the request, and taken back by `failed` only if it was certainly not processed.
        self.sent += 1;
        self.reads = self.connection.reads.count.load(Ordering::Relaxed);
        self.connection.usage().sender.try_send_request(request)
    }

    /// Records that the last request got no answer. The request no longer counts as sent if hyper returned it unwritten,
    /// or if the upstream said that it was not processed and has not contradicted itself.
    // tests/hyper.rs: hyper_returns_only_requests_it_has_not_written
    pub(super) fn failed(&mut self, why: &Unanswered) {
        let is_denied = was_denied(why) && !self.connection.reads.are_contradicted();
        self.sent -= u64::from(why.message().is_some() || is_denied);
    }

    /// Returns whether nothing at all has been received after the last request: the upstream may be gone.
    fn is_unresponsive(&self) -> bool {
        self.sent > 0 && self.connection.reads.count.load(Ordering::Relaxed) == self.reads
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        let mut usage = self.connection.usage();
        usage.streams -= 1;
        usage.since = clock::nanos();
    }
}

/// hyper's future that passes requests to h2.
type Handover = http2::Connection<TokioIo<Counted>, Full<Bytes>, Spawn>;

/// Why a request got no answer, with the request itself if hyper has not written it.
pub(super) type Unanswered = TrySendError<Request<Full<Bytes>>>;

/// Returns whether the upstream said that a request was not processed: it refused the stream (RFC 9113 §8.7), or sent
/// a GOAWAY that names an earlier stream as the last one (§6.8).
///
/// h2 reports a GOAWAY only to streams after the last one that it names. The other streams go on; if the connection
/// breaks, they end with an I/O error.
// tests/hyper.rs: refused_stream_is_reported_as_a_remote_reset
// tests/hyper.rs: goaway_is_reported_only_to_streams_beyond_its_last_one
fn was_denied(why: &Unanswered) -> bool {
    let cause = why.error().source().and_then(|cause| cause.downcast_ref::<h2::Error>());
    cause.is_some_and(|cause| {
        // `is_remote`: h2 resets streams by itself, too, and such a reset says nothing about what the upstream has
        // done.
        cause.is_remote() && (cause.is_go_away() || cause.reason() == Some(h2::Reason::REFUSED_STREAM))
    })
}

/// The task that moves a connection's bytes. Dropping it aborts the task, which closes the socket.
#[derive(Debug, Default)]
struct Driver(Arc<OnceLock<AbortHandle>>);

impl Drop for Driver {
    fn drop(&mut self) {
        if let Some(task) = self.0.get() {
            task.abort();
        }
    }
}

/// Futures that hyper spawned, one for each request, and that [`dispatch`] has not polled yet. No wake-up is needed:
/// hyper spawns them while `dispatch` polls the connection, and `dispatch` polls them right after.
type Spawned = Arc<Mutex<Vec<Pin<Box<dyn Future<Output = ()> + Send>>>>>;

/// hyper's executor: spawns the first future, the driver, as a task, and leaves the others to [`dispatch`].
// tests/hyper.rs: hyper_spawns_the_driver_first_and_then_one_task_per_request
#[derive(Clone)]
struct Spawn {
    driver: Arc<OnceLock<AbortHandle>>,
    spawned: Spawned,
}

impl<F> hyper::rt::Executor<F> for Spawn
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, future: F) {
        match self.driver.get() {
            Some(_) => self.spawned.lock().unwrap_or_else(PoisonError::into_inner).push(Box::pin(future)),
            None => drop(self.driver.set(tokio::spawn(future).abort_handle())),
        }
    }
}
