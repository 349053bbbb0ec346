//! The scalars that a contract wants in the audit trail.
//!
//! The walk notes where each one stands in the body, and copies nothing. The trail gets them as members of its record.

use std::ops::Range;

use smallvec::SmallVec;

use super::CheckedBody;
use super::schema::AuditIndex;
use crate::json::Cursor;
use crate::keyed_hash::{Mark, hidden};
use crate::model::redaction::Shown;
use crate::plain;

impl CheckedBody {
    /// Appends the members that the contract adds to the audit record, each as JSON with a comma in front.
    ///
    /// A member in the items of an array is a list with one value for each item, so that lists of the same items match by
    /// position. An absent value is `null`. A value is the caller's literal. Characters that may be taken for others are
    /// escaped; control characters cannot occur, since strict JSON has no raw ones. A number beyond a double becomes a string,
    /// since many readers reject a line that has one (RFC 8259, section 6). A member that is hidden is left out, or written as
    /// its `mark`.
    pub fn audit_members(&self, mark: &dyn Fn(&[&[u8]]) -> Mark, out: &mut Vec<u8>) {
        let from = out.len();
        for (index, member) in (0..).map(AuditIndex).zip(&*self.members) {
            if member.shown == Shown::Omit {
                continue;
            }
            out.extend_from_slice(member.opening.as_bytes());
            let (before, most) = (out.len(), if member.is_list { usize::MAX } else { 1 });
            for scalar in self.captured.iter().filter(|scalar| scalar.member == index).take(most) {
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

/// The scalars for the audit trail. Up to nine need no allocation, which is three inspectors with their counts. Room for more
/// would make every request's future larger.
pub(super) type Captured = SmallVec<[AuditScalar; 9]>;

/// Where a scalar for the audit trail is in the body; or that an item of a list has none.
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

/// Whether a literal is a number that is infinite as a double. The shortest has five characters, 1e309.
fn is_beyond_a_double(literal: &[u8]) -> bool {
    let may_be = literal.len() >= 5 && matches!(literal[0], b'-' | b'0'..=b'9');
    may_be && str::from_utf8(literal).is_ok_and(|text| text.parse().is_ok_and(f64::is_infinite))
}

/// The length of a value, which was read once already, by reading it again.
#[cold]
fn length_at(start: usize, body: &[u8]) -> usize {
    let mut cursor = Cursor::new(body.get(start..).unwrap_or_default());
    cursor.skip_value().map_or(0, |()| cursor.position())
}
