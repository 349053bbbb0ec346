//! A part of the trail is lost: what that means, and how it is accepted.
//!
//! Keys of the window live in the trail. If a part of it is missing or was changed, nobody knows whether a key that is not
//! found was used, so that a call with it is refused: until the window is over, or until an operator accepts the loss. Then
//! unknown keys count as new, and the event `loss_accepted` says so. Segments without the key that they were written with are
//! a loss as a whole: the start is refused.
//!
//! Each fault has a word, a hash of what is wrong there. The word of a loss is a hash of the words of its faults, so that an
//! operator accepts only what the gateway has told. The event lists the words of the faults and covers no others: later damage is
//! a new loss, wherever it lies.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::OpenOptions;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::chain::{Lines, first_seq, number_of, stated};
use super::directory::{Directory, open_regular};
use super::recovery::Damage;
use super::retention::Place;
use super::{StartError, chain, retention, start};

use crate::keyed_hash::{Hash, Keys, hex};

/// The name of the event.
pub(crate) const ACCEPTED: &str = "loss_accepted";

/// The number of faults in a segment that have a word each. All further ones in it share one.
const MAX_FAULTS: usize = 100;

/// A segment without its key is told from others by its name, its length and so many bytes of its beginning: the first record
/// has a time of its own.
const BEGINNING: u64 = 4096;

/// A part of the trail is lost, and nobody has accepted that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Loss {
    /// What is wrong first.
    #[serde(flatten)]
    pub first: Fault,
    /// What `serve --accept-loss` must say.
    pub word: String,
    /// The words of all faults.
    #[serde(skip)]
    faults: Vec<String>,
}

/// A place where a part of the trail is lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// The segment.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// What is wrong there.
    pub reason: &'static str,
    #[serde(skip)]
    word: String,
}

impl Loss {
    /// `None` without a fault.
    fn of(faults: Vec<Fault>) -> Option<Self> {
        let words: Vec<_> = faults.iter().map(|fault| fault.word.clone()).collect();
        let first = faults.into_iter().next()?;
        Some(Self { first, word: word(words.iter()), faults: words })
    }

    /// What the event of its acceptance says.
    pub fn details(&self) -> Map<String, Value> {
        let Self { first: Fault { file, line, reason, .. }, word, faults } = self;
        let details = json!({ "file": file, "line": line, "reason": reason, "word": word, "faults": faults });
        details.as_object().cloned().unwrap_or_default()
    }
}

/// Eight hex digits that stand for some texts.
fn word(texts: impl IntoIterator<Item = impl AsRef<[u8]>>) -> String {
    let mut hash = Sha256::new();
    for text in texts {
        hash.update((text.as_ref().len() as u64).to_be_bytes());
        hash.update(text);
    }
    hex(&hash.finalize().into())[..8].to_owned()
}

/// The word for segments whose key is missing. Names alone would not do: the first segment of every trail has the same.
pub(super) fn word_without_key(segments: &[PathBuf]) -> String {
    word(segments.iter().flat_map(|path| {
        let (mut length, mut begin) = (0, Vec::new());
        // What cannot be read has a word, too: the segment is set aside unread.
        let _ = open_regular(path, OpenOptions::new().read(true)).and_then(|file| {
            length = file.metadata()?.len();
            file.take(BEGINNING).read_to_end(&mut begin)
        });
        let name = path.file_name().unwrap_or_default().as_encoded_bytes().to_vec();
        [name, length.to_be_bytes().to_vec(), begin]
    }))
}

/// What a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Checked {
    /// The gateway wrote it behind the line before.
    Proven,
    /// It was changed, or the line before was.
    Changed,
    /// What a failed fdatasync leaves at the end of a segment. It says nothing: the next segment has the batch, proven.
    Repeated,
}

/// Follows the chain over the lines of some segments, in their order, and remembers the faults that nobody has accepted.
pub(crate) struct ChainCheck<'a> {
    keys: &'a Keys,
    last: Place,
    /// The segment that is read, and the number of the first record of the one behind it.
    segment: PathBuf,
    next: Option<u64>,
    /// The number of the last record that is proven.
    proven: u64,
    faults: Vec<Fault>,
    /// How many of them are of this segment.
    here: usize,
    accepted: HashSet<String>,
}

impl<'a> ChainCheck<'a> {
    /// To begin with the first of these segments; what lies before it is believed.
    pub(crate) fn begin(keys: &'a Keys, segments: &[PathBuf]) -> io::Result<Self> {
        let first = segments.first().filter(|path| first_seq(path) > 1);
        let before = first.map(|path| retention::before(path)).transpose()?.flatten();
        let seq = first.map_or(0, |path| first_seq(path) - 1);
        let last = Place { seq, hash: before.map_or(Hash::default(), |before| before.hash) };
        let (segment, faults, accepted) = <_>::default();
        Ok(Self { keys, last, segment, next: None, proven: 0, faults, here: 0, accepted })
    }

    /// The next segment is read; `next` is the one behind it.
    pub(crate) fn enter(&mut self, segment: &Path, next: Option<&PathBuf>) {
        segment.clone_into(&mut self.segment);
        self.next = next.map(|path| first_seq(path));
        self.here = 0;
    }

    /// Whether the record of this number, or one behind it, was read and is proven.
    pub(crate) fn has_proven(&self, seq: u64) -> bool {
        self.proven >= seq
    }

