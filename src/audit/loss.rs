//! Damage of the trail within the idempotency window: what counts as lost, and how an operator accepts the
//! loss.
//!
//! The trail is the memory of deduplication across restarts. If a part of it is missing or was changed, it is
//! unknown whether a key that is not found was used. A call with such a key is rejected until the window is
//! over or an operator accepts the loss. After that, unknown keys count as new, and the event `loss_accepted`
//! records it. Segments without the key that they were written with are a loss as a whole: the start fails.
//!
//! Each fault has a *word*, a hash of what is wrong there. The word of a loss is a hash of the words of its
//! faults, so that an operator accepts only what the gateway has reported. The event lists the words of the
//! faults and covers no others: later damage is a new loss, wherever it is.
//!
//! This module does not repair anything.

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
use super::retention::ChainPosition;
use super::{OpenError, chain, retention, start};

use crate::keyed_hash::{Hash, Keys, hex};

/// The name of the event that records that a loss is accepted.
pub(crate) const ACCEPTED: &str = "loss_accepted";

/// The number of faults in one segment that have a word each. All further ones in it share one.
// A segment that was encrypted or overwritten has a fault in every line. The event with their words must stay
// short.
const MAX_FAULTS: usize = 100;

/// How many bytes at the beginning of a segment without its key go into its word.
// 4 KiB hold the first record with its time, which tells the segment from that of another trail with the same
// name and length.
const BEGINNING: u64 = 4096;

/// A part of the trail is lost, and nobody has accepted that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Loss {
    /// The first fault.
    #[serde(flatten)]
    pub first: LostPart,
    /// The word of this loss, for `serve --accept-loss`.
    pub word: String,
    /// The words of all faults.
    #[serde(skip)]
    faults: Vec<String>,
}

/// A place where the trail is damaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LostPart {
    /// The name of the segment.
    pub file: String,
    /// The line, counted from 1.
    pub line: usize,
    /// A description for people.
    pub reason: &'static str,
    #[serde(skip)]
    word: String,
}

impl Loss {
    /// The loss that these faults make up; `None` if there are none.
    fn of(faults: Vec<LostPart>) -> Option<Self> {
        let words: Vec<_> = faults.iter().map(|fault| fault.word.clone()).collect();
        let first = faults.into_iter().next()?;
        Some(Self { first, word: word(words.iter()), faults: words })
    }

    /// The members of the event that records the acceptance of this loss.
    pub fn details(&self) -> Map<String, Value> {
        let Self { first: LostPart { file, line, reason, .. }, word, faults } = self;
        let details = json!({ "file": file, "line": line, "reason": reason, "word": word, "faults": faults });
        details.as_object().cloned().unwrap_or_default()
    }
}

/// Eight hex digits that stand for some texts. They protect against mistakes and not against attacks: 32 bits
/// are not collision-resistant.
fn word(texts: impl IntoIterator<Item = impl AsRef<[u8]>>) -> String {
    let mut hash = Sha256::new();
    for text in texts {
        // The length separates the texts. Without it, two different lists of faults could have the same word.
        hash.update((text.as_ref().len() as u64).to_be_bytes());
        hash.update(text);
    }
    hex(&hash.finalize().into())[..8].to_owned()
}

/// The word for segments whose key is missing.
// Names alone do not identify a trail: the first segment of every trail has the same name.
pub(super) fn word_without_key(segments: &[PathBuf]) -> String {
    word(segments.iter().flat_map(|path| {
        let (mut length, mut begin) = (0, Vec::new());
        // A segment that cannot be read still has a word, by its name. It is set aside without being read.
        let _ = open_regular(path, OpenOptions::new().read(true)).and_then(|file| {
            length = file.metadata()?.len();
            file.take(BEGINNING).read_to_end(&mut begin)
        });
        let name = path.file_name().unwrap_or_default().as_encoded_bytes().to_vec();
        [name, length.to_be_bytes().to_vec(), begin]
    }))
}

/// The result of checking one line against the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LineCheck {
    /// The gateway wrote the line directly after the previous one.
    Proven,
    /// This line, or the one before it, was changed.
    Changed,
    /// The line belongs to a batch whose fdatasync failed, at the end of a segment. It is to be ignored: the
    /// next segment has the batch again, proven.
    Repeated,
}

/// Checks the hash chain over segments in order, and collects the faults that nobody has accepted.
pub(crate) struct ChainCheck<'a> {
    keys: &'a Keys,
    last: ChainPosition,
    /// The segment that is read.
    segment: PathBuf,
    /// The number of the first record of the segment after it.
    next: Option<u64>,
    /// The number of the last proven record.
    proven: u64,
    faults: Vec<LostPart>,
    /// How many of the faults are in this segment.
    here: usize,
    /// The words of accepted faults.
    accepted: HashSet<String>,
}

impl<'a> ChainCheck<'a> {
    /// A check that begins with the first of these segments. What lies before it is not verified.
    ///
    /// Fails if the first segment cannot be read.
    pub(crate) fn begin(keys: &'a Keys, segments: &[PathBuf]) -> io::Result<Self> {
        let first = segments.first().filter(|path| first_seq(path) > 1);
        let before = first.map(|path| retention::before(path)).transpose()?.flatten();
        let seq = first.map_or(0, |path| first_seq(path) - 1);
        let last = ChainPosition { seq, hash: before.map_or(Hash::default(), |before| before.hash) };
        let (segment, faults, accepted) = <_>::default();
        Ok(Self { keys, last, segment, next: None, proven: 0, faults, here: 0, accepted })
    }

