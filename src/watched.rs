//! What is kept in files, looked at to notice a change. At rest they are not read.
//!
//! What belongs together may be kept in several files and written one after the other, each perhaps in two steps
//! (truncate, write), so that a reading may be torn. A change counts once two readings in a row agree; what cannot
//! be read is no change.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use tokio::time::sleep;

use crate::files::{Aside, Stamp};

/// How often files are looked at. Polling notices what a watch on a file misses: Kubernetes swaps a link, and a
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

/// A file system may keep times in steps of up to two seconds: a file that changed twice in one step looks as it did between. So
/// it is read for so long after it was seen to change.
const GRAIN: Duration = Duration::from_secs(3);

/// Looks at one thing again and again.
pub(crate) struct Watched<T, E> {
    /// Where it is kept.
    files: Vec<PathBuf>,
    load: Box<dyn Fn() -> Result<T, E> + Send>,
    /// How the files looked last, and since when.
    stamps: Option<(Vec<Stamp>, Instant)>,
    /// When they were last read.
    read: Option<Instant>,
    seen: T,
    /// A change, read once.
    settling: Option<T>,
    /// It could not be read or used when it was last looked at.
    is_unusable: bool,
}

/// What a look found.
pub(crate) enum Noticed<T, E> {
    /// It can be used, and is what it was.
    Nothing,
    /// A change; the next look, [`SETTLE`] later, tells whether it stays.
    Settling,
    /// A change that stays.
    Changed(T),
    /// It cannot be read or used now.
    Unusable(E),
}

impl<T: Clone + PartialEq, E> Watched<T, E> {
    /// What these files hold; `seen` is what is known of it.
    pub(crate) fn new(
        files: Vec<PathBuf>,
        load: impl Fn() -> Result<T, E> + Send + 'static,
        seen: T,
    ) -> Self {
        let (load, stamps, read) = (Box::new(load), None, None);
        Self { files, load, stamps, read, seen, settling: None, is_unusable: false }
    }

    /// Looks at it again, and reads it only where it may have changed.
    pub(crate) fn look(&mut self) -> Noticed<T, E> {
        if self.is_at_rest() {
            return Noticed::Nothing;
        }
        self.read = Some(Instant::now());
        let found = match (self.load)() {
            Ok(found) => found,
            Err(error) => {
                self.settling = None;
                self.is_unusable = true;
                return Noticed::Unusable(error);
            }
        };
        self.is_unusable = false;
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

    /// Whether the files look as they did when they were last read, and had done so for a while then.
    fn is_at_rest(&mut self) -> bool {
        let stamps: Vec<_> = self.files.iter().map(|file| Stamp::of(file)).collect();
        match &self.stamps {
            Some((known, since)) if *known == stamps => {
                let is_certain = self.read.is_some_and(|read| read >= *since + GRAIN);
                is_certain && self.settling.is_none() && !self.is_unusable
            }
            _ => {
                self.stamps = Some((stamps, Instant::now()));
                false
            }
        }
    }
}

/// What is followed, and what could not be used of it.
struct Followed<T, E> {
    watched: Watched<T, E>,
    take: Box<dyn Fn(T) -> Result<(), E> + Send>,
    refused: Option<T>,
}

/// What came of a look.
enum Turn {
    /// What lies in the files is in use, or is so now.
    Good { is_new: bool },
    /// It cannot be used, and why.
    Bad { why: String, is_new: bool },
    /// It is not known yet.
    Settling,
}

impl<T: Clone + PartialEq, E: fmt::Display> Followed<T, E> {
    /// Looks, and takes what has changed.
    fn turn(&mut self) -> Turn {
        match self.watched.look() {
            Noticed::Nothing => match self.refused.take() {
                None => Turn::Good { is_new: false },
                Some(found) => self.take(found, false),
            },
            Noticed::Settling => Turn::Settling,
            Noticed::Changed(found) => self.take(found, true),
            Noticed::Unusable(error) => Turn::Bad { why: error.to_string(), is_new: false },
        }
    }

