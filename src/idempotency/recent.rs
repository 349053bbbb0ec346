//! A queue of recent successes of calls without a key, with an index that finds the youngest of each call hash.
//!
//! Entries are added at the back and removed at the front. Only the index is read at random places. Each of its entries has four
//! bytes, so that the index stays in the processor's cache.
//!
//! Decides nothing: how long a success counts, and how many may be remembered, is up to [`super::duplicates`].

use std::collections::VecDeque;
use std::hash::BuildHasher;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use uuid::Uuid;

use crate::keyed_hash::KeyedFingerprint;

/// The queue and its index.
#[derive(Default)]
pub(super) struct Recent {
    row: VecDeque<PastCall>,
    /// The number of the call at the front of `row`. Each further call has the next number. Numbers wrap around.
    first: u32,
    /// The number of the youngest call of each call hash.
    // Numbers instead of call hashes: with a million calls known the table took 51 MB and 93 to 97 ns a call, a map from hashes
    // 84 MB and 117 to 129 ns. Numbers count all calls of the process, so that no entry changes when the row loses its front.
    youngest: HashTable<u32>,
    hasher: foldhash::fast::RandomState,
}

/// A success whose caller has the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PastCall {
    pub(super) call_hash: KeyedFingerprint,
    pub(super) id: Uuid,
    /// When it succeeded, in seconds since 1970.
    pub(super) since: u32,
    /// The caller, hashed.
    pub(super) caller: u32,
}

/// The most that the index takes per call, in bytes: more than four, since a hash table has unused buckets and is copied when it
/// grows. The constant of the same name in [`super::slots`] has the computation.
const INDEX_BYTES: usize = 35;

impl Recent {
    /// The most memory that this many calls take, in bytes.
    pub(super) const fn max_bytes(count: usize) -> usize {
        // While the row grows, the old buffer exists beside a new one of twice its size.
        count * (3 * size_of::<PastCall>() + INDEX_BYTES)
    }

    /// The number of calls in the queue. Each call counts, also if a younger one has the same call hash.
    pub(super) fn len(&self) -> usize {
        self.row.len()
    }

    /// The call that [`Self::forget_oldest`] would remove.
    pub(super) fn oldest(&self) -> Option<&PastCall> {
        self.row.front()
    }

    /// The youngest call of a call hash; `None` once that was removed.
    pub(super) fn get(&self, call_hash: &KeyedFingerprint) -> Option<&PastCall> {
        let Self { row, first, youngest, hasher } = self;
        let number = youngest
            .find(hasher.hash_one(call_hash), |&number| at(row, *first, number).call_hash == *call_hash)?;
        Some(at(row, *first, *number))
    }

    /// Adds a call at the back, and returns `true`. Adds nothing, and returns `false`, if the youngest known call of its hash is
    /// younger than this call, or is this call.
    // The rebuild passes such calls. It reads the trail while younger calls are served already, and once more if a reading
    // failed. An older call in the index would shorten the window of the younger one.
    pub(super) fn push(&mut self, call: PastCall) -> bool {
        let PastCall { call_hash, id, since, .. } = call;
        let Self { row, first, youngest, hasher } = self;
        #[expect(clippy::cast_possible_truncation, reason = "so many do not fit into memory")]
        let number = first.wrapping_add(row.len() as u32);
        // Added first, and removed again in the rare case that it must not be added: only the rebuild adds calls out of order.
        row.push_back(call);
        let is_same = |&number: &u32| at(row, *first, number).call_hash == call_hash;
        let is_newer = |known: &PastCall| known.since > since || known.id == id;
        let hash = |&number: &u32| hasher.hash_one(at(row, *first, number).call_hash);
        match youngest.entry(hasher.hash_one(call_hash), is_same, hash) {
            Entry::Occupied(entry) if is_newer(at(row, *first, *entry.get())) => {
                row.pop_back();
                return false;
            }
            Entry::Occupied(mut entry) => *entry.get_mut() = number,
            Entry::Vacant(entry) => {
                entry.insert(number);
            }
        }
        true
    }

    /// Removes the oldest call and returns it.
    pub(super) fn forget_oldest(&mut self) -> Option<PastCall> {
        let oldest = self.row.pop_front()?;
        let number = self.first;
        self.first = number.wrapping_add(1);
        // Found by its number, not by its hash: the index may name a younger call of that hash, which stays.
        if let Ok(entry) =
            self.youngest.find_entry(self.hasher.hash_one(oldest.call_hash), |&other| other == number)
        {
            entry.remove();
        }
        Some(oldest)
    }
}

// Wrapping: after four billion calls numbers begin again at 0, and the distance from the first one is still right.
fn at(row: &VecDeque<PastCall>, first: u32, number: u32) -> &PastCall {
    &row[number.wrapping_sub(first) as usize]
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn recent_calls_stay_within_the_stated_memory_bound() {
        let mut recent = Recent::default();
        for number in 0..40_000_u32 {
            let call_hash = (u128::from(number) << 32).to_be_bytes();
            assert!(recent.push(PastCall {
                call_hash,
                id: Uuid::from_u128(number.into()),
                since: 0,
                caller: 1
            }));
            // A capacity is what stays. While it grew, the old buffer of half its size existed beside it.
            let row = recent.row.capacity() * size_of::<PastCall>() / 2 * 3;
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
        // The oracle is a list and a map. Numbers begin 50 before they wrap, since no test adds four billion calls.
        #[test]
        fn each_fingerprint_maps_to_its_newest_call(
            steps in prop::collection::vec(prop::option::of((0_u8..8, 0_u32..4)), 0..200),
        ) {
            let mut recent = Recent { first: u32::MAX - 50, ..Recent::default() };
            let (mut all, mut youngest) = (VecDeque::new(), HashMap::new());
            for (count, step) in (0..).zip(steps) {
                if let Some((number, since)) = step {
                    let call = PastCall { call_hash: [number; 16], id: Uuid::from_u128(count), since, caller: 1 };
                    let is_newer = youngest.get(&call.call_hash).is_none_or(|known: &PastCall| known.since <= since);
                    prop_assert_eq!(recent.push(call), is_newer);
                    if is_newer {
                        all.push_back(call);
                        youngest.insert(call.call_hash, call);
                    }
                } else {
                    recent.forget_oldest();
                    if let Some(call) = all.pop_front() && youngest.get(&call.call_hash) == Some(&call) {
                        youngest.remove(&call.call_hash);
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
