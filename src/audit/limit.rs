//! The limit on the size of files (`RLIMIT_FSIZE`: `ulimit -f`, `LimitFSIZE=`), beside what a segment takes.

use std::io;

use rustix::process::{Resource, getrlimit};
use thiserror::Error;

use super::{segment::AHEAD, writer::OUTCOME};
use crate::config::Config;

/// Below this no segment has room for what is reserved and some records: nothing would ever be served.
const LEAST: u64 = AHEAD + (64 << 10);

/// What must be raised, and by which names.
const RAISE: &str = "the limit on the size of files (LimitFSIZE=, ulimit -f)";

/// No segment has room.
#[derive(Clone, Copy, Debug, Error)]
#[error("a file may have {0} bytes here, and a segment needs {LEAST} at least: raise {RAISE}")]
pub struct TooLow(u64);

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

/// Looks whether a segment has room at all.
pub fn check() -> Result<(), TooLow> {
    let limit = of_files();
    if limit < LEAST { Err(TooLow(limit)) } else { Ok(()) }
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
