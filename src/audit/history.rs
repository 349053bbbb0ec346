//! The history of one call: all records that name it, found in the segments.
//!
//! A request id is a UUIDv7, which contains the time at which the call began. Segments that end before that time are
//! not read. The chain is not checked here: `audit verify` does that.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;

use super::age;
use super::chain::{Lines, segments};
use super::unresolved_calls::LIST;

/// How much earlier than the time in its id a record of the call may be dated.
// Within a process both are dated by the same clock. A later process may have started with a clock that is behind.
const SLACK: Duration = Duration::from_secs(60 * 60);

/// A record that names a call.
#[derive(Debug)]
pub struct Naming {
    /// The line as it is in the trail, without its newline.
    // The text itself, since numbers and escapes written anew would change the bytes that the hash covers.
    pub line: String,
    /// The parsed line.
    pub record: Value,
}

/// Returns all records that name this call, in the order of the trail: its own, those of calls that repeat or equal
/// it, and events about it.
///
/// Lists of unresolved calls are left out. A line that cannot be read is skipped; `audit verify` names it. Fails if
/// the directory or a segment cannot be read.
pub fn records_of(directory: &Path, id: Uuid) -> io::Result<Vec<Naming>> {
    let mut tries = 10;
    loop {
        match read(directory, id) {
            // A running gateway may remove a segment between the listing and the reading. Ten times in a row it is
            // something else.
            Err(error) if error.kind() == io::ErrorKind::NotFound && tries > 0 && directory.is_dir() => {
                tries -= 1;
            }
            read => return read,
        }
    }
}

fn read(directory: &Path, id: Uuid) -> io::Result<Vec<Naming>> {
    let segments = segments(directory)?;
    let text = id.hyphenated().to_string();
    let mut records = Vec::new();
    for path in &segments[first_segment(&segments, id)?..] {
        let mut lines = Lines::open(path)?;
        while let Some(line) = lines.read()? {
            let Ok(line) = std::str::from_utf8(line.bytes) else { continue };
            // A search in the text first: parsing each line of a long trail would take many times as long.
            if line.contains(&text)
                && let Ok(record) = serde_json::from_str::<Value>(line)
                && is_about(&record, &text)
            {
                records.push(Naming { line: line.to_owned(), record });
            }
        }
    }
    Ok(records)
}

fn is_about(record: &Value, id: &str) -> bool {
    let is_list = record["event"] == LIST || record["event"] == age::START;
    !is_list && ["id", "first", "forced"].iter().any(|member| record[*member] == id)
}

/// Returns the index of the first segment that may name the call.
// If the wall clock was set back between two segments, their times say nothing, and reading begins before them.
fn first_segment(segments: &[PathBuf], id: Uuid) -> io::Result<usize> {
    let Some(begun) = begun(id) else { return Ok(0) };
    let from = begun - i64::try_from(SLACK.as_millis()).unwrap_or_default();
    let mut before = i64::MIN;
    for (index, path) in segments.iter().enumerate() {
        let time = first_time(path)?.unwrap_or(i64::MIN);
        if time > from || time < before {
            return Ok(index.saturating_sub(1));
        }
        before = time;
    }
    Ok(segments.len().saturating_sub(1))
}

/// When a call began, in milliseconds since 1970; `None` if its id is not a UUIDv7.
pub(super) fn begun(id: Uuid) -> Option<i64> {
    let (seconds, nanos) = id.get_timestamp()?.to_unix();
    i64::try_from(seconds).ok()?.checked_mul(1000)?.checked_add(i64::from(nanos / 1_000_000))
}

fn first_time(segment: &Path) -> io::Result<Option<i64>> {
    let mut lines = Lines::open(segment)?;
    let Some(line) = lines.read()? else { return Ok(None) };
    let record = serde_json::from_slice::<Value>(line.bytes).unwrap_or_default();
    Ok(record["time"].as_str().and_then(age::millis))
}
