//! The upstream connections of one worker, over hyper's client connection.
//!
//! Guarantees that at most `max_connections` are open, that a wait for one is bounded, that a connection
//! which the upstream closed or which idled too long is not used, and that for every connection it is
//! known whether a byte was written. Does not decide whether to send again: that is `upstream`.

use std::{
    future::{Future, poll_fn},
    io,
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use prometheus::{IntCounterVec, IntGauge, Opts, Registry};
use rustix::net::RecvFlags;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::AbortHandle,
    time::{Instant, Sleep, sleep, timeout},
};

use crate::{
    clock,
    connect::{ConnectError, Connector, Stream},
};

/// The upstream's answer may have this much head; hyper's own bound is far higher.
const MAX_HEAD: usize = 64 * 1024;

/// Why no connection was had.
#[derive(Debug, Error)]
pub enum NoConnection {
    /// All connections were busy for as long as a caller may wait.
    #[error("all upstream connections are busy")]
    Busy,
    /// None could be made.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The connection closed before the first request.
    #[error("the upstream closed a new connection")]
    Closed,
}

/// Why a request got no answer.
#[derive(Debug, Error)]
pub enum SendError {
    /// There is no connection.
    #[error("no connection")]
    Closed,
    /// The exchange broke off.
    #[error(transparent)]
    Http(#[from] hyper::Error),
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
    wait: Duration,
    /// In nanoseconds.
    idle_timeout: u64,
    metrics: Metrics,
}

#[derive(Debug)]
struct Idle {
    connection: Connection,
    timer: Option<Timer>,
    /// In nanoseconds of this process.
    since: u64,
}

impl Idle {
    fn is_too_old(&self, idle_timeout: u64) -> bool {
        clock::nanos().saturating_sub(self.since) >= idle_timeout
    }
}

/// A live connection to the upstream. Dropped, it is closed at once, whatever its other side does.
#[derive(Debug)]
struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    task: AbortHandle,
    written: Arc<AtomicU64>,
    /// The same socket once more, to ask the kernel whether the upstream closed it.
    probe: OwnedFd,
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

/// A connection reserved for one exchange. It goes back to the pool by [`Reserved::give_back`], or dropped
/// before it was used; any other is closed, since nobody knows what still lies in it.
#[derive(Debug)]
pub struct Reserved {
    pool: Arc<Pool>,
    /// `None` only while this is dropped.
    connection: Option<Connection>,
    timer: Option<Timer>,
    /// The turn of the event loop in which it was reserved.
    reserved: u64,
    /// Nothing lies in it that belongs to somebody else.
    clean: bool,
    _permit: OwnedSemaphorePermit,
}

impl Pool {
    /// A pool of at most `max` connections.
    pub fn new(
        connector: Connector,
        max: usize,
        wait: Duration,
        idle_timeout: Duration,
        metrics: Metrics,
    ) -> Self {
        let permits = Arc::new(Semaphore::new(max));
        let idle_timeout = clock::nanos_of(idle_timeout);
        Self { connector, permits, idle: Mutex::default(), wait, idle_timeout, metrics }
    }

    /// Reserves a connection: an idle one that is still alive, or a new one.
    pub async fn reserve(self: &Arc<Self>) -> Result<Reserved, NoConnection> {
        let permit = match self.permits.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => Box::pin(self.wait_for_permit()).await?,
        };
        let (connection, timer) = match self.take_idle() {
            Some(idle) => idle,
            None => (Box::pin(self.connect()).await?, None),
        };
        Ok(Reserved {
            pool: self.clone(),
            connection: Some(connection),
            timer,
            reserved: clock::turn(),
            clean: true,
            _permit: permit,
        })
    }

    /// Closes what has idled too long or was closed by the upstream. To be called about once a second.
    pub fn sweep(&self) {
        self.idle().retain(|idle| !idle.is_too_old(self.idle_timeout) && !idle.connection.sender.is_closed());
    }

