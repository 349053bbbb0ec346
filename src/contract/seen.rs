//! Which values have been seen. A few are compared one by one, without an allocation; many go into a set whose
//! hash is seeded per process and set, so that a hostile list costs no square.

use std::collections::HashSet;
use std::hash::Hash;

use foldhash::fast::RandomState;
use smallvec::SmallVec;

/// Up to so many are compared one by one.
const FEW: usize = 8;

pub(super) struct Seen<T> {
    few: SmallVec<[T; FEW]>,
    many: Option<HashSet<T, RandomState>>,
}

impl<T: Eq + Hash> Seen<T> {
    pub(super) fn new() -> Self {
        Self { few: SmallVec::new(), many: None }
    }

    /// False if it was there already.
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
    fn a_value_is_new_once_among_few_and_among_many() {
        let mut seen = Seen::new();
        for value in 0..100 {
            assert!(seen.insert(value), "{value}");
            for old in 0..=value {
                assert!(!seen.insert(old), "{old} after {value}");
            }
        }
    }
}
