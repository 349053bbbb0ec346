//! The bounds on concurrent work: connections, requests, and the bytes that unfinished ones hold.

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

/// Why there is no room.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum NoRoom {
    /// The gateway is stopping.
    #[error("the gateway is stopping; call again, a new one takes over")]
    Draining,
    /// `max_in_flight` or `max_connections` is reached.
    #[error("the gateway has reached its bound on concurrent work; call again shortly")]
    Overloaded,
}

/// So many connections over the cap are told so at once; what goes beyond is closed without a word.
const MAX_SURPLUS: usize = 64;

/// Of these, so many at most go to those of whom no caller is known, and to those that have not shown their certificate yet: who
/// they are is known only behind the handshake. The rest is for known callers.
const MAX_UNKNOWN_SURPLUS: usize = MAX_SURPLUS / 2;

/// How far a stop has come.
const SERVING: u8 = 0;
const CLOSING: u8 = 1;
const DRAINING: u8 = 2;

/// The bounds on concurrent work, shared by all workers.
#[derive(Debug)]
pub struct Bounds {
    phase: AtomicU8,
    connections: AtomicUsize,
    surplus: AtomicUsize,
    in_flight: AtomicUsize,
    max_connections: usize,
    max_in_flight: usize,
    shares: Arc<Shares>,
    unfinished: Arc<Budget>,
    alive: mpsc::WeakSender<()>,
}

/// Room for one connection or one request; given back on drop. The stop waits for all of them.
#[derive(Debug)]
pub struct Room {
    bounds: Arc<Bounds>,
    counter: fn(&Bounds) -> &AtomicUsize,
    _alive: Option<mpsc::Sender<()>>,
}

/// A connection's place among all.
#[derive(Debug)]
pub struct Place {
    /// It is over the cap: its one request is refused.
    pub surplus: bool,
    _room: Room,
}

impl Bounds {
    /// Bounds of a configuration. The stop is over when all senders of `alive` are gone.
    pub fn new(server: &config::Server, alive: &mpsc::Sender<()>) -> Self {
        Self {
            phase: AtomicU8::new(SERVING),
            connections: AtomicUsize::new(0),
            surplus: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            max_connections: server.max_connections,
            max_in_flight: server.max_in_flight,
            shares: Arc::new(Shares::new(server.max_connections)),
            unfinished: Budget::new(server.max_unfinished),
            alive: alive.downgrade(),
        }
    }

    /// Room for a connection. One over the cap finds room only to be told so, within bounds of its own. `is_known`: a caller is
    /// known by its address or user.
    pub fn connection(self: &Arc<Self>, is_known: bool) -> Result<Place, NoRoom> {
        let room = self.take(|bounds| &bounds.connections, self.max_connections);
        let surplus = room.is_err();
        let max_surplus = if is_known { MAX_SURPLUS } else { MAX_UNKNOWN_SURPLUS };
        let room = room.or_else(|_| self.take(|bounds| &bounds.surplus, max_surplus))?;
        Ok(Place { surplus, _room: room })
    }

    /// A place for a connection of which no caller is known; `None`: strangers, or those of its address or user, have no more.
    pub(crate) fn stranger(&self, peer: Peer) -> Option<Stranger> {
        self.shares.stranger(peer)
    }

    /// A place for a handshake that must show a certificate.
    pub(crate) fn unproven(&self, peer: Peer) -> Unproven {
        self.shares.unproven(peer)
    }

    /// What a head or a body that begins may hold.
    pub(crate) fn unfinished(&self) -> Part {
        self.unfinished.part()
    }

    /// Room for a request. It goes with the exchange, so that a stop waits for an exchange whose caller left.
    pub fn request(self: &Arc<Self>, surplus: bool) -> Result<Room, NoRoom> {
        if self.phase.load(Ordering::Relaxed) == DRAINING {
            return Err(NoRoom::Draining);
        }
        if surplus {
            return Err(NoRoom::Overloaded);
        }
        self.take(|bounds| &bounds.in_flight, self.max_in_flight)
    }

    /// The gateway is stopping. Requests are served, each as the last one of its connection.
    pub fn close(&self) {
        self.phase.store(CLOSING, Ordering::Relaxed);
    }

    /// From now on requests are refused.
    pub fn drain(&self) {
        self.phase.store(DRAINING, Ordering::Relaxed);
    }

    /// Whether the gateway is stopping.
    pub fn is_stopping(&self) -> bool {
        self.phase.load(Ordering::Relaxed) != SERVING
    }

    /// Open caller connections.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Requests between head and answer, and exchanges whose caller left.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    fn take(self: &Arc<Self>, counter: fn(&Self) -> &AtomicUsize, max: usize) -> Result<Room, NoRoom> {
        let before = counter(self).fetch_add(1, Ordering::Relaxed);
        let room = Room { bounds: self.clone(), counter, _alive: self.alive.upgrade() };
        if before < max { Ok(room) } else { Err(NoRoom::Overloaded) }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        (self.counter)(&self.bounds).fetch_sub(1, Ordering::Relaxed);
    }
}
