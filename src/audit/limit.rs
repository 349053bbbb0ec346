//! The limit on the size of files (`RLIMIT_FSIZE`: `ulimit -f`, `LimitFSIZE=`), compared with what a segment needs.
//!
//! A limit under which new calls could be refused for ever is refused at the start. Under a higher one that is still
//! too low for full segments, segments end early, and a notice says so.

use std::io;

use rustix::process::{Resource, getrlimit};
use thiserror::Error;

use super::segment::AHEAD;
use super::writer::{MOST_AT_ONCE, OUTCOME};
use crate::config::Config;

/// What a segment needs in any case, in bytes.
// A segment begins with the list of unresolved calls: 10,000 calls with 512 bytes each take 5 MiB. The batch with
// that list, and what the batch adds to it, take twice `MOST_AT_ONCE`, and 1 MiB is reserved. The rest is for
// records: if each segment took the whole list and few records, lists would fill the disk.
const LEAST: u64 = 16 << 20;

// A longer list is possible, since a call within the idempotency window is never removed from it. The writer then
// stays in its segment and refuses new calls: see `Writer::begins` and `Writer::reserve`.
const _: () =
    assert!(super::unresolved_calls::AT_MOST as u64 * 512 + 2 * MOST_AT_ONCE as u64 + AHEAD < LEAST);

/// Four times the body for a record, and as much for its call on the list. Longer ones are rare.
// Either may come in addition to `MOST_AT_ONCE`. A record of many short values that are redacted is longer;
// `Shared::push_intent` refuses one that no file can hold.
const RECORD: u64 = 2 * 4;

/// What a call in flight needs, in bytes: the space reserved for its outcome, and its place on the list.
const IN_FLIGHT: u64 = OUTCOME + CALL;

/// The length of a call on the list, in bytes. Only one with a long task takes more.
const CALL: u64 = 1024;

/// What an operator must raise, by the names that set it.
pub(super) const RAISE: &str = "the limit on the size of files (LimitFSIZE=, ulimit -f)";

/// The limit is too low for any segment.
#[derive(Clone, Copy, Debug, Error)]
#[error(
    "a file can have at most {limit} bytes here, and a segment of the audit trail needs at least {needed}: raise {RAISE}"
)]
pub struct TooLow {
    limit: u64,
    needed: u64,
}

/// The limit on the size of a file of this process, in bytes; [`u64::MAX`] if there is none.
// Read each time: an operator can raise it with `prlimit` while the gateway runs, and service must then come back.
pub(super) fn of_files() -> u64 {
    getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX)
}

/// Adds to an error of the file `name` that the file is larger than the limit allows. Other errors are returned
/// unchanged.
pub(super) fn explain(error: io::Error, name: &str) -> io::Error {
    match error.kind() {
        kind @ io::ErrorKind::FileTooLarge => {
            io::Error::new(kind, format!("{name} is larger than {RAISE} allows: {error}"))
        }
        _ => error,
    }
}

/// Checks that a segment has room for a full list and for records after it: 16 MiB, 8 times `server.max_body`, and 3
/// KiB for each of `server.max_in_flight`. Fails if the limit is lower.
pub fn check(config: &Config) -> Result<(), TooLow> {
    let server = &config.server;
    let (limit, needed) =
        (of_files(), LEAST + RECORD * server.max_body as u64 + IN_FLIGHT * server.max_in_flight as u64);
    if limit < needed { Err(TooLow { limit, needed }) } else { Ok(()) }
}

/// A notice for the operator if the limit makes segments end before they are full; `None` if it does not.
pub fn notice(config: &Config) -> Option<String> {
    let (limit, size) = (of_files(), config.audit.segment_size);
    let behind = AHEAD + OUTCOME * config.server.max_in_flight as u64;
    let needed = size + behind;
    (limit < needed).then(|| {
        let fitting = limit.saturating_sub(behind) >> 10;
        let lower = match fitting {
            // `audit.segment_size` takes no less than 64 KiB, so that the advice would be refused.
            ..64 => String::new(),
            _ => format!(", or set audit.segment_size to {fitting}KiB"),
        };
        format!(
            "a file can have at most {limit} bytes here, and a segment of audit.segment_size ({size}) with the space \
             reserved behind it takes {needed}: segments end before they are full. Raise {RAISE}{lower}"
        )
    })
}
