//! Strict JSON, piece by piece: no lone surrogate, depth ≤ 32, nothing behind the value. UTF-8 without a BOM, if
//! [`check_encoding`] says so.
//!
//! Knows no schema and keeps no tree: a token borrows the bytes. Strings are searched eight bytes at a time.
//! Keys that stand twice are the walk's matter.

use std::{borrow::Cow, cmp::Ordering};

use thiserror::Error;

/// How deep arrays and objects may nest.
const MAX_DEPTH: usize = 32;

/// The lowest byte that `plain` may have to escape.
const DEL: u8 = 0x7F;

/// What stands where a value must.
const A_VALUE: &str = "expected a value: a string in double quotes, a number, true, false, null, `[` or `{`";

/// Half of a character beyond the first 65,536.
const SURROGATE: &str = "half a character: `\\uD800` to `\\uDBFF` must come before `\\uDC00` to `\\uDFFF`";

/// A body that is not strict JSON.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("line {line}, column {column}: {reason}")]
pub struct NotJson {
    /// The line, from 1.
    pub line: usize,
    /// The character of the line, from 1.
    pub column: usize,
    /// What is wrong; holds nothing of the body.
    pub reason: &'static str,
}

impl NotJson {
    fn at(document: &[u8], offset: usize, reason: &'static str) -> Self {
        let before = document.get(..offset).unwrap_or(document);
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        let last = before.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
        let goes_on = |byte: &&u8| **byte & 0xC0 == 0x80; // UTF-8: not the first byte of a character
        Self { line, column: last.len() - last.iter().filter(goes_on).count() + 1, reason }
    }
}

/// Where a walk halted, in bytes from the start, and why.
#[derive(Clone, Copy, Debug)]
struct Halted {
    offset: usize,
    reason: &'static str,
}

/// The walk cannot go on; a fault of the document is the cursor's to tell. Empty, since it is part of the result
/// of every step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Halt;

/// A value as far as a rule looks at it by itself: scalars are whole.
#[derive(Clone, Copy, Debug)]
pub(super) enum Token<'a> {
    Null,
    Boolean(bool),
    Number(Number<'a>),
    Text(Text<'a>),
    Array,
    Object,
}

/// Checks that a document is UTF-8 without a byte order mark, and no longer than an offset can tell. Returns whether every byte is
/// below DEL.
pub(super) fn check_encoding(document: &[u8]) -> Result<bool, NotJson> {
    if u32::try_from(document.len()).is_err() {
        return Err(NotJson::at(document, 0, "the text is longer than 4 GiB"));
    }
    let is_plain = is_plain(document);
    if !is_plain {
        std::str::from_utf8(document)
            .map_err(|error| NotJson::at(document, error.valid_up_to(), "this byte is not UTF-8"))?;
    }
    if document.starts_with("\u{feff}".as_bytes()) {
        return Err(NotJson::at(document, 0, "there is a byte order mark (BOM); leave it out"));
    }
    Ok(is_plain)
}

/// Whether every byte is below DEL. It looks at eight bytes a step; the last step overlaps the one before.
fn is_plain(document: &[u8]) -> bool {
    const LOW: u64 = u64::from_ne_bytes([0x7F; 8]);
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    let Some(last) = document.last_chunk() else { return document.iter().all(|byte| *byte < DEL) };
    // Adding one sets the highest bit of DEL, and carries into no other byte.
    let look = |bytes: [u8; 8]| {
        let bytes = u64::from_ne_bytes(bytes);
        bytes | ((bytes & LOW) + ONES)
    };
    let all = document.as_chunks().0.iter().fold(look(*last), |all, bytes| all | look(*bytes));
    all & !LOW == 0
}

/// What a first byte says of a value.
#[derive(Clone, Copy, Debug)]
pub(super) enum Begins {
    Text,
    Number,
    Word,
    Array,
    Object,
}

/// A string, still escaped, without its quotes. UTF-8 if the document is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Text<'a> {
    escaped: &'a [u8],
    has_escapes: bool,
}

