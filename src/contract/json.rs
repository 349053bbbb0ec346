//! Strict JSON, token by token: UTF-8, no BOM, no lone surrogate, depth ≤ 32, nothing behind the value.

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
    /// What is wrong.
    pub reason: &'static str,
}

/// What a value begins with; scalars are whole.
#[derive(Clone, Debug)]
pub(super) enum Token<'a> {
    Null,
    Boolean(bool),
    Number(Number<'a>),
    Text(Text<'a>),
    Array,
    Object,
}

/// A string, still escaped.
#[derive(Clone, Debug)]
pub(super) struct Text<'a> {
    raw: &'a str,
    escaped: bool,
    start: usize,
}

/// A number literal.
#[derive(Clone, Copy, Debug)]
pub(super) struct Number<'a>(pub(super) &'a str);

/// Where the walk stands.
pub(super) struct Cursor<'a> {
    text: &'a str,
    bytes: &'a [u8],
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
        Ok(Self { text, bytes, position: 0, depth: 0 })
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn text(&self, range: Range<usize>) -> &'a str {
        &self.text[range]
    }

    pub(super) fn fault_at(&self, offset: usize, reason: &'static str) -> NotJson {
        NotJson { offset, reason }
    }

    fn fault<T>(&self, reason: &'static str) -> Result<T, NotJson> {
        let reason = if self.position >= self.bytes.len() { "the body ends too early" } else { reason };
        Err(NotJson { offset: self.position, reason })
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.position).copied()
    }

    /// Skips white space; returns where the next token begins.
    pub(super) fn skip_space(&mut self) -> usize {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.position += 1;
        }
        self.position
    }

    /// Reads a scalar, or the bracket that opens a container.
    pub(super) fn token(&mut self) -> Result<Token<'a>, NotJson> {
        self.skip_space();
        match self.peek() {
            Some(b'"') => self.string().map(Token::Text),
            Some(b'{') => Ok(Token::Object),
            Some(b'[') => Ok(Token::Array),
            Some(b'-' | b'0'..=b'9') => self.number().map(Token::Number),
            Some(b't') => self.literal("true").map(|()| Token::Boolean(true)),
            Some(b'f') => self.literal("false").map(|()| Token::Boolean(false)),
            Some(b'n') => self.literal("null").map(|()| Token::Null),
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

    fn leave(&mut self) {
        self.position += 1;
        self.depth -= 1;
    }

    /// Reads a key and its colon.
    pub(super) fn key(&mut self) -> Result<Text<'a>, NotJson> {
        self.skip_space();
        if self.peek() != Some(b'"') {
            return self.fault("a key in quotes must stand here");
        }
        let key = self.string()?;
        self.skip_space();
        if self.peek() != Some(b':') {
            return self.fault("a colon must stand here");
        }
        self.position += 1;
        Ok(key)
    }

    pub(super) fn end(&mut self) -> Result<(), NotJson> {
        if self.skip_space() == self.bytes.len() {
            Ok(())
        } else {
            self.fault("nothing may stand behind the value")
        }
    }

    fn literal(&mut self, word: &'static str) -> Result<(), NotJson> {
        if self.bytes[self.position..].starts_with(word.as_bytes()) {
            self.position += word.len();
            return Ok(());
        }
        self.fault("a value must stand here")
    }

    fn string(&mut self) -> Result<Text<'a>, NotJson> {
        self.position += 1;
        let start = self.position;
        let mut escaped = false;
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
        let raw = &self.text[start..self.position];
        self.position += 1;
        Ok(Text { raw, escaped, start })
    }

    fn escape(&mut self) -> Result<(), NotJson> {
        self.position += 1;
        match self.peek() {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => {
                self.position += 1;
                Ok(())
            }
            Some(b'u') => match self.unit()? {
                0xd800..=0xdbff => {
                    if !self.bytes[self.position..].starts_with(b"\\u") {
                        return self.fault("a lone surrogate");
                    }
                    self.position += 1;
                    match self.unit()? {
                        0xdc00..=0xdfff => Ok(()),
                        _ => self.fault("a lone surrogate"),
                    }
                }
                0xdc00..=0xdfff => self.fault("a lone surrogate"),
                _ => Ok(()),
            },
            _ => self.fault("not an escape of JSON"),
        }
    }

    /// Reads `uXXXX`.
    fn unit(&mut self) -> Result<u16, NotJson> {
        self.position += 1;
        let digits =
            self.bytes.get(self.position..self.position + 4).filter(|d| d.iter().all(u8::is_ascii_hexdigit));
        let Some(digits) = digits else {
            return Err(NotJson { offset: self.position, reason: "four hex digits must stand here" });
        };
        self.position += 4;
        let text = std::str::from_utf8(digits).unwrap_or_default();
        Ok(u16::from_str_radix(text, 16).unwrap_or_default())
    }

    fn number(&mut self) -> Result<Number<'a>, NotJson> {
        let start = self.position;
        self.position += usize::from(self.peek() == Some(b'-'));
        match self.peek() {
            Some(b'0') => self.position += 1,
            Some(b'1'..=b'9') => self.digits()?,
            _ => return self.fault("a digit must stand here"),
        }
        if self.peek() == Some(b'.') {
            self.position += 1;
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.position += 1;
            self.position += usize::from(matches!(self.peek(), Some(b'+' | b'-')));
            self.digits()?;
        }
        Ok(Number(&self.text[start..self.position]))
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
    /// Where its first character stands.
    pub(super) fn start(&self) -> usize {
        self.start
    }

    pub(super) fn decoded(&self) -> Cow<'a, str> {
        if self.escaped { decode(&format!("\"{}\"", self.raw)).into_owned().into() } else { self.raw.into() }
    }

    pub(super) fn is(&self, other: &str) -> bool {
        if self.escaped { self.decoded() == other } else { self.raw == other }
    }

    pub(super) fn same(&self, other: &Self) -> bool {
        if self.escaped || other.escaped { self.decoded() == other.decoded() } else { self.raw == other.raw }
    }

    /// For a violation: cut at 64 bytes, control characters escaped.
    pub(super) fn shown(&self) -> String {
        let decoded = self.decoded();
        let mut end = decoded.len().min(64);
        while !decoded.is_char_boundary(end) {
            end -= 1;
        }
        decoded[..end]
            .chars()
            .flat_map(|c| {
                if c.is_control() { c.escape_default().to_string() } else { c.to_string() }
                    .chars()
                    .collect::<Vec<_>>()
            })
            .collect()
    }
}