    /// Call this before the lines of a segment; `next` is the segment after it.
    pub(crate) fn enter(&mut self, segment: &Path, next: Option<&PathBuf>) {
        segment.clone_into(&mut self.segment);
        self.next = next.map(|path| first_seq(path));
        self.here = 0;
    }

    /// Whether a record with this number or a higher one was proven.
    pub(crate) fn has_proven(&self, seq: u64) -> bool {
        self.proven >= seq
    }

    /// Records a fault: the trail begins later than the window does. Retention never removes a segment of the
    /// window, so somebody else did.
    pub(crate) fn begins_late(&mut self) {
        let first = first_seq(&self.segment);
        self.fault(1, "records of the window before this one are missing", (first, first), &[]);
    }

    /// Checks a line without its newline. `number` is its line number, counted from 1.
    pub(crate) fn check(&mut self, number: usize, line: &[u8]) -> LineCheck {
        let seq = number_of(line);
        let expected = self.last.seq + 1;
        // A failed fdatasync leaves a batch at the end of this segment whose numbers the next segment has, too.
        if self.next.is_some_and(|next| expected >= next && seq.is_none_or(|seq| seq >= next)) {
            return LineCheck::Repeated;
        }
        let hash = self.keys.check(line, &self.last.hash);
        // A changed line states any hash its author likes, so a copy of an earlier record verifies after it.
        // Its number gives it away.
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
        let checked = if is_proven { LineCheck::Proven } else { LineCheck::Changed };
        self.proven = if is_proven { seq } else { self.proven };
        // A number of the next segment cannot be in this one. It was changed, and if it counted, all following
        // lines would look repeated and be ignored.
        let seq = if self.next.is_some_and(|next| seq >= next) { expected } else { seq };
        self.last = ChainPosition { seq, hash: hash.ok().or_else(|| stated(line)).unwrap_or(self.last.hash) };
        checked
    }

    /// Takes note of a proven event: of one that records damage or the acceptance of a loss. `name` is the name
    /// of the event.
    // The words of accepted faults are collected here and applied at the end: an acceptance comes after the
    // faults that it names.
    pub(crate) fn event(&mut self, number: usize, name: &str, line: &[u8]) {
        if name == ACCEPTED {
            self.accepted.extend(accepted(line));
        } else if Damage::is_recorded_by(line) {
            let seq = self.last.seq;
            self.fault(number, "a start found less than the lock file says", (seq, seq), &[]);
        }
    }

    /// Adds a fault. `expected` is the number that the record should have, `seq` the one that it has.
    // The word covers the bytes of the line, too, so that an acceptance covers no later change of the same
    // line.
    fn fault(&mut self, line: usize, reason: &'static str, (expected, seq): (u64, u64), bytes: &[u8]) {
        let numbers = [expected, seq].map(u64::to_be_bytes);
        let word = word([reason.as_bytes(), &numbers[0], &numbers[1], bytes]);
        let file = self.segment.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let fault = LostPart { file, line, reason, word };
        match self.faults.last_mut().filter(|_| self.here > MAX_FAULTS) {
            Some(last) => last.word = self::word([&last.word, &fault.word]),
            None => {
                self.here += 1;
                self.faults.push(fault);
            }
        }
    }

    /// Returns what is lost and not accepted.
    pub(crate) fn loss(mut self) -> Option<Loss> {
        self.faults.retain(|fault| !self.accepted.contains(&fault.word));
        Loss::of(self.faults)
    }
}

/// The words of the faults that an event of an acceptance names. An event that cannot be parsed accepts
/// nothing.
fn accepted(event: &[u8]) -> Vec<String> {
    #[derive(Deserialize)]
    struct Accepted {
        #[serde(default)]
        faults: Vec<String>,
    }
    serde_json::from_slice::<Accepted>(event).map(|event| event.faults).unwrap_or_default()
}

/// Returns what is lost of a whole trail and not accepted. A missing beginning counts as well, even if
/// retention removed it: only a start knows whether the window reaches back that far.
///
/// Fails if a segment cannot be read. Reads the whole trail.
pub(super) fn find(directory: &Path, keys: &Keys) -> io::Result<Option<Loss>> {
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
            if checked == LineCheck::Proven
                && let Ok(Event { event }) = serde_json::from_slice(line.bytes)
            {
                chain.event(line.number, &event, line.bytes);
            }
        }
    }
    Ok(chain.loss())
}

/// Moves the segments whose key is missing, and the lock file, into a directory of their own within the audit
/// directory. Returns its name.
///
/// Fails if another process has locked the directory.
pub(super) fn set_aside(directory: &Path) -> Result<String, OpenError> {
    let fail = |error| OpenError::Directory(directory.into(), error);
    let opened = Directory::open(directory).map_err(fail)?;
    start::lock(&opened)?;
    let segments = chain::segments(directory).map_err(fail)?;
    let name = format!("lost-{}", word_without_key(&segments));
    let aside = directory.join(&name);
    // The name of the directory depends on the segments only. An attempt that was interrupted may have made it.
    // If it has files, `rename` would replace them.
    let is_empty = fs::read_dir(&aside).is_ok_and(|mut entries| entries.next().is_none());
    if !is_empty {
        fs::create_dir(&aside).map_err(|error| OpenError::Directory(aside.clone(), error))?;
    }
    let lock = directory.join(super::lock::NAME);
    // The lock file goes along: it names a segment of the old trail, and would make the new trail look damaged.
    for path in segments.into_iter().chain(lock.exists().then_some(lock)) {
        let target = aside.join(path.file_name().unwrap_or_default());
        fs::rename(&path, target).map_err(fail)?;
    }
    opened.sync().map_err(fail)?;
    Ok(name)
}
