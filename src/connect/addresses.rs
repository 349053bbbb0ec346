//! What is known of a host's addresses.
//!
//! Asks the system's resolver, no more often than every few seconds; an address that changes is noticed by then. While
//! the resolver has no answer, the last one counts.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    net::lookup_host,
    task::JoinHandle,
    time::{Instant, timeout},
};

use crate::log::OncePerSecond;

/// An answer is not asked for again within this time.
const FRESH: Duration = Duration::from_secs(5);

/// Who knows addresses waits no longer for newer ones.
const PATIENCE: Duration = Duration::from_millis(300);

static UNRESOLVED: OncePerSecond = OncePerSecond::new();

/// The addresses of one host.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    /// The question that is under way. It outlives who asked it, so that a resolver that hangs holds one
    /// thread and not one for every caller.
    asking: tokio::sync::Mutex<Option<JoinHandle<io::Result<Vec<SocketAddr>>>>>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// The last answer, the address that answered last in front.
    addresses: Vec<SocketAddr>,
    /// When it was given.
    at: Option<Instant>,
}

impl Known {
    fn fresh(&self) -> Option<Vec<SocketAddr>> {
        self.at.filter(|at| at.elapsed() < FRESH).map(|_| self.addresses.clone())
    }
}

impl Addresses {
    /// The addresses of a host; those that answered before come first.
    pub(super) async fn resolve(&self, host: &Arc<str>, port: u16) -> io::Result<Vec<SocketAddr>> {
        if let Some(fresh) = self.known().fresh() {
            return Ok(fresh);
        }
        let mut asking = self.asking.lock().await;
        if let Some(fresh) = self.known().fresh() {
            return Ok(fresh); // somebody else has asked meanwhile
        }
        let question = asking.get_or_insert_with(|| {
            let host = host.clone();
            tokio::spawn(async move { Ok(lookup_host((&*host, port)).await?.collect()) })
        });
        let known = self.known().addresses.clone();
        let patience = if known.is_empty() { Duration::MAX } else { PATIENCE };
        let answer = match timeout(patience, question).await {
            Ok(answer) => answer.unwrap_or_else(|error| Err(io::Error::other(error))),
            Err(_) => return Ok(known), // who asks later collects the answer
        };
        *asking = None;
        let failed = match answer {
            Ok(mut addresses) => {
                let mut known = self.known();
                let preferred = known.addresses.first().copied();
                addresses.sort_by_key(|address| Some(*address) != preferred);
                *known = Known { addresses, at: Some(Instant::now()) };
                None
            }
            Err(error) if known.is_empty() => return Err(error),
            Err(error) => {
                self.known().at = Some(Instant::now());
                Some(error)
            }
        };
        drop(asking);
        if let Some(error) = failed
            && let Some(times) = UNRESOLVED.times()
        {
            tracing::warn!(%error, %host, times, "the name does not resolve; its last addresses are used");
        }
        Ok(self.known().addresses.clone())
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
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
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
}
