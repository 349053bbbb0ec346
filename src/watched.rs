//! What is kept in files, read again to notice a change.
//!
//! What belongs together may be kept in several files and written one after the other, each perhaps in two steps
//! (truncate, write), so that a reading may be torn. A change counts once two readings in a row agree; what cannot
//! be read is no change.

use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::time::sleep;

/// How often files are read again. Polling notices what a watch on a file misses: Kubernetes swaps a link, and a
/// mount can be replaced whole.
pub(crate) const POLL: Duration = Duration::from_secs(1);

/// Time between the two readings that must agree.
pub(crate) const SETTLE: Duration = Duration::from_millis(250);

/// Tells contents from others: what is watched need not be kept.
pub(crate) fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> [u8; 32] {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update((part.len() as u64).to_be_bytes());
        digest.update(part);
    }
    digest.finalize().into()
}

/// Looks at one thing again and again.
pub(crate) struct Watched<T, E> {
    load: Box<dyn Fn() -> Result<T, E> + Send>,
    seen: T,
    /// A change, read once.
    settling: Option<T>,
    unusable: bool,
}

/// What a look found.
pub(crate) enum Noticed<T, E> {
    /// Nothing new.
    Nothing,
    /// A change; the next look, [`SETTLE`] later, tells whether it stays.
    Settling,
    /// A change that stays.
    Changed(T),
    /// It cannot be read or used any more. Told once.
    Unusable(E),
}

impl<T: Clone + PartialEq, E> Watched<T, E> {
    /// `seen` is what is known.
    pub(crate) fn new(load: impl Fn() -> Result<T, E> + Send + 'static, seen: T) -> Self {
        Self { load: Box::new(load), seen, settling: None, unusable: false }
    }

    /// Reads it again.
    pub(crate) fn look(&mut self) -> Noticed<T, E> {
        let found = match (self.load)() {
            Ok(found) => found,
            Err(error) => {
                self.settling = None;
                let known = std::mem::replace(&mut self.unusable, true);
                return if known { Noticed::Nothing } else { Noticed::Unusable(error) };
            }
        };
        self.unusable = false;
        if found == self.seen {
            self.settling = None;
            return Noticed::Nothing;
        }
        if self.settling.as_ref() != Some(&found) {
            self.settling = Some(found);
            return Noticed::Settling;
        }
        self.settling = None;
        self.seen = found.clone();
        Noticed::Changed(found)
    }
}

/// Looks for ever. `take` takes what has changed, if it can be used; `tell` hears of each change, and what came of it.
/// What could not be used is tried again, and told of when it can be.
pub(crate) async fn follow<T: Clone + PartialEq, E>(
    mut watched: Watched<T, E>,
    take: impl Fn(T) -> Result<(), E>,
    tell: impl Fn(Result<(), E>),
) {
    let mut refused = None;
    loop {
        let mut wait = POLL;
        match watched.look() {
            Noticed::Nothing => {
                if let Some(found) = refused.take_if(|found: &mut T| take(found.clone()).is_ok()) {
                    drop(found);
                    tell(Ok(()));
                }
            }
            Noticed::Settling => wait = SETTLE,
            Noticed::Changed(found) => {
                let taken = take(found.clone());
                refused = taken.is_err().then_some(found);
                tell(taken);
            }
            Noticed::Unusable(error) => tell(Err(error)),
        }
        sleep(wait).await;
    }
}
