//! The bytes that unfinished heads and bodies, and what is sent behind a request at work, may hold, all connections together: who
//! sends half of something and waits cannot make the gateway run out of memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// So many bytes of a head or a body are not counted, so that small calls pass while others have used up the budget. Their sum is
/// bounded by the bounds on connections and requests.
pub(crate) const FREE: usize = 4 * 1024;

/// What is left for all.
#[derive(Debug)]
pub(crate) struct Budget(AtomicUsize);

/// The part that one unfinished head or body holds; given back on drop.
#[derive(Debug)]
pub(crate) struct Part {
    budget: Arc<Budget>,
    /// Changed by one task only.
    bytes: AtomicUsize,
}

impl Budget {
    pub(super) fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self(AtomicUsize::new(bytes)))
    }

    /// For a head or a body that begins.
    pub(crate) fn part(self: &Arc<Self>) -> Part {
        Part { budget: self.clone(), bytes: AtomicUsize::new(0) }
    }
}

impl Part {
    /// More bytes came. Returns whether there is room for them.
    pub(crate) fn grow(&self, more: usize) -> bool {
        let before = self.bytes.load(Ordering::Relaxed);
        let counted = beyond(before + more) - beyond(before);
        let take = |left: usize| left.checked_sub(counted);
        let has_room =
            counted == 0 || self.budget.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok();
        if has_room {
            self.bytes.store(before + more, Ordering::Relaxed);
        }
        has_room
    }

    /// The head or the body is finished.
    pub(crate) fn finish(&self) {
        self.shrink(0);
    }

    /// How many bytes it holds.
    pub(crate) fn held(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// It holds so many bytes from now on. Returns whether there is room for them; without, it holds what it held.
    pub(crate) fn hold(&self, bytes: usize) -> bool {
        match bytes.checked_sub(self.held()) {
            Some(more) => self.grow(more),
            None => {
                self.shrink(bytes);
                true
            }
        }
    }

    fn shrink(&self, bytes: usize) {
        let counted = beyond(self.held()) - beyond(bytes);
        self.bytes.store(bytes, Ordering::Relaxed);
        if counted > 0 {
            self.budget.0.fetch_add(counted, Ordering::Relaxed);
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.finish();
    }
}

/// How much of so many bytes is counted.
fn beyond(bytes: usize) -> usize {
    bytes.saturating_sub(FREE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budget_is_for_all_and_what_is_finished_is_given_back() {
        let budget = Budget::new(10_000);
        let (first, second) = (budget.part(), budget.part());
        assert!(first.grow(FREE) && first.grow(6_000), "6,000 are counted");
        assert!(!second.grow(FREE + 4_001));
        assert!(second.grow(FREE + 4_000), "what found no room is not held");
        assert!(!second.grow(1) && !first.grow(1));
        assert!(budget.part().grow(FREE), "small ones pass");
        first.finish();
        assert!(second.grow(6_000) && !second.grow(1));
        assert!(second.hold(FREE + 4_000) && first.hold(FREE + 6_000), "what is less is given back, too");
        assert!(!first.hold(FREE + 6_001) && first.held() == FREE + 6_000);
        drop((first, second));
        assert_eq!(budget.0.load(Ordering::Relaxed), 10_000);
    }
}
