//! Lines on their way to the writer: whole, but for what links them.

use serde_json::Value;

use super::{Kind, chain::OPEN_LINKS, line::Second, record::Entry};

/// Lines in the order of their numbers.
#[derive(Default)]
pub(super) struct Batch {
    /// The last number that was given away, here or in the batch before.
    seq: u64,
    text: Vec<u8>,
    /// Where each line ends.
    ends: Vec<usize>,
    /// How many there are, by kind.
    pub(super) kinds: [u64; Kind::ALL.len()],
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
        // What a panic left of a line counts for nothing.
        self.text.truncate(self.size());
        entry.format(self.seq + 1, &mut self.second, &mut self.text);
        self.text.extend_from_slice(OPEN_LINKS);
        self.seq += 1;
        self.ends.push(self.text.len());
        self.kinds[entry.kind() as usize] += 1;
        self.seq
    }

    /// Writes an event of the trail itself; `details` is an object.
    pub(super) fn event(&mut self, name: &'static str, details: Value) {
        if let Value::Object(details) = details {
            self.push(&Entry::Event { name, details: &details });
        }
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
        other.kinds = Default::default();
        std::mem::swap(&mut self.second, &mut other.second);
        std::mem::swap(self, other);
    }

    /// Gives memory back beyond so many bytes of text.
    pub(super) fn shrink_to(&mut self, bytes: usize) {
        self.text.clear();
        self.text.shrink_to(bytes);
    }
}