/// The value of a string literal that was read already.
pub(super) fn decode(literal: &str) -> Cow<'_, str> {
    if literal.contains('\\') {
        serde_json::from_str::<String>(literal).unwrap_or_default().into()
    } else {
        literal.trim_matches('"').into()
    }
}

impl Number<'_> {
    /// An optional minus and digits, but not `-0`.
    pub(super) fn is_integer(&self) -> bool {
        self.0 != "-0" && !self.0.contains(['.', 'e', 'E'])
    }

    /// Integers are compared exactly, however long; others as floats.
    pub(super) fn compare(&self, other: &Self) -> Ordering {
        if self.is_integer() && other.is_integer() {
            return match (self.0.strip_prefix('-'), other.0.strip_prefix('-')) {
                (None, None) => magnitude(self.0, other.0),
                (Some(a), Some(b)) => magnitude(b, a),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
            };
        }
        let value = |number: &str| number.parse::<f64>().unwrap_or(f64::NAN);
        value(self.0).partial_cmp(&value(other.0)).unwrap_or(Ordering::Equal)
    }
}

fn magnitude(a: &str, b: &str) -> Ordering {
    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use crate::contract::{Contract, Fault};

    fn is_json(text: &[u8]) -> bool {
        let any = Contract::compile("{}").unwrap();
        !matches!(any.check(Bytes::copy_from_slice(text)), Err(Fault::NotJson(_)))
    }

    #[test]
    fn only_strict_json_is_json() {
        for good in [
            r#" {"a":[1,-2.5e+3,"x\u00e9\ud83d\ude00",true,false,null,{}]} "#,
            r#""\"\\\/\b\f\n\r\t""#,
            r#"{"a":{"a":1},"b":{"a":1}}"#,
            "[]",
            "0",
        ] {
            assert!(is_json(good.as_bytes()), "{good}");
        }
        for bad in [
            "",
            " ",
            "{",
            "[1,]",
            "{\"a\":1,}",
            "{a:1}",
            "'a'",
            "01",
            "+1",
            "1.",
            ".5",
            "1e",
            "--1",
            "nul",
            "1 2",
            "NaN",
            "\"\t\"",
            r#""\x""#,
            r#""\u12""#,
            r#""\ud83d""#,
            r#""\ude00""#,
            r#""\ud83d\u0041""#,
            "\u{feff}{}",
            r#"{"a":1,"a":2}"#,
            r#"{"a":1,"\u0061":2}"#,
            r#"{"x":{"b":1,"b":1}}"#,
            "/**/1",
            "{\"a\" 1}",
            "[1 2]",
            "]",
        ] {
            assert!(!is_json(bad.as_bytes()), "{bad}");
        }
        assert!(!is_json(b"\"\xff\""));
        assert!(is_json(("[".repeat(32) + &"]".repeat(32)).as_bytes()));
        assert!(!is_json(("[".repeat(33) + &"]".repeat(33)).as_bytes()));
    }

    #[test]
    fn a_cut_anywhere_is_not_json() {
        let whole = r#"{"a":[1,"x\u00e9",{"b":true}]}"#;
        for end in 0..whole.len() {
            assert!(!is_json(&whole.as_bytes()[..end]), "{end}");
        }
    }

    #[test]
    fn many_keys_cost_no_square() {
        let keys: Vec<_> = (0..60_000).map(|i| format!("\"{i}\":1")).collect();
        let started = std::time::Instant::now();
        assert!(is_json(format!("{{{}}}", keys.join(",")).as_bytes()));
        assert!(!is_json(format!("{{{},\"59999\":1}}", keys.join(",")).as_bytes()));
        assert!(started.elapsed().as_secs() < 4, "{:?}", started.elapsed());
    }
}
