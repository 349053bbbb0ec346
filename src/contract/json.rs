//! Strict JSON, token by token: UTF-8, no BOM, no lone surrogate, depth ≤ 32, nothing behind the value.
//!
//! Knows no schema and keeps no tree: a token borrows the bytes. Keys that stand twice are the walk's matter.

use std::{borrow::Cow, cmp::Ordering, ops::Range};

use thiserror::Error;

/// How deep arrays and objects may nest.
const MAX_DEPTH: usize = 32;

/// A body that is not strict JSON.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("byte {offset}: {reason}")]
pub struct NotJson {
    /// Where, in bytes from the start.
    pub offset: usize,
    /// What is wrong; holds nothing of the body.
    pub reason: &'static str,
}

/// What a value begins with; scalars are whole.
#[derive(Clone, Copy, Debug)]
pub(super) enum Token<'a> {
    Null,
    Boolean(bool),
    Number(Number<'a>),
    Text(Text<'a>),
    Array,
    Object,
}

/// A string, still escaped, with its quotes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Text<'a> {
    literal: &'a str,
    escaped: bool,
}

/// A number literal.
#[derive(Clone, Copy, Debug)]
pub(super) struct Number<'a>(pub(super) &'a str);

/// Where the walk stands.
pub(super) struct Cursor<'a> {
    text: &'a str,
    position: usize,
    depth: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Result<Self, NotJson> {
        let text = std::str::from_utf8(bytes)
            .map_err(|error| NotJson { offset: error.valid_up_to(), reason: "not UTF-8" })?;
        if text.starts_with('\u{feff}') {
            return Err(NotJson { offset: 0, reason: "a byte order mark must not stand here" });
        }
        Ok(Self { text, position: 0, depth: 0 })
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn text(&self, range: Range<usize>) -> &'a str {
        &self.text[range]
    }

    /// Skips white space; returns where the next token begins.
    pub(super) fn skip_space(&mut self) -> usize {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.position += 1;
        }
        self.position
    }

    /// Reads a scalar, or sees the bracket that opens a container.
    pub(super) fn token(&mut self) -> Result<Token<'a>, NotJson> {
        self.skip_space();
        match self.peek() {
            Some(b'"') => self.string().map(Token::Text),
            Some(b'{') => Ok(Token::Object),
            Some(b'[') => Ok(Token::Array),
            Some(b'-' | b'0'..=b'9') => self.number().map(Token::Number),
            Some(b't') => self.word("true", Token::Boolean(true)),
            Some(b'f') => self.word("false", Token::Boolean(false)),
            Some(b'n') => self.word("null", Token::Null),
            _ => self.fault("a value must stand here"),
        }
    }

    /// Enters a container; false if it is empty.
    pub(super) fn open(&mut self, close: u8) -> Result<bool, NotJson> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return self.fault("nested deeper than 32");
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
    pub(super) fn next(&mut self, close: u8) -> Result<bool, NotJson> {
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
            _ => self.fault("a comma or the closing bracket must stand here"),
        }
    }

    /// Reads a key and its colon; says where the key begins.
    pub(super) fn key(&mut self) -> Result<(usize, Text<'a>), NotJson> {
        let start = self.skip_space();
        if self.peek() != Some(b'"') {
            return self.fault("a key in quotes must stand here");
        }
        let key = self.string()?;
        self.skip_space();
        if self.peek() != Some(b':') {
            return self.fault("a colon must stand here");
        }
        self.position += 1;
        Ok((start, key))
    }

    /// Behind the value: nothing.
    pub(super) fn end(&mut self) -> Result<(), NotJson> {
        if self.skip_space() == self.text.len() {
            Ok(())
        } else {
            self.fault("nothing may stand behind the value")
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.position).copied()
    }

    fn rest(&self) -> &'a [u8] {
        &self.text.as_bytes()[self.position..]
    }

    fn leave(&mut self) {
        self.position += 1;
        self.depth -= 1;
    }

    fn fault<T>(&self, reason: &'static str) -> Result<T, NotJson> {
        let reason = if self.position >= self.text.len() { "the body ends too early" } else { reason };
        Err(NotJson { offset: self.position, reason })
    }

    fn word(&mut self, word: &'static str, token: Token<'a>) -> Result<Token<'a>, NotJson> {
        if !self.rest().starts_with(word.as_bytes()) {
            return self.fault("a value must stand here");
        }
        self.position += word.len();
        Ok(token)
    }

    fn string(&mut self) -> Result<Text<'a>, NotJson> {
        let start = self.position;
        let mut escaped = false;
        self.position += 1;
        loop {
            match self.peek() {
                Some(b'"') => break,
                Some(b'\\') => {
                    escaped = true;
                    self.escape()?;
                }
                Some(0..=0x1f) => return self.fault("a control character must be escaped"),
                Some(_) => self.position += 1,
                None => return self.fault("the body ends too early"),
            }
        }
        self.position += 1;
        Ok(Text { literal: &self.text[start..self.position], escaped })
    }

    fn escape(&mut self) -> Result<(), NotJson> {
        let start = self.position;
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
                    _ => !matches!(unit, 0xd800..=0xdfff),
                };
                if !is_whole {
                    return Err(NotJson { offset: start, reason: "a lone surrogate" });
                }
            }
            _ => return self.fault("not an escape of JSON"),
        }
        Ok(())
    }

    /// Reads `uXXXX`.
    fn unit(&mut self) -> Result<u32, NotJson> {
        self.position += 1;
        let mut unit = 0;
        for _ in 0..4 {
            let Some(digit) = self.peek().and_then(|byte| char::from(byte).to_digit(16)) else {
                return self.fault("four hex digits must stand here");
            };
            unit = unit << 4 | digit;
            self.position += 1;
        }
        Ok(unit)
    }

    fn number(&mut self) -> Result<Number<'a>, NotJson> {
        let start = self.position;
        self.skip(b"-");
        if !self.skip(b"0") {
            self.digits()?;
        }
        if self.skip(b".") {
            self.digits()?;
        }
        if self.skip(b"eE") {
            self.skip(b"+-");
            self.digits()?;
        }
        Ok(Number(&self.text[start..self.position]))
    }

    fn skip(&mut self, any_of: &[u8]) -> bool {
        let found = self.peek().is_some_and(|byte| any_of.contains(&byte));
        self.position += usize::from(found);
        found
    }

    fn digits(&mut self) -> Result<(), NotJson> {
        let start = self.position;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.position += 1;
        }
        if self.position == start { self.fault("a digit must stand here") } else { Ok(()) }
    }
}

