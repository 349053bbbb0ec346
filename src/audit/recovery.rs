//! Crash recovery of the write-ahead trail: reads the segments, verifies the hash chain, and finds the end that
//! a writer continues from.
//!
//! A start calls [`read_end`], which reads the last two segments only, so that the gateway serves at once. The
//! whole trail is verified in the background. The commands `audit verify`, `audit in-doubt` and `audit head`
//! call [`read`].
//!
//! Some traces of a crash are not faults:
//!
//! * The last write may be cut short (*torn*). After a crash of the machine it may also have holes: pages that
//!   did not reach the disk read as zeros. Nothing of such a write was committed.
//! * A batch may be in the trail twice, at the end of one segment and at the beginning of the next. That happens
//!   if fdatasync failed, and the process died after it had written the batch to the next segment and before it
//!   cut the first copy off. The second copy is the one that the chain proves.
//!
//! The chain does not show that records are missing at the end of the trail. The lock file does: it names the
//! newest segment and one record of the trail. If a start does not find these, it writes an event about the
//! damage. It then continues with a higher number in a new segment, so that the gap stays visible.
//!
//! This module changes no file. [`super::start`] cuts off a torn line and records the damage.

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
use super::lock::{ClosingStatement, Statement};
use super::retention::ChainPosition;
use super::unresolved_calls::{RecordView, UnresolvedList};
use super::{age, lock, retention};

use crate::keyed_hash::{Hash, Keys};

/// The value of `what` in the event `recovery` for a damaged trail.
pub(super) const DAMAGED: &str = "damaged";

/// The largest number of faults that are collected.
// With a wrong key every record is a fault. To collect more would only cost memory.
const MAX_FAULTS: usize = 10_000;

/// The number of consecutive zero bytes that count as a part of a page that did not reach the disk.
// A sector has 512 bytes, but only a piece of it may lie within one line. 16 is still far more than a flipped
// bit or a damaged byte produces.
const LEAST_LOST: usize = 16;

/// How far from the end of the file, in bytes, a line with a hole may begin and still count as a part of a torn
/// last write, which is cut off. A hole that is farther away counts as damage.
const MAX_TORN: u64 = 1 << 20;

/// The result of reading a trail.
///
/// A record is *proven* if it verifies with the key and the hash of the record before it, and if its number is higher
/// than those of all records proven before.
#[derive(Debug, Default)]
pub struct TrailState {
    /// The number of the last complete record.
    pub seq: u64,
    /// The hash of the last complete record.
    pub hash: Hash,
    /// The calls that have no outcome, whose outcome is unknown, or which succeeded and whose caller may not have
    /// got the answer.
    pub unresolved: UnresolvedList,
    /// The lines that are not records or do not verify, in the order of the trail. At most 10,000.
    pub faults: Vec<BrokenLine>,
    /// The torn end of the last write: the segment, the offset where the torn part begins, and its length in
    /// bytes.
    pub torn: Option<(PathBuf, u64, u64)>,
    /// The last segment, and its length in bytes without a torn line.
    pub last: Option<(PathBuf, u64)>,
    /// The anchors of the records that were read, in the order of the trail: see [`super::age`].
    pub(super) anchors: Vec<Anchor>,
    /// The time of the last proven record (RFC 3339).
    time: String,
    /// The highest version of the trail's format that a proven event states.
    format: u64,
    /// What is missing compared with the statement in the lock file.
    pub damage: Vec<Damage>,
    /// The events by which earlier starts recorded [`Damage`].
    pub recorded: Vec<BrokenLine>,
    /// Whether the text of the lock file cannot be parsed. Then nothing is known about the end of the trail.
    pub is_lock_unreadable: bool,
    /// The highest number of any record, proven or not.
    highest: u64,
    /// The highest number of a proven record.
    proven: u64,
    /// The record that the lock file names.
    expected: Option<ChainPosition>,
    /// Whether that record was found, or is before the part of the trail that was read.
    is_reached: bool,
    /// The highest number that was assigned according to the lock file, if records are missing at the end; 0 if not.
    given: u64,
    /// The position in the chain before the first segment, if earlier segments were removed.
    begins_behind: Option<ChainPosition>,
    /// Whether an event `retention` says that the records before the first segment were removed.
    is_retained: bool,
}

