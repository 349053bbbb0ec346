//! Reads the trail: recovery at start, `audit verify`, `audit in-doubt`, `audit head`.
//!
//! A start reads the end of the trail only, so that it serves at once; all of it is verified beside that, for damage
//! and for what was left open.
//!
//! A crash leaves traces that are no faults. The last write may be cut short; and if the machine crashed, those
//! pages of it that did not reach the disk read as zeros. Nothing of that was safe. A batch whose fdatasync
//! failed stands twice, if nobody came to cut it off: at the end of one segment and, proven, at the beginning of
//! the next.

use std::{
    borrow::Cow,
    fs::{self, File, OpenOptions},
    io::{self, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    age::{self, Anchor, FORMAT, Newer},
    chain::{Hash, Keys, Lines, first_seq, segments, stated},
    retention::{self, Place},
    unresolved::{Step, UnresolvedList},
    writer::Segment,
};

/// No record has so high a number; a line that states one is no place to go on from.
const MAX_SEQ: u64 = 1 << 60;

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
    /// The last record's time.
    time: String,
    /// The highest format that a start states.
    format: u64,
    /// Where the trail begins, if that is not its first record.
    begins_behind: Option<Place>,
    /// An event says that what lies before was removed.
    is_retained: bool,
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
        match read_all(&segments(directory)?, keys) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && tries > 0 => tries -= 1,
            read => return read,
        }
    }
}

fn read_all(segments: &[PathBuf], keys: &Keys) -> io::Result<Found> {
    let mut found = Found::begin(segments.first())?;
    found.begins_behind = (found.seq > 0).then_some(Place { seq: found.seq, hash: found.hash });
    let mut found = read_segments(segments, found, keys)?;
    if let (Some(_), Some(path), false) = (found.begins_behind, segments.first(), found.is_retained) {
        let reason = "records before this one were removed, and no event says so";
        found.faults.insert(0, Fault { file: path.clone(), line: 1, seq: first_seq(path), reason });
    }
    Ok(found)
}

/// Reads the last two segments of a directory, which is where a crash leaves a torn line. What lies before them is
/// believed.
pub(super) fn read_end(directory: &Path, keys: &Keys) -> io::Result<Found> {
    let segments = segments(directory)?;
    let (before, end) = segments.split_at(segments.len().saturating_sub(2));
    let mut found = read_segments(end, Found::begin(end.first())?, keys)?;
    if let (true, Some(newest)) = (found.anchors.is_empty(), found.newest()) {
        found.anchors.extend(age::last_anchor(before, newest)?);
    }
    Ok(found)
}

fn read_segments(segments: &[PathBuf], mut found: Found, keys: &Keys) -> io::Result<Found> {
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
    let mut rest = BufReader::new(File::open(path)?);
    rest.seek(SeekFrom::Start(offset))?;
    let mut begin = BufReader::new(File::open(next)?).bytes();
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
        let size = fs::metadata(path)?.len();
        let mut lines = Lines::open(path)?;
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

    /// Where a writer goes on: the last number given away, and the segment with its length. What is damaged
    /// stays as it is: new records then go into a new segment, whose name is that of no other.
    pub(super) fn resume(&self) -> io::Result<(u64, Option<Segment>)> {
        match &self.last {
            Some((path, length)) if self.faults.is_empty() => {
                let file = OpenOptions::new().write(true).open(path)?;
                Ok((self.seq, Some(Segment::new(file, *length))))
            }
            Some((path, _)) => Ok((self.seq.max(first_seq(path)), None)),
            None => Ok((self.seq, None)),
        }
    }

    /// The last record's time, in milliseconds since 1970.
    pub(super) fn newest(&self) -> Option<i64> {
        age::millis(&self.time)
    }

    fn fault(&mut self, path: &Path, line: usize, reason: &'static str) {
        if self.faults.len() < MAX_FAULTS {
            self.faults.push(Fault { file: path.into(), line, seq: self.seq, reason });
        }
    }

    fn take(&mut self, path: &Path, number: usize, line: &[u8], keys: &Keys) {
        let seq = self.seq + 1;
        self.seq = seq;
        match keys.check(line, &self.hash) {
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
        self.time.clear();
        self.time.push_str(head.time.as_deref().unwrap_or_default());
        let step = Step {
            kind: &head.kind,
            event: head.event.as_deref(),
            id: head.id,
            outcome: head.outcome.as_deref(),
            time: &self.time,
        };
        self.unresolved.take(&step, line);
        if step.kind == "event" {
            self.is_retained |=
                self.begins_behind.is_some_and(|place| retention::said(line) == Some(place));
            self.anchors.extend(Anchor::read(line));
            self.format = self.format.max(age::format(line).unwrap_or_default());
        }
    }
}
