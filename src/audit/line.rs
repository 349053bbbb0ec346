//! Writes a record's members into its line. Allocates nothing where the line has room.

use jiff::Timestamp;
use serde::Serialize;

use crate::plain;

/// A line under construction. Every key is given with the comma before it and the colon behind it; that of a
/// word with the opening quote, too.
pub(super) struct Line<'a>(pub(super) &'a mut Vec<u8>);

impl Line<'_> {
    /// A text; what JSON needs escaped is escaped, what is not UTF-8 is replaced.
    pub(super) fn text(&mut self, key: &'static str, text: &[u8]) {
        self.0.extend_from_slice(key.as_bytes());
        // No early exit, so that many bytes are looked at in one instruction.
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

    /// A text of ours, which needs no escape. Always inlined: keys are constants, so that each is a few moves and no call.
    #[inline(always)]
    pub(super) fn word(&mut self, key: &'static str, word: impl AsRef<[u8]>) {
        self.0.extend_from_slice(key.as_bytes());
        self.0.extend_from_slice(word.as_ref());
        self.0.push(b'"');
    }

    pub(super) fn optional(&mut self, key: &'static str, text: Option<impl AsRef<[u8]>>) {
        if let Some(text) = text {
            self.text(key, text.as_ref());
        }
    }

    #[inline(always)]
    pub(super) fn number(&mut self, key: &'static str, number: u64) {
        self.0.extend_from_slice(key.as_bytes());
        self.0.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
    }

    /// A number of thousandths, as a decimal number.
    pub(super) fn thousandths(&mut self, key: &'static str, number: u64) {
        self.number(key, number / 1000);
        let rest = number % 1000;
        if rest > 0 {
            self.0.push(b'.');
            self.digits::<3>(rest);
        }
    }

    /// RFC 3339, UTC, of microseconds since 1970. `second` remembers the last second's text.
    pub(super) fn time(&mut self, key: &'static str, micros: u64, second: &mut Second) {
        self.0.extend_from_slice(key.as_bytes());
        self.0.extend_from_slice(second.text(micros / 1_000_000));
        self.0.push(b'.');
        self.digits::<6>(micros % 1_000_000);
        self.0.extend_from_slice(b"Z\"");
    }

    /// Anything that can be serialised.
    pub(super) fn any(&mut self, key: &str, value: &impl Serialize) {
        self.0.push(b',');
        self.serialized(&key);
        self.0.push(b':');
        self.serialized(value);
    }

    pub(super) fn raw(&mut self, text: &[u8]) {
        self.0.extend_from_slice(text);
    }

    fn serialized(&mut self, value: &(impl Serialize + ?Sized)) {
        let from = self.0.len();
        // Writing strings, numbers and maps of them into memory cannot fail.
        let _ = serde_json::to_writer(&mut *self.0, value);
        plain::escape(self.0, from);
    }

    /// The last six digits of a number, or the last three.
    #[inline(always)]
    fn digits<const COUNT: u32>(&mut self, number: u64) {
        // A digit in front keeps the zeros.
        let mut text = itoa::Buffer::new();
        let digits = text.format(number + 10u64.pow(COUNT)).as_bytes();
        self.0.extend_from_slice(&digits[1..]);
    }
}

/// The last second, and its text: a second has many records.
#[derive(Debug, Default)]
pub(super) struct Second {
    second: Option<u64>,
    text: String,
}

impl Second {
    fn text(&mut self, second: u64) -> &[u8] {
        if self.second != Some(second) {
            self.second = Some(second);
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
    fn members_are_json_whatever_they_hold() {
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
    fn times_are_what_jiff_prints() {
        let mut second = Second::default();
        for micros in [0, 1, 999_999, 1_000_000, 1_795_500_000_123_456, 1_795_500_000_999_999] {
            let time = Timestamp::from_microsecond(micros).unwrap();
            let line = written(|line| line.time("\"", micros.try_into().unwrap(), &mut second));
            assert_eq!(line, format!("\"{time:.6}\""));
        }
    }
}
