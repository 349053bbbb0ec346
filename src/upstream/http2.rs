//! The HTTP/2 connections of one worker: each carries many exchanges at once, a stream each.
//!
//! Guarantees that no stream is opened beyond what the upstream allows, that a connection which is closed,
//! idled too long, has nothing to say any more, or contradicted itself takes no new stream, and that a request
//! counts as sent unless hyper never wrote it, or the upstream says that it was not processed and has said nothing
//! on its connection that contradicts this (see [`super::frames`]). Does not connect, nor bound how many
//! connections there are: that is the pool's.

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

/// So many exchanges share a connection at most, whatever the upstream allows: what one lost packet delays,
/// and what one lost connection leaves in doubt, stays bounded.
const MAX_STREAMS: usize = 256;

/// What the upstream may send on a stream before somebody reads it: as much of a reply as decides.
const STREAM_WINDOW: u32 = 64 * 1024;

/// The same of a connection: room for all streams, so that callers who are slow to read hold up nobody else.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MAX_STREAMS as u32;

/// Stands for the limit on streams until the upstream has told it. None that it can tell: theirs have 32 bits.
// tests/hyper.rs: the_limit_on_streams_is_the_initial_one_until_the_settings_come
const UNTOLD: usize = usize::MAX - 1;

/// The HTTP/2 connections of one worker.
#[derive(Debug)]
pub(super) struct Connections {
    /// What `Host` would hold.
    authority: uri::Authority,
    open: Mutex<Vec<Arc<Connection>>>,
    /// The attempt to connect that is under way: all who need a connection wait for the same one.
    dialing: Mutex<Option<watch::Receiver<Dialing>>>,
    /// A stream came free.
    pub(super) freed: Notify,
    /// The upstream picked HTTP/1.1 when it was asked last.
    refused: AtomicBool,
}

/// How an attempt to connect goes.
#[derive(Debug)]
pub(super) enum Dialing {
    UnderWay,
    Done,
    Failed(NoConnection),
}

impl Connections {
    pub(super) fn new(authority: uri::Authority) -> Self {
        let (open, dialing, freed) = (Mutex::default(), Mutex::default(), Notify::new());
        Self { authority, open, dialing, freed, refused: AtomicBool::new(false) }
    }

    /// Whether a new connection may be one of HTTP/2, by what is known.
    pub(super) fn are_to_be_had(&self) -> bool {
        !self.refused.load(Ordering::Relaxed)
    }

    /// Notes what the upstream picked.
    pub(super) fn picked(&self, http2: bool) {
        self.refused.store(!http2, Ordering::Relaxed);
    }

    pub(super) fn add(&self, connection: Arc<Connection>) {
        self.open().push(connection);
        self.freed.notify_waiters(); // it has room for many
    }

    /// A stream on the first connection that has room, so that few carry many and the others idle out.
    /// Connections that cannot be used any more are given up on the way.
    pub(super) fn stream(
        &self,
        but: Option<&Weak<Connection>>,
        idle_timeout: u64,
        generation: u64,
    ) -> Option<Stream> {
        let mut open = self.open();
        let mut i = 0;
        while let Some(connection) = open.get(i) {
            if connection.is_spent(idle_timeout, generation) {
                open.remove(i);
                continue;
            }
            let is_other = but.is_none_or(|but| but.as_ptr() != Arc::as_ptr(connection));
            if let Some(stream) = is_other.then(|| connection.stream()).flatten() {
                return Some(stream);
            }
            i += 1;
        }
        None
    }

    /// Takes a stream back. Returns its connection, which others may use on.
    pub(super) fn release(&self, stream: Stream) -> Weak<Connection> {
        let connection = Arc::downgrade(&stream.connection);
        if stream.is_lost() {
            self.open().retain(|open| !Arc::ptr_eq(open, &stream.connection));
        }
        drop(stream); // and with the last one of a connection that is given up its place under the cap
        self.freed.notify_one();
        connection
    }

    /// Closes what has idled too long, was closed by the upstream, or was made under other roots; the streams that it has yet run
    /// to their end.
    pub(super) fn sweep(&self, idle_timeout: u64, generation: u64) {
        self.open().retain(|connection| !connection.is_spent(idle_timeout, generation));
    }

    /// The request as HTTP/2 has it: no `Host`, but the whole URI.
    pub(super) fn adapt(&self, mut request: Request<Full<Bytes>>) -> Request<Full<Bytes>> {
        let mut parts = std::mem::take(request.uri_mut()).into_parts();
        parts.scheme = Some(uri::Scheme::HTTPS);
        parts.authority = Some(self.authority.clone());
        // All three parts are there, so that this is a URI.
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
        request.headers_mut().remove(header::HOST);
        request
    }

