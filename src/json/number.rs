//! Parses JSON numbers (RFC 8259 §6) and compares them.
//!
//! A number keeps its literal. Integers are compared exactly at any length, since ids have more digits than a double holds.

use std::cmp::Ordering;

use super::{Abort, Cursor};

/// The most digits with which every integer fits an `i64`.
const SMALL_DIGITS: usize = 18;

/// A number literal, borrowed from its document.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Number<'a> {
    pub(crate) literal: &'a [u8],
    /// Whether the literal is an optional minus and digits, but not `-0`.
    // Some readers take `-0` for a float and others for 0, so that it is not one integer to all of them.
    pub(crate) is_integer: bool,
    /// The value, if the literal has no fraction, no exponent and at most 18 digits.
    pub(crate) small: Option<i64>,
}

impl<'a> Cursor<'a> {
    /// Reads the number that begins here.
    // A number at the very end of a document is complete for this step. In a cut document the next step reports the
    // cut.
    #[inline(always)]
    pub(crate) fn number(&mut self) -> Result<Number<'a>, Abort> {
        let start = self.position;
        let is_negative = self.skip(|byte| byte == b'-');
        let first = self.position;
        let mut magnitude = 0;
        // A leading 0 is a number by itself: a digit after it is reported by the next step.
        if !self.skip(|byte| byte == b'0') {
            magnitude = self.digits()?;
        }
        let digits = self.position - first;
        if let Some(b'.' | b'e' | b'E') = self.peek() {
            return self.fraction(start);
        }
        let small = (digits <= SMALL_DIGITS).then(|| if is_negative { -magnitude } else { magnitude });
        // `digits > 1`, since the magnitude of a long number has wrapped, and may be 0.
        Ok(Number {
            literal: self.since(start),
            is_integer: !is_negative || magnitude != 0 || digits > 1,
            small,
        })
    }

    /// Reads what follows the integer part of the number that began at `start`.
    #[inline(never)]
    fn fraction(&mut self, start: usize) -> Result<Number<'a>, Abort> {
        if self.skip(|byte| byte == b'.') {
            self.digits()?;
        }
        if self.skip(|byte| matches!(byte, b'e' | b'E')) {
            self.skip(|byte| matches!(byte, b'+' | b'-'));
            self.digits()?;
        }
        Ok(Number { literal: self.since(start), is_integer: false, small: None })
    }

    /// Skips the next byte if `is_meant` returns true for it. Returns whether it was skipped.
    #[inline(always)]
    fn skip(&mut self, is_meant: impl Fn(u8) -> bool) -> bool {
        let found = self.peek().is_some_and(is_meant);
        self.position += usize::from(found);
        found
    }

    /// Reads one digit or more and returns their value. The value is right for at most [`SMALL_DIGITS`] digits.
    #[inline(always)]
    fn digits(&mut self) -> Result<i64, Abort> {
        let start = self.position;
        let mut value = 0_i64;
        while let Some(byte @ b'0'..=b'9') = self.peek() {
            // Wrapping, since a caller may send any number of digits. `number` drops the value of a long one.
            value = value.wrapping_mul(10).wrapping_add(i64::from(byte - b'0'));
            self.position += 1;
        }
        if self.position == start { Err(self.abort("expected a digit")) } else { Ok(value) }
    }
}

impl<'a> Number<'a> {
    /// Parses a literal; `None` if it does not begin with a number. What follows the number is not checked.
    pub(crate) fn known(literal: &'a str) -> Option<Self> {
        Cursor::new(literal.as_bytes()).number().ok()
    }

    /// Compares two numbers. Integers are compared exactly, whatever their length; other numbers as doubles.
    #[inline(always)]
    pub(crate) fn compare(&self, other: &Self) -> Ordering {
        match (self.small, other.small) {
            (Some(a), Some(b)) => a.cmp(&b),
            _ => self.compare_literals(other),
        }
    }

    fn compare_literals(&self, other: &Self) -> Ordering {
        if !self.is_integer || !other.is_integer {
            return self.float().total_cmp(&other.float());
        }
        match (self.literal.strip_prefix(b"-"), other.literal.strip_prefix(b"-")) {
            (None, None) => magnitude(self.literal, other.literal),
            (Some(a), Some(b)) => magnitude(b, a),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
        }
    }

    /// Returns the nearest double; an infinity if the number is out of range.
    fn float(&self) -> f64 {
        let literal = std::str::from_utf8(self.literal).unwrap_or_default();
        // Adding zero turns -0 into 0, which `total_cmp` would order below it.
        literal.parse::<f64>().unwrap_or(f64::NAN) + 0.0
    }
}

/// Compares two integers without a sign.
// A literal has no leading zeros, so that the longer one is larger, and those of one length compare like text.
fn magnitude(a: &[u8], b: &[u8]) -> Ordering {
    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_compared_exactly_and_fractions_as_floats() {
        let compare = |a: &str, b: &str| Number::known(a).unwrap().compare(&Number::known(b).unwrap());
        assert_eq!(compare("18446744073709551615", "18446744073709551615"), Ordering::Equal);
        assert_eq!(compare("18446744073709551616", "18446744073709551615"), Ordering::Greater);
        assert_eq!(compare("-9223372036854775809", "-9223372036854775808"), Ordering::Less);
        assert_eq!(compare(&"9".repeat(400), "18446744073709551615"), Ordering::Greater);
        assert_eq!(compare("-1", "0"), Ordering::Less);
        assert_eq!(compare("1.50", "15e-1"), Ordering::Equal);
        assert_eq!(compare("-0", "0"), Ordering::Equal);
        assert_eq!(compare("1e999", "18446744073709551615"), Ordering::Greater);
    }
}