/// A number literal.
#[derive(Clone, Copy, Debug)]
pub(super) struct Number<'a> {
    pub(super) literal: &'a [u8],
    /// An optional minus and digits, but not `-0`.
    pub(super) is_integer: bool,
    /// An integer that is not long.
    pub(super) small: Option<i64>,
}

/// Integers up to so many digits fit an `i64` for certain.
const SMALL_DIGITS: usize = 18;

/// Where the walk stands.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
    depth: usize,
    halted: Option<Halted>,
}

impl<'a> Cursor<'a> {
    /// Before the document.
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0, depth: 0, halted: None }
    }

    /// What is wrong with the document, if the walk halted for that.
    pub(super) fn fault(&self) -> Option<NotJson> {
        self.halted.map(|halted| NotJson::at(self.bytes, halted.offset, halted.reason))
    }

    /// Whether the walk halted since there is no more of the document.
    pub(super) fn is_cut(&self) -> bool {
        self.halted.is_some_and(|halted| halted.offset >= self.bytes.len())
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn since(&self, start: usize) -> &'a [u8] {
        &self.bytes[start..self.position]
    }

    /// Skips white space; returns where the next token begins.
    #[inline(always)]
    pub(super) fn skip_space(&mut self) -> usize {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.position += 1;
        }
        self.position
    }

    /// What begins here, by its first byte.
    #[inline(always)]
    pub(super) fn begins(&mut self) -> Result<Begins, Halt> {
        match self.peek() {
            Some(b'"') => Ok(Begins::Text),
            Some(b'-' | b'0'..=b'9') => Ok(Begins::Number),
            Some(b'{') => Ok(Begins::Object),
            Some(b'[') => Ok(Begins::Array),
            Some(b't' | b'f' | b'n') => Ok(Begins::Word),
            _ => Err(self.halt(A_VALUE)),
        }
    }

    /// Reads `true`, `false` or `null`.
    pub(super) fn word(&mut self) -> Result<Token<'a>, Halt> {
        let words = [("true", Token::Boolean(true)), ("false", Token::Boolean(false)), ("null", Token::Null)];
        let found = words.into_iter().find(|(word, _)| self.rest().starts_with(word.as_bytes()));
        let Some((word, token)) = found else {
            if words.iter().any(|(word, _)| word.as_bytes().starts_with(self.rest())) {
                self.position = self.bytes.len();
            }
            return Err(self.halt(A_VALUE));
        };
        self.position += word.len();
        Ok(token)
    }

    /// Enters a container; false if it is empty.
    #[inline(always)]
    pub(super) fn open(&mut self, close: u8) -> Result<bool, Halt> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.halt("arrays and objects are nested more than 32 deep"));
        }
        self.position += 1;
        self.skip_space();
        if self.peek() == Some(close) {
            self.leave();
            return Ok(false);
        }
        Ok(true)
    }

    /// Behind an element: true if another follows.
    #[inline(always)]
    pub(super) fn next(&mut self, close: u8) -> Result<bool, Halt> {
        self.skip_space();
        match self.peek() {
            Some(b',') => {
                self.position += 1;
                Ok(true)
            }
            Some(byte) if byte == close => {
                self.leave();
                Ok(false)
            }
            // A number reads all its digits, but for those behind a 0 in front.
            Some(b'0'..=b'9') if self.bytes[..self.position].ends_with(b"0") => {
                Err(self.halt("a number must not begin with an extra 0: write 7, not 07"))
            }
            _ if close == b']' => Err(self.halt("expected `,` or `]`")),
            _ => Err(self.halt("expected `,` or `}`")),
        }
    }

    /// Reads a key that begins here.
    pub(super) fn key(&mut self) -> Result<Text<'a>, Halt> {
        match self.peek() {
            Some(b'"') => self.string(),
            Some(b'}') => Err(self.halt("expected a key: remove the comma before `}`")),
            _ => Err(self.halt("expected a key in double quotes")),
        }
    }

    /// Reads a key that begins here, if it is this one; a literal with its quotes and the colon behind it.
    #[inline(always)]
    pub(super) fn skip_key(&mut self, literal: &[u8]) -> bool {
        let is_it = begins_with(self.rest(), literal);
        if is_it {
            self.position += literal.len();
        }
        is_it
    }

    /// Behind a key: a colon.
    #[inline(always)]
    pub(super) fn colon(&mut self) -> Result<(), Halt> {
        self.skip_space();
        if self.peek() != Some(b':') {
            return Err(self.halt("expected `:` behind the key"));
        }
        self.position += 1;
        Ok(())
    }

    /// Skips the value that begins here; only its syntax is looked at.
    pub(super) fn skip_value(&mut self) -> Result<(), Halt> {
        match self.begins()? {
            Begins::Text => self.string().map(drop),
            Begins::Number => self.number().map(drop),
            Begins::Word => self.word().map(drop),
            Begins::Array => {
                let mut more = self.open(b']')?;
                while more {
                    self.skip_space();
                    self.skip_value()?;
                    more = self.next(b']')?;
                }
                Ok(())
            }
            Begins::Object => {
                let mut more = self.open(b'}')?;
                while more {
                    self.skip_space();
                    self.key()?;
                    self.colon()?;
                    self.skip_space();
                    self.skip_value()?;
                    more = self.next(b'}')?;
                }
                Ok(())
            }
        }
    }

    /// Behind the value: nothing.
    pub(super) fn end(&mut self) -> Result<(), Halt> {
        if self.skip_space() == self.bytes.len() {
            Ok(())
        } else {
            Err(self.halt("expected the end: a JSON text is one value"))
        }
    }

    /// The fault is here, or that nothing is here.
    #[cold]
    #[inline(never)]
    fn halt(&mut self, reason: &'static str) -> Halt {
        let reason = if self.position >= self.bytes.len() {
            "the text ends before its value is whole"
        } else {
            reason
        };
        self.halt_at(self.position, reason)
    }

    /// The fault is there.
    #[cold]
    #[inline(never)]
    pub(super) fn halt_at(&mut self, offset: usize, reason: &'static str) -> Halt {
        self.halted = Some(Halted { offset, reason });
        Halt
    }

    #[inline(always)]
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.position).copied()
    }

    #[inline(always)]
    fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.position..).unwrap_or_default()
    }

    fn leave(&mut self) {
        self.position += 1;
        self.depth -= 1;
    }

    /// Reads the string that begins here.
    #[inline(always)]
    pub(super) fn string(&mut self) -> Result<Text<'a>, Halt> {
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

    #[inline(never)]
    fn escape(&mut self) -> Result<(), Halt> {
        let start = self.position;
        if self.peek() != Some(b'\\') {
            return Err(self.halt("a control character within a string must be escaped, as in `\\n`"));
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
                    0xd800..=0xdbff if b"\\u".starts_with(self.rest()) => {
                        self.position = self.bytes.len();
                        return Err(self.halt(SURROGATE));
                    }
                    _ => !matches!(unit, 0xd800..=0xdfff),
                };
                if !is_whole {
                    return Err(self.halt_at(start, SURROGATE));
                }
            }
            _ => return Err(self.halt("unknown escape; JSON has `\\\"`, `\\\\`, `\\/`, `\\b`, `\\f`, `\\n`, `\\r`, `\\t` and `\\uXXXX`")),
        }
        Ok(())
    }

    /// Reads `uXXXX`.
    fn unit(&mut self) -> Result<u32, Halt> {
        self.position += 1;
        let mut unit = 0;
        for _ in 0..4 {
            let Some(digit) = self.peek().and_then(|byte| char::from(byte).to_digit(16)) else {
                return Err(self.halt("expected four hexadecimal digits behind `\\u`"));
            };
            unit = unit << 4 | digit;
            self.position += 1;
        }
        Ok(unit)
    }

    /// Reads the number that begins here.
    #[inline(always)]
    pub(super) fn number(&mut self) -> Result<Number<'a>, Halt> {
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

