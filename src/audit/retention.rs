//! What is older than `retain` goes, a segment at a time, the oldest first. How old a record is says [`super::age`], whatever a
//! wall clock shows; while that is doubtful, nothing goes.
//!
//! The chain stays verifiable: before a segment is removed, an event `retention` tells the number and the hash of its
//! last record, and so where the trail begins from then on. Without such an event a trail that does not begin at its
//! first record is damaged.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    age,
    chain::{Hash, Keys, Line, Lines, hex, parse_hex, segments},
};

/// The name of the event.
pub(super) const EVENT: &str = "retention";

/// A segment of which every record is old enough to go.
#[derive(Debug)]
pub(super) struct Old {
    pub(super) path: PathBuf,
    /// Its last record.
    last: Place,
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
            return Ok(old.map(|last| Old { path: oldest.clone(), last }));
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
        json!({ "what": "removed", "file": file, "last_seq": self.last.seq, "last_hash": hex(&self.last.hash) })
    }
}

/// Up to where the trail was removed, if a record says so.
pub(super) fn said(line: &[u8]) -> Option<Place> {
    let Said { event, last_seq, last_hash } = serde_json::from_slice(line).ok()?;
    (event == EVENT).then_some(Place { seq: last_seq, hash: parse_hex(last_hash)? })
}
