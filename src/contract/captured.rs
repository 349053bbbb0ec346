//! The scalars that a contract wants in the audit trail.
//!
//! The walk notes where each one stands in the body, and copies nothing. The trail gets them as members of its record.

use std::ops::Range;

use smallvec::SmallVec;

use super::{CheckedBody, schema::AuditIndex};
use crate::{
    json::Cursor,
    keyed_hash::{Mark, hidden},
    model::redaction::Shown,
    plain,
};

impl CheckedBody {
    /// What the contract wants in the audit trail, as JSON members with a comma in front of each. A member that stands in
    /// the items of an array is a list with one value for each item, so that lists of the same items match by
    /// position. What is absent is `null`. The values are the caller's scalars, verbatim but for characters that may be taken
    /// for something else: strict JSON has no raw control character, so that a line stays one. A number beyond a double is a
    /// string, since many readers refuse a line that has one (RFC 8259, section 6). What is to be hidden is left out, or written
    /// as its `mark`.
    pub fn audit_members(&self, mark: &dyn Fn(&[&[u8]]) -> Mark, out: &mut Vec<u8>) {
        let from = out.len();
        for (index, member) in (0..).map(AuditIndex).zip(&*self.members) {
            if member.shown == Shown::Omit {
                continue;
            }
            out.extend_from_slice(member.opening.as_bytes());
            let before = out.len();
            for scalar in self.captured.iter().filter(|scalar| scalar.member == index) {
                if out.len() > before {
                    out.push(b',');
                }
                let literal = scalar.literal(&self.bytes);
                match member.shown {
                    _ if literal.is_empty() => out.extend_from_slice(b"null"),
                    Shown::Clear | Shown::Omit if is_beyond_a_double(literal) => {
                        out.extend_from_slice(&[b"\"", literal, b"\""].concat());
                    }
                    Shown::Clear | Shown::Omit => out.extend_from_slice(literal),
                    Shown::Hmac => {
                        let hidden = hidden(mark(&[b"field", member.name.as_bytes(), literal]));
                        out.extend_from_slice(format!("\"{hidden}\"").as_bytes());
                    }
                }
                if !member.is_list {
                    break;
                }
            }
            if member.is_list {
                out.push(b']');
            } else if out.len() == before {
                out.extend_from_slice(b"null");
            }
        }
        if !self.is_plain {
            plain::escape(out, from);
        }
    }
}

/// The scalars for the audit trail. Three inspectors with their counts need no allocation; room for more would be paid by
/// every request's future.
pub(super) type Captured = SmallVec<[AuditScalar; 9]>;

/// A scalar for the audit trail, or that an item of a list has none.
#[derive(Clone, Copy, Debug)]
pub(super) struct AuditScalar {
    pub(super) member: AuditIndex,
    /// In bytes; 0 if there is no scalar, [`u16::MAX`] if it is longer than fits.
    length: u16,
    start: u32,
}

impl AuditScalar {
    pub(super) fn new(member: AuditIndex, place: Range<usize>) -> Self {
        let length = u16::try_from(place.len()).unwrap_or(u16::MAX);
        Self { member, length, start: place.start as u32 }
    }

    /// The scalar's literal; empty if there is none.
    fn literal(self, body: &[u8]) -> &[u8] {
        let start = self.start as usize;
        let length = if self.length == u16::MAX { length_at(start, body) } else { usize::from(self.length) };
        body.get(start..start + length).unwrap_or_default()
    }
}

/// Whether it is a number whose magnitude no double has. The least has five characters, 1e309.
fn is_beyond_a_double(literal: &[u8]) -> bool {
    let may_be = literal.len() >= 5 && matches!(literal[0], b'-' | b'0'..=b'9');
    may_be && str::from_utf8(literal).is_ok_and(|text| text.parse().is_ok_and(f64::is_infinite))
}

/// How long a value is that was read once already.
#[cold]
fn length_at(start: usize, body: &[u8]) -> usize {
    let mut cursor = Cursor::new(body.get(start..).unwrap_or_default());
    cursor.skip_value().map_or(0, |()| cursor.position())
}
