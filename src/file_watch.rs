//! Change detection for configuration, secrets and certificates by polling. Files that have not changed for some
//! seconds are checked with `stat` only and are not read.
//!
//! A value may be kept in several files that are written one after the other, and each file may be written in two steps
//! (truncate, write). So one reading may see a mixture of old and new. A change is reported only after two readings in
//! a row agree. A failure to read is not a change: the last value stays in use.
//!
//! This module does not use inotify. It does not parse contents either: the caller's `load` does.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use tokio::time::sleep;

use crate::files::{Aside, Stamp};

/// The interval between two checks.
// Polling notices what a watch on a file misses: Kubernetes replaces a symbolic link, and a mount can be
// replaced as a whole.
pub(crate) const POLL: Duration = Duration::from_secs(1);

/// The time between the two readings that must agree.
pub(crate) const SETTLE: Duration = Duration::from_millis(250);

/// Returns a SHA-256 digest of the parts, so that contents can be compared without keeping them. Each part is hashed
/// with its length, so that moving bytes from one part to the next changes the digest.
pub(crate) fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> [u8; 32] {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update((part.len() as u64).to_be_bytes());
        digest.update(part);
    }
    digest.finalize().into()
}

/// How long a file is still read at every check after it changed.
// Some file systems store times in steps of up to two seconds. A file that changes twice within one step has
// the same stamp both times, so the stamp alone would miss the second change.
const GRAIN: Duration = Duration::from_secs(3);

/// One value that is kept in files, with the state of its last check.
pub(crate) struct FileWatch<T, E> {
    /// The files to check with `stat`.
    files: Vec<PathBuf>,
    load: Box<dyn Fn() -> Result<T, E> + Send>,
    /// The stamps of the files at the last check, and when these stamps were first seen.
    stamps: Option<(Vec<Stamp>, Instant)>,
    /// When the files were last read.
    read: Option<Instant>,
    /// The value that was last reported.
    seen: T,
    /// A changed value that was read once and must be read again.
    settling: Option<T>,
    /// Whether the last reading failed.
    is_unusable: bool,
}

/// The result of one check.
pub(crate) enum FileChange<T, E> {
    /// The value is readable and unchanged.
    Nothing,
    /// The value differs from the one that was last reported, and was read only once. The caller must check again after
    /// [`SETTLE`].
    Settling,
    /// A new value, read twice.
    Changed(T),
    /// The value cannot be read now.
    Unusable(E),
}

impl<T: Clone + PartialEq, E> FileWatch<T, E> {
    /// Watches `files`. `load` reads them and returns their value; `seen` is the value that is already known.
    pub(crate) fn new(
        files: Vec<PathBuf>,
        load: impl Fn() -> Result<T, E> + Send + 'static,
        seen: T,
    ) -> Self {
        let (load, stamps, read) = (Box::new(load), None, None);
        Self { files, load, stamps, read, seen, settling: None, is_unusable: false }
    }

    /// Checks once, and calls `load` only if the files may have changed. Blocks on file I/O: a dead mount
    /// blocks it for as long as it is dead.
    pub(crate) fn poll(&mut self) -> FileChange<T, E> {
        if self.is_at_rest() {
            return FileChange::Nothing;
        }
        self.read = Some(Instant::now());
        let found = match (self.load)() {
            Ok(found) => found,
            Err(error) => {
                // The next two good readings must agree again. A reading before the failure may be half of a
                // change.
                self.settling = None;
                self.is_unusable = true;
                return FileChange::Unusable(error);
            }
        };
        self.is_unusable = false;
        // A file that was rewritten with the same content, or changed and changed back, is no change.
        if found == self.seen {
            self.settling = None;
            return FileChange::Nothing;
        }
        // A writer may be between two files, or between truncate and write. The value counts once a second
        // reading returns the same.
        if self.settling.as_ref() != Some(&found) {
            self.settling = Some(found);
            return FileChange::Settling;
        }
        self.settling = None;
        self.seen = found.clone();
        FileChange::Changed(found)
    }

    /// Whether no reading is needed: the stamps are the same as at the last check, and the last reading came at least
    /// [`GRAIN`] after these stamps were first seen.
    fn is_at_rest(&mut self) -> bool {
        let stamps: Vec<_> = self.files.iter().map(|file| Stamp::of(file)).collect();
        match &self.stamps {
            Some((known, since)) if *known == stamps => {
                let is_certain = self.read.is_some_and(|read| read >= *since + GRAIN);
                // A change that was read once is read again even if the stamps do not move. So is a file that
                // could not be used: a cause such as an I/O error or the limit on open files does not show in
                // the stamp, and the end of the failure is to be reported.
                is_certain && self.settling.is_none() && !self.is_unusable
            }
            _ => {
                // The stamps are taken before the files are read. A change between the two then shows at the
                // next check; in the other order it would be missed.
                self.stamps = Some((stamps, Instant::now()));
                false
            }
        }
    }
}

/// A watched value with the function that puts it into effect, and the last value that this function rejected.
struct Followed<T, E> {
    watch: FileWatch<T, E>,
    take: Box<dyn Fn(T) -> Result<(), E> + Send>,
    refused: Option<T>,
}

