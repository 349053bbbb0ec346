//! Escapes characters that a terminal, or a reader of lines, may take for something else: invisible ones, and
//! ones that move text.
//!
//! No such character is written raw to the trail, to the log, or to the output of commands. Without that, a
//! value of another system could forge a line or hide a part of it.

/// The ranges of such characters from DEL on, in order.
///
/// They are the controls, format characters and separators of Unicode (categories Cc, Cf, Z), and the
/// characters that are not drawn where they are not supported (`Default_Ignorable_Code_Point`, with the code
/// points reserved for more of them). Some further ones are drawn as a blank or not at all: the empty braille
/// pattern, two fillers, the object replacement character, and the rest of the block of hieroglyph format
/// controls. The built-in contract rejects the same characters in an inspector's id.
const UNPLAIN: [(char, char); 31] = [
    ('\u{7F}', '\u{A0}'),
    ('\u{AD}', '\u{AD}'),
    ('\u{34F}', '\u{34F}'),
    ('\u{600}', '\u{605}'),
    ('\u{61C}', '\u{61C}'),
    ('\u{6DD}', '\u{6DD}'),
    ('\u{70F}', '\u{70F}'),
    ('\u{890}', '\u{891}'),
    ('\u{8E2}', '\u{8E2}'),
    ('\u{115F}', '\u{1160}'),
    ('\u{1680}', '\u{1680}'),
    ('\u{17B4}', '\u{17B5}'),
    ('\u{180B}', '\u{180F}'),
    ('\u{2000}', '\u{200F}'),
    ('\u{2028}', '\u{202F}'),
    ('\u{205F}', '\u{206F}'),
    ('\u{2800}', '\u{2800}'),
    ('\u{3000}', '\u{3000}'),
    ('\u{3164}', '\u{3164}'),
    ('\u{FE00}', '\u{FE0F}'),
    ('\u{FEFF}', '\u{FEFF}'),
    ('\u{FFA0}', '\u{FFA0}'),
    ('\u{FFF0}', '\u{FFFC}'),
    ('\u{110BD}', '\u{110BD}'),
    ('\u{110CD}', '\u{110CD}'),
    ('\u{13430}', '\u{1345F}'),
    ('\u{16FE4}', '\u{16FE4}'),
    ('\u{1BCA0}', '\u{1BCA3}'),
    ('\u{1D159}', '\u{1D159}'),
    ('\u{1D173}', '\u{1D17A}'),
    ('\u{E0000}', '\u{E0FFF}'),
];

/// Replaces such characters from the position `from` on by JSON's `\u` escapes. Within a JSON string they mean
/// the same; elsewhere JSON allows none of them. Text that is not UTF-8 is not changed.
pub(crate) fn escape(text: &mut Vec<u8>, from: usize) {
    // A fold without an early exit, so that the compiler can test many bytes in one instruction. Nearly every
    // record is ASCII and ends here.
    if !text[from..].iter().fold(false, |odd, byte| odd | (*byte >= 0x7F)) {
        return;
    }
    let Ok(tail) = str::from_utf8(&text[from..]) else { return };
    if !tail.contains(is_unplain) {
        return;
    }
    let escaped = escaped(tail, is_unplain);
    text.truncate(from);
    text.extend_from_slice(escaped.as_bytes());
}

/// Whether a text is one line without such characters.
pub(crate) fn is_plain(text: &str) -> bool {
    !text.contains(|character| character < ' ' || is_unplain(character))
}

/// Returns a text as one line, with such characters, line breaks and other controls escaped.
pub fn line(text: &str) -> String {
    escaped(text, |character| character < ' ' || is_unplain(character))
}

/// Returns a text as one line like [`line()`], but keeps escape sequences for colours.
pub(crate) fn colored(text: &str) -> String {
    escaped(text, |character| (character < ' ' && character != '\x1B') || is_unplain(character))
}

/// Returns a text like [`line()`], but keeps its line breaks.
pub fn lines(text: &str) -> String {
    escaped(text, |character| (character < ' ' && character != '\n') || is_unplain(character))
}

