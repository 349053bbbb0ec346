//! How much memory the keys and the stored replies take, at most.

use std::fs;

use super::claims::Claims;
use super::duplicates::DuplicateDetector;
use crate::config;
use crate::config::WithoutKey;

/// What the rest of the gateway takes, beside keys and replies, in bytes: a rough figure, with some connections.
const REST: u64 = 64 << 20;

/// Where a container sees its own limit (cgroup v2, v1). On a host neither exists, or it is a huge number.
const LIMITS: [&str; 2] = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];

/// Memory that keys and replies may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryBound {
    /// All keys that may be held, in bytes.
    pub keys: u64,
    /// All successes of calls without a key that may be held, in bytes; 0 but under `without_key = "block"`.
    pub successes: u64,
    /// All replies that are stored, in bytes.
    pub replies: u64,
}

impl MemoryBound {
    /// The bound of a configuration.
    pub fn new(settings: &config::Idempotency) -> Self {
        let successes = match settings.without_key {
            WithoutKey::Block => DuplicateDetector::max_bytes(settings.max_keys),
            WithoutKey::Off | WithoutKey::Warn | WithoutKey::Guard | WithoutKey::RequireKey => 0,
        };
        let keys = Claims::max_bytes(settings.max_keys) as u64;
        Self { keys, successes: successes as u64, replies: settings.reply_memory }
    }

    /// A warning, if the container that this process runs in allows less memory than it may come to need.
    pub fn notice(self) -> Option<String> {
        let limit = LIMITS.iter().find_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok());
        self.notice_of(limit?)
    }

    /// The same for a limit in bytes.
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

/// Rounded up.
pub fn mebibytes(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_below_what_may_be_needed_is_told() {
        let bound = MemoryBound { keys: (100 << 20) - 1, successes: 0, replies: 64 << 20 };
        assert_eq!(bound.notice_of(228 << 20), None);
        let notice = bound.notice_of(227 << 20).unwrap();
        assert!(notice.contains("may use 227 MiB") && notice.contains("keys may take 100 MiB"), "{notice}");
    }
}
