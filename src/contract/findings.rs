//! What becomes of the violations that a walk finds.
//!
//! The first walk ends at the first violation. The second one, over a body that is refused, lists them with their places.

use super::{Violation, Violations};
use crate::json::Halt;

/// How many violations are listed. All are counted.
const MAX_LISTED: usize = 100;

/// The member at fault, if it is not the present place, and the detail.
pub(super) type Told = (Option<String>, String);

/// What a walk does with violations.
pub(super) trait Findings<'a> {
    /// The walk enters a member of the contract, or an item.
    fn enter(&mut self, _: Step<'a>) {}

    /// The walk leaves it.
    fn leave(&mut self) {}

    /// Takes a violation; an error ends the walk. `told` is called only if the detail is needed.
    fn note(&mut self, code: &'static str, told: impl FnOnce() -> Told) -> Result<(), Halt>;
}

/// Ends the walk at the first violation.
pub(super) struct Verdict;

/// Goes on, and lists the violations with their places.
#[derive(Default)]
pub(super) struct Gathered<'a> {
    /// From the root to the present place. Has names of the contract and indices only: below an unknown key nothing is checked.
    path: Vec<Step<'a>>,
    pub(super) violations: Violations,
}

#[derive(Clone, Copy)]
pub(super) enum Step<'a> {
    Key(&'a str),
    Index(usize),
}

impl<'a> Findings<'a> for Verdict {
    fn note(&mut self, _: &'static str, _: impl FnOnce() -> Told) -> Result<(), Halt> {
        Err(Halt)
    }
}

impl<'a> Findings<'a> for Gathered<'a> {
    fn enter(&mut self, step: Step<'a>) {
        self.path.push(step);
    }

    fn leave(&mut self) {
        self.path.pop();
    }

    fn note(&mut self, code: &'static str, told: impl FnOnce() -> Told) -> Result<(), Halt> {
        self.violations.total += 1;
        if self.violations.list.len() < MAX_LISTED {
            let (member, detail) = told();
            let pointer = self.pointer(member.as_deref());
            self.violations.list.push(Violation { pointer, code, detail });
        }
        Ok(())
    }
}

impl Gathered<'_> {
    fn pointer(&self, member: Option<&str>) -> String {
        let steps = self.path.iter().map(|step| match step {
            Step::Key(key) => format!("/{}", escape(key)),
            Step::Index(index) => format!("/{index}"),
        });
        steps.chain(member.map(|member| format!("/{}", escape(member)))).collect()
    }
}

/// A key as a step of a JSON Pointer (RFC 6901 §3).
pub(super) fn escape(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}

/// An unknown key as a violation names it: cut at 64 bytes, control characters escaped.
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
    fn a_shown_key_is_cut_and_holds_no_control_character() {
        assert_eq!(shown("a\0\n\u{85}b".as_bytes()), r"a\u{0}\n\u{85}b");
        assert_eq!(shown("é".repeat(40).as_bytes()).len(), 64);
        assert_eq!(shown(("x".to_owned() + &"é".repeat(40)).as_bytes()).len(), 63);
    }
}
