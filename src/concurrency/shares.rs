//! How many connections those may hold of whom no caller is known: silent strangers never shut callers out.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::model::peer::Peer;

/// The connections of strangers, and of those that have not shown a certificate yet.
#[derive(Debug)]
pub(super) struct Shares {
    /// The most connections of all strangers, and of one of them.
    max_strangers: (usize, usize),
    strangers: Mutex<Strangers>,
    /// The most handshakes of all, and of one address.
    max_unproven: (usize, usize),
    unproven: Mutex<Handshakes>,
}

#[derive(Debug, Default)]
struct Strangers {
    all: usize,
    each: HashMap<Origin, usize>,
}

/// Where a stranger comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Origin {
    /// An IPv6 address stands for its network of 64 bits, of which one host has all.
    Address(IpAddr),
    Uid(u32),
}

/// The handshakes that go on, by where they come from, oldest first.
#[derive(Debug, Default)]
struct Handshakes {
    begun: u64,
    all: usize,
    of: HashMap<Origin, VecDeque<(u64, oneshot::Sender<()>)>>,
}

/// A stranger's place; given back on drop.
#[derive(Debug)]
pub(crate) struct Stranger {
    shares: Arc<Shares>,
    origin: Origin,
}

/// The place of a handshake that must show a certificate; given back on drop.
#[derive(Debug)]
pub(crate) struct Unproven {
    shares: Arc<Shares>,
    origin: Origin,
    number: u64,
    displaced: oneshot::Receiver<()>,
}

impl Shares {
    /// Of so many connections strangers get a sixteenth, and one of them a quarter of that; handshakes get a quarter, and
    /// those of one address a quarter of that. Small
    /// caps leave strangers some places, and callers at least half.
    pub(super) fn new(max_connections: usize) -> Self {
        let at_most = max_connections.div_ceil(2);
        let strangers = (max_connections / 16).max(16).min(at_most);
        let max_unproven = (max_connections / 4).max(16).min(at_most);
        Self {
            max_strangers: (strangers, strangers.div_ceil(4)),
            strangers: Mutex::default(),
            max_unproven: (max_unproven, max_unproven.div_ceil(4)),
            unproven: Mutex::default(),
        }
    }

    /// A place for a stranger; `None`: strangers, or those of its address or user, have no more.
    pub(super) fn stranger(self: &Arc<Self>, peer: Peer) -> Option<Stranger> {
        let origin = Origin::of(peer);
        let mut strangers = lock(&self.strangers);
        let (max, max_each) = self.max_strangers;
        if strangers.all >= max || strangers.each.get(&origin).is_some_and(|count| *count >= max_each) {
            return None;
        }
        strangers.all += 1;
        *strangers.each.entry(origin).or_default() += 1;
        Some(Stranger { shares: self.clone(), origin })
    }

    /// A place for a handshake. If there is none left, the oldest one of the address that has most is closed: a caller's is over in
    /// a moment, and whoever opens many displaces its own.
    pub(super) fn unproven(self: &Arc<Self>, peer: Peer) -> Unproven {
        let (sender, displaced) = oneshot::channel();
        let origin = Origin::of(peer);
        let (max, max_each) = self.max_unproven;
        let mut handshakes = lock(&self.unproven);
        handshakes.begun += 1;
        let number = handshakes.begun;
        let own = handshakes.of.entry(origin).or_default();
        own.push_back((number, sender));
        if own.len() > max_each {
            own.pop_front(); // its sender is dropped
        } else if handshakes.all == max {
            let age = |open: &VecDeque<_>| Reverse(open.front().map(|(number, _)| *number));
            if let Some(most) = handshakes.of.values_mut().max_by_key(|open| (open.len(), age(open))) {
                most.pop_front();
            }
        } else {
            handshakes.all += 1;
        }
        Unproven { shares: self.clone(), origin, number, displaced }
    }
}

impl Origin {
    fn of(peer: Peer) -> Self {
        match peer {
            Peer::Unix { uid, .. } => Self::Uid(uid),
            Peer::Tcp(address) => Self::Address(match address.ip().to_canonical() {
                IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
                address @ IpAddr::V4(_) => address,
            }),
        }
    }
}

