//! A DNS cache for one host: single flight, a fixed lifetime, and stale answers while the resolver fails or hangs.
//!
//! It asks the system's resolver (getaddrinfo, which reads the hosts file, too, and reports no lifetime), at most once in 5 s.
//! It does not check that an address answers: the connector reports that.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::lookup_host;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::log::OncePerSecond;

/// How long an answer is used without a new query.
const FRESH: Duration = Duration::from_secs(5);

/// How long a dial that has stale addresses waits for newer ones, counted from the beginning of the query.
const PATIENCE: Duration = Duration::from_millis(300);

/// The cached addresses of one host. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Addresses(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    // Never held across an await: while it was held during a query, the k-th dial waited k times as long for a resolver that
    // hung.
    cached: Mutex<Cached>,
    /// Wakes the dials that wait for an answer.
    answered: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Cached {
    /// The last answer; first the address that last accepted a connection.
    addresses: Vec<SocketAddr>,
    /// When the last query ended; `None` asks for a new one.
    at: Option<Instant>,
    /// When the query began that is under way. All dials share it (single flight), and it outlives them, so that a resolver that
    /// hangs occupies one thread.
    asking: Option<Instant>,
    /// Why the last query failed.
    error: String,
}

impl Cached {
    /// Returns the addresses if no new query is due.
    fn fresh(&self) -> Option<Vec<SocketAddr>> {
        self.at.filter(|at| at.elapsed() < FRESH).map(|_| self.addresses.clone())
    }
}

impl Shared {
    fn cached(&self) -> MutexGuard<'_, Cached> {
        self.cached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queries the resolver and wakes the waiting dials. Logs a failure only if stale addresses hide it from the callers.
    async fn ask(self: Arc<Self>, host: Arc<str>, port: u16) {
        let answer = lookup_host((&*host, port)).await.map(Vec::from_iter);
        let failed = self.cached().take(answer);
        self.answered.send_replace(());
        static UNRESOLVED: OncePerSecond = OncePerSecond::new();
        if let Some(error) = failed
            && let Some(times) = UNRESOLVED.times()
        {
            tracing::warn!(%error, %host, times, "the name does not resolve; its last addresses are used");
        }
    }
}

impl Cached {
    /// Stores the result of a query. Returns the error if stale addresses stay in use.
    fn take(&mut self, answer: io::Result<Vec<SocketAddr>>) -> Option<String> {
        self.asking = None;
        match answer {
            Ok(mut addresses) => {
                // The order of the resolver stays, but for the address that is known to work.
                let preferred = self.addresses.first().copied();
                addresses.sort_by_key(|address| Some(*address) != preferred);
                (self.addresses, self.at) = (addresses, Some(Instant::now()));
                None
            }
            Err(error) => {
                self.error = error.to_string();
                let is_known = !self.addresses.is_empty();
                // Stale addresses count as fresh again, so that a resolver that is down is not queried by each dial.
                self.at = is_known.then(Instant::now);
                is_known.then_some(self.error.clone())
            }
        }
    }
}

impl Addresses {
    /// Returns the addresses of a host, first the one that last accepted a connection. With stale addresses at hand it waits at
    /// most 300 ms; without, it waits until the query ends, so callers set a deadline. Cancellation safe. Fails if the query
    /// failed and no address is known.
    pub(super) async fn resolve(&self, host: &Arc<str>, port: u16) -> io::Result<Vec<SocketAddr>> {
        // Subscribed before the state is read: an answer in between would otherwise be missed.
        let mut answered = self.0.answered.subscribe();
        let (asked, is_known) = {
            let mut cached = self.cached();
            if let Some(fresh) = cached.fresh() {
                return Ok(fresh);
            }
            // A task of its own: this future is dropped when the dial's time is over, and the next dial needs the answer.
            let asked = *cached.asking.get_or_insert_with(|| {
                tokio::spawn(self.0.clone().ask(host.clone(), port));
                Instant::now()
            });
            (asked, !cached.addresses.is_empty())
        };
        if is_known {
            // Counted from the query and not from this call: dials that come later do not wait once more for the same query.
            let _ = timeout_at(asked + PATIENCE, answered.changed()).await;
        } else {
            // The connector's timer ends this wait.
            let _ = answered.changed().await;
        }
        let cached = self.cached();
        if cached.addresses.is_empty() {
            return Err(io::Error::other(cached.error.clone()));
        }
        Ok(cached.addresses.clone())
    }

    /// Puts an address that has accepted a connection first.
    pub(super) fn prefer(&self, answered: SocketAddr) {
        self.cached().addresses.sort_by_key(|address| *address != answered);
    }

    /// Makes the next dial query the resolver, since no address accepted a connection: they may be outdated.
    pub(super) fn expire(&self) {
        self.cached().at = None;
    }

    fn cached(&self) -> MutexGuard<'_, Cached> {
        self.0.cached()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn last_working_address_is_tried_first_while_dns_fails() {
        let addresses = Addresses::default();
        let resolve = async |host: &str| addresses.resolve(&host.into(), 1).await;
        let (one, two) = ("127.0.0.1:1".parse().unwrap(), "127.0.0.2:1".parse().unwrap());
        assert!(resolve("no-such-host.invalid").await.is_err(), "the control");
        addresses.cached().addresses = vec![one, two];
        addresses.prefer(two);
        assert_eq!(resolve("no-such-host.invalid").await.unwrap(), [two, one]);
    }

    #[tokio::test]
    async fn dns_answer_is_cached_until_its_addresses_fail() {
        let addresses = Addresses::default();
        let resolve = async |host: &str| addresses.resolve(&host.into(), 1).await;
        let first = resolve("localhost").await.unwrap();
        // Another name than before shows whether the resolver is queried: it would fail.
        assert_eq!(resolve("no-such-host.invalid").await.unwrap(), first, "the resolver is not asked");
        addresses.cached().addresses = vec!["127.0.0.9:1".parse().unwrap()];
        addresses.expire();
        assert_eq!(resolve("localhost").await.unwrap(), first, "it is");
    }

    /// The dials share one query, and its wait of 300 ms is over for all of them at the same time.
    #[tokio::test]
    async fn dials_share_one_dns_wait_and_use_cached_addresses() {
        let addresses = Addresses::default();
        let cached: SocketAddr = "127.0.0.1:1".parse().unwrap();
        addresses.cached().addresses = vec![cached];
        // A query that never ends: nothing runs that could answer.
        addresses.cached().asking = Some(Instant::now());
        let begun = Instant::now();
        let dial = || async { addresses.resolve(&"localhost".into(), 1).await.unwrap() };
        let mut dials: Vec<_> = (0..20).map(|_| Box::pin(dial())).collect();
        for dial in &mut dials {
            assert_eq!(dial.await, [cached]);
        }
        assert!(begun.elapsed() >= PATIENCE && begun.elapsed() < 4 * PATIENCE, "{:?}", begun.elapsed());
        let begun = Instant::now();
        for _ in 0..100 {
            assert_eq!(dial().await, [cached]);
        }
        assert!(begun.elapsed() < PATIENCE, "nobody waits once more: {:?}", begun.elapsed());
    }
}