    /// The trail begins behind the beginning of the window, although nothing in the window is ever removed.
    pub(crate) fn begins_late(&mut self) {
        let first = first_seq(&self.segment);
        self.fault(1, "records of the window before this one are missing", (first, first), &[]);
    }

    /// Checks a line.
    pub(crate) fn check(&mut self, number: usize, line: &[u8]) -> Checked {
        let seq = number_of(line);
        let expected = self.last.seq + 1;
        if self.next.is_some_and(|next| expected >= next && seq.is_none_or(|seq| seq >= next)) {
            return Checked::Repeated;
        }
        let hash = self.keys.check(line, &self.last.hash);
        // Behind a changed line stands what that line states. A copy of an earlier record fits there.
        let is_proven = hash.is_ok() && seq.is_none_or(|seq| seq > self.proven);
        let reason = match (&hash, seq) {
            (_, None) => Some("a record cannot be read"),
            (Err(_), Some(seq)) if seq == expected => Some("a record was changed"),
            (_, Some(seq)) => (seq != expected).then_some("records before this one are missing"),
        };
        let seq = seq.unwrap_or(expected);
        if let Some(reason) = reason {
            self.fault(number, reason, (expected, seq), line);
        }
        let checked = if is_proven { Checked::Proven } else { Checked::Changed };
        self.proven = if is_proven { seq } else { self.proven };
        // A number that belongs to the next segment is a changed one: what follows is still of this segment.
        let seq = if self.next.is_some_and(|next| seq >= next) { expected } else { seq };
        self.last = Place { seq, hash: hash.ok().or_else(|| stated(line)).unwrap_or(self.last.hash) };
        checked
    }

    /// An event passes that the gateway wrote: one that tells of damage, or of its acceptance.
    pub(crate) fn event(&mut self, number: usize, name: &str, line: &[u8]) {
        if name == ACCEPTED {
            self.accepted.extend(accepted(line));
        } else if Damage::is_told_by(line) {
            let seq = self.last.seq;
            self.fault(number, "a start found less than the lock file says", (seq, seq), &[]);
        }
    }

    /// `expected` is the number that the record should have, `seq` the one that it has. The word stands for its bytes, too, so
    /// that an acceptance covers no later change of it.
    fn fault(&mut self, line: usize, reason: &'static str, (expected, seq): (u64, u64), bytes: &[u8]) {
        let numbers = [expected, seq].map(u64::to_be_bytes);
        let word = word([reason.as_bytes(), &numbers[0], &numbers[1], bytes]);
        let file = self.segment.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let fault = Fault { file, line, reason, word };
        match self.faults.last_mut().filter(|_| self.here > MAX_FAULTS) {
            Some(last) => last.word = self::word([&last.word, &fault.word]),
            None => {
                self.here += 1;
                self.faults.push(fault);
            }
        }
    }

    /// What is lost, and not accepted.
    pub(crate) fn loss(mut self) -> Option<Loss> {
        self.faults.retain(|fault| !self.accepted.contains(&fault.word));
        Loss::of(self.faults)
    }
}

/// The words of the faults that an event of an acceptance covers.
fn accepted(event: &[u8]) -> Vec<String> {
    #[derive(Deserialize)]
    struct Accepted {
        #[serde(default)]
        faults: Vec<String>,
    }
    serde_json::from_slice::<Accepted>(event).map(|event| event.faults).unwrap_or_default()
}

/// What is lost of a whole trail, and not accepted. That its beginning is missing counts as well, also where retention removed
/// it: only a start knows whether the window reaches back to it.
pub(super) fn look(directory: &Path, keys: &Keys) -> io::Result<Option<Loss>> {
    #[derive(Deserialize)]
    struct Event<'a> {
        #[serde(borrow)]
        event: Cow<'a, str>,
    }
    let segments = chain::segments(directory)?;
    let mut chain = ChainCheck::begin(keys, &segments)?;
    for (index, path) in segments.iter().enumerate() {
        chain.enter(path, segments.get(index + 1));
        let mut lines = Lines::open(path)?;
        while let Some(line) = lines.read()? {
            let checked = chain.check(line.number, line.bytes);
            if index == 0 && line.number == 1 && first_seq(path) > 1 {
                chain.begins_late();
            }
            if checked == Checked::Proven
                && let Ok(Event { event }) = serde_json::from_slice(line.bytes)
            {
                chain.event(line.number, &event, line.bytes);
            }
        }
    }
    Ok(chain.loss())
}

/// Moves segments whose key is missing, and the lock file that tells of them, into a directory of their own. Returns its
/// name.
pub(super) fn set_aside(directory: &Path) -> Result<String, StartError> {
    let fail = |error| StartError::Directory(directory.into(), error);
    let opened = Directory::open(directory).map_err(fail)?;
    start::lock(&opened)?;
    let segments = chain::segments(directory).map_err(fail)?;
    let name = format!("lost-{}", word_without_key(&segments));
    let aside = directory.join(&name);
    // Not one that has segments: they would be replaced. An attempt that was cut short may have left it empty.
    let is_empty = fs::read_dir(&aside).is_ok_and(|mut entries| entries.next().is_none());
    if !is_empty {
        fs::create_dir(&aside).map_err(|error| StartError::Directory(aside.clone(), error))?;
    }
    let lock = directory.join(super::lock::NAME);
    for path in segments.into_iter().chain(lock.exists().then_some(lock)) {
        let target = aside.join(path.file_name().unwrap_or_default());
        fs::rename(&path, target).map_err(fail)?;
    }
    opened.sync().map_err(fail)?;
    Ok(name)
}
