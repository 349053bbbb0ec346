//! The space that is reserved ahead of what is written, and when a new segment begins.
//!
//! Space is reserved for the outcomes of all that is in flight and some more: once that can't be had, new intents are refused, and
//! what was sent already still gets its outcome on a full disk. A limit on the size of files is no full disk: there the next batch
//! begins a new segment, after a look whether it can have that space and has more room than the list of unresolved calls takes,
//! with which it begins.

use std::io;
use std::time::{Duration, Instant};

use super::{MOST_AT_ONCE, OUTCOME, Segment, Shared, Writer, limit};
use crate::audit::queue::Carried;
use crate::audit::segment;
use crate::audit::segment::AHEAD;

/// How long a segment that cannot be begun waits.
const RETRY_SEGMENT: Duration = Duration::from_secs(1);

impl Writer {
    /// What the next batch is to carry over, if it begins a segment. Where there is no space for one, or a file may not be as long as
    /// the list makes it, that is tried once a second.
    pub(super) fn begins(&mut self, shared: &Shared) -> Option<Carried> {
        let is_full = self.segment.as_ref().is_none_or(|segment| self.is_full(segment));
        if !self.may_begin() || !(is_full || self.lacks_list) {
            return None;
        }
        let limit = limit::of_files();
        if !self.is_outgrown && limit < u64::MAX && self.of_new_segment(shared) > limit {
            self.list_refused = Some(Instant::now());
            return None;
        }
        let listed = shared.unresolved().calls().next().is_some();
        Some(Carried { at_work: !self.ledger.is_empty(), listed })
    }

    /// About what a new segment takes with its first batch, and what is to be reserved behind that: the list as it is, a batch, and
    /// as much again for what that adds to the list.
    fn of_new_segment(&self, shared: &Shared) -> u64 {
        let list = shared.unresolved().clone();
        list.size() + self.ledger.size() + 2 * MOST_AT_ONCE as u64 + room(shared)
    }

    fn may_begin(&self) -> bool {
        self.list_refused.is_none_or(|refused| refused.elapsed() >= RETRY_SEGMENT)
    }

    pub(super) fn is_full(&self, segment: &Segment) -> bool {
        self.is_outgrown || segment.length.saturating_sub(self.list_length) >= self.options.segment_size
    }

    /// Reserves space for so many bytes, and for the outcomes of all that is in flight. At the limit
    /// on file sizes the next batch begins a new segment, but only where that has more room: its list may be longer than all records
    /// for which there is room behind it.
    pub(super) fn reserve(&mut self, shared: &Shared, bytes: u64) {
        let needed = bytes + room(shared);
        let mut reserved = self.segment.as_mut().map_or(Ok(()), |segment| segment.reserve(needed));
        let is_limit = reserved.as_ref().is_err_and(is_too_large);
        self.is_outgrown &= is_limit;
        if is_limit && self.may_begin() {
            let needed = self.of_new_segment(shared);
            self.is_outgrown = segment::has_space_for(&self.directory, needed).is_ok();
            self.list_refused = (!self.is_outgrown).then(Instant::now);
        }
        if self.is_outgrown {
            reserved = Ok(());
        }
        if let Err(error) = &reserved
            && shared.room.is_set()
        {
            let raise = is_limit.then_some(limit::RAISE);
            shared.trouble.begins(None, format!("no space can be reserved: {error}"));
            tracing::error!(%error, raise, "no space can be reserved for the audit trail; nothing new is sent meanwhile");
        }
        shared.room.replace(reserved.is_ok());
    }
}

/// What is to be reserved behind what is written.
pub(super) fn room(shared: &Shared) -> u64 {
    AHEAD + OUTCOME * shared.in_flight()
}

/// It is this file that cannot grow; another one may.
pub(super) fn is_too_large(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::FileTooLarge
}
