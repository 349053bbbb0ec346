//! The upstream connections of one worker, over hyper's client connections.
//!
//! Guarantees that at most `max_connections` are open, that a wait for one is bounded, that a connection
//! which the upstream closed, which idled too long or which was made under other roots is not used, and that for
//! every request it is known whether it may have been sent. Does not decide whether to send again: that is `upstream`.
//!
//! An HTTP/1.1 connection is reserved for one exchange; one of HTTP/2 is shared by many, and so is the attempt
//! to open it. Who reserves does not see the difference.

use std::{
    future::{Future, poll_fn},
    io,
    os::fd::{AsFd, OwnedFd},
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, uri::Authority};
use http_body_util::Full;
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use prometheus::{IntCounterVec, IntGauge, Opts, Registry};
use rustix::net::RecvFlags;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::AbortHandle,
    time::{Instant, Sleep, sleep, timeout},
};

use super::{
    http2::{self, Dialing, Received},
    queue::Queue,
};
use crate::{
    clock,
    connect::{self, Connector, Stream},
    model::cause::Cause,
    reason::Reason,
};

/// So many timers are kept for exchanges over HTTP/2, whose connections have none of their own.
const KEPT_TIMERS: usize = 256;

/// Why no connection was had.
#[derive(Clone, Debug, Error)]
pub enum NoConnection {
    /// All connections were busy for as long as a caller may wait.
    #[error("all upstream connections are busy")]
    Busy,
    /// None could be made, or it closed before the first request.
    #[error("{0}")]
    Failed(Reason),
}

impl From<Reason> for NoConnection {
    fn from(reason: Reason) -> Self {
        Self::Failed(reason)
    }
}

/// Why a request got no answer.
#[derive(Debug, Error)]
pub enum SendError {
    /// There is no connection, or it takes no more.
    #[error("the connection takes no more requests")]
    Closed,
    /// The exchange broke off.
    #[error(transparent)]
    Http(#[from] hyper::Error),
}

impl SendError {
    /// Why, for who is told.
    #[cold]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Closed => closed(),
            Self::Http(error) => Reason::of_exchange(error),
        }
    }
}

/// A connection was closed before it had a request.
fn closed() -> Reason {
    Reason::new(Cause::Reset, "the upstream closed a new connection")
}

/// Counts of upstream connections.
#[derive(Clone, Debug)]
pub struct Metrics {
    open: IntGauge,
    connects: IntCounterVec,
}

impl Metrics {
    /// Registers the pool's metrics.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let open = IntGauge::new("ccsqm_gateway_upstream_connections", "Open upstream connections.")?;
        let connects = IntCounterVec::new(
            Opts::new(
                "ccsqm_gateway_upstream_connects_total",
                "Attempts to connect to the upstream, by result.",
            ),
            &["result"],
        )?;
        registry.register(Box::new(open.clone()))?;
        registry.register(Box::new(connects.clone()))?;
        Ok(Self { open, connects })
    }
}

/// The connections of one worker.
#[derive(Debug)]
pub struct Pool {
    connector: Connector,
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<Idle>>,
    /// The connections that are shared; `None`: none ever is.
    http2: Option<http2::Connections>,
    timers: Mutex<Vec<Timer>>,
    queue: Queue,
    wait: Duration,
    /// In nanoseconds.
    idle_timeout: u64,
    metrics: Metrics,
}

/// What an exchange is run on.
#[derive(Debug)]
enum Place {
    /// A connection of its own, and its place under the cap.
    Http1(Connection, OwnedSemaphorePermit),
    /// A part of a shared one, which has its place itself.
    Http2(http2::Stream),
}

/// A connection that was opened just now.
enum Opened {
    Http1(Connection, OwnedSemaphorePermit),
    Http2(Arc<http2::Connection>),
}

#[derive(Debug)]
struct Idle {
    connection: Connection,
    timer: Option<Timer>,
    /// In nanoseconds of this process.
    since: u64,
}

impl Idle {
    /// Whether it idled too long, was closed, or was made under other roots.
    fn is_spent(&self, idle_timeout: u64, generation: u64) -> bool {
        clock::nanos().saturating_sub(self.since) >= idle_timeout
            || self.connection.sender.is_closed()
            || self.connection.generation != generation
    }
}

