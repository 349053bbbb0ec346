//! The user and group ids that the kernel can show to this process.
//!
//! In a user namespace (containers, `PrivateUsers=`, `unshare --user`) ids are mapped. All ids without a
//! mapping look alike: the kernel shows the overflow id instead, 65534 unless the system sets another
//! (user_namespaces(7)). A caller with that id may be anybody, so it identifies nobody.

use std::fs;
use std::ops::Range;
use std::sync::LazyLock;

/// Ids of users, or of groups.
#[derive(Debug)]
pub(crate) struct Ids {
    /// The ids with a mapping; `None` if every id is mapped to itself.
    mapped: Option<Vec<Range<u64>>>,
    /// The id that stands for all others.
    overflow: u32,
}

/// The number of ids. The last number of 32 bits is not an id: system calls take it as "no change".
const ALL: u64 = 4_294_967_295;

/// The overflow id of a system that sets no other.
const OVERFLOW: u32 = 65534;

/// The user ids of this process's namespace, read once.
pub(crate) fn users() -> &'static Ids {
    static USERS: LazyLock<Ids> = LazyLock::new(|| Ids::read("uid_map", "overflowuid"));
    &USERS
}

/// The group ids of this process's namespace, read once.
pub(crate) fn groups() -> &'static Ids {
    static GROUPS: LazyLock<Ids> = LazyLock::new(|| Ids::read("gid_map", "overflowgid"));
    &GROUPS
}

impl Ids {
    fn read(map: &str, overflow: &str) -> Self {
        let overflow = fs::read_to_string(format!("/proc/sys/kernel/{overflow}")).ok();
        let overflow = overflow.and_then(|text| text.trim().parse().ok()).unwrap_or(OVERFLOW);
        Self::parse(fs::read_to_string(format!("/proc/self/{map}")).ok().as_deref(), overflow)
    }

    /// Parses a map of ids as in `/proc/self/uid_map`. Without a map, all ids but the overflow id count as
    /// mapped.
    fn parse(map: Option<&str>, overflow: u32) -> Self {
        let lines: Vec<[u64; 3]> = map
            // A map that is not the identity, so that the overflow id stays nobody's.
            .unwrap_or("0 1 4294967295")
            .lines()
            .filter_map(|line| {
                let mut numbers = line.split_whitespace().map_while(|number| number.parse().ok());
                Some([numbers.next()?, numbers.next()?, numbers.next()?])
            })
            .collect();
        // The identity may be given in several lines. Since the kernel rejects ranges that overlap, the sum of
        // their lengths tells whether every id is covered.
        let is_identity = lines.iter().all(|[inside, outside, _]| inside == outside)
            && lines.iter().map(|[.., count]| count).sum::<u64>() == ALL;
        let mapped =
            lines.into_iter().map(|[inside, _, count]| inside..inside.saturating_add(count)).collect();
        Self { mapped: (!is_identity).then_some(mapped), overflow }
    }

    /// Whether an id that the kernel shows may be any of several ids. It must match no caller then.
    pub(crate) fn is_nobody(&self, id: u32) -> bool {
        self.mapped.is_some() && id == self.overflow
    }

    /// Fails with a text for operators if the kernel cannot show this id to this process.
    // At the start rather than at the first call: such an id in the configuration would never match, or match
    // everybody.
    pub(crate) fn check(&self, id: u32) -> Result<(), String> {
        if u64::from(id) >= ALL {
            return Err(format!("{id} is not a valid id: ids end at {}", ALL - 1));
        }
        if self.is_nobody(id) {
            return Err(format!(
                "in this user namespace {id} is shown for every id that is not mapped, so it identifies no user or group; \
                 use an id that is mapped"
            ));
        }
        let shows = |mapped: &Vec<Range<u64>>| mapped.iter().any(|ids| ids.contains(&u64::from(id)));
        if self.mapped.as_ref().is_none_or(shows) {
            return Ok(());
        }
        Err(format!(
            "{id} is not mapped in this user namespace (/proc/self/uid_map, gid_map), so that the kernel cannot show it; run the gateway \
             without PrivateUsers= or a namespace of its own, or map the id"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mapped_ids_are_valid_and_the_overflow_id_names_no_user() {
        let identity = Ids::parse(Some("         0          0 4294967295\n"), 65534);
        for id in [0, 1000, 65534] {
            assert!(identity.check(id).is_ok() && !identity.is_nobody(id), "{id}");
        }
        assert!(identity.check(u32::MAX).is_err());
        let in_lines = Ids::parse(Some("0 0 65536\n65536 65536 4294901759\n"), 65534);
        assert!(in_lines.check(65534).is_ok() && !in_lines.is_nobody(65534));
        let two = Ids::parse(Some("0 100000 1\n1000 1000 1\n"), 65534);
        assert!(two.check(0).is_ok() && two.check(1000).is_ok() && !two.is_nobody(1000));
        assert!(two.check(1).is_err() && two.check(65534).is_err() && two.is_nobody(65534));
        let container = Ids::parse(Some("0 100000 65536\n"), 65534);
        assert!(container.check(4242).is_ok() && container.check(70000).is_err());
        assert!(container.check(65534).is_err(), "mapped, and not to be told from what is not");
        let other = Ids::parse(Some("0 100000 65536\n"), 7);
        assert!(other.check(65534).is_ok() && other.is_nobody(7));
        for unknown in [Ids::parse(None, 65534), Ids::parse(Some(""), 65534)] {
            assert!(unknown.is_nobody(65534));
        }
        assert!(Ids::parse(Some(""), 65534).check(0).is_err(), "nothing is mapped yet");
        assert!(Ids::parse(None, 65534).check(1000).is_ok(), "without /proc");
    }
}
