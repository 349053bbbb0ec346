//! Lines on their way to the writer: whole, but for what links them.

use std::ops::Range;

use serde_json::{Value, json};
use uuid::Uuid;

use super::chain::OPEN_LINKS;
use super::entry::{Entry, Kind};
use super::line::Second;
use super::unresolved::{LIST, LIST_LEFT_OUT, UnresolvedList};
use crate::model::outcome::Outcome;

/// What a record changes in the list of the unresolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    None,
    Intent(Uuid),
    Outcome {
        id: Uuid,
        outcome: Outcome,
        /// The call repeats another one by force.
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
    /// The last number that was given away, here or in the batch before.
    seq: u64,
    text: Vec<u8>,
    /// Where each line ends.
    ends: Vec<usize>,
    /// What each line changes in the list of the unresolved.
    changes: Vec<Change>,
    /// How many there are, by kind.
    pub(super) kinds: [u64; Kind::ALL.len()],
    /// It may begin a segment.
    pub(super) begins_segment: bool,
    /// The text of the last second.
    second: Second,
}

impl Batch {
    /// An empty one, whose first line will have the number behind this one.
    pub(super) fn behind(seq: u64) -> Self {
        Self { seq, ..Self::default() }
    }

    /// Writes a line; returns its number.
    pub(super) fn push(&mut self, entry: &Entry<'_>) -> u64 {
        self.push_with(entry, |text| entry.members(text))
    }

    /// Writes the line of a record whose members are written already; returns its number.
    pub(super) fn push_written(&mut self, entry: &Entry<'_>, members: &[u8]) -> u64 {
        self.push_with(entry, |text| text.extend_from_slice(members))
    }

    fn push_with(&mut self, entry: &Entry<'_>, members: impl FnOnce(&mut Vec<u8>)) -> u64 {
        // What a panic left of a line counts for nothing.
        self.text.truncate(self.size());
        entry.begin(self.seq + 1, &mut self.second, &mut self.text);
        members(&mut self.text);
        self.text.extend_from_slice(OPEN_LINKS);
        self.seq += 1;
        self.ends.push(self.text.len());
        self.changes.push(entry.change());
        self.kinds[entry.kind() as usize] += 1;
        self.seq
    }

    /// Writes an event of the trail itself; `details` is an object.
    pub(super) fn event(&mut self, name: &'static str, details: Value) {
        if let Value::Object(details) = details {
            self.push(&Entry::Event { name, details: &details });
        }
    }

    /// Keeps the last place for the list of the unresolved, which stands in the first batch of each segment.
    pub(super) fn reserve_list(&mut self) {
        self.event(LIST, json!({}));
    }

    /// Whether it changes the list of the unresolved by more than calls that begin and end.
    pub(super) fn changes_list(&self) -> bool {
        let is_change = |change: &Change| match change {
            Change::Outcome { outcome, is_forced, .. } => *is_forced || *outcome == Outcome::Unknown,
            Change::Event { .. } => true,
            Change::None | Change::Intent(_) => false,
        };
        self.changes.iter().any(is_change)
    }

    /// Whether the last place is kept for the list.
    pub(super) fn has_list(&self) -> bool {
        matches!(self.changes.last(), Some(Change::Event { name: LIST, .. }))
    }

    /// Writes the list into the place that was kept for it; returns its length in bytes.
    pub(super) fn fill_list(&mut self, list: &UnresolvedList, forgotten: &[Uuid]) -> usize {
        self.take_last();
        let before = self.size();
        self.push(&Entry::Unresolved { list, forgotten });
        self.size() - before
    }

    /// Says in the place of the list that it is left out. Its number is given away.
    pub(super) fn leave_list_out(&mut self, details: Value) {
        self.take_last();
        self.event(LIST_LEFT_OUT, details);
        self.begins_segment = false;
    }

    /// Takes the last line off, which is an event.
    fn take_last(&mut self) {
        self.ends.pop();
        self.changes.pop();
        self.kinds[Kind::Event as usize] -= 1;
        self.seq -= 1;
    }

    /// What each line changes, and where it lies in the text, without its newline.
    pub(super) fn changes(&self) -> impl Iterator<Item = (&Change, Range<usize>)> {
        let begins = std::iter::once(&0).chain(&self.ends);
        self.changes
            .iter()
            .zip(begins.zip(&self.ends))
            .map(|(change, (begin, end))| (change, *begin..end - 1))
    }

    /// How many lines there are.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// How long they are together, in bytes.
    pub(super) fn size(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Whether there is none.
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

    /// All lines, one behind the other.
    pub(super) fn text(&self) -> &[u8] {
        &self.text[..self.size()]
    }

    /// Each line, to be linked.
    pub(super) fn lines_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        let (mut rest, mut start) = (&mut self.text[..], 0);
        self.ends.iter().map(move |&end| {
            let (line, behind) = std::mem::take(&mut rest).split_at_mut(end - start);
            (rest, start) = (behind, end);
            line
        })
    }

    /// Moves all lines over; what is left goes on with the next number, in the other's memory.
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

    /// Moves the first lines over, if all are longer than `most` bytes: as many as are not, and one at least. False if there is
    /// nothing to cut. How many of a kind there are is told by what stays, which is written last.
    pub(super) fn cut(&mut self, most: usize, first: &mut Self) -> bool {
        let count = self.ends.partition_point(|end| *end <= most).max(1);
        if self.size() <= most || count == self.len() {
            return false;
        }
        let length = self.ends[count - 1];
        *first = Self { seq: self.first() + count as u64 - 1, ..Self::default() };
        first.text.extend(self.text.drain(..length));
        first.ends.extend(self.ends.drain(..count));
        first.changes.extend(self.changes.drain(..count));
        self.ends.iter_mut().for_each(|end| *end -= length);
        true
    }

    /// Gives memory back beyond so many bytes of text.
    pub(super) fn shrink_to(&mut self, bytes: usize) {
        self.text.clear();
        self.text.shrink_to(bytes);
    }
}
