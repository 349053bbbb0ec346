//! Storage of the claims: a hash index by key, and a linked queue in the order in which they expire.
//!
//! Built for a small and predictable cost in memory. Entries lie in blocks that never move, so that growth copies none of
//! them; the index takes four bytes for an entry. Memory of removed entries is used again, and never returned to the
//! allocator.

use std::hash::BuildHasher;

use hashbrown::HashTable;

use crate::keyed_hash::KeyedFingerprint;

/// The number of entries of a block.
const BLOCK: usize = 4096;

/// The number that means no entry.
// A number instead of an `Option`, which would double the size of a link.
const NONE: u32 = u32::MAX;

/// The most that the index takes per entry, in bytes: 3 × 5 × 16/7, rounded up.
// A bucket takes five bytes: the number, and a control byte of hashbrown. The number of buckets is doubled when 7/8 of them are
// used, more than half of these by entries and the others by tombstones. Until the entries have moved, old and new buckets exist
// together: three times the old ones, of which 7/16 at least hold entries.
const INDEX_BYTES: usize = 35;

/// The number of an entry: its place in the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EntryNumber(u32);

/// A map of entries by key, some of which are in a queue.
pub(super) struct Slots<T> {
    // Blocks, not one vector: that would copy all entries when it grows, and need three times its memory meanwhile.
    blocks: Vec<Vec<Slot<T>>>,
    index: HashTable<u32>,
    hasher: foldhash::fast::RandomState,
    /// The first of the unused entries, which are linked by `next`; or [`NONE`].
    unused: u32,
    /// The first entry of the queue; [`NONE`] while it is empty.
    first: u32,
    /// The last entry of the queue; [`NONE`] while it is empty.
    last: u32,
}

/// The storage of one entry. `value` is `None` while the slot is unused.
struct Slot<T> {
    key: KeyedFingerprint,
    link: Link,
    value: Option<T>,
}

#[derive(Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
}

impl Link {
    /// The link of an entry outside of the queue: it names itself as the previous one, which no entry of a queue does.
    // So no flag is needed, which would take eight bytes of each entry with its padding.
    const fn outside(number: u32) -> Self {
        Self { previous: number, next: NONE }
    }
}

impl<T> Slots<T> {
    /// An empty map whose index has room for this many entries.
    pub(super) fn with_room(room: usize) -> Self {
        Self {
            blocks: Vec::new(),
            index: HashTable::with_capacity(room),
            hasher: <_>::default(),
            unused: NONE,
            first: NONE,
            last: NONE,
        }
    }

    /// The most memory that this many entries take, in bytes.
    pub(super) const fn max_bytes(count: usize) -> usize {
        let blocks = count.div_ceil(BLOCK);
        blocks * BLOCK * size_of::<Slot<T>>() + count * INDEX_BYTES
    }

    /// The number of entries, in the queue or not.
    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    /// The entry of a key.
    pub(super) fn find(&self, key: &KeyedFingerprint) -> Option<EntryNumber> {
        let is_it = |&number: &u32| self.slot(number).key == *key;
        self.index.find(self.hasher.hash_one(key), is_it).copied().map(EntryNumber)
    }

    /// The value of an entry; `None` if it was removed.
    pub(super) fn get(&self, number: EntryNumber) -> Option<&T> {
        self.slot(number.0).value.as_ref()
    }

    /// The value of an entry, to be changed; `None` if it was removed.
    pub(super) fn get_mut(&mut self, number: EntryNumber) -> Option<&mut T> {
        self.slot_mut(number.0).value.as_mut()
    }

    /// Adds an entry, which is not in the queue. The key must not be in the map; this is not checked.
    pub(super) fn insert(&mut self, key: KeyedFingerprint, value: T) {
        let number = self.take_unused();
        *self.slot_mut(number) = Slot { key, link: Link::outside(number), value: Some(value) };
        let Self { blocks, index, hasher, .. } = self;
        let hash = |&number: &u32| hasher.hash_one(slot(blocks, number).key);
        index.insert_unique(hasher.hash_one(key), number, hash);
    }

    /// A place for an entry: one that was removed, or a new one at the end of the last block.
    fn take_unused(&mut self) -> u32 {
        if self.unused != NONE {
            let number = self.unused;
            self.unused = self.slot(number).link.next;
            return number;
        }
        if self.blocks.last().is_none_or(|block| block.len() == BLOCK) {
            self.blocks.push(Vec::with_capacity(BLOCK));
        }
        #[expect(clippy::cast_possible_truncation, reason = "`max_keys` is at most ten million")]
        let number = ((self.blocks.len() - 1) * BLOCK + self.blocks.last().map_or(0, Vec::len)) as u32;
        if let Some(block) = self.blocks.last_mut() {
            block.push(Slot { key: KeyedFingerprint::default(), link: Link::outside(number), value: None });
        }
        number
    }

    /// Removes an entry from the map and the queue, and returns its value. Its number will be used again.
    pub(super) fn remove(&mut self, number: EntryNumber) -> Option<T> {
        self.unlink(number);
        let EntryNumber(number) = number;
        let hash = self.hasher.hash_one(self.slot(number).key);
        if let Ok(entry) = self.index.find_entry(hash, |&other| other == number) {
            entry.remove();
        }
        let unused = std::mem::replace(&mut self.unused, number);
        let slot = self.slot_mut(number);
        slot.link.next = unused;
        slot.value.take()
    }