impl<'a> Text<'a> {
    /// A literal that a cursor has walked already; `None` if it is no string.
    pub(super) fn read(literal: &'a str) -> Option<Self> {
        literal.starts_with('"').then(|| Self { literal, escaped: literal.contains('\\') })
    }

    /// What the string means.
    pub(super) fn decoded(&self) -> Cow<'a, str> {
        if self.escaped {
            // The cursor has read it: serde_json has nothing left to refuse.
            serde_json::from_str::<String>(self.literal).unwrap_or_default().into()
        } else {
            self.literal[1..self.literal.len() - 1].into()
        }
    }

    /// For a violation: cut at 64 bytes, control characters escaped.
    pub(super) fn shown(&self) -> String {
        let decoded = self.decoded();
        let mut shown = String::new();
        for char in decoded[..decoded.floor_char_boundary(64)].chars() {
            if char.is_control() { shown.extend(char.escape_default()) } else { shown.push(char) }
        }
        shown
    }
}

impl PartialEq<str> for Text<'_> {
    fn eq(&self, other: &str) -> bool {
        self.decoded() == other
    }
}

impl Number<'_> {
    /// An optional minus and digits, but not `-0`.
    pub(super) fn is_integer(&self) -> bool {
        self.0 != "-0" && !self.0.contains(['.', 'e', 'E'])
    }

    /// Integers are compared exactly, however long; others as floats.
    pub(super) fn compare(&self, other: &Self) -> Ordering {
        if !self.is_integer() || !other.is_integer() {
            return self.float().total_cmp(&other.float());
        }
        match (self.0.strip_prefix('-'), other.0.strip_prefix('-')) {
            (None, None) => magnitude(self.0, other.0),
            (Some(a), Some(b)) => magnitude(b, a),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
        }
    }

    /// Adding zero makes `-0` and `0` one.
    fn float(&self) -> f64 {
        self.0.parse::<f64>().unwrap_or(f64::NAN) + 0.0
    }
}

/// Literals have no leading zeros, so that the longer one is the larger one.
fn magnitude(a: &str, b: &str) -> Ordering {
    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::Walk;

    fn read(bytes: &[u8]) -> Result<(), NotJson> {
        Cursor::new(bytes).and_then(|cursor| Walk::over(cursor, &[], None)).map(drop)
    }

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
        let at = |text: &str| read(text.as_bytes()).map_err(|fault| (fault.offset, fault.reason));
        assert_eq!(at(r#"{"a":1, "a":2}"#), Err((8, "a key stands twice in one object")));
        assert_eq!(at(r#"["x\ud800"]"#), Err((3, "a lone surrogate")));
        assert_eq!(at("[1,"), Err((3, "the body ends too early")));
        assert_eq!(at("[1] x"), Err((4, "nothing may stand behind the value")));
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
        let compare = |a: &str, b: &str| Number(a).compare(&Number(b));
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
        let shown = |literal: &'static str| Text::read(literal).map(|text| text.shown());
        assert_eq!(shown(r#""a\u0000\n\u0085b""#).as_deref(), Some(r"a\u{0}\n\u{85}b"));
        assert_eq!(shown("\"ééééééééééééééééééééééééééééééééxéé\"").map(|text| text.len()), Some(64));
        assert_eq!(shown("1"), None);
    }
}