    #[cold]
    async fn wait_for_permit(&self) -> Result<OwnedSemaphorePermit, NoConnection> {
        match timeout(self.wait, self.permits.clone().acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) | Err(_) => Err(NoConnection::Busy),
        }
    }

    /// The connection that was used last; the others may then idle out.
    fn take_idle(&self) -> Option<(Connection, Option<Timer>)> {
        let mut idle = self.idle();
        while let Some(last) = idle.pop() {
            if !last.is_too_old(self.idle_timeout) && !last.connection.sender.is_closed() {
                return Some((last.connection, last.timer));
            }
        }
        None
    }

    async fn connect(&self) -> Result<Connection, NoConnection> {
        let stream = self.connector.connect().await.inspect_err(|error| {
            self.metrics.connects.with_label_values(&[error.class()]).inc();
        })?;
        let written = Arc::new(AtomicU64::new(0));
        let probe = stream.socket().as_fd().try_clone_to_owned().map_err(ConnectError::from)?;
        let io = Counted { stream, written: written.clone() };
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(MAX_HEAD)
            .writev(false) // one buffer and send(2) cost less than two and writev(2)
            .handshake(TokioIo::new(io))
            .await
            .map_err(|_| NoConnection::Closed)?;
        self.metrics.connects.with_label_values(&["ok"]).inc();
        let open = Open::count(&self.metrics.open);
        let task = tokio::spawn(async move {
            let _open = open;
            if let Err(error) = connection.await {
                tracing::debug!(%error, "upstream connection ended");
            }
        });
        Ok(Connection { sender, task: task.abort_handle(), written, probe })
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }
}

impl Reserved {
    /// Waits until a request can be sent: the last one must be over.
    pub async fn ready(&mut self) -> Result<(), SendError> {
        self.clean = false;
        let connection = self.connection.as_mut().ok_or(SendError::Closed)?;
        Ok(connection.sender.ready().await?)
    }

    /// Sends a request; the future waits for the head of the answer. It does not hold the request, so that it
    /// stays small.
    pub fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> impl Future<Output = Result<Response<Incoming>, SendError>> + use<> {
        self.clean = false;
        let answer = self.connection.as_mut().map(|connection| connection.sender.send_request(request));
        async move {
            match answer {
                Some(answer) => Ok(answer.await?),
                None => Err(SendError::Closed),
            }
        }
    }

    /// Bytes written on this connection so far. If the number has not moved, nothing was sent.
    pub fn written(&self) -> u64 {
        self.connection.as_ref().map_or(0, Connection::written)
    }

    /// Replaces a dead connection by a new one, keeping its place under the cap.
    #[cold]
    pub async fn reconnect(&mut self) -> Result<(), NoConnection> {
        self.connection = Some(Box::pin(self.pool.connect()).await?);
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
        self.is_closed()
            || clock::turn() == self.reserved
                && self.connection.as_ref().is_none_or(|connection| !is_quiet(&connection.probe))
    }

    /// Whether it can carry another request.
    pub fn is_closed(&self) -> bool {
        self.connection.as_ref().is_none_or(|connection| connection.sender.is_closed())
    }

    /// Gives the connection back after its answer was read to the end.
    pub fn give_back(mut self) {
        self.clean = true;
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let reusable = self.clean && !self.is_closed();
        if let Some(connection) = self.connection.take().filter(|_| reusable) {
            let idle = Idle { connection, timer: self.timer.take(), since: clock::nanos() };
            self.pool.idle().push(idle);
        }
    }
}

/// Nothing to read and no end in sight: an idle HTTP/1.1 connection has nothing to say.
fn is_quiet(socket: &OwnedFd) -> bool {
    let mut byte = [0_u8; 1];
    let peeked = rustix::net::recv(socket, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
    matches!(peeked, Err(rustix::io::Errno::AGAIN))
}

/// Counts a connection as open while it lives.
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

/// The stream under hyper: counts what was written.
#[derive(Debug)]
struct Counted {
    stream: Stream,
    written: Arc<AtomicU64>,
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
        Pin::new(&mut self.stream).poll_read(cx, buf)
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