    /// The attempt to connect that was made last.
    pub(super) fn dialing(&self) -> MutexGuard<'_, Option<watch::Receiver<Dialing>>> {
        self.dialing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> MutexGuard<'_, Vec<Arc<Connection>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A live connection. Dropped, with all its streams, it is closed at once, whatever its other side does.
#[derive(Debug)]
pub(super) struct Connection {
    /// What hands requests over; it ends behind a GOAWAY, with streams still open.
    // tests/hyper.rs: behind_a_goaway_the_handover_ends_with_streams_still_open
    dispatch: AbortHandle,
    _driver: Driver,
    /// The same socket once more, to ask the kernel whether anything came.
    probe: OwnedFd,
    /// Which roots it was made under.
    pub(super) generation: u64,
    reads: Arc<Reads>,
    /// The upstream's limit on streams.
    limit: Arc<AtomicUsize>,
    usage: Mutex<Usage>,
    /// Its place under the cap on connections.
    _permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct Usage {
    sender: http2::SendRequest<Full<Bytes>>,
    /// Streams that are open.
    streams: usize,
    /// When the last one ended, in nanoseconds of this process.
    since: u64,
}

/// What came from the upstream on one connection.
#[derive(Debug, Default)]
pub(super) struct Reads {
    count: AtomicU64,
    next: Notify,
    /// The upstream said of a stream that it was not processed, though it had answered on it.
    contradicted: AtomicBool,
}

impl Reads {
    /// Whether the upstream contradicted itself: it is not believed any more that a stream was not processed.
    fn are_contradicted(&self) -> bool {
        self.contradicted.load(Ordering::Relaxed)
    }
}

/// The receiving side of one connection, under hyper.
#[derive(Debug, Default)]
pub(super) struct Received {
    reads: Arc<Reads>,
    frames: FrameReader,
}

impl Received {
    /// What the connection's streams see of it.
    pub(super) fn reads(&self) -> Arc<Reads> {
        self.reads.clone()
    }

