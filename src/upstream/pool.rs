//! Connection pool of one worker, over hyper's client connections.
//!
//! Guarantees that at most `max_connections` are open, and that a wait for one is bounded. A connection is not used if the
//! upstream closed it, if it idled too long, or if it was made under other roots. Of every request it is known whether it may
//! have been sent. Does not decide whether to send again: that is for the exchange.
//!
//! An HTTP/1.1 connection is reserved for one exchange. An HTTP/2 connection is shared by many exchanges, and so is the attempt
//! to open one (single flight). [`Pool::reserve`] hides the difference.

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
pub use self::reserved::Reserved;
pub(super) use self::reserved::is_quiet;
pub use self::timer::Timer;
use super::http2;
use super::http2::Dialing;
use super::queue::Queue;
use crate::clock;
use crate::connect::Connector;
use crate::model::cause::Cause;
use crate::reason::Reason;
use crate::registry::Registry;

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
    /// The cause and its text, for operators.
    #[cold]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Closed => Reason::new(Cause::Reset, "the upstream closed a new connection"),
            Self::Http(error) => Reason::of_exchange(error),
        }
    }
}

/// Counts of upstream connections.
#[derive(Clone, Debug)]
pub struct Metrics {
    open: Gauge,
    connects: Family<ResultLabel, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    /// "ok", or the cause of the failure.
    result: &'static str,
}

impl Metrics {
    /// Registers the pool's metrics.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        Self {
            open: registry.metric("upstream_connections", "Open upstream connections."),
            connects: registry
                .metric("upstream_connects_total", "Attempts to connect to the upstream, by result."),
        }
    }
}

/// The connections of one worker.
#[derive(Debug)]
pub struct Pool {
    connector: Connector,
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<Idle>>,
    /// The shared connections; `None` if HTTP/2 is not offered.
    http2: Option<http2::Connections>,
    timers: Mutex<Vec<Timer>>,
    queue: Queue,
    wait: Duration,
    /// In nanoseconds.
    idle_timeout: u64,
    metrics: Metrics,
}

/// The connection of one exchange.
#[derive(Debug)]
enum Place {
    /// One that no other exchange uses, with its permit under the cap.
    Http1(Connection, OwnedSemaphorePermit),
    /// A stream of a shared one, which holds the permit itself.
    Http2(http2::Stream),
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
    /// A duplicate of the socket, to ask the kernel whether the upstream closed it.
    probe: OwnedFd,
    /// The generation of the roots that it was made under.
    generation: u64,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
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

    /// Reserves a connection: a stream of a shared one, an idle one that is still alive, or a new one.
    pub async fn reserve(self: &Arc<Self>) -> Result<Reserved, NoConnection> {
        let (place, timer) = match self.http2.as_ref().filter(|http2| http2.are_to_be_had()) {
            Some(http2) => match http2.stream(None, self.idle_timeout, self.connector.generation()) {
                Some(stream) => (Place::Http2(stream), self.timers().pop()),
                None => Box::pin(self.shared(http2, None)).await?,
            },
            None => self.own().await?,
        };
        Ok(Reserved::new(self.clone(), place, timer))
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
    async fn own(&self) -> Result<(Place, Option<Timer>), NoConnection> {
        let permit = match self.permits.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => Box::pin(self.wait_for_permit()).await?,
        };
        match self.take_idle() {
            Some((connection, timer)) => Ok((Place::Http1(connection, permit), timer)),
            None => Ok((Box::pin(self.connect(permit)).await?, None)),
        }
    }

    /// A stream of a shared connection other than `but`, if there is another or can be. All who need a new connection wait for
    /// the same attempt. If the upstream picks HTTP/1.1 after all, an unshared connection.
    #[cold]
    async fn shared(
        self: &Arc<Self>,
        http2: &http2::Connections,
        but: Option<&Weak<http2::Connection>>,
    ) -> Result<(Place, Option<Timer>), NoConnection> {
        let give_up = Instant::now() + self.wait;
        while http2.are_to_be_had() {
            let mut freed = pin!(http2.freed.notified());
            freed.as_mut().enable(); // a stream that is freed from here on is not missed
            let dialing = match http2.stream(but, self.idle_timeout, self.connector.generation()) {
                Some(stream) => return Ok((Place::Http2(stream), self.timers().pop())),
                None => self.dial(http2),
            };
            match dialing {
                Some(mut dialing) => tokio::select! {
                    dialed = dialed(&mut dialing) => dialed?,
                    () = freed => {}
                },
                // All connections that the cap allows are open and full.
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

    /// The attempt to connect that is under way, or a new one; `None` if the cap allows no more connections. It runs as a task
    /// of its own, since others wait for it, too.
    fn dial(self: &Arc<Self>, http2: &http2::Connections) -> Option<watch::Receiver<Dialing>> {
        let mut dialing = http2.dialing();
        if let Some(under_way) = dialing.as_ref().filter(|dialing| dialing.has_changed().is_ok()) {
            return Some(under_way.clone());
        }
        self.idle().clear(); // these are HTTP/1.1, and hold no permit
        let permit = self.permits.clone().try_acquire_owned().ok()?;
        let (sender, receiver) = watch::channel(Dialing::UnderWay);
        let pool = self.clone();
        tokio::spawn(async move {
            let dialed = match pool.connect(permit).await {
                Ok(Place::Http2(_)) => Dialing::Done,
                Ok(Place::Http1(connection, _permit)) => {
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

    /// The connection that was used last, so that the others may idle out.
    fn take_idle(&self) -> Option<(Connection, Option<Timer>)> {
        let (mut idle, generation) = (self.idle(), self.connector.generation());
        let live = iter::from_fn(|| idle.pop()).find(|last| !last.is_spent(self.idle_timeout, generation));
        live.map(|last| (last.connection, last.timer))
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn timers(&self) -> MutexGuard<'_, Vec<Timer>> {
        self.timers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until an attempt to connect is over.
async fn dialed(dialing: &mut watch::Receiver<Dialing>) -> Result<(), NoConnection> {
    match dialing.wait_for(|dialing| !matches!(dialing, Dialing::UnderWay)).await.as_deref() {
        Ok(Dialing::Failed(why)) => Err(why.clone()),
        Ok(Dialing::UnderWay | Dialing::Done) | Err(_) => Ok(()),
    }
}