impl Unproven {
    /// Ends when a newer handshake takes this place.
    pub(crate) async fn displaced(&mut self) {
        let _ = (&mut self.displaced).await;
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let mut strangers = lock(&self.shares.strangers);
        strangers.all -= 1;
        if let Some(count) = strangers.each.get_mut(&self.origin) {
            *count -= 1;
            if *count == 0 {
                strangers.each.remove(&self.origin);
            }
        }
    }
}

impl Drop for Unproven {
    fn drop(&mut self) {
        let mut handshakes = lock(&self.shares.unproven);
        let Some(own) = handshakes.of.get_mut(&self.origin) else { return };
        let place = own.binary_search_by_key(&self.number, |(number, _)| *number);
        if let Ok(place) = place {
            own.remove(place);
        }
        if own.is_empty() {
            handshakes.of.remove(&self.origin);
        }
        if place.is_ok() {
            handshakes.all -= 1;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(address: &str) -> Peer {
        Peer::Tcp(address.parse().unwrap())
    }

    #[test]
    fn stranger_gets_a_quarter_of_what_all_strangers_get() {
        let shares = Arc::new(Shares::new(1024));
        let one: Vec<_> =
            (0..16).map(|port| shares.stranger(tcp(&format!("10.0.0.1:{port}"))).unwrap()).collect();
        assert!(shares.stranger(tcp("10.0.0.1:99")).is_none());
        let others: Vec<_> =
            (2..50).map(|last| shares.stranger(tcp(&format!("10.0.0.{last}:1"))).unwrap()).collect();
        assert!(shares.stranger(tcp("10.1.0.1:1")).is_none(), "all have 64");
        drop(others);
        assert!(shares.stranger(tcp("10.1.0.1:1")).is_some());
        assert!(shares.stranger(tcp("10.0.0.1:99")).is_none(), "its own are not given back");
        drop(one);
        assert!(shares.stranger(tcp("10.0.0.1:99")).is_some());
        assert_eq!(lock(&shares.strangers).each.len(), 0, "nothing is kept of who is gone");
    }

    #[test]
    fn addresses_of_one_host_are_one_origin() {
        let of = |address| Origin::of(tcp(address));
        assert_eq!(of("[2001:db8:0:1::1]:1"), of("[2001:db8:0:1:ffff::2]:2"));
        assert_ne!(of("[2001:db8:0:1::1]:1"), of("[2001:db8:0:2::1]:1"));
        assert_eq!(of("[::ffff:10.0.0.1]:1"), of("10.0.0.1:2"));
        assert_ne!(of("10.0.0.1:1"), of("10.0.0.2:1"));
        assert_eq!(Origin::of(Peer::Unix { uid: 1, gid: 2 }), Origin::of(Peer::Unix { uid: 1, gid: 3 }));
    }

    #[test]
    fn small_caps_leave_callers_at_least_half() {
        for (max, strangers, unproven) in [(1, 1, 1), (10, 5, 5), (100, 16, 25), (1024, 64, 256)] {
            let shares = Shares::new(max);
            assert_eq!((shares.max_strangers.0, shares.max_unproven.0), (strangers, unproven), "{max}");
        }
    }

    #[tokio::test]
    async fn oldest_handshake_of_the_address_that_has_most_makes_room() {
        let shares = Arc::new(Shares::new(64)); // 16 handshakes, 4 of one address
        let is_open = |handshake: &mut Unproven| {
            handshake.displaced.try_recv().is_err_and(|error| error == oneshot::error::TryRecvError::Empty)
        };
        let mut own: Vec<_> = (0..4).map(|_| shares.unproven(tcp("10.0.0.1:1"))).collect();
        drop(own.remove(1));
        own.push(shares.unproven(tcp("10.0.0.1:1")));
        assert!(own.iter_mut().all(is_open));
        own.push(shares.unproven(tcp("10.0.0.1:1")));
        own[0].displaced().await;
        assert!(own[1..].iter_mut().all(is_open), "its own oldest");
        let mut others: Vec<_> =
            (2..14).map(|last| shares.unproven(tcp(&format!("10.0.0.{last}:1")))).collect();
        assert!(own[1..].iter_mut().chain(&mut others).all(is_open), "16 in all");
        let mut one_more = shares.unproven(tcp("10.0.0.99:1"));
        own[1].displaced().await;
        assert!(is_open(&mut one_more) && others.iter_mut().all(is_open), "who has one keeps it");
        drop((own, others, one_more));
        let handshakes = lock(&shares.unproven);
        assert_eq!((handshakes.all, handshakes.of.len()), (0, 0));
    }
}
