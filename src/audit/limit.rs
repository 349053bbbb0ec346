//! The limit on the size of files (`RLIMIT_FSIZE`: `ulimit -f`, `LimitFSIZE=`), beside what a segment takes.

use std::io;

use rustix::process::{Resource, getrlimit};
use thiserror::Error;

use super::segment::AHEAD;
use super::writer::{MOST_AT_ONCE, OUTCOME};
use crate::config::Config;

/// What a segment takes in any case. A new one begins with the list of unresolved calls: 10,000 take 5 MiB, with 512 bytes each. The
/// batch with that list and what it adds to it take twice [`MOST_AT_ONCE`], and 1 MiB is reserved. What is left is for records: each
/// new segment takes so much that the lists do not fill the disk.
const LEAST: u64 = 16 << 20;

// A longer list is possible: a call younger than the idempotency window never leaves it. There the writer stays in its segment and
// refuses what is new: see `Writer::begins` and `Writer::reserve`.
const _: () = assert!(super::unresolved::AT_MOST as u64 * 512 + 2 * MOST_AT_ONCE as u64 + AHEAD < LEAST);

/// A record is rarely longer than so many times the body that it tells of, and its call on the list as long: both may stand beyond
/// the [`MOST_AT_ONCE`]. One of many short values that are hidden is longer; `Shared::push_intent` refuses what no file can hold.
const RECORD: u64 = 2 * 4;

/// What a call in flight takes: the space kept for its outcome, and its place on the list, which may be long.
const IN_FLIGHT: u64 = OUTCOME + CALL;

/// A call takes no more on the list, but for one with a long task.
const CALL: u64 = 1024;

/// What must be raised, and by which names.
pub(super) const RAISE: &str = "the limit on the size of files (LimitFSIZE=, ulimit -f)";

/// No segment has room.
#[derive(Clone, Copy, Debug, Error)]
#[error(
    "a file may have {limit} bytes here, and a segment of the audit trail needs {needed} at least: raise {RAISE}"
)]
pub struct TooLow {
    limit: u64,
    needed: u64,
}

/// So large may a file of this process be.
pub(super) fn of_files() -> u64 {
    getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX)
}

/// Says what an error of a file means that is larger than the limit already.
pub(super) fn explain(error: io::Error, name: &str) -> io::Error {
    match error.kind() {
        kind @ io::ErrorKind::FileTooLarge => {
            io::Error::new(kind, format!("{name} is larger than {RAISE} allows: {error}"))
        }
        _ => error,
    }
}

/// Looks whether any segment has room: 16 MiB, 8 times `server.max_body`, and 3 KiB for each of `server.max_in_flight`.
///
/// So a segment has room for a full list and for records behind it. Below that new calls might be refused for good, so that such a
/// limit is refused at the start.
pub fn check(config: &Config) -> Result<(), TooLow> {
    let server = &config.server;
    let (limit, needed) =
        (of_files(), LEAST + RECORD * server.max_body as u64 + IN_FLIGHT * server.max_in_flight as u64);
    if limit < needed { Err(TooLow { limit, needed }) } else { Ok(()) }
}

/// What is to be told of the limit: that segments end before they are full.
pub fn notice(config: &Config) -> Option<String> {
    let (limit, size) = (of_files(), config.audit.segment_size);
    let behind = AHEAD + OUTCOME * config.server.max_in_flight as u64;
    let needed = size + behind;
    (limit < needed).then(|| {
        let fitting = limit.saturating_sub(behind) >> 10;
        let lower = match fitting {
            ..64 => String::new(),
            _ => format!(", or set audit.segment_size to {fitting}KiB"),
        };
        format!(
            "a file may have {limit} bytes here, and a segment of audit.segment_size ({size}) with what is reserved behind it \
             takes {needed}: segments are left before they are full. Raise {RAISE}{lower}"
        )
    })
}