/// A live HTTP/1.1 connection to the upstream. Dropped, it is closed at once, whatever its other side does.
#[derive(Debug)]
struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    task: AbortHandle,
    written: Arc<AtomicU64>,
    /// The same socket once more, to ask the kernel whether the upstream closed it.
    probe: OwnedFd,
    /// Which roots it was made under.
    generation: u64,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The timer of a connection's exchanges. Their deadlines follow each other, and a timer that is only ever
/// moved forward is hardly touched.
#[derive(Debug)]
pub struct Timer(Pin<Box<Sleep>>);

impl Timer {
    /// Polls something until a deadline.
    pub fn until<F: Future>(
        &mut self,
        deadline: Instant,
        mut what: Pin<&mut F>,
    ) -> impl Future<Output = Option<F::Output>> {
        poll_fn(move |cx| {
            if let Poll::Ready(output) = what.as_mut().poll(cx) {
                return Poll::Ready(Some(output));
            }
            if self.0.deadline() > deadline {
                self.0.as_mut().reset(deadline);
            }
            loop {
                ready!(self.0.as_mut().poll(cx));
                if Instant::now() >= deadline {
                    return Poll::Ready(None);
                }
                self.0.as_mut().reset(deadline);
            }
        })
    }
}

impl Default for Timer {
    fn default() -> Self {
        Self(Box::pin(sleep(Duration::from_secs(30))))
    }
}

/// A connection reserved for one exchange, or a part of a shared one. It goes back to the pool by
/// [`Reserved::give_back`], or dropped before it was used. Any other is closed, if it is the exchange's own,
/// since nobody knows what still lies in it; of a shared one just the exchange's stream is.
#[derive(Debug)]
pub struct Reserved {
    pool: Arc<Pool>,
    /// `None` while this is dropped, or got no other one instead of a dead one.
    place: Option<Place>,
    timer: Option<Timer>,
    /// The turn of the event loop in which it was reserved.
    reserved: u64,
    /// Nothing lies in it that belongs to somebody else.
    clean: bool,
}

impl Pool {
    /// A pool of at most `max` connections. `http2` is the upstream's authority, if HTTP/2 is to be offered.
    pub fn new(
        connector: Connector,
        max: usize,
        wait: Duration,
        idle_timeout: Duration,
        http2: Option<Authority>,
        metrics: Metrics,
    ) -> Self {
        let connector = if http2.is_some() { connector.offering_http2() } else { connector };
        Self {
            connector,
            permits: Arc::new(Semaphore::new(max)),
            idle: Mutex::default(),
            http2: http2.map(http2::Connections::new),
            timers: Mutex::default(),
            queue: Queue::new(max),
            wait,
            idle_timeout: clock::nanos_of(idle_timeout),
            metrics,
        }
    }

    /// Reserves a connection: an idle one that is still alive, a part of one that is shared, or a new one.
    pub async fn reserve(self: &Arc<Self>) -> Result<Reserved, NoConnection> {
        let (place, timer) = match self.http2.as_ref().filter(|http2| http2.are_to_be_had()) {
            Some(http2) => match http2.stream(None, self.idle_timeout, self.connector.generation()) {
                Some(stream) => (Place::Http2(stream), self.timers().pop()),
                None => Box::pin(self.shared(http2, None)).await?,
            },
            None => self.own().await?,
        };
        Ok(Reserved { pool: self.clone(), place: Some(place), timer, reserved: clock::turn(), clean: true })
    }

    /// Closes what has idled too long, was closed by the upstream, or was made under other roots. To be called about once a
    /// second.
    pub fn sweep(&self) {
        let generation = self.connector.generation();
        self.idle().retain(|idle| !idle.is_spent(self.idle_timeout, generation));
        if let Some(http2) = &self.http2 {
            http2.sweep(self.idle_timeout, generation);
        }
    }