    /// Something came: bytes, or none with the end or an error. To be called before hyper sees them.
    pub(super) fn came(&mut self, bytes: &[u8]) {
        static CONTRADICTED: OncePerSecond = OncePerSecond::new();
        if self.frames.read(bytes)
            && !self.reads.contradicted.swap(true, Ordering::Relaxed)
            && let Some(times) = CONTRADICTED.times()
        {
            tracing::warn!(
                times,
                "the upstream says that a request was not processed, and has answered on its HTTP/2 stream: what is \
                 refused on this connection counts as unknown, and is not sent again"
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
    /// Greets the upstream, and waits until it has told its limits. While streams are open, a PING goes out when
    /// nothing came for `patience`; without an answer within thrice that, since a stall of our own counts, too,
    /// the connection is closed.
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
        while connection.current_max_send_streams() == UNTOLD {
            let came = reads.next.notified();
            let ended = poll_fn(|cx| match Pin::new(&mut connection).poll(cx) {
                Poll::Ready(ended) => Poll::Ready(Some(ended)),
                Poll::Pending => Poll::Ready(None),
            });
            match ended.await {
                Some(ended) => {
                    ended?;
                    break; // its sender is closed
                }
                None => came.await,
            }
        }
        let limit = Arc::new(AtomicUsize::new(connection.current_max_send_streams()));
        let dispatch = tokio::spawn(unconstrained(dispatch(connection, limit.clone(), spawned)));
        let usage = Mutex::new(Usage { sender, streams: 0, since: clock::nanos() });
        let dispatch = dispatch.abort_handle();
        Ok(Self { dispatch, _driver: driver, probe, generation, reads, limit, usage, _permit: permit })
    }

    /// Opens a stream, if there is room. Nothing is sent yet.
    pub(super) fn stream(self: &Arc<Self>) -> Option<Stream> {
        let mut usage = self.usage();
        let room = MAX_STREAMS.min(self.limit.load(Ordering::Relaxed));
        (usage.streams < room).then(|| {
            usage.streams += 1;
            Stream { connection: self.clone(), sent: 0, reads: 0 }
        })
    }

    /// Whether it takes no stream any more.
    fn is_spent(&self, idle_timeout: u64, generation: u64) -> bool {
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

/// Hands requests over until the connection takes no more, and answers back until all are there, by way of what hyper
/// spawned: a task of its own for each request would cost as much as HTTP/2 itself does. In this order: who is told that its
/// request was given back by a GOAWAY finds the connection closed to new ones.
// tests/hyper.rs: a_connection_is_closed_before_a_goaway_gives_its_request_back
async fn dispatch(connection: Handover, limit: Arc<AtomicUsize>, spawned: Spawned) {
    let mut connection = Some(connection);
    let mut companions = FuturesUnordered::new();
    poll_fn(|cx| {
        if let Some(open) = &mut connection {
            let polled = Pin::new(&mut *open).poll(cx);
            limit.store(open.current_max_send_streams(), Ordering::Relaxed);
            if let Poll::Ready(ended) = polled {
                if let Err(error) = ended {
                    tracing::debug!(%error, "upstream connection ended");
                }
                connection = None;
            }
        }
        loop {
            companions.extend(spawned.lock().unwrap_or_else(PoisonError::into_inner).drain(..));
            match companions.poll_next_unpin(cx) {
                Poll::Ready(Some(())) => {}
                Poll::Ready(None) if connection.is_none() => return Poll::Ready(()),
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await;
}

/// One exchange's part of a connection.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) connection: Arc<Connection>,
    /// Requests that may have been processed.
    pub(super) sent: u64,
    /// How much had come when the last one was sent.
    reads: u64,
}

impl Stream {
    pub(super) fn is_closed(&self) -> bool {
        self.connection.usage().sender.is_closed() || self.connection.reads.are_contradicted()
    }

    /// Gives the event loop the chance to see that the upstream closed the connection, if nothing else is
    /// under way on it and it has something to say.
    pub(super) async fn look(&self) {
        if self.connection.usage().streams == 1 && !is_quiet(&self.connection.probe) {
            yield_now().await;
        }
    }

    /// Sends a request; the future waits for the head of the answer. It does not hold the request.
    pub(super) fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> impl Future<Output = Result<Response<Incoming>, Unanswered>> + use<> {
        self.sent += 1;
        self.reads = self.connection.reads.count.load(Ordering::Relaxed);
        self.connection.usage().sender.try_send_request(request)
    }

    /// A request got no answer. It does not count as sent if hyper never wrote it and gives it back, or if the upstream
    /// says that it was not processed, and can be believed.
    // tests/hyper.rs: hyper_gives_back_only_a_request_that_it_has_not_written
    pub(super) fn failed(&mut self, why: &Unanswered) {
        let is_denied = was_denied(why) && !self.connection.reads.are_contradicted();
        self.sent -= u64::from(why.message().is_some() || is_denied);
    }

    /// Whether a request was sent and nothing at all has come since: nobody may be there any more.
    fn is_lost(&self) -> bool {
        self.sent > 0 && self.connection.reads.count.load(Ordering::Relaxed) == self.reads
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut usage = self.connection.usage();
        usage.streams -= 1;
        usage.since = clock::nanos();
    }
}

/// What hyper hands requests over with.
type Handover = http2::Connection<TokioIo<Counted>, Full<Bytes>, Spawn>;

/// Why a request got no answer, and the request, if it was not even handed over.
pub(super) type Unanswered = TrySendError<Request<Full<Bytes>>>;

/// Whether the upstream says that a request was not processed: it refused its stream (RFC 9113 §8.7), or went away and
/// named an earlier stream as its last one (§6.8). Of a GOAWAY h2 tells only streams beyond the last one; those that
/// it covers go on, and end by an I/O error if the connection does.
// tests/hyper.rs: a_refused_stream_is_told_as_one_that_the_other_side_reset
// tests/hyper.rs: a_goaway_is_told_only_to_the_streams_beyond_the_one_that_it_names
fn was_denied(why: &Unanswered) -> bool {
    let cause = why.error().source().and_then(|cause| cause.downcast_ref::<h2::Error>());
    cause.is_some_and(|cause| {
        cause.is_remote() && (cause.is_go_away() || cause.reason() == Some(h2::Reason::REFUSED_STREAM))
    })
}

/// The task that moves a connection's bytes. Dropped, it stops, and the socket closes.
#[derive(Debug, Default)]
struct Driver(Arc<OnceLock<AbortHandle>>);

impl Drop for Driver {
    fn drop(&mut self) {
        if let Some(task) = self.0.get() {
            task.abort();
        }
    }
}

/// What hyper spawned for one request each, until [`dispatch`] polls it for the first time: hyper spawns from within the
/// connection, which `dispatch` polls just before, so that nobody needs to be woken.
type Spawned = Arc<Mutex<Vec<Pin<Box<dyn Future<Output = ()> + Send>>>>>;

/// Runs what hyper spawns: the driver, which is the first, and what belongs to one request.
// tests/hyper.rs: hyper_spawns_the_driver_first_and_the_rest_for_one_request_each
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
