//! Shares of the connections for peers that are no known caller.
//!
//! Guarantees that silent strangers never use up the connections of callers. Thousands of connections of one
//! unprivileged process once filled `max_connections`, and callers were reset without a word. Does not limit callers:
//! many of them may come from one address.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::model::peer::Peer;

/// The connections of strangers, and the handshakes whose peer has yet to show a certificate.
#[derive(Debug)]
pub(super) struct Shares {
    /// The largest number of strangers' connections: of all, and of one origin.
    max_strangers: (usize, usize),
    strangers: Mutex<Strangers>,
    /// The largest number of handshakes: of all, and of one origin.
    max_unproven: (usize, usize),
    unproven: Mutex<Handshakes>,
}

#[derive(Debug, Default)]
struct Strangers {
    all: usize,
    each: HashMap<Origin, usize>,
}

/// Where a peer comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Origin {
    /// Of IPv6 the network of 64 bits: one host usually has all of its addresses, and could come from a new one each
    /// time.
    Address(IpAddr),
    /// The user at the other end of a Unix socket. The group does not count, since a process may choose among
    /// several.
    Uid(u32),
}

/// The handshakes in progress by origin, the oldest first.
#[derive(Debug, Default)]
struct Handshakes {
    begun: u64,
    all: usize,
    of: HashMap<Origin, VecDeque<(u64, oneshot::Sender<()>)>>,
}

/// A stranger's place. Released on drop.
#[derive(Debug)]
pub(crate) struct Stranger {
    shares: Arc<Shares>,
    origin: Origin,
}

/// The place of a handshake that must show a certificate. Released on drop, unless a newer handshake has taken it.
#[derive(Debug)]
pub(crate) struct Unproven {
    shares: Arc<Shares>,
    origin: Origin,
    number: u64,
    displaced: oneshot::Receiver<()>,
}

impl Shares {
    /// Divides `max_connections`. All strangers get a sixteenth, one origin a quarter of that; handshakes get a
    /// quarter, one origin a quarter of that. With a small cap strangers still get some places, and callers at least
    /// half.
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

    /// Takes a place for a stranger. Returns `None` if all strangers, or those of its origin, have no more.
    pub(super) fn stranger(self: &Arc<Self>, peer: Peer) -> Option<Stranger> {
        let origin = Origin::of(peer);
        let mut strangers = lock(&self.strangers);
        let (max, max_each) = self.max_strangers;
        if strangers.all >= max || strangers.each.get(&origin).is_some_and(|count| *count >= max_each) {
            return None;
        }
        // No older one is displaced, as a handshake would be: a stranger stays one, while a handshake may turn out to
        // be a caller's.
        strangers.all += 1;
        *strangers.each.entry(origin).or_default() += 1;
        Some(Stranger { shares: self.clone(), origin })
    }

    /// Takes a place for a handshake. If there is none left, the oldest one of the origin that has most is displaced.
    ///
    /// Before it shows its certificate, a caller looks like a stranger, so a newcomer is always admitted. A caller's
    /// handshake takes a moment only, and an origin that opens many displaces its own.
    pub(super) fn unproven(self: &Arc<Self>, peer: Peer) -> Unproven {
        let (sender, displaced) = oneshot::channel();
        let origin = Origin::of(peer);
        let (max, max_each) = self.max_unproven;
        let mut handshakes = lock(&self.unproven);
        handshakes.begun += 1;
        let number = handshakes.begun;
        let own = handshakes.of.entry(origin).or_default();
        own.push_back((number, sender));
        // The origin's own bound first. While the oldest of all made room, one address that was fast enough displaced
        // callers.
        if own.len() > max_each {
            // Dropping the sender wakes the handshake that waits in `displaced`.
            own.pop_front();
        } else if handshakes.all == max {
            // Of origins with equally many, the one whose oldest handshake is the oldest: it has had the most time.
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
                // After `to_canonical`, so that an IPv4 address that is mapped into IPv6 is the same origin as
                // without.
                IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
                address @ IpAddr::V4(_) => address,
            }),
        }
    }
}

impl Unproven {
    /// Waits until a newer handshake takes this place. Cancellation safe.
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
                // Otherwise the map would grow with each address that ever connected.
                strangers.each.remove(&self.origin);
            }
        }
    }
}

impl Drop for Unproven {
    fn drop(&mut self) {
        let mut handshakes = lock(&self.shares.unproven);
        let Some(own) = handshakes.of.get_mut(&self.origin) else { return };
        let index = own.binary_search_by_key(&self.number, |(number, _)| *number);
        // A displaced handshake is no longer in the list. Its place in `all` went to the newcomer.
        if let Ok(index) = index {
            own.remove(index);
        }
        if own.is_empty() {
            handshakes.of.remove(&self.origin);
        }
        if index.is_ok() {
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
    fn unknown_peer_gets_a_quarter_of_the_share_of_unknown_peers() {
        let shares = Arc::new(Shares::new(1024));
        // A sixteenth of 1024 is 64, a quarter of that 16.
        let one: Vec<_> =
            (0..16).map(|port| shares.stranger(tcp(&format!("10.0.0.1:{port}"))).unwrap()).collect();
        assert!(shares.stranger(tcp("10.0.0.1:99")).is_none());
        let others: Vec<_> =
            (2..50).map(|last| shares.stranger(tcp(&format!("10.0.0.{last}:1"))).unwrap()).collect();
        assert!(shares.stranger(tcp("10.1.0.1:1")).is_none(), "all have 64");
        drop(others);
        // The control: places that were released are given to any peer.
        assert!(shares.stranger(tcp("10.1.0.1:1")).is_some());
        assert!(shares.stranger(tcp("10.0.0.1:99")).is_none(), "its own are not given back");
        drop(one);
        assert!(shares.stranger(tcp("10.0.0.1:99")).is_some());
        assert_eq!(lock(&shares.strangers).each.len(), 0, "nothing is kept of who is gone");
    }

    #[test]
    fn addresses_of_one_host_share_one_origin() {
        let of = |address| Origin::of(tcp(address));
        assert_eq!(of("[2001:db8:0:1::1]:1"), of("[2001:db8:0:1:ffff::2]:2"));
        assert_ne!(of("[2001:db8:0:1::1]:1"), of("[2001:db8:0:2::1]:1"));
        assert_eq!(of("[::ffff:10.0.0.1]:1"), of("10.0.0.1:2"));
        assert_ne!(of("10.0.0.1:1"), of("10.0.0.2:1"));
        assert_eq!(Origin::of(Peer::Unix { uid: 1, gid: 2 }), Origin::of(Peer::Unix { uid: 1, gid: 3 }));
    }

    #[test]
    fn small_caps_leave_callers_at_least_half() {
        // From the smallest cap to one at which the fractions count instead of the least numbers.
        for (max, strangers, unproven) in [(1, 1, 1), (10, 5, 5), (100, 16, 25), (1024, 64, 256)] {
            let shares = Shares::new(max);
            assert_eq!((shares.max_strangers.0, shares.max_unproven.0), (strangers, unproven), "{max}");
        }
    }

    #[tokio::test]
    async fn oldest_handshake_of_the_busiest_address_is_displaced() {
        let shares = Arc::new(Shares::new(64)); // 16 handshakes, 4 of one address
        let is_open = |handshake: &mut Unproven| {
            handshake.displaced.try_recv().is_err_and(|error| error == oneshot::error::TryRecvError::Empty)
        };
        let mut own: Vec<_> = (0..4).map(|_| shares.unproven(tcp("10.0.0.1:1"))).collect();
        // From the middle, so that the search by number is tested, too.
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