/// The result of checking once and, if there was a change, putting it into effect.
enum Checked {
    /// The value of the files is in effect. `is_new` is true if this check put it into effect.
    Good { is_new: bool },
    /// The value cannot be read or put into effect. `is_new` is true if the value changed or a file hangs, so that the
    /// failure must be reported even if its reason was reported before.
    Bad { why: String, is_new: bool },
    /// A changed value was read once, and must be read again.
    Settling,
}

impl<T: Clone + PartialEq, E: fmt::Display> Followed<T, E> {
    /// Checks once, and puts a change into effect.
    fn check(&mut self) -> Checked {
        match self.watch.poll() {
            // A value may be rejected for a cause outside these files. It is tried again at every check until
            // it is accepted or replaced.
            FileChange::Nothing => match self.refused.take() {
                None => Checked::Good { is_new: false },
                Some(found) => self.take(found, false),
            },
            FileChange::Settling => Checked::Settling,
            FileChange::Changed(found) => self.take(found, true),
            FileChange::Unusable(error) => Checked::Bad { why: error.to_string(), is_new: false },
        }
    }

    /// Puts a value into effect, or remembers it as rejected.
    fn take(&mut self, found: T, is_new: bool) -> Checked {
        match (self.take)(found.clone()) {
            Ok(()) => Checked::Good { is_new: true },
            Err(error) => {
                self.refused = Some(found);
                Checked::Bad { why: error.to_string(), is_new }
            }
        }
    }
}

/// Watches the files of a value, and puts each change into effect. Never returns.
///
/// `take` puts a changed value into effect, and fails if that cannot be done. A rejected value is tried again at every
/// check.
///
/// `report` is called with `Ok` when a new value is in effect, or when the files are usable again. It is called with
/// `Err` and the reason when the files cannot be read or their value is rejected. The same reason is reported again
/// only if the files changed, or if another reason was reported in between.
///
/// `load` and `take` run on the blocking pool, one at a time. So a file that does not answer blocks neither the runtime
/// nor other files. May be cancelled at any time; a check that has begun runs to its end.
pub(crate) async fn follow<T, E>(
    watch: FileWatch<T, E>,
    take: impl Fn(T) -> Result<(), E> + Send + 'static,
    report: impl Fn(Result<(), String>),
) where
    T: Clone + PartialEq + Send + 'static,
    E: fmt::Display + 'static,
{
    let mut followed = Aside::new(Followed { watch, take: Box::new(take), refused: None });
    // The last reported reason, compared as text. A file that was bad, then did not answer, and is bad again
    // for the first reason is reported again: otherwise the last line in the log would say that it does not
    // answer.
    let mut bad: Option<String> = None;
    loop {
        let check = match followed.run(Followed::check).await {
            Ok(check) => check,
            // `Aside` reports a hang once per job, so it is always news.
            Err(hangs) => Checked::Bad { why: hangs.to_string(), is_new: true },
        };
        let wait = if matches!(check, Checked::Settling) { SETTLE } else { POLL };
        match check {
            Checked::Good { is_new } => {
                if bad.take().is_some() || is_new {
                    report(Ok(()));
                }
            }
            Checked::Bad { why, is_new } => {
                if is_new || bad.as_ref() != Some(&why) {
                    report(Err(why.clone()));
                }
                bad = Some(why);
            }
            Checked::Settling => {}
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
    fn rejected_change_is_retried_and_reports_the_current_error() {
        let wrong = Arc::new(Mutex::new(Some("first")));
        let take = {
            let wrong = wrong.clone();
            move |_| wrong.lock().unwrap().map_or(Ok(()), Err)
        };
        let watch = FileWatch::new(Vec::new(), || Ok(2), 1);
        let mut followed = Followed { watch, take: Box::new(take), refused: None };
        assert!(matches!(followed.check(), Checked::Settling));
        let mut says = |why: &str, new: bool| {
            let check = followed.check();
            assert!(
                matches!(&check, Checked::Bad { why: told, is_new } if told == why && *is_new == new),
                "{why}"
            );
        };
        says("first", true);
        says("first", false);
        *wrong.lock().unwrap() = Some("second");
        says("second", false);
        *wrong.lock().unwrap() = None;
        assert!(matches!(followed.check(), Checked::Good { is_new: true }));
        assert!(matches!(followed.check(), Checked::Good { is_new: false }));
    }

    #[test]
    fn file_watch_does_not_read_an_unchanged_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (path, reads) = (file.path().to_owned(), Arc::new(AtomicUsize::new(0)));
        let load = {
            let (path, reads) = (path.clone(), reads.clone());
            move || {
                reads.fetch_add(1, SeqCst);
                fs::read(&path)
            }
        };
        let mut watch = FileWatch::new(vec![path.clone()], load, Vec::new());
        let mut looks = |count: usize| {
            reads.store(0, SeqCst);
            let changed = (0..count).filter(|_| matches!(watch.poll(), FileChange::Changed(_))).count();
            // As if time had passed: the test needs no sleep of three seconds for each step.
            watch.read = watch.read.map(|read| read + GRAIN);
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
