//! Exponential back-off after a refused credential.

use std::time::Duration;

/// The pause after a refusal that follows `count` others: 30 s, doubled each time up to 5 min.
// Long, since each further try could lock the account.
pub(crate) fn after_refusals(count: u32) -> Duration {
    Duration::from_secs((30_u64 << count.min(4)).min(300))
}