fn escaped(text: &str, is_odd: impl Fn(char) -> bool) -> String {
    let mut escaped = String::with_capacity(text.len() + 32);
    for character in text.chars() {
        match character {
            _ if !is_odd(character) => escaped.push(character),
            '\n' => escaped.push_str("\\n"),
            _ => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    escaped.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
    escaped
}

fn is_unplain(character: char) -> bool {
    let next = UNPLAIN.partition_point(|(first, _)| *first <= character);
    next > 0 && character <= UNPLAIN[next - 1].1
}

#[cfg(test)]
mod tests {
    use regex_syntax::hir::{Class, ClassUnicode, ClassUnicodeRange, HirKind};

    use super::*;

    fn set(ranges: &[(char, char)]) -> ClassUnicode {
        ClassUnicode::new(ranges.iter().map(|(first, last)| ClassUnicodeRange::new(*first, *last)))
    }

    fn class(text: &str) -> ClassUnicode {
        match regex_syntax::parse(text).unwrap().into_kind() {
            HirKind::Class(Class::Unicode(class)) => class,
            kind => panic!("{text} is no class: {kind:?}"),
        }
    }

    // The tables of `regex-syntax` follow Unicode. An update of that crate may bring more characters, and this
    // test then names them.
    #[test]
    fn invisible_characters_match_unicode_plus_unlisted_blanks() {
        let own = set(&UNPLAIN);
        assert_eq!(own.ranges().len(), UNPLAIN.len(), "in order, and none touches another");
        let mut unicode = class(r"[\p{Default_Ignorable_Code_Point}\p{Cc}\p{Cf}\p{Z}]");
        unicode.intersect(&set(&[('\u{7F}', char::MAX)]));
        let mut missing = unicode.clone();
        missing.difference(&own);
        assert_eq!(missing, set(&[]), "Unicode has these");
        let mut more = own.clone();
        more.difference(&unicode);
        let blanks = set(&[
            ('\u{2800}', '\u{2800}'),
            ('\u{FFFC}', '\u{FFFC}'),
            ('\u{13440}', '\u{1345F}'),
            ('\u{16FE4}', '\u{16FE4}'),
            ('\u{1D159}', '\u{1D159}'),
        ]);
        assert_eq!(more, blanks, "only these are beside it");
        for range in own.ranges() {
            assert!(is_unplain(range.start()) && is_unplain(range.end()), "{range:?}");
        }
        for range in {
            let mut other = own.clone();
            other.negate();
            other
        }
        .ranges()
        {
            assert!(!is_unplain(range.start()) && !is_unplain(range.end()), "{range:?}");
        }
    }

    #[test]
    fn built_in_contract_rejects_invisible_characters_in_inspector_ids() {
        let contract: serde_json::Value =
            serde_json::from_str(crate::contract::Contract::APPOINT_QUALITY_TASK).unwrap();
        let id = &contract["properties"]["setCounts"]["items"]["properties"]["personID"];
        let taken = id["pattern"].as_str().unwrap().strip_prefix('^').unwrap().strip_suffix("*$").unwrap();
        let mut refused = class(taken);
        refused.negate();
        let mut expected = set(&UNPLAIN);
        expected.union(&set(&[('\0', ' ')]));
        assert_eq!(refused, expected);
    }

    #[test]
    fn line_escapes_newlines_and_lines_keeps_them() {
        let odd = "a\u{1b}[31m\r\n\tb\u{202e}\u{e0020}é";
        let json = serde_json::to_string(odd).unwrap();
        assert_eq!(line(odd), "a\\u001b[31m\\u000d\\n\\u0009b\\u202e\\udb40\\udc20é");
        assert_eq!(lines(odd), "a\\u001b[31m\\u000d\n\\u0009b\\u202e\\udb40\\udc20é");
        assert_eq!(serde_json::from_str::<String>(&line(&json)).unwrap(), odd);
        assert_eq!(line(&json), lines(&json));
        assert_eq!(
            (line("plain é \\u001b"), lines("")),
            ("plain é \\u001b".to_owned(), String::new()),
            "the control"
        );
    }

    #[test]
    fn escaped_text_has_the_same_meaning_in_json() {
        let odd =
            "a\u{7F}\u{85}\u{9B}\u{A0}\u{AD}\u{200B}\u{2028}\u{2029}\u{202E}\u{FEFF}\u{E0020}é€\u{1F600}";
        let json = serde_json::to_string(odd).unwrap();
        let mut text = format!("{odd}{json}").into_bytes();
        escape(&mut text, odd.len());
        let text = String::from_utf8(text).unwrap();
        let escaped = text.strip_prefix(odd).unwrap();
        assert_eq!(
            escaped,
            "\"a\\u007f\\u0085\\u009b\\u00a0\\u00ad\\u200b\\u2028\\u2029\\u202e\\ufeff\\udb40\\udc20é€\u{1F600}\""
        );
        assert_eq!(serde_json::from_str::<String>(escaped).unwrap(), odd);
        for plain in [&b"plain \"ascii\"\n"[..], "é€".as_bytes(), b"\xff\xc2\x85"] {
            let mut text = plain.to_vec();
            escape(&mut text, 0);
            assert_eq!(text, plain);
        }
    }
}
