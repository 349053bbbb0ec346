//! A batch: the lines of a group commit, complete except for the links of the hash chain.
//!
//! Lines get their numbers here, in the order in which they are queued. The writer later fills in the links in
//! place, without copying the lines. Beside each line the batch keeps what that line changes in the list of unresolved
//! calls.

use std::ops::Range;

use serde_json::{Value, json};
use uuid::Uuid;

use super::chain::OPEN_LINKS;
use super::entry::{Entry, RecordKind};
use super::line::Second;
use super::unresolved_calls::{LIST, LIST_LEFT_OUT, UnresolvedList};
use crate::model::outcome::Outcome;

/// What a record changes in the list of unresolved calls.
// Taken from the record's facts when it is queued: the writer would otherwise have to parse each line that it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ListChange {
    None,
    Intent(Uuid),
    Outcome {
        id: Uuid,
        outcome: Outcome,
        /// Whether the call repeats a call of unknown outcome, as its caller demanded by `Idempotency-Force`.
        is_forced: bool,
    },
    Event {
        name: &'static str,
        id: Option<Uuid>,
    },
}

/// Lines in the order of their numbers.
#[derive(Default)]
pub(super) struct Batch {
    /// The number of the last line, in this batch or an earlier one.
    seq: u64,
    text: Vec<u8>,
    /// The offset in the text at which each line ends, after its newline.
    ends: Vec<usize>,
    /// What each line changes in the list of unresolved calls.
    changes: Vec<ListChange>,
    /// The number of lines of each kind, for the metrics.
    pub(super) kinds: [u64; RecordKind::ALL.len()],
    /// Whether the writer may begin a segment with this batch.
    pub(super) begins_segment: bool,
    /// The text of the time of the last line, up to the second. Lines of the same second share it.
    second: Second,
}

impl Batch {
    /// An empty batch whose first line will have the number after `seq`.
    pub(super) fn behind(seq: u64) -> Self {
        Self { seq, ..Self::default() }
    }

    /// Appends a line. Returns its number.
    pub(super) fn push(&mut self, entry: &Entry<'_>) -> u64 {
        self.push_with(entry, |text| entry.members(text))
    }

    /// Appends the line of a record whose members are already JSON text. Returns its number.
    pub(super) fn push_written(&mut self, entry: &Entry<'_>, members: &[u8]) -> u64 {
        self.push_with(entry, |text| text.extend_from_slice(members))
    }

    fn push_with(&mut self, entry: &Entry<'_>, members: impl FnOnce(&mut Vec<u8>)) -> u64 {
        // A panic in the middle of a line leaves its beginning in the text. Only lines that have an end count.
        self.text.truncate(self.size());
        entry.begin(self.seq + 1, &mut self.second, &mut self.text);
        members(&mut self.text);
        self.text.extend_from_slice(OPEN_LINKS);
        // Only after the whole text: a panic in `members` must use up no number.
        self.seq += 1;
        self.ends.push(self.text.len());
        self.changes.push(entry.change());
        self.kinds[entry.kind() as usize] += 1;
        self.seq
    }

    /// Appends an event. `details` must be a JSON object; otherwise nothing is appended.
    pub(super) fn event(&mut self, name: &'static str, details: Value) {
        if let Value::Object(details) = details {
            self.push(&Entry::Event { name, details: &details });
        }
    }

    /// Appends a placeholder for the list of unresolved calls. The list can be written only when all other lines of the
    /// batch are known.
    pub(super) fn reserve_list(&mut self) {
        self.event(LIST, json!({}));
    }

    /// Whether any line is an unknown outcome, a forced repetition or an event. Such a line may add a call that stays on
    /// the list after its outcome, or remove one. Intents do not count: their calls leave the list with the outcome.
    pub(super) fn changes_list(&self) -> bool {
        let is_change = |change: &ListChange| match change {
            ListChange::Outcome { outcome, is_forced, .. } => *is_forced || *outcome == Outcome::Unknown,
            ListChange::Event { .. } => true,
            ListChange::None | ListChange::Intent(_) => false,
        };
        self.changes.iter().any(is_change)
    }

