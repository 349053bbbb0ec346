//! What is known of a host's addresses.
//!
//! Asks the system's resolver, no more often than every few seconds; an address that changes is noticed by then. While
//! the resolver has no answer, the last one counts.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::lookup_host;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::log::OncePerSecond;

/// An answer is not asked for again within this time.
const FRESH: Duration = Duration::from_secs(5);

/// Who knows addresses waits no longer for newer ones, counted from the question.
const PATIENCE: Duration = Duration::from_millis(300);

/// The addresses of one host.
#[derive(Clone, Debug, Default)]
pub(super) struct Addresses(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    known: Mutex<Known>,
    /// Wakes who waits for an answer.
    answered: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Known {
    /// The last answer, the address that answered last in front.
    addresses: Vec<SocketAddr>,
    /// When it was given.
    at: Option<Instant>,
    /// Since when a question is under way. It is one for all who ask meanwhile (single flight), and outlives them, so that a
    /// resolver that hangs holds one thread.
    asking: Option<Instant>,
    /// Why the last question had no answer.
    error: String,
}

impl Known {
    fn fresh(&self) -> Option<Vec<SocketAddr>> {
        self.at.filter(|at| at.elapsed() < FRESH).map(|_| self.addresses.clone())
    }
}

impl Shared {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(self: Arc<Self>, host: Arc<str>, port: u16) {
        let answer = lookup_host((&*host, port)).await.map(Vec::from_iter);
        let failed = self.known().take(answer);
        self.answered.send_replace(());
        static UNRESOLVED: OncePerSecond = OncePerSecond::new();
        if let Some(error) = failed
            && let Some(times) = UNRESOLVED.times()
        {
            tracing::warn!(%error, %host, times, "the name does not resolve; its last addresses are used");
        }
    }
}

impl Known {
    /// Takes an answer. Returns the error, if the last addresses are used on.
    fn take(&mut self, answer: io::Result<Vec<SocketAddr>>) -> Option<String> {
        self.asking = None;
        match answer {
            Ok(mut addresses) => {
                let preferred = self.addresses.first().copied();
                addresses.sort_by_key(|address| Some(*address) != preferred);
                (self.addresses, self.at) = (addresses, Some(Instant::now()));
                None
            }
            Err(error) => {
                self.error = error.to_string();
                let is_known = !self.addresses.is_empty();
                self.at = is_known.then(Instant::now);
                is_known.then_some(self.error.clone())
            }
        }
    }
}

impl Addresses {
    /// The addresses of a host; those that answered before come first.
    pub(super) async fn resolve(&self, host: &Arc<str>, port: u16) -> io::Result<Vec<SocketAddr>> {
        let mut answered = self.0.answered.subscribe();
        let (asked, is_known) = {
            let mut known = self.known();
            if let Some(fresh) = known.fresh() {
                return Ok(fresh);
            }
            let asked = *known.asking.get_or_insert_with(|| {
                tokio::spawn(self.0.clone().ask(host.clone(), port));
                Instant::now()
            });
            (asked, !known.addresses.is_empty())
        };
        if is_known {
            let _ = timeout_at(asked + PATIENCE, answered.changed()).await;
        } else {
            let _ = answered.changed().await; // for as long as a connection may take
        }
        let known = self.known();
        if known.addresses.is_empty() {
            return Err(io::Error::other(known.error.clone()));
        }
        Ok(known.addresses.clone())
    }

    /// This one has answered.
    pub(super) fn prefer(&self, answered: SocketAddr) {
        self.known().addresses.sort_by_key(|address| *address != answered);
    }

    /// None of them has answered: they may be old.
    pub(super) fn doubt(&self) {
        self.known().at = None;
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.known()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_address_that_answered_last_comes_first_and_counts_while_the_resolver_fails() {
        let addresses = Addresses::default();
        let resolve = async |host: &str| addresses.resolve(&host.into(), 1).await;
        let (one, two) = ("127.0.0.1:1".parse().unwrap(), "127.0.0.2:1".parse().unwrap());
        assert!(resolve("no-such-host.invalid").await.is_err(), "the control");
        addresses.known().addresses = vec![one, two];
        addresses.prefer(two);
        assert_eq!(resolve("no-such-host.invalid").await.unwrap(), [two, one]);
    }

    #[tokio::test]
    async fn an_answer_counts_for_a_while_unless_nobody_answers_there() {
        let addresses = Addresses::default();
        let resolve = async |host: &str| addresses.resolve(&host.into(), 1).await;
        let first = resolve("localhost").await.unwrap();
        assert_eq!(resolve("no-such-host.invalid").await.unwrap(), first, "the resolver is not asked");
        addresses.known().addresses = vec!["127.0.0.9:1".parse().unwrap()];
        addresses.doubt();
        assert_eq!(resolve("localhost").await.unwrap(), first, "it is");
    }

    /// The one question goes on, and costs everybody the same time once.
    #[tokio::test]
    async fn while_the_resolver_hangs_all_dials_share_one_wait_and_use_what_is_known() {
        let addresses = Addresses::default();
        let known: SocketAddr = "127.0.0.1:1".parse().unwrap();
        addresses.known().addresses = vec![known];
        addresses.known().asking = Some(Instant::now()); // and no answer comes
        let begun = Instant::now();
        let dial = || async { addresses.resolve(&"localhost".into(), 1).await.unwrap() };
        let mut dials: Vec<_> = (0..20).map(|_| Box::pin(dial())).collect();
        for dial in &mut dials {
            assert_eq!(dial.await, [known]);
        }
        assert!(begun.elapsed() >= PATIENCE && begun.elapsed() < 4 * PATIENCE, "{:?}", begun.elapsed());
        let begun = Instant::now();
        for _ in 0..100 {
            assert_eq!(dial().await, [known]);
        }
        assert!(begun.elapsed() < PATIENCE, "nobody waits once more: {:?}", begun.elapsed());
    }
}
