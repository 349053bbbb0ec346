//! How long a credential that was refused is left alone.

use std::time::Duration;

/// The pause behind a refusal that follows `count` others: 30 s, doubling to 5 min. Each further try could lock the account.
pub(crate) fn after_refusals(count: u32) -> Duration {
    Duration::from_secs((30_u64 << count.min(4)).min(300))
}