/// Something that is missing and that the chain cannot show: the lock file, or records or a segment that it names.
#[derive(Clone, Debug, Serialize)]
pub struct Damage {
    /// What kind of thing is missing.
    pub lacks: Lacking,
    /// The name of the file that is missing, or that lacks records.
    pub file: String,
    /// Whether the missing part is at the end of the trail and may be newer than everything that is left.
    pub at_end: bool,
    /// A description for people.
    pub reason: String,
}

/// What can be missing without leaving a trace in the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Lacking {
    /// The lock file, though there are segments. Without it, it is unknown whether newer segments are missing.
    LockFile,
    /// The newest segment.
    NewestSegment,
    /// The last records of a trail whose gateway was stopped cleanly.
    LastRecords,
    /// The last records of a trail whose gateway was not stopped cleanly. Where durability is `kernel`, a crash
    /// of the machine may have lost them; otherwise they were removed.
    LastRecordsAfterCrash,
}

/// A line of a segment that is not a record or does not verify.
#[derive(Clone, Debug, Serialize)]
pub struct BrokenLine {
    /// The path of the segment.
    pub file: PathBuf,
    /// The number of the line in the segment, counted from 1.
    pub line: usize,
    /// The number that the record should have.
    pub seq: u64,
    /// A description for people.
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

/// Reads and verifies all segments of a directory. A running gateway may write the trail at the same time; if
/// it removes a segment meanwhile, reading starts again, up to ten times.
///
/// Fails if a segment cannot be read, and with an error that wraps [`Newer`] if a newer version wrote a part of
/// the trail. Faults of the trail are no errors: they are in [`TrailState`]. Reads every byte of the trail, so do
/// not call it on a thread that serves requests.
pub fn read(directory: &Path, keys: &Keys) -> io::Result<TrailState> {
    let mut tries = 10;
    loop {
        // The lock file is read before the segments are listed. In the other order, a running gateway could
        // begin a segment in between, and the lock file would name one that the list lacks.
        let statement = lock::read(directory).unwrap_or(Statement::Unreadable);
        match read_all(&segments(directory)?, keys, &statement) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && tries > 0 => tries -= 1,
            read => return read,
        }
    }
}

fn read_all(segments: &[PathBuf], keys: &Keys, statement: &Statement) -> io::Result<TrailState> {
    let mut found = TrailState::begin(segments.first())?;
    found.begins_behind = (found.seq > 0).then_some(ChainPosition { seq: found.seq, hash: found.hash });
    let mut found = read_segments(segments, found, keys, statement)?;
    if let (Some(_), Some(path), false) = (found.begins_behind, segments.first(), found.is_retained) {
        let reason = "records before this one were removed, and no event records their removal";
        found.faults.insert(0, BrokenLine { file: path.clone(), line: 1, seq: first_seq(path), reason });
    }
    Ok(found)
}

/// Reads the last two segments of a directory without verifying the ones before. For the last anchor it may
/// read further back.
///
/// Fails as [`read`] does.
// Two segments and not one: the last one may hold nothing but a torn line. Then the place in the chain and the
// list of unresolved calls are in the one before. A batch whose fdatasync failed is at the end of the last but
// one, too.
pub(super) fn read_end(directory: &Path, keys: &Keys, statement: &Statement) -> io::Result<TrailState> {
    let segments = segments(directory)?;
    let (before, end) = segments.split_at(segments.len().saturating_sub(2));
    let mut found = read_segments(end, TrailState::begin(end.first())?, keys, statement)?;
    if let (true, Some(newest)) = (found.anchors.is_empty(), found.newest()) {
        found.anchors.extend(age::last_anchor(before, newest, keys)?);
    }
    Ok(found)
}

