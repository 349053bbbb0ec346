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
    chain::{Hash, Line, Lines, hex, parse_hex, segments},
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

/// How a segment begins.
#[derive(Deserialize)]
struct Begin<'a> {
    seq: u64,
    time: &'a str,
    prev: &'a str,
}

/// What the event says.
#[derive(Deserialize)]
struct Said<'a> {
    event: &'a str,
    last_seq: u64,
    last_hash: &'a str,
}

/// The oldest segment, if the one behind it begins with a record that is old by its number and its time, in milliseconds since
/// 1970. The last one never goes.
pub(super) fn oldest(directory: &Path, is_old: impl Fn(u64, i64) -> bool) -> io::Result<Option<Old>> {
    let segments = segments(directory)?;
    let [oldest, next, ..] = segments.as_slice() else { return Ok(None) };
    let old = begin(next)?.filter(|(last, time)| is_old(last.seq + 1, *time));
    Ok(old.map(|(last, _)| Old { path: oldest.clone(), last }))
}

/// The place before the first record of a segment.
pub(super) fn before(segment: &Path) -> io::Result<Option<Place>> {
    Ok(begin(segment)?.map(|(place, _)| place))
}

/// The place before a segment's first line, and when that was written, in milliseconds since 1970.
fn begin(segment: &Path) -> io::Result<Option<(Place, i64)>> {
    let parse = |line: Line<'_>| {
        let Begin { seq, time, prev } = serde_json::from_slice(line.bytes).ok()?;
        Some((Place { seq: seq.checked_sub(1)?, hash: parse_hex(prev)? }, age::millis(time)?))
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
