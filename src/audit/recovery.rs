//! Reads the trail: recovery at start, `audit verify`, `audit in-doubt`, `audit head`.
//!
//! A start reads the end of the trail only, so that it serves at once; all of it is verified beside that, for damage
//! and for what was left open.
//!
//! A crash leaves traces that are no faults. The last write may be cut short; and if the machine crashed, those
//! pages of it that did not reach the disk read as zeros. Nothing of that was safe. A batch whose fdatasync
//! failed stands twice, if nobody came to cut it off: at the end of one segment and, proven, at the beginning of
//! the next.
//!
//! What is missing at the end leaves no trace in the chain. The lock file tells it: it names the newest segment and a
//! record that was there. A start that finds less records that, and goes on with a higher number in a new segment, so
//! that the gap stays to be seen.

use std::borrow::Cow;
use std::fs::OpenOptions;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::age::{Anchor, FORMAT, Newer};
use super::chain::{Lines, MAX_SEQ, first_seq, segment_name, segments, stated};
use super::directory::open_regular;
use super::lock::{Stated, Statement};
use super::retention::Place;
use super::unresolved::{Step, UnresolvedList};
use super::{age, lock, retention};

use crate::keyed_hash::{Hash, Keys};

/// What an event says of a trail that is not whole.
pub(super) const DAMAGED: &str = "damaged";

/// Beyond so many faults there is no more to say: it is another key, or another trail.
const MAX_FAULTS: usize = 10_000;

/// So many zeros in a row are a piece of a page that did not reach the disk. A sector has 512.
const LEAST_LOST: usize = 16;

/// A last write that lacks pages is no longer than this, in bytes; if more follows a gap, the file is damaged.
const MAX_TORN: u64 = 1 << 20;

/// What reading a trail found.
#[derive(Debug, Default)]
pub struct Found {
    /// The last whole record's number.
    pub seq: u64,
    /// The last whole record's hash.
    pub hash: Hash,
    /// The calls at work, in doubt, or done without their callers having learnt of it.
    pub unresolved: UnresolvedList,
    /// What does not fit, in the order of the trail.
    pub faults: Vec<Fault>,
    /// What a crash left of the last write: the segment, where that begins, and its length.
    pub torn: Option<(PathBuf, u64, u64)>,
    /// The last segment and its length without a torn line.
    pub last: Option<(PathBuf, u64)>,
    /// What ties the times of records to the time that has passed, in the order of the trail.
    pub(super) anchors: Vec<Anchor>,
    /// The time of the last record that is proven.
    time: String,
    /// The highest format that an anchor states.
    format: u64,
    /// What is missing now, as the lock file says.
    pub damage: Vec<Damage>,
    /// Events of earlier starts that found something missing.
    pub recorded: Vec<Fault>,
    /// The lock file has a text that is not to be read, so that it says nothing.
    pub is_lock_unreadable: bool,
    /// The highest number of a record, and that of one that is proven.
    highest: u64,
    proven: u64,
    /// A record that the lock file names, and whether it was found.
    expected: Option<Place>,
    is_reached: bool,
    /// A number that was given away for certain.
    given: u64,
    /// Where the trail begins, if that is not its first record.
    begins_behind: Option<Place>,
    /// An event says that what lies before was removed.
    is_retained: bool,
}

/// What a trail lacks.
#[derive(Clone, Debug, Serialize)]
pub struct Damage {
    /// What is missing.
    pub lacks: Lacking,
    /// The name of the file that is missing, or from which records are.
    pub file: String,
    /// Whether it lies at the end of the trail, so that what is missing may be newer than all that is left.
    pub at_end: bool,
    /// The same in words.
    pub reason: String,
}

/// What can be missing without a trace in the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Lacking {
    /// The lock file, beside segments: nobody can say whether newer ones are missing.
    LockFile,
    /// The newest segment.
    NewestSegment,
    /// The last records of a trail that was closed in order.
    LastRecords,
    /// The last records of a trail whose gateway was not stopped in order. Beside somebody who removed them, a crash of
    /// the machine may have lost them where durability is `kernel`.
    LastRecordsAfterCrash,
}

