//! A budget of bytes for unfinished heads and bodies, and for what callers send after a request that is in flight.
//!
//! It is one budget for all connections: peers that send half of something and wait cannot exhaust the gateway's
//! memory. What rustls reads ahead of hyper is not counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many bytes of each head or body are not counted, so that small calls pass while others have used up the
/// budget. Their sum is bounded by the bounds on connections and requests.
pub(crate) const FREE: usize = 4 * 1024;

/// The number of bytes that are left for all.
#[derive(Debug)]
pub(crate) struct Budget(AtomicUsize);

/// What one unfinished head or body holds of the budget. Returned on drop.
#[derive(Debug)]
pub(crate) struct Part {
    budget: Arc<Budget>,
    /// Held at present. Only the task of its connection changes it, so load and store need not be one step.
    bytes: AtomicUsize,
}

impl Budget {
    /// A budget of `bytes` bytes.
    pub(super) fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self(AtomicUsize::new(bytes)))
    }

    /// Starts to count a head or a body. It holds nothing yet.
    pub(crate) fn part(self: &Arc<Self>) -> Part {
        Part { budget: self.clone(), bytes: AtomicUsize::new(0) }
    }
}

impl Part {
    /// Takes room for `more` bytes that came. Returns whether there is any; if not, nothing changes.
    pub(crate) fn grow(&self, more: usize) -> bool {
        let before = self.bytes.load(Ordering::Relaxed);
        let counted = beyond(before + more) - beyond(before);
        let take = |left: usize| left.checked_sub(counted);
        let has_room =
            // Most heads and bodies stay below `FREE`, and cost no access to what all workers share.
            counted == 0 || self.budget.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok();
        if has_room {
            self.bytes.store(before + more, Ordering::Relaxed);
        }
        has_room
    }

    /// Returns all bytes: the head or the body is whole.
    pub(crate) fn finish(&self) {
        self.release_down_to(0);
    }

    /// The number of bytes that it holds, those below [`FREE`] included.
    pub(crate) fn held(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Makes it hold `bytes` bytes. Returns whether there is room; if not, it holds what it held before.
    pub(crate) fn hold(&self, bytes: usize) -> bool {
        match bytes.checked_sub(self.held()) {
            Some(more) => self.grow(more),
            None => {
                self.release_down_to(bytes);
                true
            }
        }
    }

    fn release_down_to(&self, bytes: usize) {
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

/// How many of `bytes` bytes are counted.
fn beyond(bytes: usize) -> usize {
    bytes.saturating_sub(FREE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finished_parts_return_their_bytes_to_the_shared_budget() {
        let budget = Budget::new(10_000);
        let (first, second) = (budget.part(), budget.part());
        assert!(first.grow(FREE) && first.grow(6_000), "6,000 are counted");
        assert!(!second.grow(FREE + 4_001));
        // 4,000 are left of 10,000. If the refused attempt above had taken any, this would fail.
        assert!(second.grow(FREE + 4_000), "what found no room is not held");
        assert!(!second.grow(1) && !first.grow(1));
        assert!(budget.part().grow(FREE), "small ones pass");
        first.finish();
        assert!(second.grow(6_000) && !second.grow(1));
        assert!(second.hold(FREE + 4_000) && first.hold(FREE + 6_000), "what is less is given back, too");
        assert!(!first.hold(FREE + 6_001) && first.held() == FREE + 6_000);
        drop((first, second));
        // A byte lost or returned twice would show here.
        assert_eq!(budget.0.load(Ordering::Relaxed), 10_000);
    }
}
