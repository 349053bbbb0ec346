//! Streaming parser (pull parser) for strict JSON (RFC 8259): no lone surrogate, at most 32 levels, nothing after the
//! value.
//!
//! Tokens borrow the bytes of the document, and no tree is built. A bare number keeps its literal, so that no digit is
//! lost. The cursor does not check the encoding; [`check_encoding`] does, for bodies of callers. A key that occurs
//! twice in an object is not detected here: the walk of a contract does that.

mod number;
mod text;

use thiserror::Error;

pub(super) use self::number::Number;
pub(super) use self::text::Text;

/// How deep arrays and objects may nest.
// Readers recurse once a level. Without this bound a small body of `[[[[…` would overflow the stack and end the process.
const MAX_DEPTH: usize = 32;

/// The lowest byte that [`crate::plain`] may have to escape.
const DEL: u8 = 0x7F;

/// The error text for a place where a value should begin but does not.
const A_VALUE: &str = "expected a value: a string in double quotes, a number, true, false, null, `[` or `{`";

/// The error for a document that is not strict JSON.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("line {line}, column {column}: {reason}")]
pub struct NotJson {
    /// The line of the fault, from 1.
    pub line: usize,
    /// The position of the fault in its line, in characters from 1.
    pub column: usize,
    /// What is wrong. A constant text, which quotes nothing of the document.
    pub reason: &'static str,
}

impl NotJson {
    /// Returns the error for a fault at `offset`, in bytes.
    fn at(document: &[u8], offset: usize, reason: &'static str) -> Self {
        let before = document.get(..offset).unwrap_or(document);
        // Counted without a list of lines: a refused body of 16 MiB of newlines once took 256 MiB for that list.
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        let last = before.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
        // In UTF-8, the bytes of a character after its first one. A column counts characters, as editors do.
        let goes_on = |byte: &&u8| **byte & 0xC0 == 0x80;
        Self { line, column: last.len() - last.iter().filter(goes_on).count() + 1, reason }
    }
}

/// Where a walk was aborted, in bytes from the start, and why.
// Line and column are computed only when they are reported: a walk that may be aborted pays for neither.
#[derive(Clone, Copy, Debug)]
struct AbortedAt {
    offset: usize,
    reason: &'static str,
}

/// The error of every step of a [`Cursor`]: the walk cannot go on. [`Cursor::fault`] says what is wrong with the
/// document.
// Empty, since it is a part of the result of every step. The reason lies in the cursor instead.
#[derive(Clone, Copy, Debug)]
pub(super) struct Abort;

/// A value as a rule sees it: a scalar with its content, or the kind of a container.
#[derive(Clone, Copy, Debug)]
pub(super) enum Lexeme<'a> {
    Null,
    Boolean(bool),
    Number(Number<'a>),
    Text(Text<'a>),
    Array,
    Object,
}

/// Checks that a document is UTF-8 without a byte order mark, and shorter than 4 GiB. Returns whether every byte is below DEL.
///
/// # Errors
///
/// The place of the first byte that breaks one of these rules.
pub(super) fn check_encoding(document: &[u8]) -> Result<bool, NotJson> {
    // Captured scalars note their offset in 32 bits. A request is bounded by `max_body`, but `contract check` reads any file.
    if u32::try_from(document.len()).is_err() {
        return Err(NotJson::at(document, 0, "the text is longer than 4 GiB"));
    }
    let is_plain = is_plain(document);
    // Most bodies are ASCII, which is UTF-8 as it is.
    if !is_plain {
        std::str::from_utf8(document)
            .map_err(|error| NotJson::at(document, error.valid_up_to(), "this byte is not UTF-8"))?;
    }
    // RFC 8259 §8.1 forbids senders to add one, and readers may ignore it or refuse it. An upstream may do either.
    if document.starts_with("\u{feff}".as_bytes()) {
        return Err(NotJson::at(document, 0, "there is a byte order mark (BOM); leave it out"));
    }
    Ok(is_plain)
}

/// Whether every byte is below DEL. Checks eight bytes at a time. The last eight may overlap the eight before them.
// Not `is_ascii`, which accepts DEL, and which checks the bytes after its last whole block one by one.
fn is_plain(document: &[u8]) -> bool {
    const LOW: u64 = u64::from_ne_bytes([0x7F; 8]);
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    let Some(last) = document.last_chunk() else { return document.iter().all(|byte| *byte < DEL) };
    // Adding one sets the highest bit of DEL, and carries into no other byte.
    let high_bits = |bytes: [u8; 8]| {
        let bytes = u64::from_ne_bytes(bytes);
        bytes | ((bytes & LOW) + ONES)
    };
    // Without an early exit, so that the compiler can check several words at once.
    let all = document.as_chunks().0.iter().fold(high_bits(*last), |all, bytes| all | high_bits(*bytes));
    all & !LOW == 0
}

/// The kind of a value, by its first byte.
#[derive(Clone, Copy, Debug)]
pub(super) enum ValueStart {
    Text,
    Number,
    Word,
    Array,
    Object,
}

/// A position in a document. Each step reads one token and moves past it.
///
/// After an error of a step the position is not defined. The cursor must then be used for [`Cursor::fault`] and
/// [`Cursor::is_cut`] only.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
    depth: usize,
    aborted: Option<AbortedAt>,
}