/// Without a call for the lengths that most keys have: two words that may overlap.
#[inline(always)]
fn begins_with(bytes: &[u8], literal: &[u8]) -> bool {
    let Some(bytes) = bytes.get(..literal.len()) else { return false };
    match (literal.first_chunk::<8>(), literal.last_chunk::<8>()) {
        (Some(first), Some(last)) if literal.len() <= 16 => {
            bytes.first_chunk() == Some(first) && bytes.last_chunk() == Some(last)
        }
        _ => bytes == literal,
    }
}

/// Where the next quote, backslash or control character stands, or the end; eight bytes at a time.
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

/// Sets the high bit of the first quote, backslash or control character of eight bytes, and none below. (A
/// subtraction borrows from the bytes above only, so that what it spoils stands behind a find.)
#[inline(always)]
fn special(word: u64) -> u64 {
    const ONES: u64 = u64::MAX / 255;
    let below = |word: u64, bound: u64| word.wrapping_sub(ONES * bound) & !word;
    // The first swaps 0x20 and 0x22, the space and the quote: then the quote, too, lies below the rest.
    (below(word ^ (ONES * 0x02), 0x21) | below(word ^ (ONES * 0x5c), 1)) & (ONES * 0x80)
}

impl<'a> Text<'a> {
    /// What the string means. If it is not UTF-8, as it stands.
    #[inline(always)]
    pub(super) fn decoded(&self) -> Cow<'a, [u8]> {
        if self.has_escapes { self.unescaped().into() } else { self.escaped.into() }
    }

    #[cold]
    fn unescaped(&self) -> Vec<u8> {
        let literal = [b"\"", self.escaped, b"\""].concat();
        serde_json::from_slice(&literal).map_or_else(|_| self.escaped.to_vec(), String::into_bytes)
    }
}