    /// The first entry of the queue.
    pub(super) fn front(&self) -> Option<EntryNumber> {
        (self.first != NONE).then_some(EntryNumber(self.first))
    }

    /// Whether an entry is in the queue.
    pub(super) fn is_queued(&self, number: EntryNumber) -> bool {
        self.slot(number.0).link.previous != number.0
    }

    /// Moves an entry to the end of the queue, whether it was in it or not.
    pub(super) fn queue(&mut self, number: EntryNumber) {
        self.unlink(number);
        let EntryNumber(number) = number;
        let last = std::mem::replace(&mut self.last, number);
        self.slot_mut(number).link = Link { previous: last, next: NONE };
        if last == NONE {
            self.first = number;
        } else {
            self.slot_mut(last).link.next = number;
        }
    }

    /// Sorts the queue by `key`, a function of the values. Entries with equal results keep their order.
    pub(super) fn sort_queue_by_key<K: Ord>(&mut self, key: impl Fn(&T) -> K) {
        let mut queue: Vec<_> = self.queued().collect();
        let key = |slots: &Self, number: u32| slots.slot(number).value.as_ref().map(&key);
        // Nearly every trail is in order. Then a million links need not be written anew.
        if !queue.is_sorted_by_key(|number| key(self, *number)) {
            queue.sort_by_cached_key(|number| key(self, *number));
            queue.into_iter().for_each(|number| self.queue(EntryNumber(number)));
        }
    }

    /// The numbers of the entries in the queue, in its order.
    fn queued(&self) -> impl Iterator<Item = u32> {
        let first = (self.first != NONE).then_some(self.first);
        std::iter::successors(first, |number| Some(self.slot(*number).link.next).filter(|next| *next != NONE))
    }

    /// Removes an entry from the queue, not from the map. Does nothing if it is not in the queue.
    pub(super) fn unlink(&mut self, number: EntryNumber) {
        if !self.is_queued(number) {
            return;
        }
        let EntryNumber(number) = number;
        let Link { previous, next } =
            std::mem::replace(&mut self.slot_mut(number).link, Link::outside(number));
        match previous {
            NONE => self.first = next,
            previous => self.slot_mut(previous).link.next = next,
        }
        match next {
            NONE => self.last = previous,
            next => self.slot_mut(next).link.previous = previous,
        }
    }

    fn slot(&self, number: u32) -> &Slot<T> {
        slot(&self.blocks, number)
    }

    fn slot_mut(&mut self, number: u32) -> &mut Slot<T> {
        &mut self.blocks[number as usize / BLOCK][number as usize % BLOCK]
    }

    /// The memory that is allocated, in bytes.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.index.allocation_size() + self.blocks.len() * BLOCK * size_of::<Slot<T>>()
    }
}

// Not a method: `insert` needs it while `index` is borrowed.
fn slot<T>(blocks: &[Vec<Slot<T>>], number: u32) -> &Slot<T> {
    &blocks[number as usize / BLOCK][number as usize % BLOCK]
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, VecDeque};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The oracle is a map and a list.
        #[test]
        fn entries_are_found_by_key_and_queued_in_order(steps in prop::collection::vec((0_u8..4, 0_u8..6), 0..300)) {
            let mut slots = Slots::with_room(0);
            let (mut all, mut queue) = (HashMap::new(), VecDeque::new());
            for (value, (step, key)) in steps.into_iter().enumerate() {
                let number = slots.find(&[key; 16]);
                prop_assert_eq!(number.and_then(|number| slots.get(number)), all.get(&key));
                match (step, number) {
                    (0, None) => {
                        slots.insert([key; 16], value);
                        all.insert(key, value);
                    }
                    (0, Some(number)) => {
                        queue.retain(|other| *other != key);
                        prop_assert_eq!(slots.remove(number), all.remove(&key));
                    }
                    (1, Some(number)) => {
                        queue.retain(|other| *other != key);
                        queue.push_back(key);
                        slots.queue(number);
                    }
                    (3, Some(_)) if key == 5 => {
                        queue.make_contiguous().sort_by_key(|key| all[key] % 3);
                        slots.sort_queue_by_key(|value| value % 3);
                    }
                    (2, Some(number)) => {
                        queue.retain(|other| *other != key);
                        slots.unlink(number);
                    }
                    (_, Some(number)) => prop_assert_eq!(slots.is_queued(number), queue.contains(&key)),
                    (_, None) => {}
                }
                prop_assert_eq!(slots.len(), all.len());
                prop_assert_eq!(slots.front().and_then(|front| slots.get(front)), queue.front().map(|key| &all[key]));
            }
            for key in queue {
                let front = slots.front().unwrap();
                prop_assert_eq!(slots.remove(front), all.remove(&key));
            }
            prop_assert_eq!(slots.front(), None);
            prop_assert!(slots.blocks.iter().flatten().count() <= 6, "places are used again");
        }
    }
}