impl<'a> Cursor<'a> {
    /// Returns a cursor at the beginning of a document.
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0, depth: 0, aborted: None }
    }

    /// Returns what is wrong with the document; `None` if no step failed.
    pub(super) fn fault(&self) -> Option<NotJson> {
        self.aborted.map(|aborted| NotJson::at(self.bytes, aborted.offset, aborted.reason))
    }

    /// Whether a step failed because the document ended too early. Distinguishes a reply that was cut from one that is not JSON.
    pub(super) fn is_cut(&self) -> bool {
        self.aborted.is_some_and(|aborted| aborted.offset >= self.bytes.len())
    }

    /// Returns the offset in bytes from the start of the document.
    pub(super) fn position(&self) -> usize {
        self.position
    }

    /// Returns the bytes from `start` to the current position.
    pub(super) fn since(&self, start: usize) -> &'a [u8] {
        &self.bytes[start..self.position]
    }

    /// Skips white space and returns the offset at which the next token begins.
    #[inline(always)]
    pub(super) fn skip_space(&mut self) -> usize {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.position += 1;
        }
        self.position
    }

    /// Returns the kind of the value that begins here. Does not move.
    #[inline(always)]
    pub(super) fn begins(&mut self) -> Result<ValueStart, Abort> {
        match self.peek() {
            Some(b'"') => Ok(ValueStart::Text),
            Some(b'-' | b'0'..=b'9') => Ok(ValueStart::Number),
            Some(b'{') => Ok(ValueStart::Object),
            Some(b'[') => Ok(ValueStart::Array),
            Some(b't' | b'f' | b'n') => Ok(ValueStart::Word),
            _ => Err(self.abort(A_VALUE)),
        }
    }

    /// Reads `true`, `false` or `null`.
    pub(super) fn word(&mut self) -> Result<Lexeme<'a>, Abort> {
        let words =
            [("true", Lexeme::Boolean(true)), ("false", Lexeme::Boolean(false)), ("null", Lexeme::Null)];
        let found = words.into_iter().find(|(word, _)| self.rest().starts_with(word.as_bytes()));
        let Some((word, token)) = found else {
            // The document ends within the word. Reported at its end, so that `is_cut` is true: `tru` is the beginning of a reply
            // that was cut, `trx` is a fault.
            if words.iter().any(|(word, _)| word.as_bytes().starts_with(self.rest())) {
                self.position = self.bytes.len();
            }
            return Err(self.abort(A_VALUE));
        };
        self.position += word.len();
        Ok(token)
    }

    /// Enters the array or object that begins here and ends with `close`. Returns true if it has an element. If it is
    /// empty, moves past it and returns false.
    #[inline(always)]
    pub(super) fn open(&mut self, close: u8) -> Result<bool, Abort> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.abort("arrays and objects are nested more than 32 deep"));
        }
        self.position += 1;
        self.skip_space();
        if self.peek() == Some(close) {
            self.leave();
            return Ok(false);
        }
        Ok(true)
    }

    /// Reads what follows an element. Returns true for a comma, and false for `close`, the end of the container.
    #[inline(always)]
    pub(super) fn next(&mut self, close: u8) -> Result<bool, Abort> {
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
            // A number ends after a leading 0 (RFC 8259 §6), so that the second digit of 07 is found here. Only
            // after a 0: in `[1 2]` a comma is missing, and the message must not speak of a 0.
            Some(b'0'..=b'9') if self.bytes[..self.position].ends_with(b"0") => {
                Err(self.abort("a number must not begin with an extra 0: write 7, not 07"))
            }
            _ if close == b']' => Err(self.abort("expected `,` or `]`")),
            _ => Err(self.abort("expected `,` or `}`")),
        }
    }

    /// Reads the key that begins here, without the colon after it.
    pub(super) fn key(&mut self) -> Result<Text<'a>, Abort> {
        match self.peek() {
            Some(b'"') => self.string(),
            Some(b'}') => Err(self.abort("expected a key: remove the comma before `}`")),
            _ => Err(self.abort("expected a key in double quotes")),
        }
    }

    /// Skips `literal` and returns true if the document continues with it; otherwise returns false and does not move. The literal
    /// is a key in quotes with its colon.
    #[inline(always)]
    pub(super) fn skip_key(&mut self, literal: &[u8]) -> bool {
        let is_it = begins_with(self.rest(), literal);
        if is_it {
            self.position += literal.len();
        }
        is_it
    }

    /// Reads the colon after a key.
    #[inline(always)]
    pub(super) fn colon(&mut self) -> Result<(), Abort> {
        self.skip_space();
        if self.peek() != Some(b':') {
            return Err(self.abort("expected `:` after the key"));
        }
        self.position += 1;
        Ok(())
    }

    /// Skips the value that begins here, and checks its syntax.
    pub(super) fn skip_value(&mut self) -> Result<(), Abort> {
        match self.begins()? {
            ValueStart::Text => self.string().map(drop),
            ValueStart::Number => self.number().map(drop),
            ValueStart::Word => self.word().map(drop),
            ValueStart::Array => {
                let mut more = self.open(b']')?;
                while more {
                    self.skip_space();
                    self.skip_value()?;
                    more = self.next(b']')?;
                }
                Ok(())
            }
            ValueStart::Object => {
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

    /// Checks that nothing but white space is left.
    // Something after the value may be a second one, which another parser could take for the body.
    pub(super) fn end(&mut self) -> Result<(), Abort> {
        if self.skip_space() == self.bytes.len() {
            Ok(())
        } else {
            Err(self.abort("expected the end of the text: a JSON text is one value"))
        }
    }

    /// Notes a fault at the current position and returns the error. At the end of the document, the reason is replaced
    /// by one that says that the text ends too early.
    #[cold]
    #[inline(never)]
    fn abort(&mut self, reason: &'static str) -> Abort {
        let reason = if self.position >= self.bytes.len() {
            "the text ends before its value is complete"
        } else {
            reason
        };
        self.abort_at(self.position, reason)
    }

    /// Notes a fault at `offset` and returns the error.
    #[cold]
    #[inline(never)]
    pub(super) fn abort_at(&mut self, offset: usize, reason: &'static str) -> Abort {
        self.aborted = Some(AbortedAt { offset, reason });
        Abort
    }

    #[inline(always)]
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.position).copied()
    }

    #[inline(always)]
    fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.position..).unwrap_or_default()
    }

    /// Moves past the closing bracket of a container.
    fn leave(&mut self) {
        self.position += 1;
        self.depth -= 1;
    }
}

