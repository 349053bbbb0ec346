//! Writes the members of a record into its line, as JSON text.
//!
//! It allocates nothing as long as the line's buffer has room. Whatever a text holds, the line stays valid JSON on
//! one line, without characters that a terminal could take for something else.

use jiff::Timestamp;
use serde::Serialize;

use crate::plain;

/// A line under construction. Each `key` is JSON text with the comma in front and the colon behind it; that of
/// [`Line::word`] and [`Line::time`] also has the opening quote.
// Keys as ready text: to write one is a copy of a constant.
pub(super) struct Line<'a>(pub(super) &'a mut Vec<u8>);

impl Line<'_> {
    /// Appends a text as a JSON string. Bytes that are not UTF-8 are replaced.
    pub(super) fn text(&mut self, key: &'static str, text: &[u8]) {
        self.0.extend_from_slice(key.as_bytes());
        // No early exit, so that the compiler can check many bytes with one instruction.
        let odd = text.iter().fold(false, |odd, byte| {
            odd | (*byte < b' ') | (*byte > b'~') | (*byte == b'"') | (*byte == b'\\')
        });
        if !odd {
            self.0.push(b'"');
            self.0.extend_from_slice(text);
            self.0.push(b'"');
        } else {
            self.serialized(&String::from_utf8_lossy(text));
        }
    }

    /// Appends a text that needs no escape: one of our own constants, or a validated one.
    // Always inlined: the keys are constants, so that each becomes a few moves and no call.
    #[inline(always)]
    pub(super) fn word(&mut self, key: &'static str, word: impl AsRef<[u8]>) {
        self.0.extend_from_slice(key.as_bytes());
        self.0.extend_from_slice(word.as_ref());
        self.0.push(b'"');
    }

    /// Appends a text, if there is one.
    pub(super) fn optional(&mut self, key: &'static str, text: Option<impl AsRef<[u8]>>) {
        if let Some(text) = text {
            self.text(key, text.as_ref());
        }
    }

    /// Appends a number.
    #[inline(always)]
    pub(super) fn number(&mut self, key: &'static str, number: u64) {
        self.0.extend_from_slice(key.as_bytes());
        self.0.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
    }

    /// Appends a number of thousandths as a decimal number, such as microseconds as milliseconds.
    // In integers: a floating-point number would print digits that the clock does not have.
    pub(super) fn thousandths(&mut self, key: &'static str, number: u64) {
        self.number(key, number / 1000);
        let rest = number % 1000;
        if rest > 0 {
            self.0.push(b'.');
            self.digits::<3>(rest);
        }
    }

    /// Appends a time as RFC 3339 in UTC. `micros` are microseconds since 1970; `second` caches the text of the last
    /// second.
    pub(super) fn time(&mut self, key: &'static str, micros: u64, second: &mut Second) {
        self.0.extend_from_slice(key.as_bytes());
        self.0.extend_from_slice(second.text(micros / 1_000_000));
        self.0.push(b'.');
        self.digits::<6>(micros % 1_000_000);
        self.0.extend_from_slice(b"Z\"");
    }

    /// Appends any value that can be serialised. `key` is the bare name here: it may come from an event's details.
    pub(super) fn any(&mut self, key: &str, value: &impl Serialize) {
        self.0.push(b',');
        self.serialized(&key);
        self.0.push(b':');
        self.serialized(value);
    }

    /// Appends text that is JSON already.
    pub(super) fn raw(&mut self, text: &[u8]) {
        self.0.extend_from_slice(text);
    }

    fn serialized(&mut self, value: &(impl Serialize + ?Sized)) {
        let from = self.0.len();
        // It cannot fail: strings, numbers and maps of them are written into memory.
        let _ = serde_json::to_writer(&mut *self.0, value);
        // JSON allows U+2028 and other invisible characters raw. In a trail that people read they could hide or
        // imitate something.
        plain::escape(self.0, from);
    }

    /// Appends the last `COUNT` digits of a number, with leading zeros.
    #[inline(always)]
    fn digits<const COUNT: u32>(&mut self, number: u64) {
        // One more digit in front, which is then left out, so that the formatter keeps the zeros.
        let mut text = itoa::Buffer::new();
        let digits = text.format(number + 10u64.pow(COUNT)).as_bytes();
        self.0.extend_from_slice(&digits[1..]);
    }
}

/// The text of the last second.
// Formatting a date takes longer than the rest of a line's head, and one second has many records.
#[derive(Debug, Default)]
pub(super) struct Second {
    second: Option<u64>,
    text: String,
}

impl Second {
    fn text(&mut self, second: u64) -> &[u8] {
        if self.second != Some(second) {
            self.second = Some(second);
            // No clock reaches what jiff cannot represent. A wrong one gives the latest time instead of a panic in
            // the queue.
            let time = i64::try_from(second).ok().and_then(|second| Timestamp::from_second(second).ok());
            self.text = time.unwrap_or(Timestamp::MAX).to_string();
            self.text.truncate(self.text.trim_end_matches('Z').len());
        }
        self.text.as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl FnOnce(&mut Line<'_>)) -> String {
        let mut bytes = Vec::new();
        write(&mut Line(&mut bytes));
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn members_with_any_content_are_valid_json() {
        // Each of these takes another path: no escape, JSON's own escapes, bytes that are not ASCII, and characters
        // beyond JSON's rules.
        for text in ["plain", "", "quo\"te", "back\\slash", "line\nbreak", "é\u{7f}\u{0}", "</script>"] {
            let line = written(|line| line.text("\"k\":", text.as_bytes()));
            let parsed: serde_json::Value = serde_json::from_str(&format!("{{{line}}}")).unwrap();
            assert_eq!(parsed["k"], text);
        }
        assert_eq!(written(|line| line.text("", b"\xff")), "\"\u{fffd}\"");
        assert_eq!(written(|line| line.number("", u64::MAX)), u64::MAX.to_string());
        for (number, text) in [(0, "0"), (7, "0.007"), (1000, "1"), (1010, "1.010"), (1_234_567, "1234.567")]
        {
            assert_eq!(written(|line| line.thousandths("", number)), text);
        }
    }

    #[test]
    fn written_times_match_those_of_jiff() {
        let mut second = Second::default();
        // Zeros on the left of the fraction and on a change of the second are where a writer of digits goes wrong.
        for micros in [0, 1, 999_999, 1_000_000, 1_795_500_000_123_456, 1_795_500_000_999_999] {
            let time = Timestamp::from_microsecond(micros).unwrap();
            let line = written(|line| line.time("\"", micros.try_into().unwrap(), &mut second));
            assert_eq!(line, format!("\"{time:.6}\""));
        }
    }
}