    /// A connection for one exchange alone.
    async fn own(self: &Arc<Self>) -> Result<(Place, Option<Timer>), NoConnection> {
        let permit = match self.permits.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => Box::pin(self.wait_for_permit()).await?,
        };
        match self.take_idle() {
            Some((connection, timer)) => Ok((Place::Http1(connection, permit), timer)),
            None => Ok((Box::pin(self.new_place(permit)).await?, None)),
        }
    }

    /// A new connection, or a part of it, should the upstream have changed its mind about HTTP/2.
    async fn new_place(self: &Arc<Self>, permit: OwnedSemaphorePermit) -> Result<Place, NoConnection> {
        match self.connect(permit).await? {
            Opened::Http1(connection, permit) => Ok(Place::Http1(connection, permit)),
            Opened::Http2(connection) => {
                connection.stream().map(Place::Http2).ok_or_else(|| NoConnection::Failed(no_streams()))
            }
        }
    }

    /// A part of a shared connection other than `but`, as far as there is one or can be. All who wait for a
    /// new one wait for the same. Where the upstream turns out to pick HTTP/1.1, a connection of one's own.
    #[cold]
    async fn shared(
        self: &Arc<Self>,
        http2: &http2::Connections,
        but: Option<&Weak<http2::Connection>>,
    ) -> Result<(Place, Option<Timer>), NoConnection> {
        let give_up = Instant::now() + self.wait;
        while http2.are_to_be_had() {
            let mut freed = pin!(http2.freed.notified());
            freed.as_mut().enable(); // what comes free from here on is not missed
            let dialing = match http2.stream(but, self.idle_timeout, self.connector.generation()) {
                Some(stream) => return Ok((Place::Http2(stream), self.timers().pop())),
                None => self.dial(http2),
            };
            match dialing {
                Some(mut dialing) => {
                    let dialed = async {
                        match dialing
                            .wait_for(|dialing| !matches!(dialing, Dialing::UnderWay))
                            .await
                            .as_deref()
                        {
                            Ok(Dialing::Failed(why)) => Err(why.clone()),
                            Ok(Dialing::UnderWay | Dialing::Done) | Err(_) => Ok(()),
                        }
                    };
                    tokio::select! {
                        dialed = dialed => dialed?,
                        () = freed => {}
                    }
                }
                // As many connections as may be are open, and all are full.
                None => match http2.stream(None, self.idle_timeout, self.connector.generation()) {
                    Some(stream) => return Ok((Place::Http2(stream), self.timers().pop())),
                    None => {
                        let left = give_up.saturating_duration_since(Instant::now());
                        self.queue.wait(left, freed).await.ok_or(NoConnection::Busy)?;
                    }
                },
            }
        }
        self.own().await
    }

    /// The attempt to connect that is under way, or a new one; `None` if there is no place for a connection.
    /// It outlives who asked for it, as others wait for it, too.
    fn dial(self: &Arc<Self>, http2: &http2::Connections) -> Option<watch::Receiver<Dialing>> {
        let mut dialing = http2.dialing();
        if let Some(under_way) = dialing.as_ref().filter(|dialing| dialing.has_changed().is_ok()) {
            return Some(under_way.clone());
        }
        self.idle().clear(); // of HTTP/1.1, and as good as gone: they have no place under the cap
        let permit = self.permits.clone().try_acquire_owned().ok()?;
        let (sender, receiver) = watch::channel(Dialing::UnderWay);
        let pool = self.clone();
        tokio::spawn(async move {
            let dialed = match pool.connect(permit).await {
                Ok(Opened::Http2(_)) => Dialing::Done,
                Ok(Opened::Http1(connection, _permit)) => {
                    pool.idle().push(Idle { connection, timer: None, since: clock::nanos() });
                    Dialing::Done
                }
                Err(why) => Dialing::Failed(why),
            };
            sender.send_replace(dialed);
        });
        *dialing = Some(receiver.clone());
        Some(receiver)
    }

    #[cold]
    async fn wait_for_permit(&self) -> Result<OwnedSemaphorePermit, NoConnection> {
        let permit = self.queue.wait(self.wait, self.permits.clone().acquire_owned()).await;
        permit.and_then(Result::ok).ok_or(NoConnection::Busy)
    }

    /// The connection that was used last; the others may then idle out.
    fn take_idle(&self) -> Option<(Connection, Option<Timer>)> {
        let (mut idle, generation) = (self.idle(), self.connector.generation());
        while let Some(last) = idle.pop() {
            if !last.is_spent(self.idle_timeout, generation) {
                return Some((last.connection, last.timer));
            }
        }
        None
    }

    async fn connect(&self, permit: OwnedSemaphorePermit) -> Result<Opened, NoConnection> {
        let opened = self.open(permit).await;
        let result = opened.as_ref().map_or_else(|reason| reason.cause.as_str(), |_| "ok");
        self.metrics.connects.with_label_values(&[result]).inc();
        Ok(opened?)
    }

    async fn open(&self, permit: OwnedSemaphorePermit) -> Result<Opened, Reason> {
        let (stream, generation) = self.connector.connect_under().await?;
        match &self.http2 {
            Some(http2) if stream.is_http2() => {
                let opened = timeout(self.wait, self.greet_http2(stream, generation, permit)).await;
                let late = |_| Reason::new(Cause::Timeout, "the upstream did not greet over HTTP/2 in time");
                let connection = Arc::new(opened.map_err(late)??);
                if !connection.is_usable() {
                    return Err(no_streams());
                }
                http2.picked(true);
                http2.add(connection.clone());
                Ok(Opened::Http2(connection))
            }
            _ => {
                let connection = self.greet_http1(stream, generation).await?;
                if let Some(http2) = &self.http2 {
                    http2.picked(false);
                }
                Ok(Opened::Http1(connection, permit))
            }
        }
    }

    async fn greet_http1(&self, stream: Stream, generation: u64) -> Result<Connection, Reason> {
        let (written, probe) = (Arc::new(AtomicU64::new(0)), probe(&stream)?);
        let io = Counted {
            stream,
            written: written.clone(),
            received: None,
            _open: Open::count(&self.metrics.open),
        };
        let greeted = connect::http1().handshake(TokioIo::new(io)).await;
        let (sender, connection) = greeted.map_err(|error| Reason::of_exchange(&error))?;
        let task = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "upstream connection ended");
            }
        });
        Ok(Connection { sender, task: task.abort_handle(), written, probe, generation })
    }

    async fn greet_http2(
        &self,
        stream: Stream,
        generation: u64,
        permit: OwnedSemaphorePermit,
    ) -> Result<http2::Connection, Reason> {
        let (received, probe) = (Received::default(), probe(&stream)?);
        let (reads, open) = (received.reads(), Open::count(&self.metrics.open));
        let io = Counted { stream, written: Arc::default(), received: Some(received), _open: open };
        let opened = http2::Connection::open(io, reads, (probe, generation), permit, self.wait).await;
        opened.map_err(|error| Reason::of_exchange(&error))
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn timers(&self) -> MutexGuard<'_, Vec<Timer>> {
        self.timers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reserved {
    /// Waits until a request can be sent: the last one must be over. It is to be sent without another wait then: the roots
    /// under which the connection was made are known to be in use now.
    pub async fn ready(&mut self) -> Result<(), SendError> {
        self.clean = false;
        let generation = match self.place.as_mut().ok_or(SendError::Closed)? {
            Place::Http1(connection, _) => {
                connection.sender.ready().await?;
                connection.generation
            }
            Place::Http2(stream) => {
                if clock::turn() == self.reserved {
                    stream.look().await;
                }
                if stream.is_closed() {
                    return Err(SendError::Closed);
                }
                stream.connection.generation
            }
        };
        // Asked here, since much may lie between the reservation and this: the wait for the intent, and that for another token.
        if generation == self.pool.connector.generation() { Ok(()) } else { Err(SendError::Closed) }
    }

    /// Sends a request and waits for the head of the answer. The request is made here, so that the future does
    /// not hold it.
    pub async fn send(
        &mut self,
        request: impl FnOnce() -> Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, SendError> {
        self.clean = false;
        match (self.place.as_mut(), &self.pool.http2) {
            (Some(Place::Http1(connection, _)), _) => {
                connection.sender.send_request(request()).await.map_err(SendError::Http)
            }
            (Some(Place::Http2(stream)), Some(http2)) => {
                let answer = stream.send(http2.adapt(request()));
                answer.await.map_err(|why| {
                    stream.failed(&why);
                    SendError::Http(why.into_error())
                })
            }
            (None, _) | (_, None) => Err(SendError::Closed),
        }
    }

    /// A number that moves when something may have been sent: bytes written on a connection of one's own, or
    /// requests on a shared one, but for those that the upstream did not process.
    pub fn written(&self) -> u64 {
        match &self.place {
            Some(Place::Http1(connection, _)) => connection.written.load(Ordering::Relaxed),
            Some(Place::Http2(stream)) => stream.sent,
            None => 0,
        }
    }

    /// Replaces a connection that is dead, or refuses requests, by another one. The place under the cap stays.
    #[cold]
    pub async fn reconnect(&mut self) -> Result<(), NoConnection> {
        self.place = Some(match (self.place.take(), &self.pool.http2) {
            (Some(Place::Http1(_, permit)), _) => Box::pin(self.pool.new_place(permit)).await?,
            (Some(Place::Http2(stream)), Some(http2)) => {
                let but = http2.release(stream);
                Box::pin(self.pool.shared(http2, Some(&but))).await?.0
            }
            (None, _) | (_, None) => return Err(closed().into()),
        });
        Ok(())
    }

    /// The timer of this connection, for as long as the exchange needs it.
    pub fn take_timer(&mut self) -> Timer {
        self.timer.take().unwrap_or_default()
    }

    /// Gives the timer back.
    pub fn keep_timer(&mut self, timer: Timer) {
        self.timer = Some(timer);
    }

    /// Whether the upstream is known to have closed it: by what the event loop saw, if it has looked since the
    /// connection was reserved; else the kernel is asked, which costs a system call.
    pub fn is_stale(&self) -> bool {
        match &self.place {
            Some(Place::Http1(connection, _)) if clock::turn() == self.reserved => {
                connection.sender.is_closed() || !is_quiet(&connection.probe)
            }
            _ => self.is_closed(),
        }
    }

    /// Whether the upstream closed it, or is not believed any more. Whether it may carry another request under the present roots
    /// is for [`Reserved::ready`] to say.
    pub fn is_closed(&self) -> bool {
        match &self.place {
            Some(Place::Http1(connection, _)) => connection.sender.is_closed(),
            Some(Place::Http2(stream)) => stream.is_closed(),
            None => true,
        }
    }

    /// Gives the connection back after its answer was read to the end.
    pub fn give_back(mut self) {
        self.clean = true;
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        match self.place.take() {
            Some(Place::Http1(connection, _permit)) if self.clean && !connection.sender.is_closed() => {
                let idle = Idle { connection, timer: self.timer.take(), since: clock::nanos() };
                self.pool.idle().push(idle);
            }
            Some(Place::Http2(stream)) => {
                if let Some(http2) = &self.pool.http2 {
                    http2.release(stream);
                }
                let mut timers = self.pool.timers();
                if timers.len() < KEPT_TIMERS {
                    timers.extend(self.timer.take());
                }
            }
            Some(Place::Http1(..)) | None => {}
        }
    }
}

fn probe(stream: &Stream) -> Result<OwnedFd, Reason> {
    let probe = stream.socket().as_fd().try_clone_to_owned();
    probe.map_err(|error| Reason::new(Cause::of_io(&error), error))
}

/// The upstream allows no stream on a new connection.
fn no_streams() -> Reason {
    Reason::new(Cause::NotProcessed, "the upstream allows no request on a new HTTP/2 connection")
}

/// Nothing to read and no end in sight: an idle connection has nothing to say.
pub(super) fn is_quiet(socket: &OwnedFd) -> bool {
    let mut byte = [0_u8; 1];
    let peeked = rustix::net::recv(socket, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
    matches!(peeked, Err(rustix::io::Errno::AGAIN))
}

/// Counts a connection as open while it lives.
#[derive(Debug)]
struct Open(IntGauge);

impl Open {
    fn count(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The stream under hyper: counts what was written, and over HTTP/2 looks at what is received.
#[derive(Debug)]
pub(super) struct Counted {
    stream: Stream,
    written: Arc<AtomicU64>,
    received: Option<Received>,
    _open: Open,
}

impl Counted {
    fn count(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        let bytes = match (&written, &self.stream) {
            (Poll::Ready(Ok(bytes)), _) => *bytes as u64,
            // A TLS record may have left in part before the error.
            (Poll::Ready(Err(_)), Stream::Tls(_)) => 1,
            (Poll::Ready(Err(_)), Stream::Plain(_)) | (Poll::Pending, _) => 0,
        };
        self.written.fetch_add(bytes, Ordering::Relaxed);
        written
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { stream, received, .. } = &mut *self;
        let Some(received) = received else { return Pin::new(stream).poll_read(cx, buf) };
        let before = buf.filled().len();
        let read = Pin::new(stream).poll_read(cx, buf);
        if read.is_ready() {
            received.came(&buf.filled()[before..]);
        }
        read
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.count(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.count(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
