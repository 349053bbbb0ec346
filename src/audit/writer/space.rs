//! Space reservation ahead of writes, and the decision when a new segment begins.
//!
//! Space is reserved for the outcomes of all calls in flight, and some more. If it cannot be had, new intents are
//! refused (load shedding), and what was already sent still gets its outcome on a full disk.
//!
//! The limit on the size of files is not a full disk: there the next batch begins a new segment. First the writer
//! checks that a new segment can have the space, and more of it than the list of unresolved calls takes, with which
//! it begins.

use std::io;
use std::time::{Duration, Instant};

use super::{MOST_AT_ONCE, OUTCOME, Segment, Shared, Writer, limit};
use crate::audit::queue::Carried;
use crate::audit::segment;
use crate::audit::segment::AHEAD;

/// How long the writer waits until it tries again to begin a segment.
const RETRY_SEGMENT: Duration = Duration::from_secs(1);

impl Writer {
    /// Decides whether the next batch begins a segment, and returns what it then must carry over. `None` if the open
    /// segment goes on.
    ///
    /// If there is no space for a new segment, or its list would make it longer than a file may be, this is tried
    /// once a second.
    pub(super) fn begins(&mut self, shared: &Shared) -> Option<Carried> {
        let is_full = self.segment.as_ref().is_none_or(|segment| self.is_full(segment));
        if !self.may_begin() || !(is_full || self.lacks_list) {
            return None;
        }
        let limit = limit::of_files();
        // Only under a limit: otherwise the list need not be copied and measured for each segment.
        if !self.is_outgrown && limit < u64::MAX && self.of_new_segment(shared) > limit {
            self.list_refused = Some(Instant::now());
            return None;
        }
        let listed = shared.unresolved().calls().next().is_some();
        Some(Carried { at_work: !self.ledger.is_empty(), listed })
    }

    /// An estimate of the space that a new segment takes with its first batch and what is reserved after it, in
    /// bytes.
    // Twice a part: one for the batch, and one for what that batch adds to the list.
    fn of_new_segment(&self, shared: &Shared) -> u64 {
        let list = shared.unresolved().clone();
        list.size() + self.ledger.size() + 2 * MOST_AT_ONCE as u64 + room(shared)
    }

    /// Whether a new segment may be tried: none was given up within the last second.
    fn may_begin(&self) -> bool {
        self.list_refused.is_none_or(|refused| refused.elapsed() >= RETRY_SEGMENT)
    }

    /// Whether a segment has reached its size, its list not counted, or the limit on file sizes.
    pub(super) fn is_full(&self, segment: &Segment) -> bool {
        self.is_outgrown || segment.length.saturating_sub(self.list_length) >= self.options.segment_size
    }

    /// Reserves space for `bytes` bytes and for the outcomes of all calls in flight, and sets whether new intents are
    /// accepted.
    // At the limit on file sizes the next batch begins a new segment, but only if that has more room: the list in it
    // may be longer than all the records that fit after it. Every few records would then take a segment with the
    // whole list, until the disk is full.
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
        // The open segment is full, but the next batch goes into a new one, for which there is space.
        if self.is_outgrown {
            reserved = Ok(());
        }
        // Logged when it begins only: this is tried ten times a second.
        if let Err(error) = &reserved
            && shared.room.is_set()
        {
            let raise = is_limit.then_some(limit::RAISE);
            shared.trouble.begins(None, format!("no space can be reserved: {error}"));
            tracing::error!(
                %error, raise,
                "no space can be reserved for the audit trail; no new call is sent until there is space"
            );
        }
        shared.room.replace(reserved.is_ok());
    }
}

/// The space that must be reserved after what is written, in bytes.
pub(super) fn room(shared: &Shared) -> u64 {
    AHEAD + OUTCOME * shared.in_flight()
}

/// Whether an error means that this file cannot grow, so that another one may.
pub(super) fn is_too_large(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::FileTooLarge
}
