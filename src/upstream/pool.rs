//! Connection pool of one worker, built on hyper's client connections.
//!
//! At most `max_connections` connections are open, and each wait for one is bounded. A connection is not reused if
//! the upstream closed it, if it has been idle for too long, or if the root certificates have changed after it was
//! opened. For every request the pool knows whether it may have been sent. It does not decide whether to send again:
//! the exchange does.
//!
//! An HTTP/1.1 connection is reserved for one exchange. An HTTP/2 connection is shared by many exchanges, and so is
//! the attempt to open one (single flight). [`Pool::reserve`] hides the difference.

mod counted;
mod opening;
mod reserved;
mod timer;

use std::iter;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use http::uri::Authority;
use http_body_util::Full;
use hyper::client::conn::http1;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

pub(super) use self::counted::Counted;
pub use self::reserved::PooledConnection;
pub(super) use self::reserved::is_quiet;
pub use self::timer::Timer;
use super::http2;
use super::http2::Dialing;
use super::wait_queue::WaitQueue;
use crate::clock;
use crate::connect::Connector;
use crate::model::cause::Cause;
use crate::reason::Reason;
use crate::registry::Registry;

/// Why no connection could be reserved.
#[derive(Clone, Debug, Error)]
pub enum NoConnection {
    /// All connections were busy, and the wait for one timed out or was expected to.
    #[error("all upstream connections are busy")]
    Busy,
    /// No connection could be opened, or a new one closed before its first request.
    #[error("{0}")]
    Failed(Reason),
}

impl From<Reason> for NoConnection {
    fn from(reason: Reason) -> Self {
        Self::Failed(reason)
    }
}

/// Why a request got no reply.
///
/// With [`SendError::Closed`] nothing was sent. After any other error, [`PooledConnection::written`] tells whether the
/// request may have been sent.
#[derive(Debug, Error)]
pub enum SendError {
    /// There is no connection, or it takes no further request. Nothing was sent.
    #[error("the connection takes no more requests")]
    Closed,
    /// The connection broke while the request was written or the reply was awaited.
    #[error(transparent)]
    Http(#[from] hyper::Error),
}

impl SendError {
    /// The cause and its full text, for operators.
    #[cold]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Closed => Reason::new(Cause::Reset, "the upstream closed a new connection"),
            Self::Http(error) => Reason::of_exchange(error),
        }
    }
}

/// Metrics of upstream connections, shared by the pools of all workers.
#[derive(Clone, Debug)]
pub struct ConnectionMetrics {
    open: Gauge,
    connects: Family<ResultLabel, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    /// `ok`, or the cause of the failure.
    result: &'static str,
}

impl ConnectionMetrics {
    /// Registers the pool's metrics.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        Self {
            open: registry.metric("upstream_connections", "Open upstream connections."),
            connects: registry
                .metric("upstream_connects_total", "Attempts to connect to the upstream, by result."),
        }
    }
}

/// The connections of one worker to the upstream. All methods must run on that worker's runtime.
#[derive(Debug)]
pub struct Pool {
    connector: Connector,
    // Each HTTP/1.1 connection in use holds a permit, and each HTTP/2 connection as long as it is open. Idle HTTP/1.1
    // connections hold none: an exchange acquires a permit before it takes one.
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<Idle>>,
    /// The shared connections; `None` if HTTP/2 is not offered to the upstream.
    http2: Option<http2::Connections>,
    // An idle HTTP/1.1 connection keeps its timer. An HTTP/2 connection has many exchanges at once, so their timers
    // are kept here.
    timers: Mutex<Vec<Timer>>,
    queue: WaitQueue,
    // `upstream.connect_timeout`: a caller must not wait longer for a connection to become free than for a new one.
    wait: Duration,
    /// After how long an unused connection is closed, in nanoseconds.
    idle_timeout: u64,
    metrics: ConnectionMetrics,
}

/// What one exchange holds of the pool.
#[derive(Debug)]
enum Transport {
    /// A connection that no other exchange uses, and its permit.
    Http1(Connection, OwnedSemaphorePermit),
    /// A stream of a shared connection. The connection holds the permit.
    Http2(http2::RequestStream),
}

#[derive(Debug)]
struct Idle {
    connection: Connection,
    timer: Option<Timer>,
    /// When it became idle, in nanoseconds of [`clock::nanos`].
    since: u64,
}

