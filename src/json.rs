//! Reads strict JSON, token by token: no lone surrogate, at most 32 levels, nothing behind the value.
//!
//! Tokens borrow the bytes; no tree is built. [`check_encoding`] checks that the bytes are UTF-8 without a BOM. A key that
//! stands twice is not noticed here.

mod number;
mod text;

use thiserror::Error;

pub(super) use self::number::Number;
pub(super) use self::text::Text;

/// How deep arrays and objects may nest.
const MAX_DEPTH: usize = 32;

/// The lowest byte that `plain` may have to escape.
const DEL: u8 = 0x7F;

/// What stands where a value must.
const A_VALUE: &str = "expected a value: a string in double quotes, a number, true, false, null, `[` or `{`";

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

/// Checks that a document is UTF-8 without a byte order mark, and no longer than an offset can tell. Returns whether every byte
/// is below DEL.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::is_strict_json as read;
    use crate::json::text::SURROGATE;

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
}
