//! Retention: removes segments that are older than `retain`, one at a time, the oldest first.
//!
//! The age of a record comes from [`super::age`] and not from a wall clock. While the clock is doubtful,
//! nothing is removed.
//!
//! While the trail is larger than `max_size`, segments are removed before `retain` has passed, but never one
//! with a record that the idempotency window may need. If none may be removed, the trail grows further, and a
//! warning is logged.
//!
//! The hash chain stays verifiable: before a segment is removed, an event `retention` states the number and the
//! hash of its last record, and so where the trail begins from then on. Without such an event, a trail that
//! does not begin at its first record is damaged.
//!
//! This module finds the segment and words the event; [`super::writer`] removes the file after the event is
//! committed.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use super::chain::{Lines, SegmentLine, segments};
use super::clocks::{ClockDoubt, Clocks};
use super::directory::Directory;
use super::{Options, age};

use crate::keyed_hash::{Hash, Keys, hex, parse_hex};

/// The name of the event that precedes a removal.
pub(super) const EVENT: &str = "retention";

/// How often a warning is repeated that the trail is too large and nothing may be removed.
const REMIND: Duration = Duration::from_secs(60 * 60);

/// The size from which on segments are removed before `retain` has passed.
#[derive(Clone, Copy, Debug)]
pub struct Early {
    /// The size of all segments together, in bytes.
    pub max_size: u64,
    /// A segment is removed early only if all of its records are older than this.
    pub after: Duration,
}

/// How long and up to which size a trail is kept.
pub(super) struct Keeping {
    /// How long records are kept at least, unless the trail is too large; `None`: forever.
    retain: Option<Duration>,
    early: Option<Early>,
    /// When the last warning was logged that nothing may be removed, and whether a doubtful clock was the
    /// reason.
    last_warned: Option<(Instant, bool)>,
}

/// The trail is larger than its maximum. Both are in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Excess {
    pub(super) size: u64,
    pub(super) max_size: u64,
}

/// A segment that may be removed.
#[derive(Debug)]
pub(super) struct Old {
    /// The path of the segment.
    pub(super) path: PathBuf,
    /// The place of its last record.
    last: ChainPosition,
    /// The excess, if the segment is removed before `retain` has passed.
    pub(super) early: Option<Excess>,
}

/// A record's place in the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChainPosition {
    /// The number of the record.
    pub(super) seq: u64,
    /// Its hash, which the next record contains as `prev`.
    pub(super) hash: Hash,
}

/// The members of a segment's first record that tell about the record before it.
#[derive(Deserialize)]
struct Begin<'a> {
    seq: u64,
    prev: &'a str,
}

/// The members of a record that tell its age.
#[derive(Deserialize)]
struct Head<'a> {
    seq: u64,
    time: &'a str,
}

/// The members of the event.
#[derive(Deserialize)]
struct Removal<'a> {
    event: &'a str,
    last_seq: u64,
    last_hash: &'a str,
}

impl Keeping {
    /// The bounds that the options set.
    pub(super) fn new(options: &Options) -> Self {
        // Records within the window are the memory of deduplication. They are kept even if `retain` is shorter.
        let at_least = |time: Duration| time.max(options.window);
        let early = options.early.map(|early| Early { after: at_least(early.after), ..early });
        Self { retain: options.retain.map(at_least), early, last_warned: None }
    }

    /// Whether any segment may ever be removed.
    pub(super) fn is_bounded(&self) -> bool {
        self.retain.is_some() || self.early.is_some()
    }

    /// Finds the segment to remove next, if there is one. Finds none while the clock is doubtful, and none
    /// until all records from before the start have been read.
    ///
    /// Fails if a segment cannot be read.
    pub(super) fn find(
        &mut self,
        directory: &Directory,
        keys: &Keys,
        clocks: &Clocks,
    ) -> io::Result<Option<Old>> {
        // Without all anchors a record of an earlier boot could be dated by the wrong one.
        let Some(anchors) = clocks.anchors() else { return Ok(None) };
        let (doubt, ages) = (clocks.doubt(), clocks.ages());
        let older_than = |limit: Duration| {
            let is_old = |seq, time| ages.clone().at(seq, anchors).age(time) > limit;
            oldest(directory.path(), keys, is_old)
        };
        // Age comes first, so that an error of reading sizes does not stop it.
        let retain = self.retain.filter(|_| doubt.is_none());
        let old = retain.map(older_than).transpose()?.flatten();
        if old.is_some() {
            return Ok(old);
        }
        let Some((early, excess)) = self.early.zip(self.excess(directory)?) else { return Ok(None) };
        let old = if doubt.is_none() { older_than(early.after)? } else { None };
        if old.is_none() {
            self.warn(excess, doubt);
        }
        Ok(old.map(|old| Old { early: Some(excess), ..old }))
    }