/// A line that does not fit.
#[derive(Clone, Debug, Serialize)]
pub struct Fault {
    /// The segment.
    pub file: PathBuf,
    /// The line, from 1.
    pub line: usize,
    /// The number that the record should have.
    pub seq: u64,
    /// What is wrong.
    pub reason: &'static str,
}

#[derive(Deserialize)]
struct Head<'a> {
    seq: u64,
    #[serde(borrow)]
    time: Option<Cow<'a, str>>,
    #[serde(borrow)]
    kind: Cow<'a, str>,
    #[serde(default)]
    id: Option<Uuid>,
    #[serde(borrow, default)]
    event: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    outcome: Option<Cow<'a, str>>,
}

/// Reads all segments of a directory. A gateway may remove the oldest one meanwhile: then it is read anew. Fails with
/// [`Newer`] if a newer version wrote some of it.
pub fn read(directory: &Path, keys: &Keys) -> io::Result<Found> {
    let mut tries = 10;
    loop {
        // Before the segments, since a gateway that is running may begin others meanwhile.
        let statement = lock::read(directory).unwrap_or(Statement::Unreadable);
        match read_all(&segments(directory)?, keys, &statement) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && tries > 0 => tries -= 1,
            read => return read,
        }
    }
}

fn read_all(segments: &[PathBuf], keys: &Keys, statement: &Statement) -> io::Result<Found> {
    let mut found = Found::begin(segments.first())?;
    found.begins_behind = (found.seq > 0).then_some(Place { seq: found.seq, hash: found.hash });
    let mut found = read_segments(segments, found, keys, statement)?;
    if let (Some(_), Some(path), false) = (found.begins_behind, segments.first(), found.is_retained) {
        let reason = "records before this one were removed, and no event says so";
        found.faults.insert(0, Fault { file: path.clone(), line: 1, seq: first_seq(path), reason });
    }
    Ok(found)
}

/// Reads the last two segments of a directory, which is where a crash leaves a torn line. What lies before them is
/// believed.
pub(super) fn read_end(directory: &Path, keys: &Keys, statement: &Statement) -> io::Result<Found> {
    let segments = segments(directory)?;
    let (before, end) = segments.split_at(segments.len().saturating_sub(2));
    let mut found = read_segments(end, Found::begin(end.first())?, keys, statement)?;
    if let (true, Some(newest)) = (found.anchors.is_empty(), found.newest()) {
        found.anchors.extend(age::last_anchor(before, newest, keys)?);
    }
    Ok(found)
}

fn read_segments(
    segments: &[PathBuf],
    mut found: Found,
    keys: &Keys,
    statement: &Statement,
) -> io::Result<Found> {
    if let Statement::Of(stated) = statement {
        found.expected = Some(stated.last);
        // One that lies before what is read is not looked for.
        found.is_reached = stated.last.seq <= found.seq;
    }
    for (index, path) in segments.iter().enumerate() {
        found.last = Some((path.clone(), 0));
        match segments.get(index + 1) {
            Some(next) => found.read_full(path, next, keys)?,
            None => found.read_last(path, keys)?,
        }
    }
    if found.format > FORMAT {
        return Err(io::Error::other(Newer(found.format)));
    }
    found.compare(segments, statement);
    Ok(found)
}

/// Whether a part of a line did not reach the disk: it begins with zeros, as the write did, or holds as many as no
/// flipped bit makes. One zero is damage: what stands behind it was safe.
fn is_lost(line: &[u8]) -> bool {
    line.contains(&0)
        && (line[0] == 0 || line.windows(LEAST_LOST).any(|part| part.iter().all(|byte| *byte == 0)))
}

