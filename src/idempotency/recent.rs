//! Calls without a key that succeeded, in the order in which they were told, each found by its mark.
//!
//! Every call adds one and, once there are many, removes one. They lie in a row that is written at one end and read at
//! the other; what is hit at random is four bytes a call, so that it stays in the processor's cache. A map that holds the
//! marks themselves took 84 MB instead of 51 for a million calls, and a fifth to a third longer for each.

use std::collections::VecDeque;
use std::hash::BuildHasher;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use uuid::Uuid;

use crate::keyed_hash::Mark;

/// Times are in seconds since 1970.
#[derive(Default)]
pub(super) struct Recent {
    row: VecDeque<Call>,
    /// The number of the first in the row. Numbers wrap around.
    first: u32,
    /// The number of the youngest call of each mark.
    youngest: HashTable<u32>,
    hasher: foldhash::fast::RandomState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) mark: Mark,
    pub(super) id: Uuid,
    pub(super) since: u32,
    /// The caller, hashed.
    pub(super) caller: u32,
}

/// The most that the index takes per call, in bytes: see [`super::slots`].
const INDEX_BYTES: usize = 35;

impl Recent {
    /// The most memory that so many calls take, in bytes. While the row grows, the old one exists beside one of twice its size.
    pub(super) const fn max_bytes(count: usize) -> usize {
        count * (3 * size_of::<Call>() + INDEX_BYTES)
    }

    pub(super) fn len(&self) -> usize {
        self.row.len()
    }

    pub(super) fn oldest(&self) -> Option<&Call> {
        self.row.front()
    }

    /// The youngest call of a mark; none once that was forgotten.
    pub(super) fn get(&self, mark: &Mark) -> Option<&Call> {
        let Self { row, first, youngest, hasher } = self;
        let number = youngest.find(hasher.hash_one(mark), |&number| at(row, *first, number).mark == *mark)?;
        Some(at(row, *first, *number))
    }

    /// Puts a call in. One that is older than another of its mark tells nothing, nor does the same one again; the trail,
    /// which may be read more than once, has such. Returns whether it was put in.
    pub(super) fn push(&mut self, call: Call) -> bool {
        let Call { mark, id, since, .. } = call;
        let Self { row, first, youngest, hasher } = self;
        #[expect(clippy::cast_possible_truncation, reason = "so many do not fit into memory")]
        let number = first.wrapping_add(row.len() as u32);
        row.push_back(call);
        let is_same = |&number: &u32| at(row, *first, number).mark == mark;
        let is_newer = |known: &Call| known.since > since || known.id == id;
        let hash = |&number: &u32| hasher.hash_one(at(row, *first, number).mark);
        match youngest.entry(hasher.hash_one(mark), is_same, hash) {
            Entry::Occupied(place) if is_newer(at(row, *first, *place.get())) => {
                row.pop_back();
                return false;
            }
            Entry::Occupied(mut place) => *place.get_mut() = number,
            Entry::Vacant(place) => {
                place.insert(number);
            }
        }
        true
    }

    pub(super) fn forget_oldest(&mut self) -> Option<Call> {
        let oldest = self.row.pop_front()?;
        let number = self.first;
        self.first = number.wrapping_add(1);
        // A younger call of the mark has its place.
        if let Ok(place) =
            self.youngest.find_entry(self.hasher.hash_one(oldest.mark), |&other| other == number)
        {
            place.remove();
        }
        Some(oldest)
    }
}

fn at(row: &VecDeque<Call>, first: u32, number: u32) -> &Call {
    &row[number.wrapping_sub(first) as usize]
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn calls_take_no_more_memory_than_is_said() {
        let mut recent = Recent::default();
        for number in 0..40_000_u32 {
            let mark = (u128::from(number) << 32).to_be_bytes();
            assert!(recent.push(Call { mark, id: Uuid::from_u128(number.into()), since: 0, caller: 1 }));
            // A row that grows has just been copied from one of half its size.
            let row = recent.row.capacity() * size_of::<Call>() / 2 * 3;
            let index = recent.youngest.allocation_size() / 2 * 3;
            let said = Recent::max_bytes(recent.len());
            assert!(
                recent.len() < 64 || row + index <= said,
                "{}: {row} and {index} of {said}",
                recent.len()
            );
        }
    }

    proptest! {
        /// Beside a list and a map; numbers begin shortly before they wrap.
        #[test]
        fn each_mark_has_its_youngest_call(
            steps in prop::collection::vec(prop::option::of((0_u8..8, 0_u32..4)), 0..200),
        ) {
            let mut recent = Recent { first: u32::MAX - 50, ..Recent::default() };
            let (mut all, mut youngest) = (VecDeque::new(), HashMap::new());
            for (count, step) in (0..).zip(steps) {
                if let Some((number, since)) = step {
                    let call = Call { mark: [number; 16], id: Uuid::from_u128(count), since, caller: 1 };
                    let is_newer = youngest.get(&call.mark).is_none_or(|known: &Call| known.since <= since);
                    prop_assert_eq!(recent.push(call), is_newer);
                    if is_newer {
                        all.push_back(call);
                        youngest.insert(call.mark, call);
                    }
                } else {
                    recent.forget_oldest();
                    if let Some(call) = all.pop_front() && youngest.get(&call.mark) == Some(&call) {
                        youngest.remove(&call.mark);
                    }
                }
                prop_assert_eq!((recent.len(), recent.oldest()), (all.len(), all.front()));
                for number in 0..8 {
                    prop_assert_eq!(recent.get(&[number; 16]), youngest.get(&[number; 16]));
                }
            }
        }
    }
}