fn read_segments(
    segments: &[PathBuf],
    mut found: TrailState,
    keys: &Keys,
    statement: &Statement,
) -> io::Result<TrailState> {
    if let Statement::Of(stated) = statement {
        found.expected = Some(stated.last);
        // A start reads the end only. A record before that cannot be found, and its absence means nothing.
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

/// Whether a part of a line did not reach the disk: it begins with a zero byte, or has at least [`LEAST_LOST`] zero
/// bytes in a row.
// A single zero within a line is damage and not a torn write. Treating it as torn would cut off the committed
// records after it.
fn is_lost(line: &[u8]) -> bool {
    line.contains(&0)
        && (line[0] == 0 || line.windows(LEAST_LOST).any(|part| part.iter().all(|byte| *byte == 0)))
}

/// Whether the segment `path` from `offset` on equals the beginning of `next`. A zero byte in `path` counts as
/// equal to any byte, since pages that did not reach the disk read as zeros.
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

impl TrailState {
    /// Returns the state from which `segment` is read. It holds the number and the hash of the record before the
    /// segment, as the segment's first record states them. The state is the default for the first segment of a trail,
    /// for `None`, and if the segment's first record cannot be parsed.
    fn begin(segment: Option<&PathBuf>) -> io::Result<Self> {
        let before = match segment.filter(|path| first_seq(path) > 1) {
            Some(path) => retention::before(path)?,
            None => None,
        };
        Ok(before.map_or_else(Self::default, |ChainPosition { seq, hash }| Self {
            seq,
            hash,
            ..Self::default()
        }))
    }

    /// Reads a segment that is followed by another one, up to a batch that the next segment repeats.
    fn read_full(&mut self, path: &Path, next: &Path, keys: &Keys) -> io::Result<()> {
        let mut lines = Lines::open(path)?;
        while let Some(line) = lines.read()? {
            // The files are compared byte by byte only where the numbers have reached those of the next
            // segment.
            if self.seq + 1 == first_seq(next) && is_repeated(path, line.offset, next)? {
                break;
            }
            self.take(path, line.number, line.bytes, keys);
            if !line.whole {
                // A crash can tear the last line of the trail only. Here another segment follows, so the file
                // was changed.
                self.fault(path, line.number, "the line has no end");
            }
        }
        Ok(())
    }

    /// Reads the last segment, up to the part of the last write that a crash tore.
    fn read_last(&mut self, path: &Path, keys: &Keys) -> io::Result<()> {
        let mut lines = Lines::open(path)?;
        let size = fs::symlink_metadata(path)?.len();
        while let Some(line) = lines.read()? {
            // From a hole in the last write on, everything counts as torn: pages reach the disk in any order, so
            // complete lines may follow the hole. They were not committed either.
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

    /// Returns where a writer continues: the last number that was assigned, and the segment to append to. The segment
    /// is given by its first number and its length in bytes; `None` means that the writer must begin a new one.
    // A damaged segment is not appended to: it stays as it is, as evidence, and an operator can replace it by a
    // good copy without losing new records. The new segment is numbered above the name of the last one, so that
    // no file is replaced.
    pub(super) fn resume(&self) -> (u64, Option<(u64, u64)>) {
        let seq = self.highest.max(self.seq).max(self.given);
        let Some((path, length)) = &self.last else { return (seq, None) };
        let first = first_seq(path);
        if self.faults.is_empty() && self.given == 0 {
            return (seq, Some((first, *length)));
        }
        (seq.max(first), None)
    }

    /// Compares what was read with the statement in the lock file.
    fn compare(&mut self, segments: &[PathBuf], statement: &Statement) {
        match statement {
            Statement::Missing if !segments.is_empty() => self.damage.push(Damage {
                lacks: Lacking::LockFile,
                file: lock::NAME.into(),
                at_end: true,
                reason: "the lock file is missing, so it is unknown whether newer segments are missing"
                    .into(),
            }),
            // An empty file is the lock file of an older version, or of a start that died before its first
            // record. Neither is evidence that something is missing.
            Statement::Missing | Statement::Nothing => {}
            Statement::Unreadable => self.is_lock_unreadable = true,
            Statement::Of(stated) => self.compare_end(segments, stated),
        }
    }

    /// Adds what is missing at the end of the trail to `damage`, and sets `given`.
    fn compare_end(
        &mut self,
        segments: &[PathBuf],
        ClosingStatement { newest, last, is_stopped }: &ClosingStatement,
    ) {
        let newest_name = segment_name(*newest);
        let is_there = segments.iter().any(|path| path.ends_with(&newest_name));
        // A version before lock files may have continued the trail and removed the segment by retention. Then
        // all segments begin after the one that is named.
        let is_past = segments.first().is_some_and(|first| first_seq(first) > *newest);
        let (lacks, reason) = match () {
            () if !is_there && !is_past => (
                Lacking::NewestSegment,
                "the newest segment, which the lock file names, is missing".to_owned(),
            ),
            () if self.is_reached => return,
            () => {
                let lacks = if *is_stopped { Lacking::LastRecords } else { Lacking::LastRecordsAfterCrash };
                let (seq, found) = (last.seq, self.seq);
                let reason = match found < seq {
                    true => {
                        format!(
                            "the last record is {found}, but the lock file says that record {seq} was written"
                        )
                    }
                    false => format!("record {seq} is not the one that the lock file names"),
                };
                (lacks, reason)
            }
        };
        // No number is assigned twice, and no name of a missing segment is used again. Otherwise a copy that an
        // operator restores later would collide with the new records.
        self.given = last.seq.max(if lacks == Lacking::NewestSegment { *newest } else { 0 });
        self.damage.push(Damage { lacks, file: newest_name, at_end: true, reason });
    }

    /// The time of the last proven record, in milliseconds since 1970.
    pub(super) fn newest(&self) -> Option<i64> {
        age::millis(&self.time)
    }

    /// Whether the key is the one of this trail: it proves at least one record, or there are no records.
    pub fn fits_its_key(&self) -> bool {
        self.proven > 0 || self.seq == 0
    }

    fn fault(&mut self, path: &Path, line: usize, reason: &'static str) {
        if self.faults.len() < MAX_FAULTS {
            self.faults.push(BrokenLine { file: path.into(), line, seq: self.seq, reason });
        }
    }

    fn take(&mut self, path: &Path, number: usize, line: &[u8], keys: &Keys) {
        self.take_record(path, number, line, keys);
        self.is_reached |= self.expected == Some(ChainPosition { seq: self.seq, hash: self.hash });
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
                // The next line is checked against the hash that this line states, so that one changed record
                // is one fault and not a fault in every line that follows.
                self.hash = stated(line).unwrap_or(self.hash);
            }
        }
        let Ok(head) = serde_json::from_slice::<Head<'_>>(line) else {
            self.fault(path, number, "not a record");
            return;
        };
        if head.seq != seq {
            self.fault(
                path,
                number,
                "the number is not the next one: records were removed, added or swapped",
            );
            // Numbering continues from the stated number, so that a gap is one fault. A stated number of
            // `MAX_SEQ` or more is not used: it would leave no numbers for the next records.
            self.seq = if head.seq < MAX_SEQ { head.seq } else { seq };
        }
        self.highest = self.highest.max(self.seq);
        // Whoever changes a line can state any hash in it, so that a copy of an earlier record verifies after
        // it. Such a copy once replaced the list of unresolved calls. A record is therefore proven only if its
        // number is higher than all proven ones.
        let is_proven = is_linked && head.seq > self.proven;
        self.proven = if is_proven { head.seq } else { self.proven };
        let step = RecordView {
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
            // An unproven record may only add calls to the list. If it could remove one, whoever can write to
            // the file could make the gateway send a call twice.
            self.unresolved.take_unproven(&step, line);
        }
        if step.kind == "event" {
            self.take_event(path, number, line, is_proven);
        }
    }

    fn take_event(&mut self, path: &Path, line: usize, bytes: &[u8], is_proven: bool) {
        if self.begins_behind.is_some() {
            self.is_retained |= retention::removed_until(bytes) == self.begins_behind;
        }
        // Anchors and formats of unproven lines are ignored: a flipped bit must not make the trail unreadable
        // as "newer", and must not make a record older than it is.
        if is_proven {
            self.anchors.extend(Anchor::read(bytes));
            self.format = self.format.max(age::format(bytes).unwrap_or_default());
        }
        if Damage::is_recorded_by(bytes) && self.recorded.len() < MAX_FAULTS {
            let reason = "a start found a loss before this record, which says what is missing";
            self.recorded.push(BrokenLine { file: path.into(), line, seq: self.seq, reason });
        }
    }
}

impl Damage {
    /// Returns the members of the event `recovery` that records this damage.
    pub(super) fn details(&self) -> Value {
        let Self { lacks, file, at_end, reason } = self;
        json!({ "what": DAMAGED, "file": file, "reason": reason, "lacks": lacks, "at_end": at_end })
    }

    /// Whether a line is an event `recovery` that records a [`Damage`], and not one about a fault of the chain.
    pub(super) fn is_recorded_by(line: &[u8]) -> bool {
        #[derive(Deserialize)]
        struct Event<'a> {
            event: &'a str,
            #[serde(borrow)]
            lacks: Option<&'a str>,
        }
        let event = serde_json::from_slice::<Event<'_>>(line);
        event.is_ok_and(|event| event.event == "recovery" && event.lacks.is_some())
    }
}
