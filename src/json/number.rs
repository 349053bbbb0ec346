//! Reads and compares numbers.

use std::cmp::Ordering;

use super::{Cursor, Halt};

/// An integer of at most so many digits fits an `i64`.
const SMALL_DIGITS: usize = 18;

/// A number literal.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Number<'a> {
    pub(crate) literal: &'a [u8],
    /// An optional minus and digits, but not `-0`.
    pub(crate) is_integer: bool,
    /// An integer that is not long.
    pub(crate) small: Option<i64>,
}

impl<'a> Cursor<'a> {
    /// Reads the number that begins here.
    #[inline(always)]
    pub(crate) fn number(&mut self) -> Result<Number<'a>, Halt> {
        let start = self.position;
        let is_negative = self.skip(|byte| byte == b'-');
        let first = self.position;
        let mut magnitude = 0;
        if !self.skip(|byte| byte == b'0') {
            magnitude = self.digits()?;
        }
        let digits = self.position - first;
        if let Some(b'.' | b'e' | b'E') = self.peek() {
            return self.fraction(start);
        }
        let small = (digits <= SMALL_DIGITS).then(|| if is_negative { -magnitude } else { magnitude });
        Ok(Number {
            literal: self.since(start),
            is_integer: !is_negative || magnitude != 0 || digits > 1,
            small,
        })
    }

    /// A number that has more than an integer part.
    #[inline(never)]
    fn fraction(&mut self, start: usize) -> Result<Number<'a>, Halt> {
        if self.skip(|byte| byte == b'.') {
            self.digits()?;
        }
        if self.skip(|byte| matches!(byte, b'e' | b'E')) {
            self.skip(|byte| matches!(byte, b'+' | b'-'));
            self.digits()?;
        }
        Ok(Number { literal: self.since(start), is_integer: false, small: None })
    }

    #[inline(always)]
    fn skip(&mut self, is_meant: impl Fn(u8) -> bool) -> bool {
        let found = self.peek().is_some_and(is_meant);
        self.position += usize::from(found);
        found
    }

    /// Reads digits; their value counts if they are not too many.
    #[inline(always)]
    fn digits(&mut self) -> Result<i64, Halt> {
        let start = self.position;
        let mut value = 0_i64;
        while let Some(byte @ b'0'..=b'9') = self.peek() {
            value = value.wrapping_mul(10).wrapping_add(i64::from(byte - b'0'));
            self.position += 1;
        }
        if self.position == start { Err(self.halt("expected a digit")) } else { Ok(value) }
    }
}

impl<'a> Number<'a> {
    /// A literal that is known to be a number.
    pub(crate) fn known(literal: &'a str) -> Option<Self> {
        Cursor::new(literal.as_bytes()).number().ok()
    }

    /// Integers are compared exactly, however long; others as floats.
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

    /// Adding zero makes `-0` and `0` one.
    fn float(&self) -> f64 {
        let literal = std::str::from_utf8(self.literal).unwrap_or_default();
        literal.parse::<f64>().unwrap_or(f64::NAN) + 0.0
    }
}

/// Literals have no leading zeros, so that the longer one is the larger one.
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