    /// Whether the last line is the list or its placeholder.
    pub(super) fn has_list(&self) -> bool {
        matches!(self.changes.last(), Some(ListChange::Event { name: LIST, .. }))
    }

    /// Replaces the placeholder by the list. Returns the length of its line in bytes. `forgotten` are the calls that were
    /// removed from the list because it was too long.
    pub(super) fn fill_list(&mut self, list: &UnresolvedList, forgotten: &[Uuid]) -> usize {
        self.take_last();
        let before = self.size();
        self.push(&Entry::Unresolved { list, forgotten });
        self.size() - before
    }

    /// Replaces the placeholder by an event that says why there is no list. The batch then begins no segment.
    // The placeholder's number must be used: a gap in the numbers is a fault of the chain.
    pub(super) fn leave_list_out(&mut self, details: Value) {
        self.take_last();
        self.event(LIST_LEFT_OUT, details);
        self.begins_segment = false;
    }

    /// Removes the last line, which must be an event.
    fn take_last(&mut self) {
        self.ends.pop();
        self.changes.pop();
        self.kinds[RecordKind::Event as usize] -= 1;
        self.seq -= 1;
    }

    /// Returns for each line what it changes in the list of unresolved calls, and its range in the text, without the
    /// newline.
    pub(super) fn changes(&self) -> impl Iterator<Item = (&ListChange, Range<usize>)> {
        let begins = std::iter::once(&0).chain(&self.ends);
        self.changes
            .iter()
            .zip(begins.zip(&self.ends))
            .map(|(change, (begin, end))| (change, *begin..end - 1))
    }

    /// The number of lines.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The length of all lines together, in bytes.
    pub(super) fn size(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Whether the batch has no line.
    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The number of the first line.
    pub(super) fn first(&self) -> u64 {
        self.seq + 1 - self.len() as u64
    }

    /// The number of the last line.
    pub(super) fn last(&self) -> u64 {
        self.seq
    }

    /// The text of all lines.
    pub(super) fn text(&self) -> &[u8] {
        &self.text[..self.size()]
    }

    /// Each line with its newline, so that the chain can write its links into it.
    pub(super) fn lines_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        let (mut rest, mut start) = (&mut self.text[..], 0);
        self.ends.iter().map(move |&end| {
            let (line, behind) = std::mem::take(&mut rest).split_at_mut(end - start);
            (rest, start) = (behind, end);
            line
        })
    }

    /// Moves all lines to `other`, whose own lines are dropped. This batch is empty afterwards; its next line has the next
    /// number.
    // The buffers are swapped, so that there is neither a copy nor an allocation while the queue is locked.
    pub(super) fn move_to(&mut self, other: &mut Self) {
        other.seq = self.seq;
        other.text.clear();
        other.ends.clear();
        other.changes.clear();
        other.begins_segment = false;
        other.kinds = Default::default();
        std::mem::swap(&mut self.second, &mut other.second);
        std::mem::swap(self, other);
    }

    /// Moves the first lines to `first`: as many as fit into `most` bytes, and at least one. Returns false, and moves
    /// nothing, if all lines fit or there is only one.
    pub(super) fn cut(&mut self, most: usize, first: &mut Self) -> bool {
        let count = self.ends.partition_point(|end| *end <= most).max(1);
        if self.size() <= most || count == self.len() {
            return false;
        }
        let length = self.ends[count - 1];
        // All of `kinds` stays here, with the part that is written last. The metrics count a batch when it is
        // committed, so each line is counted once.
        *first = Self { seq: self.first() + count as u64 - 1, ..Self::default() };
        first.text.extend(self.text.drain(..length));
        first.ends.extend(self.ends.drain(..count));
        first.changes.extend(self.changes.drain(..count));
        self.ends.iter_mut().for_each(|end| *end -= length);
        true
    }

    /// Clears the text, and frees its memory except for `bytes` bytes.
    pub(super) fn shrink_to(&mut self, bytes: usize) {
        self.text.clear();
        self.text.shrink_to(bytes);
    }
}
