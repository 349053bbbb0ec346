//! Collects the violations that a walk finds: [`FailFast`] ends the walk at the first one, [`Gathered`] lists them all.
//!
//! Both are the same walk with another type parameter, so that the two cannot disagree on a rule. Nothing that is listed quotes a
//! value of the body.

use super::{Violation, Violations};
use crate::json::Abort;

/// How many violations are listed; all are counted.
// A body of many megabytes may break a rule in each item. Without this bound the problem document would be larger than the body.
const MAX_LISTED: usize = 100;

/// The place and the text of a violation. The first part is the name of a member of the current value if the violation
/// concerns that member, such as a missing one; `None` if it concerns the value itself. The second part is the detail.
pub(super) type FindingDetail = (Option<String>, String);

/// Receives the violations of a walk.
pub(super) trait Findings<'a> {
    /// Called before the walk checks a member that the contract names, or an item.
    fn enter(&mut self, _: PathStep<'a>) {}

    /// Called after the walk has checked that member or item.
    fn leave(&mut self) {}

    /// Receives one violation. `code` is that of [`Violation::code`]. `detail` returns the place and text of the
    /// violation, and is called only if they are used. An error ends the walk.
    // A closure, since the detail is text to format, and the first walk throws it away.
    fn note(&mut self, code: &'static str, detail: impl FnOnce() -> FindingDetail) -> Result<(), Abort>;
}

/// Ends the walk at the first violation.
// Of no size, with empty methods: the walk over an accepted body stores no path.
pub(super) struct FailFast;

/// Lists the violations with their places; the walk goes on to the end of the body.
#[derive(Default)]
pub(super) struct Gathered<'a> {
    /// The steps from the root to the current place.
    // Names of the contract and indices only: below an unknown key nothing is checked, so no caller can make the path long.
    path: Vec<PathStep<'a>>,
    pub(super) violations: Violations,
}

/// One step of a path into a body: a key of the contract, or the index of an item from 0.
#[derive(Clone, Copy)]
pub(super) enum PathStep<'a> {
    Key(&'a str),
    Index(usize),
}

impl<'a> Findings<'a> for FailFast {
    fn note(&mut self, _: &'static str, _: impl FnOnce() -> FindingDetail) -> Result<(), Abort> {
        Err(Abort)
    }
}

impl<'a> Findings<'a> for Gathered<'a> {
    fn enter(&mut self, step: PathStep<'a>) {
        self.path.push(step);
    }

    fn leave(&mut self) {
        self.path.pop();
    }

    fn note(&mut self, code: &'static str, detail: impl FnOnce() -> FindingDetail) -> Result<(), Abort> {
        // Counted beyond the bound, too, so that the caller learns that there are more violations than it sees.
        self.violations.total += 1;
        if self.violations.list.len() < MAX_LISTED {
            let (member, detail) = detail();
            let pointer = self.pointer(member.as_deref());
            self.violations.list.push(Violation { pointer, code, detail });
        }
        Ok(())
    }
}

impl Gathered<'_> {
    fn pointer(&self, member: Option<&str>) -> String {
        let steps = self.path.iter().map(|step| match step {
            PathStep::Key(key) => format!("/{}", escape(key)),
            PathStep::Index(index) => format!("/{index}"),
        });
        steps.chain(member.map(|member| format!("/{}", escape(member)))).collect()
    }
}

/// Returns a key as a step of a JSON Pointer (RFC 6901 §3).
pub(super) fn escape(key: &str) -> String {
    // `~` first: the other order would escape the `~` of `~1` again.
    key.replace('~', "~0").replace('/', "~1")
}

/// Returns an unknown key as a violation names it: cut at 64 bytes, control characters escaped.
// The key is the caller's text, and `contract check` prints violations to a terminal, where a raw escape sequence would act.
pub(super) fn shown(key: &[u8]) -> String {
    let key = String::from_utf8_lossy(key);
    let mut shown = String::new();
    for char in key[..key.floor_char_boundary(64)].chars() {
        if char.is_control() { shown.extend(char.escape_default()) } else { shown.push(char) }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reported_key_is_truncated_with_control_characters_escaped() {
        assert_eq!(shown("a\0\n\u{85}b".as_bytes()), r"a\u{0}\n\u{85}b");
        // Both sides of the bound: 64 is the end of a character here, and the middle of one below.
        assert_eq!(shown("é".repeat(40).as_bytes()).len(), 64);
        assert_eq!(shown(("x".to_owned() + &"é".repeat(40)).as_bytes()).len(), 63);
    }
}