/// Whether `bytes` begin with `literal`.
// For 8 to 16 bytes, which most keys have, two comparisons of words that may overlap replace a call of `memcmp`.
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
    fn strict_json_is_accepted() {
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
            // So many keys that repeated ones are found by a hash, not by comparing them one by one.
            &many_keys("last"),
        ] {
            assert_eq!(read(good.as_bytes()), Ok(()), "{good}");
        }
    }

    #[test]
    fn text_that_is_not_strict_json_is_rejected() {
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
        // No UTF-8: a lone byte, an overlong slash, a surrogate, and UTF-16 with its byte order mark.
        for bad in [&b"\"\xff\""[..], b"\"\xc0\xaf\"", b"\"\xed\xa0\x80\"", b"\xff\xfe1\0"] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn json_error_names_its_line_and_column() {
        let at = |text: &str| read(text.as_bytes()).map_err(|fault| (fault.line, fault.column, fault.reason));
        assert_eq!(at(r#"{"a":1, "a":2}"#), Err((1, 9, "this key occurs twice in the object")));
        assert_eq!(at(r#"["x\ud800"]"#), Err((1, 4, SURROGATE)));
        assert_eq!(at("[1,"), Err((1, 4, "the text ends before its value is complete")));
        assert_eq!(at("[\n \"é\" x]"), Err((2, 6, "expected `,` or `]`")), "a character is a column");
        assert_eq!(at("[1] x"), Err((1, 5, "expected the end of the text: a JSON text is one value")));
    }

    #[test]
    fn truncated_document_is_not_json() {
        let whole = r#" {"é\u00e9\ud83d\ude00": [1.5e-3, true, {"b": null}, "x\n"], "c": {}, "d": []}"#;
        assert_eq!(read(whole.as_bytes()), Ok(()));
        for end in 0..whole.len() {
            assert!(read(&whole.as_bytes()[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn literal_comparison_detects_a_difference_at_any_position() {
        // Beyond 8 and 16, where the comparison changes.
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
