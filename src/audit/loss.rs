//! A part of the trail is lost: what that means, and how it is accepted.
//!
//! Keys of the window live in the trail. If a part of it is missing or was changed, nobody knows whether a key that is not
//! found was used, so that a call with it is refused: until the window is over, or until an operator accepts the loss. Then
//! unknown keys count as new, and the event `loss_accepted` says so. Segments without the key that they were written with are
//! a loss as a whole: the start is refused.
//!
//! Each loss has a word, made of what is lost, so that nobody accepts one that is not known to him.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{
    StartError,
    chain::{self, Hash, Keys, first_seq, stated},
    directory::Directory,
    recovery::Damage,
    retention::{self, Place},
};

/// The name of the event.
pub(crate) const ACCEPTED: &str = "loss_accepted";

/// What is lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Loss {
    /// The segment, or the lock file.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// What is wrong there.
    pub reason: &'static str,
    /// What `serve --accept-loss` must say.
    pub word: String,
}

impl Loss {
    fn new(path: &Path, line: usize, reason: &'static str) -> Self {
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let word = word(&[&file, &line.to_string(), reason]);
        Self { file, line, reason, word }
    }

    /// What the event of its acceptance says.
    pub fn details(&self) -> serde_json::Map<String, Value> {
        let Self { file, line, reason, word } = self;
        let details = json!({ "file": file, "line": line, "reason": reason, "word": word });
        details.as_object().cloned().unwrap_or_default()
    }
}

/// Eight hex digits that stand for some texts.
fn word(texts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for text in texts {
        hash.update((text.len() as u64).to_be_bytes());
        hash.update(text);
    }
    chain::hex(&hash.finalize().into())[..8].to_owned()
}

/// The word for segments whose key is missing.
pub(super) fn word_without_key(segments: &[PathBuf]) -> String {
    let names: Vec<_> = segments.iter().map(|path| path.to_string_lossy()).collect();
    word(&names.iter().map(AsRef::as_ref).collect::<Vec<_>>())
}

/// Follows the chain over the lines of some segments, in their order, and remembers the first fault that nobody has
/// accepted.
pub(crate) struct ChainCheck<'a> {
    keys: &'a Keys,
    last: Place,
    /// The segment that is read, and the number of the first record of the one behind it.
    segment: PathBuf,
    next: Option<u64>,
    loss: Option<Loss>,
}

impl<'a> ChainCheck<'a> {
    /// To begin with the first of these segments; what lies before it is believed.
    pub(crate) fn begin(keys: &'a Keys, segments: &[PathBuf]) -> io::Result<Self> {
        let first = segments.first().filter(|path| first_seq(path) > 1);
        let before = first.map(|path| retention::before(path)).transpose()?.flatten();
        let last = before.unwrap_or(Place { seq: 0, hash: Hash::default() });
        Ok(Self { keys, last, segment: PathBuf::new(), next: None, loss: None })
    }

    /// The next segment is read; `next` is the one behind it.
    pub(crate) fn enter(&mut self, segment: &Path, next: Option<&PathBuf>) {
        segment.clone_into(&mut self.segment);
        self.next = next.map(|path| first_seq(path));
    }

    /// The trail begins behind the beginning of the window, although nothing in the window is ever removed.
    pub(crate) fn begins_late(&mut self) {
        self.fault(1, "records of the window before this one are missing");
    }

    /// Checks a line, which states this number; `None`: it cannot be read.
    pub(crate) fn check(&mut self, number: usize, line: &[u8], seq: Option<u64>) {
        // A batch whose fdatasync failed stands twice: here at the end, and proven in the next segment.
        if self.next.is_some_and(|next| self.last.seq + 1 >= next) {
            return;
        }
        let expected = self.last.seq + 1;
        let hash = self.keys.check(line, &self.last.hash);
        match (&hash, seq) {
            (_, None) => self.fault(number, "a record cannot be read"),
            (Err(_), Some(seq)) if seq == expected => self.fault(number, "a record was changed"),
            (_, Some(seq)) if seq != expected => self.fault(number, "records before this one are missing"),
            _ => {}
        }
        let seq = seq.unwrap_or(expected);
        self.last = Place { seq, hash: hash.ok().or_else(|| stated(line)).unwrap_or(self.last.hash) };
    }

    /// An event passes: one that tells of damage, or of its acceptance.
    pub(crate) fn event(&mut self, number: usize, name: &str, line: &[u8]) {
        if name == ACCEPTED {
            self.loss = None;
        } else if Damage::is_told_by(line) {
            self.fault(number, "a start found less than the lock file says");
        }
    }

    fn fault(&mut self, line: usize, reason: &'static str) {
        let segment = &self.segment;
        self.loss.get_or_insert_with(|| Loss::new(segment, line, reason));
    }

    /// The first fault, if there is one.
    pub(crate) fn loss(self) -> Option<Loss> {
        self.loss
    }
}

/// Moves segments whose key is missing, and the lock file that tells of them, into a directory of their own. Returns its
/// name.
pub(super) fn set_aside(directory: &Path) -> Result<String, StartError> {
    let fail = |error| StartError::Directory(directory.into(), error);
    let opened = Directory::open(directory).map_err(fail)?;
    super::lock(&opened)?;
    let segments = chain::segments(directory).map_err(fail)?;
    let name = format!("lost-{}", word_without_key(&segments));
    let aside = directory.join(&name);
    std::fs::create_dir_all(&aside).map_err(fail)?;
    let lock = directory.join(super::lock::NAME);
    for path in segments.into_iter().chain(lock.exists().then_some(lock)) {
        let target = aside.join(path.file_name().unwrap_or_default());
        std::fs::rename(&path, target).map_err(fail)?;
    }
    opened.sync().map_err(fail)?;
    Ok(name)
}
