//! The bound on the memory of deduplication: keys, successes and stored replies. `check` prints it.

use std::fs;

use super::claims::Claims;
use super::duplicates::DuplicateDetector;
use crate::config;
use crate::config::WithoutKey;

/// The memory of the rest of the gateway, in bytes: a rough figure, with some connections.
const REST: u64 = 64 << 20;

/// The files in which a container sees its own limit: of cgroup v2 and of v1.
// On a host neither exists, or the number is huge. `max` in cgroup v2, for no limit, does not parse and so is none.
const LIMITS: [&str; 2] = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];

/// The most memory that deduplication may take, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyMemory {
    /// For all keys that may be held, in bytes.
    pub keys: u64,
    /// For all successes of calls without a key, in bytes. 0 unless `without_key = "block"`: in other modes they are few.
    pub successes: u64,
    /// For all stored replies, in bytes.
    pub replies: u64,
}

impl KeyMemory {
    /// The bound of a configuration.
    pub fn new(settings: &config::Idempotency) -> Self {
        let successes = match settings.without_key {
            WithoutKey::Block => DuplicateDetector::max_bytes(settings.max_keys),
            WithoutKey::Off | WithoutKey::Warn | WithoutKey::Guard | WithoutKey::RequireKey => 0,
        };
        let keys = Claims::max_bytes(settings.max_keys) as u64;
        Self { keys, successes: successes as u64, replies: settings.reply_memory }
    }

    /// A warning for the operator, if the container of this process allows less memory than the gateway may come to need.
    // Without it a table that fills over days ends in a kill by the kernel. Each restart reads the same keys and is killed as
    // well, until the window is over.
    pub fn notice(self) -> Option<String> {
        let limit = LIMITS.iter().find_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok());
        self.notice_of(limit?)
    }

    /// The warning for a limit in bytes, if it is too low.
    fn notice_of(self, limit: u64) -> Option<String> {
        let Self { keys, successes, replies } = self;
        let needed = keys + successes + replies + REST;
        (needed > limit).then(|| {
            format!(
                "this container may use {} MiB of memory; keys may take {} MiB, successes of calls without one {} MiB, stored replies {} MiB and the rest about {} MiB: \
                 raise its limit, or lower idempotency.max_keys or idempotency.reply_memory",
                limit >> 20,
                mebibytes(keys),
                mebibytes(successes),
                mebibytes(replies),
                mebibytes(REST),
            )
        })
    }
}

/// Bytes in MiB, rounded up.
pub fn mebibytes(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_limit_below_the_bound_is_reported() {
        let bound = KeyMemory { keys: (100 << 20) - 1, successes: 0, replies: 64 << 20 };
        assert_eq!(bound.notice_of(228 << 20), None);
        let notice = bound.notice_of(227 << 20).unwrap();
        assert!(notice.contains("may use 227 MiB") && notice.contains("keys may take 100 MiB"), "{notice}");
    }
}
