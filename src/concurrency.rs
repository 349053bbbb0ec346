//! Load shedding at the entrance: bounds on connections, on requests in flight, and on the bytes of requests that have
//! not been received completely.
//!
//! A request over a bound is rejected at once; nothing waits here. The bounds hold for all workers together. Peers
//! that are no known caller (*strangers*) have a share of their own (`concurrency/shares.rs`), so that they cannot
//! take the places of callers.

mod budget;
mod shares;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use thiserror::Error;
use tokio::sync::mpsc;

use crate::config;
use crate::model::peer::Peer;
use budget::Budget;
pub(crate) use budget::{FREE, Part};
use shares::Shares;
pub(crate) use shares::{Stranger, Unproven};

/// Why there is no room for a connection or a request.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum NoRoom {
    /// The gateway is stopping.
    #[error("the gateway is stopping; call again, a new one takes over")]
    Draining,
    /// `max_in_flight` or `max_connections` is reached.
    #[error("the gateway has reached its limit on concurrent work; call again shortly")]
    Overloaded,
}

/// How many connections over the cap are accepted at a time, to be answered with 503. Further ones are closed without
/// an answer, since each costs a file descriptor and memory, too.
const MAX_OVER_CAP: usize = 64;

/// How many of the [`MAX_OVER_CAP`] connections may be of peers that are not known to be callers. The rest is for known
/// callers. A caller with a certificate counts as unknown here, since it is known only after the handshake.
// Strangers once held all of them, and the connections of callers were closed without an answer.
const MAX_UNKNOWN_OVER_CAP: usize = MAX_OVER_CAP / 2;

// The phases of a stop. Numbers, since workers read the phase from an atomic at each request.
const SERVING: u8 = 0;
const CLOSING: u8 = 1;
const DRAINING: u8 = 2;

/// The bounds on concurrent work, shared by all workers.
#[derive(Debug)]
pub struct Limits {
    phase: AtomicU8,
    connections: AtomicUsize,
    over_connection_cap: AtomicUsize,
    in_flight: AtomicUsize,
    max_connections: usize,
    max_in_flight: usize,
    shares: Arc<Shares>,
    unfinished: Arc<Budget>,
    // Weak: a stop waits until the channel is closed, and this struct outlives the stop.
    alive: mpsc::WeakSender<()>,
}

/// Room for one connection or one request, released on drop. A stop waits until all of them are dropped.
#[derive(Debug)]
pub struct InFlightPermit {
    limits: Arc<Limits>,
    counter: fn(&Limits) -> &AtomicUsize,
    _alive: Option<mpsc::Sender<()>>,
}

/// The place of one connection.
#[derive(Debug)]
pub struct ConnectionSlot {
    /// Whether the connection is over the cap. Such a connection may send one request, which is rejected.
    pub over_connection_cap: bool,
    _permit: InFlightPermit,
}

impl Limits {
    /// Makes the bounds of a configuration. Each [`InFlightPermit`] holds a clone of `alive`, so that the receiver of
    /// that channel ends when the last permit is dropped.
    pub fn new(server: &config::Server, alive: &mpsc::Sender<()>) -> Self {
        Self {
            phase: AtomicU8::new(SERVING),
            connections: AtomicUsize::new(0),
            over_connection_cap: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            max_connections: server.max_connections,
            max_in_flight: server.max_in_flight,
            shares: Arc::new(Shares::new(server.max_connections)),
            unfinished: Budget::new(server.max_unfinished),
            alive: alive.downgrade(),
        }
    }

    /// Takes a place for a connection. If `max_connections` is reached, it takes one of a few surplus places, so that
    /// the caller gets a 503 instead of a reset.
    ///
    /// `is_known` says whether the peer is a known caller by address or user.
    ///
    /// # Errors
    ///
    /// [`NoRoom::Overloaded`] if there is no surplus place either. The caller must then close the connection.
    pub fn connection(self: &Arc<Self>, is_known: bool) -> Result<ConnectionSlot, NoRoom> {
        let permit = self.take(|limits| &limits.connections, self.max_connections);
        let over_connection_cap = permit.is_err();
        let max_over_cap = if is_known { MAX_OVER_CAP } else { MAX_UNKNOWN_OVER_CAP };
        let permit = permit.or_else(|_| self.take(|limits| &limits.over_connection_cap, max_over_cap))?;
        Ok(ConnectionSlot { over_connection_cap, _permit: permit })
    }

    /// Takes a place for a peer that is no known caller. Returns `None` if the share of all strangers is used up, or
    /// that of the strangers from the same address or user.
    pub(crate) fn stranger(&self, peer: Peer) -> Option<Stranger> {
        self.shares.stranger(peer)
    }

    /// Takes a place for a handshake in which the peer must show a certificate. Always succeeds: if no place is free,
    /// an older handshake loses its own.
    pub(crate) fn unproven(&self, peer: Peer) -> Unproven {
        self.shares.unproven(peer)
    }

    /// Starts to count the bytes of the head or body of a request that is being received.
    pub(crate) fn unfinished(&self) -> Part {
        self.unfinished.part()
    }

    /// Takes room for a request. The room moves into the exchange, so that a stop waits for an exchange whose caller
    /// has disconnected.
    ///
    /// # Errors
    ///
    /// [`NoRoom::Draining`] once [`Limits::drain`] was called. [`NoRoom::Overloaded`] if `max_in_flight` is reached, or if
    /// the connection is over the cap.
    pub fn request(self: &Arc<Self>, over_connection_cap: bool) -> Result<InFlightPermit, NoRoom> {
        // Before the caps: `draining` tells a caller that another gateway takes over, `overloaded` does not.
        if self.phase.load(Ordering::Relaxed) == DRAINING {
            return Err(NoRoom::Draining);
        }
        if over_connection_cap {
            return Err(NoRoom::Overloaded);
        }
        self.take(|limits| &limits.in_flight, self.max_in_flight)
    }

    /// Begins a stop with a grace period: requests are still served, each as the last one of its connection.
    pub fn close(&self) {
        self.phase.store(CLOSING, Ordering::Relaxed);
    }

    /// Makes [`Limits::request`] reject all requests from now on.
    pub fn drain(&self) {
        self.phase.store(DRAINING, Ordering::Relaxed);
    }

    /// Returns whether a stop has begun, with or without a grace period.
    pub fn is_stopping(&self) -> bool {
        self.phase.load(Ordering::Relaxed) != SERVING
    }

    /// Returns the number of open connections, without the surplus ones.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Returns the number of requests in flight. Exchanges whose caller has disconnected are included.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    fn take(
        self: &Arc<Self>,
        counter: fn(&Self) -> &AtomicUsize,
        max: usize,
    ) -> Result<InFlightPermit, NoRoom> {
        // One atomic step. If the count were read first, several workers could take the last place together.
        let before = counter(self).fetch_add(1, Ordering::Relaxed);
        // Made in either case: if it is not returned, its drop takes the count back.
        let permit = InFlightPermit { limits: self.clone(), counter, _alive: self.alive.upgrade() };
        if before < max { Ok(permit) } else { Err(NoRoom::Overloaded) }
    }
}

impl Drop for InFlightPermit {
    fn drop(&mut self) {
        (self.counter)(&self.limits).fetch_sub(1, Ordering::Relaxed);
    }
}
