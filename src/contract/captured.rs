//! Captures the scalars that a contract adds to the audit record (`x-audit`).
//!
//! The walk notes the position of each scalar in the body and copies nothing. [`CheckedBody::audit_members`] writes them as
//! members of the record.

use std::ops::Range;

use smallvec::SmallVec;

use super::CheckedBody;
use super::schema::AuditIndex;
use crate::json::Cursor;
use crate::keyed_hash::{KeyedFingerprint, hidden};
use crate::model::redaction::Redaction;
use crate::plain;

impl CheckedBody {
    /// Appends the members that the contract adds to the audit record, each as JSON with a comma in front.
    ///
    /// A member in the items of an array is a list with one value for each item, so that lists of the same items match by
    /// position. An absent value is `null`. A value is the literal as the caller wrote it, with two exceptions: characters that a
    /// reader may take for others are escaped, and a number that does not fit a double becomes a string (RFC 8259 §6). A member
    /// that the configuration hides is left out, or written as the keyed hash that `fingerprint` computes.
    // The literal, not a value that was parsed and printed again: the trail must show what was sent, digit by digit. It cannot
    // break the line of the record, since strict JSON has no raw control character in a string.
    pub fn audit_members(&self, fingerprint: &dyn Fn(&[&[u8]]) -> KeyedFingerprint, out: &mut Vec<u8>) {
        let from = out.len();
        for (index, member) in (0..).map(AuditIndex).zip(&*self.members) {
            if member.redaction == Redaction::Omit {
                continue;
            }
            out.extend_from_slice(member.opening.as_bytes());
            // A member outside a list has one value at most, so that the search may end there.
            let (before, most) = (out.len(), if member.is_list { usize::MAX } else { 1 });
            for scalar in self.captured.iter().filter(|scalar| scalar.member == index).take(most) {
                if out.len() > before {
                    out.push(b',');
                }
                let literal = scalar.literal(&self.bytes);
                match member.redaction {
                    // Also where members are hashed: an absent value holds nothing to hide.
                    _ if literal.is_empty() => out.extend_from_slice(b"null"),
                    // Many readers reject a line with 1e309. The list of unresolved calls is read from these lines, and would
                    // lose the caller and the key of the call.
                    Redaction::Clear | Redaction::Omit if is_beyond_a_double(literal) => {
                        out.extend_from_slice(&[b"\"", literal, b"\""].concat());
                    }
                    Redaction::Clear | Redaction::Omit => out.extend_from_slice(literal),
                    // The name goes into the hash, so that equal values of different members cannot be linked.
                    Redaction::Hmac => {
                        let hidden = hidden(fingerprint(&[b"field", member.name.as_bytes(), literal]));
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

/// The scalars that one walk captured, in the order of the walk.
// Up to nine scalars need no allocation. Three inspectors with their counts and the two other members of the built-in contract
// are eight. More places would make every request's future larger.
pub(super) type Captured = SmallVec<[AuditScalar; 9]>;

/// The position of one captured scalar in the body, or the note that an item of a list lacks this member.
// Eight bytes, so that nine of them fit in the future of a request. With a range of two `usize` it would take 24.
#[derive(Clone, Copy, Debug)]
pub(super) struct AuditScalar {
    pub(super) member: AuditIndex,
    /// In bytes; 0 if there is no scalar. [`u16::MAX`] means that length or more; [`length_at`] then finds the exact length.
    length: u16,
    // Wide enough: `check_encoding` refuses a body of 4 GiB and more.
    start: u32,
}

impl AuditScalar {
    pub(super) fn new(member: AuditIndex, span: Range<usize>) -> Self {
        let length = u16::try_from(span.len()).unwrap_or(u16::MAX);
        Self { member, length, start: span.start as u32 }
    }

    /// Returns the literal of the scalar in `body`; empty if the item has none.
    fn literal(self, body: &[u8]) -> &[u8] {
        let start = self.start as usize;
        let length = if self.length == u16::MAX { length_at(start, body) } else { usize::from(self.length) };
        body.get(start..start + length).unwrap_or_default()
    }
}

/// Whether a literal is a number that does not fit a double.
fn is_beyond_a_double(literal: &[u8]) -> bool {
    // The shortest such number, 1e309, has five characters. The first character rules out strings, which may be long.
    let may_be = literal.len() >= 5 && matches!(literal[0], b'-' | b'0'..=b'9');
    may_be && str::from_utf8(literal).is_ok_and(|text| text.parse().is_ok_and(f64::is_infinite))
}

/// Returns the length in bytes of the value at `start`, which the walk has found valid before.
#[cold]
fn length_at(start: usize, body: &[u8]) -> usize {
    let mut cursor = Cursor::new(body.get(start..).unwrap_or_default());
    cursor.skip_value().map_or(0, |()| cursor.position())
}
