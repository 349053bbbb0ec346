//! A set that detects repeated values: keys of one object, or identities of the items of one array.
//!
//! A few values are compared one by one, without an allocation. More of them go into a hash set.

use std::collections::HashSet;
use std::hash::Hash;

use foldhash::fast::RandomState;
use smallvec::SmallVec;

/// The number of values up to which they are compared one by one.
const FEW: usize = 8;

/// The values that were inserted: in `few` if there are at most [`FEW`], otherwise all of them in `many`.
pub(super) struct UniqueSet<T> {
    few: SmallVec<[T; FEW]>,
    // The hash is seeded per process and per set: a body whose keys all collide would take quadratic time, and with a fixed seed
    // a caller could compute one.
    many: Option<HashSet<T, RandomState>>,
}

impl<T: Eq + Hash> UniqueSet<T> {
    pub(super) fn new() -> Self {
        Self { few: SmallVec::new(), many: None }
    }

    /// Inserts a value; returns false if it was there already.
    pub(super) fn insert(&mut self, value: T) -> bool {
        if let Some(many) = &mut self.many {
            return many.insert(value);
        }
        if self.few.contains(&value) {
            return false;
        }
        if self.few.len() < FEW {
            self.few.push(value);
        } else {
            self.many = Some(self.few.drain(..).chain([value]).collect());
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_is_new_exactly_once() {
        let mut seen = UniqueSet::new();
        // After each insertion, so that the move from the list to the set is covered with all values before and behind it.
        for value in 0..100 {
            assert!(seen.insert(value), "{value}");
            for old in 0..=value {
                assert!(!seen.insert(old), "{old} after {value}");
            }
        }
    }
}