impl Idle {
    /// Returns whether the connection must not be reused: it has been idle for `idle_timeout` nanoseconds, it is
    /// closed, or the number of its root certificates is not `generation`.
    fn is_unusable(&self, idle_timeout: u64, generation: u64) -> bool {
        // `upstream.idle_timeout` should be below the idle time-out of the server: a request that crosses the
        // server's FIN is lost, and whether it was processed is unknown.
        clock::nanos().saturating_sub(self.since) >= idle_timeout
            || self.connection.sender.is_closed()
            || self.connection.generation != generation
    }
}

/// An open HTTP/1.1 connection. When it is dropped it closes at once, whatever the upstream does.
#[derive(Debug)]
struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    task: AbortHandle,
    /// The number of bytes written to the socket so far. If a request did not change it, nothing of that request was
    /// sent.
    written: Arc<AtomicU64>,
    /// A duplicate of the socket, to ask the kernel whether the upstream closed it: hyper owns the other one.
    probe: OwnedFd,
    /// The number of the root certificates that the upstream was verified with: see [`Connector::generation`].
    generation: u64,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The task owns the socket, and would hold it open for as long as the upstream does.
        self.task.abort();
    }
}

impl Pool {
    /// Makes an empty pool for at most `max` connections.
    ///
    /// `wait` is the longest time that a request waits for a free connection, and the longest time that the HTTP/2
    /// handshake of a new connection takes. `connector` bounds the TCP and TLS handshakes itself. `http2` is the
    /// upstream's authority if HTTP/2 is to be offered. HTTP/2 needs TLS, since ALPN picks the protocol.
    pub fn new(
        connector: Connector,
        max: usize,
        wait: Duration,
        idle_timeout: Duration,
        http2: Option<Authority>,
        metrics: ConnectionMetrics,
    ) -> Self {
        let connector = if http2.is_some() { connector.offering_http2() } else { connector };
        Self {
            connector,
            permits: Arc::new(Semaphore::new(max)),
            idle: Mutex::default(),
            http2: http2.map(http2::Connections::new),
            timers: Mutex::default(),
            queue: WaitQueue::new(max),
            wait,
            idle_timeout: clock::nanos_of(idle_timeout),
            metrics,
        }
    }

    /// Reserves a connection: a stream of a shared one, an idle one that is still alive, or a new one.
    ///
    /// Cancellation safe: a dropped future returns its permit. An attempt to open an HTTP/2 connection goes on, since
    /// other requests may wait for it.
    ///
    /// # Errors
    ///
    /// [`NoConnection::Busy`] if `max` connections are in use and the wait for one timed out or is expected to.
    /// [`NoConnection::Failed`] if no connection could be opened.
    pub async fn reserve(self: &Arc<Self>) -> Result<PooledConnection, NoConnection> {
        let (transport, timer) = match self.http2.as_ref().filter(|http2| http2.is_available()) {
            Some(http2) => match http2.stream(None, self.idle_timeout, self.connector.generation()) {
                Some(stream) => (Transport::Http2(stream), self.timers().pop()),
                // Boxed, as all waits here: they are rare, and inline they would make the future of every request
                // larger.
                None => Box::pin(self.reserve_http2(http2, None)).await?,
            },
            None => self.reserve_http1().await?,
        };
        Ok(PooledConnection::new(self.clone(), transport, timer))
    }

    /// Closes connections that have been idle for too long, that the upstream closed, or whose root certificates are
    /// no longer in use.
    ///
    /// Must be called about once a second: while no requests come, nothing else closes such connections.
    pub fn sweep(&self) {
        let generation = self.connector.generation();
        self.idle().retain(|idle| !idle.is_unusable(self.idle_timeout, generation));
        if let Some(http2) = &self.http2 {
            http2.sweep(self.idle_timeout, generation);
        }
    }