    fn take(&mut self, found: T, is_new: bool) -> Turn {
        match (self.take)(found.clone()) {
            Ok(()) => Turn::Good { is_new: true },
            Err(error) => {
                self.refused = Some(found);
                Turn::Bad { why: error.to_string(), is_new }
            }
        }
    }
}

/// Looks for ever, on a thread of its own. `take` takes what has changed, if it can be used; `tell` hears of each change, and what
/// came of it. What could not be used is tried again, and told of when it can be.
pub(crate) async fn follow<T, E>(
    watched: Watched<T, E>,
    take: impl Fn(T) -> Result<(), E> + Send + 'static,
    tell: impl Fn(Result<(), String>),
) where
    T: Clone + PartialEq + Send + 'static,
    E: fmt::Display + 'static,
{
    let mut followed = Aside::new(Followed { watched, take: Box::new(take), refused: None });
    // What was told last, while it is bad: each reason is told once, and again when another one was told in between.
    let mut bad: Option<String> = None;
    loop {
        let turn = match followed.run(Followed::turn).await {
            Ok(turn) => turn,
            Err(hangs) => Turn::Bad { why: hangs.to_string(), is_new: true },
        };
        let wait = if matches!(turn, Turn::Settling) { SETTLE } else { POLL };
        match turn {
            Turn::Good { is_new } => {
                if bad.take().is_some() || is_new {
                    tell(Ok(()));
                }
            }
            Turn::Bad { why, is_new } => {
                if is_new || bad.as_ref() != Some(&why) {
                    tell(Err(why.clone()));
                }
                bad = Some(why);
            }
            Turn::Settling => {}
        }
        sleep(wait).await;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::AtomicUsize;
    use std::sync::atomic::Ordering::SeqCst;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn what_could_not_be_taken_is_tried_again_and_says_what_is_wrong_now() {
        let wrong = Arc::new(Mutex::new(Some("first")));
        let take = {
            let wrong = wrong.clone();
            move |_| wrong.lock().unwrap().map_or(Ok(()), Err)
        };
        let watched = Watched::new(Vec::new(), || Ok(2), 1);
        let mut followed = Followed { watched, take: Box::new(take), refused: None };
        assert!(matches!(followed.turn(), Turn::Settling));
        let mut says = |why: &str, new: bool| {
            let turn = followed.turn();
            assert!(
                matches!(&turn, Turn::Bad { why: told, is_new } if told == why && *is_new == new),
                "{why}"
            );
        };
        says("first", true);
        says("first", false);
        *wrong.lock().unwrap() = Some("second");
        says("second", false);
        *wrong.lock().unwrap() = None;
        assert!(matches!(followed.turn(), Turn::Good { is_new: true }));
        assert!(matches!(followed.turn(), Turn::Good { is_new: false }));
    }

    #[test]
    fn a_file_at_rest_is_only_looked_at() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (path, reads) = (file.path().to_owned(), Arc::new(AtomicUsize::new(0)));
        let load = {
            let (path, reads) = (path.clone(), reads.clone());
            move || {
                reads.fetch_add(1, SeqCst);
                fs::read(&path)
            }
        };
        let mut watched = Watched::new(vec![path.clone()], load, Vec::new());
        let mut looks = |count: usize| {
            reads.store(0, SeqCst);
            let changed = (0..count).filter(|_| matches!(watched.look(), Noticed::Changed(_))).count();
            // Some time has passed.
            watched.read = watched.read.map(|read| read + GRAIN);
            (reads.load(SeqCst), changed)
        };
        assert_eq!(looks(3), (3, 0), "it may have changed in the step of time in which it was read");
        assert_eq!(looks(3), (0, 0));
        fs::write(&path, "new").unwrap();
        assert_eq!(looks(3), (3, 1));
        assert_eq!(looks(3), (0, 0));
        fs::remove_file(&path).unwrap();
        assert_eq!(looks(3), (3, 0), "what cannot be read is tried again");
        assert_eq!(looks(3), (3, 0));
    }
}