/// A key for a violation: cut at 64 bytes, control characters escaped.
pub(super) fn shown(key: &[u8]) -> String {
    let key = String::from_utf8_lossy(key);
    let mut shown = String::new();
    for char in key[..key.floor_char_boundary(64)].chars() {
        if char.is_control() { shown.extend(char.escape_default()) } else { shown.push(char) }
    }
    shown
}

impl<'a> Number<'a> {
    /// A literal that is known to be a number.
    pub(super) fn known(literal: &'a str) -> Option<Self> {
        Cursor::new(literal.as_bytes()).number().ok()
    }

    /// Integers are compared exactly, however long; others as floats.
    #[inline(always)]
    pub(super) fn compare(&self, other: &Self) -> Ordering {
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
    use crate::contract::is_strict_json as read;

    fn nested(depth: usize) -> String {
        "[".repeat(depth) + &"]".repeat(depth)
    }

    fn many_keys(last: &str) -> String {
        let keys: String = (0..1000).map(|i| format!("\"k{i}\":{i},")).collect();
        format!("{{{keys}\"{last}\":0}}")
    }

    #[test]
    fn strict_json_is_read() {
        for good in [
            "0",
            "-0",
            "-12.50e+7",
            "1E9",
            "\"\"",
            "true",
            "false",
            "null",
            "[]",
            "{}",
            " \t\r\n[ 1 , 2 ] \n",
            r#"{"a":{"a":1},"b":[{"a":2},{"a":3}]}"#,
            r#""\"\\\/\b\f\n\r\t\u00e9""#,
            r#""\ud83d\ude00 😀""#,
            "\"\u{7f}\u{2028}\"",
            r#"{"":0}"#,
            &nested(32),
            &many_keys("last"),
        ] {
            assert_eq!(read(good.as_bytes()), Ok(()), "{good}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [
            "",
            " ",
            "{",
            "[1,]",
            "[,]",
            "[1 2]",
            "{\"a\":1,}",
            "{a:1}",
            "{'a':1}",
            "{\"a\"}",
            "{\"a\" 1}",
            "{1:1}",
            "[1}",
            "{\"a\":1]",
            "01",
            "-",
            "-01",
            "+1",
            ".5",
            "1.",
            "1.e1",
            "1e",
            "1e+",
            "0x1",
            "NaN",
            "Infinity",
            "-Infinity",
            "True",
            "nul",
            "nulll",
            "\"",
            "\"\\",
            "\"\n\"",
            "\"\u{1f}\"",
            r#""\x41""#,
            r#""\u12g4""#,
            r#""\u+123""#,
            r#""\ud800""#,
            r#""\udc00""#,
            r#""\ud800\ud800""#,
            r#""\ud800x""#,
            r#""\ud800\n""#,
            "1 2",
            "{} {}",
            "[]]",
            "// x\n1",
            "/**/1",
            "\u{feff}1",
            "1\u{feff}",
            "\u{a0}1",
            "1\0",
            r#"{"a":1,"a":1}"#,
            r#"{"a":1,"\u0061":2}"#,
            r#"[[{"x":{"b":1,"c":2,"b":3}}]]"#,
            &nested(33),
            &many_keys("k3"),
            &many_keys(r"\u006b999"),
        ] {
            assert!(read(bad.as_bytes()).is_err(), "{bad}");
        }
        for bad in [&b"\"\xff\""[..], b"\"\xc0\xaf\"", b"\"\xed\xa0\x80\"", b"\xff\xfe1\0"] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_fault_has_its_place() {
        let at = |text: &str| read(text.as_bytes()).map_err(|fault| (fault.line, fault.column, fault.reason));
        assert_eq!(at(r#"{"a":1, "a":2}"#), Err((1, 9, "this key stands twice in the object")));
        assert_eq!(at(r#"["x\ud800"]"#), Err((1, 4, SURROGATE)));
        assert_eq!(at("[1,"), Err((1, 4, "the text ends before its value is whole")));
        assert_eq!(at("[\n \"é\" x]"), Err((2, 6, "expected `,` or `]`")), "a character is a column");
        assert_eq!(at("[1] x"), Err((1, 5, "expected the end: a JSON text is one value")));
    }

    #[test]
    fn a_document_cut_anywhere_is_not_json() {
        let whole = r#" {"é\u00e9\ud83d\ude00": [1.5e-3, true, {"b": null}, "x\n"], "c": {}, "d": []}"#;
        assert_eq!(read(whole.as_bytes()), Ok(()));
        for end in 0..whole.len() {
            assert!(read(&whole.as_bytes()[..end]).is_err(), "cut at {end}");
        }
    }

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

    #[test]
    fn a_shown_key_is_cut_and_holds_no_control_character() {
        assert_eq!(shown("a\0\n\u{85}b".as_bytes()), r"a\u{0}\n\u{85}b");
        assert_eq!(shown("é".repeat(40).as_bytes()).len(), 64);
        assert_eq!(shown(("x".to_owned() + &"é".repeat(40)).as_bytes()).len(), 63);
    }

    #[test]
    fn a_literal_of_any_length_is_told_from_one_that_differs_anywhere() {
        for length in 0..40 {
            let literal: Vec<u8> = (0..length).collect();
            let longer = [&literal[..], b"x"].concat();
            assert!(begins_with(&literal, &literal) && begins_with(&longer, &literal), "{length}");
            assert!(!begins_with(&literal, &longer), "{length}");
            for at in 0..literal.len() {
                let mut other = longer.clone();
                other[at] ^= 0x80;
                assert!(!begins_with(&other, &literal), "{length} {at}");
            }
        }
    }

    #[test]
    fn a_special_byte_is_found_wherever_it_stands_in_a_word() {
        for byte in 0..=255_u8 {
            let is_special = matches!(byte, b'"' | b'\\' | 0..=0x1f);
            for filler in [b' ', b'!', b'#', b'[', b']', 0x7f, 0x80, 0x9f, 0xff] {
                for at in 0..20 {
                    let mut bytes = [filler; 20];
                    bytes[at] = byte;
                    assert_eq!(
                        plain_end(&bytes, 0),
                        if is_special { at } else { 20 },
                        "{byte} {filler} {at}"
                    );
                    bytes[at..].fill(byte); // the first one counts
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