    /// Waits for a permit, and takes an idle HTTP/1.1 connection or opens one. If the upstream picks HTTP/2 on the new
    /// connection, returns its first stream.
    async fn reserve_http1(&self) -> Result<(Transport, Option<Timer>), NoConnection> {
        let permit = match self.permits.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => Box::pin(self.wait_for_permit()).await?,
        };
        match self.take_idle() {
            Some((connection, timer)) => Ok((Transport::Http1(connection, permit), timer)),
            None => Ok((Box::pin(self.connect(permit)).await?, None)),
        }
    }

    /// Reserves a stream of a shared connection, or an unshared connection if the upstream picks HTTP/1.1.
    ///
    /// `but` is a connection that refused a request of this exchange. It is used only if no other connection has room
    /// and none can be opened. All requests that need a new connection wait for the same attempt to open one (single
    /// flight).
    #[cold]
    async fn reserve_http2(
        self: &Arc<Self>,
        http2: &http2::Connections,
        but: Option<&Weak<http2::Connection>>,
    ) -> Result<(Transport, Option<Timer>), NoConnection> {
        let give_up = Instant::now() + self.wait;
        while http2.is_available() {
            let mut freed = pin!(http2.freed.notified());
            // Enabled before the search for a stream, so that a stream which ends after it is not missed.
            freed.as_mut().enable();
            let dialing = match http2.stream(but, self.idle_timeout, self.connector.generation()) {
                Some(stream) => return Ok((Transport::Http2(stream), self.timers().pop())),
                None => self.dial(http2),
            };
            match dialing {
                Some(mut dialing) => tokio::select! {
                    dialed = dialed(&mut dialing) => dialed?,
                    () = freed => {}
                },
                // The cap allows no further connection, and all others are full. The one in `but` is better than
                // none: it refused a request, but it may take another one.
                None => match http2.stream(None, self.idle_timeout, self.connector.generation()) {
                    Some(stream) => return Ok((Transport::Http2(stream), self.timers().pop())),
                    None => {
                        // One bound for all rounds: a waiter that is woken may find the stream taken, and would begin
                        // anew each time.
                        let left = give_up.saturating_duration_since(Instant::now());
                        self.queue.wait(left, freed).await.ok_or(NoConnection::Busy)?;
                    }
                },
            }
        }
        // The loop ended because the upstream picked HTTP/1.1.
        self.reserve_http1().await
    }

    /// Returns the attempt to connect that is under way, or starts one. Returns `None` if all permits are in use, so
    /// that no further connection may be opened.
    fn dial(self: &Arc<Self>, http2: &http2::Connections) -> Option<watch::Receiver<Dialing>> {
        // Locked until the new attempt is in its place, so that no second one begins.
        let mut dialing = http2.dialing();
        // `has_changed` fails once the sender is gone. That ends an attempt whose task panicked, too.
        if let Some(under_way) = dialing.as_ref().filter(|dialing| dialing.has_changed().is_ok()) {
            return Some(under_way.clone());
        }
        // Idle connections speak HTTP/1.1 and hold no permit: with a new connection they could exceed the cap.
        self.idle().clear();
        let permit = self.permits.clone().try_acquire_owned().ok()?;
        let (sender, receiver) = watch::channel(Dialing::UnderWay);
        let pool = self.clone();
        // A task of its own, since others wait for it: the request that starts the attempt may be dropped when its
        // caller disconnects.
        tokio::spawn(async move {
            let dialed = match pool.connect(permit).await {
                Ok(Transport::Http2(_)) => Dialing::Done,
                // The upstream picked HTTP/1.1 after all. The connection goes to the idle ones, where the first
                // waiter takes it.
                Ok(Transport::Http1(connection, _permit)) => {
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

    /// Takes the idle connection that was used last, with its timer. So connections that the load does not need stay
    /// unused until the idle time-out closes them.
    fn take_idle(&self) -> Option<(Connection, Option<Timer>)> {
        let (mut idle, generation) = (self.idle(), self.connector.generation());
        let live = iter::from_fn(|| idle.pop()).find(|last| !last.is_unusable(self.idle_timeout, generation));
        live.map(|last| (last.connection, last.timer))
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn timers(&self) -> MutexGuard<'_, Vec<Timer>> {
        self.timers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until an attempt to connect is over, and returns its error if it failed. A success returns no stream: the
/// caller must search for one again.
async fn dialed(dialing: &mut watch::Receiver<Dialing>) -> Result<(), NoConnection> {
    match dialing.wait_for(|dialing| !matches!(dialing, Dialing::UnderWay)).await.as_deref() {
        Ok(Dialing::Failed(why)) => Err(why.clone()),
        // `Err` means that the task of the attempt is gone without a result. The caller then starts another one.
        Ok(Dialing::UnderWay | Dialing::Done) | Err(_) => Ok(()),
    }
}
