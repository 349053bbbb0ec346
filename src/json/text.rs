//! Parses JSON strings (RFC 8259 §7): finds the end, checks the escapes, and decodes them on demand.
//!
//! The search for the end checks eight bytes at a time. A string without escapes is never copied.

use std::borrow::Cow;

use super::{Abort, Cursor};

/// The reason for a lone surrogate: half of a character beyond the first 65,536.
// RFC 8259 §8.2 leaves its meaning open. Parsers replace it, drop it or refuse it, so two of them may read different strings.
pub(super) const SURROGATE: &str =
    "half a surrogate pair: `\\uD800` to `\\uDBFF` must come before `\\uDC00` to `\\uDFFF`";

/// A string as it is written, without its quotes. Its escapes are valid. It is UTF-8 if the document is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Text<'a> {
    escaped: &'a [u8],
    has_escapes: bool,
}

impl<'a> Cursor<'a> {
    /// Reads the string that begins here.
    #[inline(always)]
    pub(crate) fn string(&mut self) -> Result<Text<'a>, Abort> {
        let start = self.position + 1;
        let mut has_escapes = false;
        self.position = plain_end(self.bytes, start);
        while self.peek() != Some(b'"') {
            has_escapes = true;
            self.escape()?;
            self.position = plain_end(self.bytes, self.position);
        }
        let escaped = &self.bytes[start..self.position];
        self.position += 1;
        Ok(Text { escaped, has_escapes })
    }

    /// Checks and skips the escape that begins here.
    // Not inlined: strings with escapes are rare, and `string` is inlined into each of its callers.
    #[inline(never)]
    fn escape(&mut self) -> Result<(), Abort> {
        let start = self.position;
        // `string` stops at a quote, a backslash, a control character or the end. What is neither of the first two is a fault.
        if self.peek() != Some(b'\\') {
            return Err(self.abort("a control character within a string must be escaped, as in `\\n`"));
        }
        self.position += 1;
        match self.peek() {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => self.position += 1,
            Some(b'u') => {
                let unit = self.unit()?;
                let is_whole = match unit {
                    0xd800..=0xdbff if self.rest().starts_with(b"\\u") => {
                        self.position += 1;
                        matches!(self.unit()?, 0xdc00..=0xdfff)
                    }
                    // The document ends after the first half. Reported at the end, so that a cut reply counts as cut.
                    0xd800..=0xdbff if b"\\u".starts_with(self.rest()) => {
                        self.position = self.bytes.len();
                        return Err(self.abort(SURROGATE));
                    }
                    _ => !matches!(unit, 0xd800..=0xdfff),
                };
                // At the first half, though the second may be the wrong one: the caller must replace both.
                if !is_whole {
                    return Err(self.abort_at(start, SURROGATE));
                }
            }
            _ => return Err(self.abort("unknown escape; JSON has `\\\"`, `\\\\`, `\\/`, `\\b`, `\\f`, `\\n`, `\\r`, `\\t` and `\\uXXXX`")),
        }
        Ok(())
    }

    /// Reads the rest of an escape, `uXXXX`, and returns its UTF-16 code unit.
    fn unit(&mut self) -> Result<u32, Abort> {
        self.position += 1;
        let mut unit = 0;
        for _ in 0..4 {
            let Some(digit) = self.peek().and_then(|byte| char::from(byte).to_digit(16)) else {
                return Err(self.abort("expected four hexadecimal digits after `\\u`"));
            };
            unit = unit << 4 | digit;
            self.position += 1;
        }
        Ok(unit)
    }
}

impl<'a> Text<'a> {
    /// Returns the string with its escapes decoded. If the document is not UTF-8, a string with escapes is returned undecoded.
    #[inline(always)]
    pub(crate) fn decoded(&self) -> Cow<'a, [u8]> {
        if self.has_escapes { self.unescaped().into() } else { self.escaped.into() }
    }

    /// Decodes the escapes into a new buffer.
    // By serde_json, since decoding needs no speed: strings with escapes are rare.
    #[cold]
    fn unescaped(&self) -> Vec<u8> {
        let literal = [b"\"", self.escaped, b"\""].concat();
        serde_json::from_slice(&literal).map_or_else(|_| self.escaped.to_vec(), String::into_bytes)
    }
}

/// Returns the offset of the next quote, backslash or control character from `at` on, or of the end of `bytes`.
#[inline(always)]
fn plain_end(bytes: &[u8], mut at: usize) -> usize {
    while let Some(word) = bytes.get(at..).and_then(<[u8]>::first_chunk) {
        let special = special(u64::from_le_bytes(*word));
        if special != 0 {
            return at + special.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    let is_plain = |byte: &u8| !matches!(byte, b'"' | b'\\' | 0..=0x1f);
    while bytes.get(at).is_some_and(is_plain) {
        at += 1;
    }
    at
}

/// Checks eight bytes. In the word that is returned, the lowest bit that is set is the high bit of the first byte that
/// is a quote, a backslash or a control character. Returns zero if there is none.
#[inline(always)]
fn special(word: u64) -> u64 {
    const ONES: u64 = u64::MAX / 255;
    // The high bit of each byte below `bound`, which is at most 0x80. A subtraction that borrows does so from the bytes above
    // only, so that all wrong bits are above a right one.
    let below = |word: u64, bound: u64| word.wrapping_sub(ONES * bound) & !word;
    // The first XOR swaps 0x20 and 0x22, the space and the quote, and control characters among themselves. After it,
    // every byte below 0x21 is special, the quote included.
    (below(word ^ (ONES * 0x02), 0x21) | below(word ^ (ONES * 0x5c), 1)) & (ONES * 0x80)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_byte_is_found_at_every_position_in_a_word() {
        for byte in 0..=255_u8 {
            let is_special = matches!(byte, b'"' | b'\\' | 0..=0x1f);
            // The neighbours of what is special, and bytes from 0x80 on, which a wrong mask would confuse with it.
            for filler in [b' ', b'!', b'#', b'[', b']', 0x7f, 0x80, 0x9f, 0xff] {
                for at in 0..20 {
                    let mut bytes = [filler; 20];
                    bytes[at] = byte;
                    assert_eq!(
                        plain_end(&bytes, 0),
                        if is_special { at } else { 20 },
                        "{byte} {filler} {at}"
                    );
                    // All bytes from here on: those behind the first one must not change the result.
                    bytes[at..].fill(byte);
                    assert_eq!(
                        plain_end(&bytes, 0),
                        if is_special { at } else { 20 },
                        "{byte} {filler} {at}"
                    );
                }
            }
        }
    }
}
