//! What is older than `retain` goes, a segment at a time, the oldest first. How old a record is says [`super::age`], whatever a
//! wall clock shows; while that is doubtful, nothing goes.
//!
//! While the trail is larger than `max_size`, segments go early: before `retain` has passed, but never with a record that the
//! idempotency window may need. Where none may go, the trail grows on, and the log says so.
//!
//! The chain stays verifiable: before a segment is removed, an event `retention` tells the number and the hash of its
//! last record, and so where the trail begins from then on. Without such an event a trail that does not begin at its
//! first record is damaged.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use super::chain::{Line, Lines, segments};
use super::clocks::{ClockDoubt, Clocks};
use super::directory::Directory;
use super::{Options, age};

use crate::keyed_hash::{Hash, Keys, hex, parse_hex};

/// The name of the event.
pub(super) const EVENT: &str = "retention";

/// How often it is said that the trail is too large and nothing may go.
const REMIND: Duration = Duration::from_secs(60 * 60);

/// From which size on segments go before `retain` has passed.
#[derive(Clone, Copy, Debug)]
pub struct Early {
    /// The bytes of all segments together.
    pub max_size: u64,
    /// No segment goes with a record that is no older.
    pub after: Duration,
}

/// How long a trail is kept, and how much of it.
pub(super) struct Keeping {
    /// Records are kept for as long, at least, unless the trail is too large.
    retain: Option<Duration>,
    early: Option<Early>,
    /// When it was last said that the trail is too large and nothing may go, and whether because of a doubtful clock.
    told: Option<(Instant, bool)>,
}

/// The trail is larger than it may be, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Excess {
    pub(super) size: u64,
    pub(super) max_size: u64,
}

/// A segment of which every record is old enough to go.
#[derive(Debug)]
pub(super) struct Old {
    pub(super) path: PathBuf,
    /// Its last record.
    last: Place,
    /// Why it goes before `retain` has passed, if it does.
    pub(super) early: Option<Excess>,
}

/// A record's place in the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) seq: u64,
    pub(super) hash: Hash,
}

/// What a segment's first record says of the one before it.
#[derive(Deserialize)]
struct Begin<'a> {
    seq: u64,
    prev: &'a str,
}

/// What a record says of itself.
#[derive(Deserialize)]
struct Head<'a> {
    seq: u64,
    time: &'a str,
}

/// What the event says.
#[derive(Deserialize)]
struct Said<'a> {
    event: &'a str,
    last_seq: u64,
    last_hash: &'a str,
}

impl Keeping {
    pub(super) fn new(options: &Options) -> Self {
        // What is within the window never goes, whatever else is asked for.
        let at_least = |time: Duration| time.max(options.window);
        let early = options.early.map(|early| Early { after: at_least(early.after), ..early });
        Self { retain: options.retain.map(at_least), early, told: None }
    }

    /// Whether anything may ever go.
    pub(super) fn is_bounded(&self) -> bool {
        self.retain.is_some() || self.early.is_some()
    }

    /// Finds the segment that is to go, if there is one. None does while the clock is doubtful, and before all that was there at
    /// the start was read.
    pub(super) fn find(
        &mut self,
        directory: &Directory,
        keys: &Keys,
        clocks: &Clocks,
    ) -> io::Result<Option<Old>> {
        let Some(anchors) = clocks.anchors() else { return Ok(None) };
        let (doubt, ages) = (clocks.doubt(), clocks.ages());
        let older_than = |limit: Duration| {
            let is_old = |seq, time| ages.clone().at(seq, anchors).age(time) > limit;
            oldest(directory.path(), keys, is_old)
        };
        let retain = self.retain.filter(|_| doubt.is_none());
        let old = retain.map(older_than).transpose()?.flatten();
        if old.is_some() {
            return Ok(old);
        }
        let Some((early, excess)) = self.early.zip(self.excess(directory)?) else { return Ok(None) };
        let old = if doubt.is_none() { older_than(early.after)? } else { None };
        if old.is_none() {
            self.tell(excess, doubt);
        }
        Ok(old.map(|old| Old { early: Some(excess), ..old }))
    }

    /// By what the trail is too large, if it is.
    fn excess(&self, directory: &Directory) -> io::Result<Option<Excess>> {
        let Some(Early { max_size, .. }) = self.early else { return Ok(None) };
        let mut size = 0;
        for path in segments(directory.path())? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            size += directory.find(&name)?.map_or(0, |found| found.length);
        }
        Ok((size > max_size).then_some(Excess { size, max_size }))
    }

    /// Says that nothing may go, once in a while.
    fn tell(&mut self, Excess { size, max_size }: Excess, doubt: Option<ClockDoubt>) {
        let is_doubtful = doubt.is_some();
        if self.told.is_some_and(|(told, which)| which == is_doubtful && told.elapsed() < REMIND) {
            return;
        }
        self.told = Some((Instant::now(), is_doubtful));
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

/// The oldest segment, if the one behind it begins with a record that is old by its number and its time, in milliseconds since
/// 1970. Of records that were changed neither counts. The last segment never goes.
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

/// The place before the first record of a segment.
pub(super) fn before(segment: &Path) -> io::Result<Option<Place>> {
    let parse = |line: Line<'_>| {
        let Begin { seq, prev } = serde_json::from_slice(line.bytes).ok()?;
        Some(Place { seq: seq.checked_sub(1)?, hash: parse_hex(prev)? })
    };
    Ok(Lines::open(segment)?.read()?.and_then(parse))
}

impl Old {
    /// What its event says.
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

/// Up to where the trail was removed, if a record says so.
pub(super) fn said(line: &[u8]) -> Option<Place> {
    let Said { event, last_seq, last_hash } = serde_json::from_slice(line).ok()?;
    (event == EVENT).then_some(Place { seq: last_seq, hash: parse_hex(last_hash)? })
}