/// Whether the rest of a segment is how the next one begins. Pages that did not reach the disk read as zeros.
fn is_repeated(path: &Path, offset: u64, next: &Path) -> io::Result<bool> {
    let open = |path| Ok::<_, io::Error>(BufReader::new(open_regular(path, OpenOptions::new().read(true))?));
    let mut rest = open(path)?;
    rest.seek(SeekFrom::Start(offset))?;
    let mut begin = open(next)?.bytes();
    for byte in rest.bytes() {
        let (byte, proven) = (byte?, begin.next().transpose()?);
        if proven.is_none_or(|proven| byte != proven && byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Found {
    /// Before a segment is read: what it says lies before it, unless it is the first one of all.
    fn begin(segment: Option<&PathBuf>) -> io::Result<Self> {
        let before = match segment.filter(|path| first_seq(path) > 1) {
            Some(path) => retention::before(path)?,
            None => None,
        };
        Ok(before.map_or_else(Self::default, |Place { seq, hash }| Self { seq, hash, ..Self::default() }))
    }

    /// Reads a segment that another one follows.
    fn read_full(&mut self, path: &Path, next: &Path, keys: &Keys) -> io::Result<()> {
        let mut lines = Lines::open(path)?;
        while let Some(line) = lines.read()? {
            if self.seq + 1 == first_seq(next) && is_repeated(path, line.offset, next)? {
                break;
            }
            self.take(path, line.number, line.bytes, keys);
            if !line.whole {
                // A crash tears the last line of all; elsewhere somebody did.
                self.fault(path, line.number, "the line has no end");
            }
        }
        Ok(())
    }

    /// Reads the last segment, up to what a crash left of the last write.
    fn read_last(&mut self, path: &Path, keys: &Keys) -> io::Result<()> {
        let mut lines = Lines::open(path)?;
        let size = fs::symlink_metadata(path)?.len();
        while let Some(line) = lines.read()? {
            let rest = size.saturating_sub(line.offset);
            if !line.whole || (is_lost(line.bytes) && rest <= MAX_TORN) {
                self.torn = Some((path.into(), line.offset, rest));
                break;
            }
            self.take(path, line.number, line.bytes, keys);
            self.last = Some((path.into(), line.offset + line.bytes.len() as u64 + 1));
        }
        Ok(())
    }

    /// Where a writer goes on: the last number given away, and the segment by its first one, with its length. What is damaged
    /// stays as it is: new records then go into a new segment, whose name is that of no other.
    pub(super) fn resume(&self) -> (u64, Option<(u64, u64)>) {
        let seq = self.highest.max(self.seq).max(self.given);
        let Some((path, length)) = &self.last else { return (seq, None) };
        let first = first_seq(path);
        if self.faults.is_empty() && self.given == 0 {
            return (seq, Some((first, *length)));
        }
        (seq.max(first), None)
    }

    /// Compares what was read with what the lock file says.
    fn compare(&mut self, segments: &[PathBuf], statement: &Statement) {
        match statement {
            Statement::Missing if !segments.is_empty() => self.damage.push(Damage {
                lacks: Lacking::LockFile,
                file: lock::NAME.into(),
                at_end: true,
                reason: "there is no lock file, which would tell whether newer segments are missing".into(),
            }),
            Statement::Missing | Statement::Nothing => {}
            Statement::Unreadable => self.is_lock_unreadable = true,
            Statement::Of(stated) => self.compare_end(segments, stated),
        }
    }

    fn compare_end(&mut self, segments: &[PathBuf], Stated { newest, last, is_stopped }: &Stated) {
        let newest_name = segment_name(*newest);
        let is_there = segments.iter().any(|path| path.ends_with(&newest_name));
        // An older version, which does not write lock files, may have gone on and removed it.
        let is_past = segments.first().is_some_and(|first| first_seq(first) > *newest);
        let (lacks, reason) = match () {
            () if !is_there && !is_past => (
                Lacking::NewestSegment,
                "the newest segment is missing, which the lock file names".to_owned(),
            ),
            () if self.is_reached => return,
            () => {
                let lacks = if *is_stopped { Lacking::LastRecords } else { Lacking::LastRecordsAfterCrash };
                let (seq, found) = (last.seq, self.seq);
                let reason = match found < seq {
                    true => {
                        format!("the last record is {found}, and {seq} was written, as the lock file says")
                    }
                    false => format!("record {seq} is not the one that the lock file names"),
                };
                (lacks, reason)
            }
        };
        self.given = last.seq.max(if lacks == Lacking::NewestSegment { *newest } else { 0 });
        self.damage.push(Damage { lacks, file: newest_name, at_end: true, reason });
    }

    /// The time of the last record that is proven, in milliseconds since 1970.
    pub(super) fn newest(&self) -> Option<i64> {
        age::millis(&self.time)
    }

    /// Whether the key proves any record, unless there is none.
    pub fn fits_its_key(&self) -> bool {
        self.proven > 0 || self.seq == 0
    }

    fn fault(&mut self, path: &Path, line: usize, reason: &'static str) {
        if self.faults.len() < MAX_FAULTS {
            self.faults.push(Fault { file: path.into(), line, seq: self.seq, reason });
        }
    }

    fn take(&mut self, path: &Path, number: usize, line: &[u8], keys: &Keys) {
        self.take_record(path, number, line, keys);
        self.is_reached |= self.expected == Some(Place { seq: self.seq, hash: self.hash });
    }

    fn take_record(&mut self, path: &Path, number: usize, line: &[u8], keys: &Keys) {
        let seq = self.seq + 1;
        self.seq = seq;
        self.highest = self.highest.max(seq);
        let checked = keys.check(line, &self.hash);
        let is_linked = checked.is_ok();
        match checked {
            Ok(hash) => self.hash = hash,
            Err(reason) => {
                self.fault(path, number, reason);
                // Go on from what the line states, so that one changed record is one fault.
                self.hash = stated(line).unwrap_or(self.hash);
            }
        }
        let Ok(head) = serde_json::from_slice::<Head<'_>>(line) else {
            self.fault(path, number, "not a record");
            return;
        };
        if head.seq != seq {
            self.fault(path, number, "the number does not follow: records were removed, added or swapped");
            // Go on from what the line states, unless nothing could follow it.
            self.seq = if head.seq < MAX_SEQ { head.seq } else { seq };
        }
        self.highest = self.highest.max(self.seq);
        // Behind a changed line stands what that line states. A copy of an earlier record fits there.
        let is_proven = is_linked && head.seq > self.proven;
        self.proven = if is_proven { head.seq } else { self.proven };
        let step = Step {
            kind: &head.kind,
            event: head.event.as_deref(),
            id: head.id,
            outcome: head.outcome.as_deref(),
            time: head.time.as_deref().unwrap_or_default(),
        };
        if is_proven {
            step.time.clone_into(&mut self.time);
            self.unresolved.take(&step, line);
        } else {
            self.unresolved.take_unproven(&step, line);
        }
        if step.kind == "event" {
            self.take_event(path, number, line, is_proven);
        }
    }

    fn take_event(&mut self, path: &Path, line: usize, bytes: &[u8], is_proven: bool) {
        if self.begins_behind.is_some() {
            self.is_retained |= retention::said(bytes) == self.begins_behind;
        }
        // A flipped bit makes no trail a newer one, and no record older.
        if is_proven {
            self.anchors.extend(Anchor::read(bytes));
            self.format = self.format.max(age::format(bytes).unwrap_or_default());
        }
        if Damage::is_told_by(bytes) && self.recorded.len() < MAX_FAULTS {
            let reason = "a start found something missing before this record, which says what";
            self.recorded.push(Fault { file: path.into(), line, seq: self.seq, reason });
        }
    }
}

impl Damage {
    /// What its event says.
    pub(super) fn details(&self) -> Value {
        let Self { lacks, file, at_end, reason } = self;
        json!({ "what": DAMAGED, "file": file, "reason": reason, "lacks": lacks, "at_end": at_end })
    }

    /// Whether a line is such an event.
    pub(super) fn is_told_by(line: &[u8]) -> bool {
        #[derive(Deserialize)]
        struct Told<'a> {
            event: &'a str,
            #[serde(borrow)]
            lacks: Option<&'a str>,
        }
        let told = serde_json::from_slice::<Told<'_>>(line);
        told.is_ok_and(|told| told.event == "recovery" && told.lacks.is_some())
    }
}