    /// By how much the trail exceeds its maximum; `None` if it does not, or there is none.
    fn excess(&self, directory: &Directory) -> io::Result<Option<Excess>> {
        let Some(Early { max_size, .. }) = self.early else { return Ok(None) };
        let mut size = 0;
        for path in segments(directory.path())? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            size += directory.find(&name)?.map_or(0, |found| found.length);
        }
        Ok((size > max_size).then_some(Excess { size, max_size }))
    }

    /// Warns that nothing may be removed, at most once an hour for each of the two reasons.
    fn warn(&mut self, Excess { size, max_size }: Excess, doubt: Option<ClockDoubt>) {
        let is_doubtful = doubt.is_some();
        if self.last_warned.is_some_and(|(at, which)| which == is_doubtful && at.elapsed() < REMIND) {
            return;
        }
        self.last_warned = Some((Instant::now(), is_doubtful));
        match doubt {
            Some(doubt) => tracing::warn!(
                size, max_size, %doubt,
                "the audit trail is larger than max_size, and no segment is removed while the clock is doubtful: if the clock is \
                 right, run `ccsqm-gateway audit accept-clock`; watch the free space until then"
            ),
            None => tracing::warn!(
                size,
                max_size,
                "the audit trail is larger than max_size, and no segment may be removed: even the oldest has records that the \
                 idempotency window needs. Raise [audit] max_size, and its volume with it, or lower the rate_limit of callers, \
                 [quota] rate or [idempotency] window; when the volume is full, calls are refused"
            ),
        }
    }
}

/// Returns the oldest segment if the one after it begins with a record for which `is_old` holds; its arguments
/// are the number and the time of that record, in milliseconds since 1970. Never returns the last segment.
///
/// Fails if a segment cannot be read.
// All records of a segment are older than the first record of the next one, so a look at one record is enough.
// A changed record is skipped: its time may be forged to have a segment removed.
pub(super) fn oldest(
    directory: &Path,
    keys: &Keys,
    is_old: impl Fn(u64, i64) -> bool,
) -> io::Result<Option<Old>> {
    let segments = segments(directory)?;
    let [oldest, next, ..] = segments.as_slice() else { return Ok(None) };
    let mut lines = Lines::open(next)?;
    while let Some(line) = lines.read()? {
        if keys.has_written(line.bytes)
            && let Ok(Head { seq, time }) = serde_json::from_slice(line.bytes)
        {
            let is_old = age::millis(time).is_some_and(|time| is_old(seq, time));
            let old = before(next)?.filter(|_| is_old);
            return Ok(old.map(|last| Old { path: oldest.clone(), last, early: None }));
        }
    }
    Ok(None)
}

/// Returns the place before the first record of a segment, as that record states it. `None` if it cannot be
/// parsed.
pub(super) fn before(segment: &Path) -> io::Result<Option<ChainPosition>> {
    let parse = |line: SegmentLine<'_>| {
        let Begin { seq, prev } = serde_json::from_slice(line.bytes).ok()?;
        Some(ChainPosition { seq: seq.checked_sub(1)?, hash: parse_hex(prev)? })
    };
    Ok(Lines::open(segment)?.read()?.and_then(parse))
}

impl Old {
    /// The members of the event that precedes the removal.
    pub(super) fn details(&self) -> Value {
        let file = self.path.file_name().map(|name| name.to_string_lossy().into_owned());
        let mut details = json!({
            "what": "removed",
            "file": file,
            "last_seq": self.last.seq,
            "last_hash": hex(&self.last.hash),
        });
        if let Some(Excess { size, max_size }) = self.early {
            details["early"] = json!({ "why": "max_size", "trail_size": size, "max_size": max_size });
        }
        details
    }
}

/// Returns up to where the trail was removed, if the line is such an event.
pub(super) fn removed_until(line: &[u8]) -> Option<ChainPosition> {
    let Removal { event, last_seq, last_hash } = serde_json::from_slice(line).ok()?;
    (event == EVENT).then_some(ChainPosition { seq: last_seq, hash: parse_hex(last_hash)? })
}
