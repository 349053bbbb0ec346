//! Characters that a terminal, or a reader of lines, may take for something else. They stand raw in neither trail nor log.

/// Control, format and separator characters of Unicode 14 (categories Cc, Cf, Z), from DEL on, as ranges.
const UNPLAIN: [(char, char); 24] = [
    ('\u{7F}', '\u{A0}'),
    ('\u{AD}', '\u{AD}'),
    ('\u{600}', '\u{605}'),
    ('\u{61C}', '\u{61C}'),
    ('\u{6DD}', '\u{6DD}'),
    ('\u{70F}', '\u{70F}'),
    ('\u{890}', '\u{891}'),
    ('\u{8E2}', '\u{8E2}'),
    ('\u{1680}', '\u{1680}'),
    ('\u{180E}', '\u{180E}'),
    ('\u{2000}', '\u{200F}'),
    ('\u{2028}', '\u{202F}'),
    ('\u{205F}', '\u{2064}'),
    ('\u{2066}', '\u{206F}'),
    ('\u{3000}', '\u{3000}'),
    ('\u{FEFF}', '\u{FEFF}'),
    ('\u{FFF9}', '\u{FFFB}'),
    ('\u{110BD}', '\u{110BD}'),
    ('\u{110CD}', '\u{110CD}'),
    ('\u{13430}', '\u{13438}'),
    ('\u{1BCA0}', '\u{1BCA3}'),
    ('\u{1D173}', '\u{1D17A}'),
    ('\u{E0001}', '\u{E0001}'),
    ('\u{E0020}', '\u{E007F}'),
];

/// Writes such characters of a text, from a place on, as JSON's `\u` escapes. Within a JSON string they mean the same; anywhere
/// else JSON has none of them. What is not UTF-8 stays.
pub(crate) fn escape(text: &mut Vec<u8>, from: usize) {
    // Without an early exit, so that many bytes are looked at in one instruction.
    if !text[from..].iter().fold(false, |odd, byte| odd | (*byte >= 0x7F)) {
        return;
    }
    let Ok(tail) = str::from_utf8(&text[from..]) else { return };
    if !tail.contains(is_unplain) {
        return;
    }
    let mut escaped = String::with_capacity(tail.len() + 32);
    for character in tail.chars() {
        if is_unplain(character) {
            for unit in character.encode_utf16(&mut [0; 2]) {
                escaped.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            escaped.push(character);
        }
    }
    text.truncate(from);
    text.extend_from_slice(escaped.as_bytes());
}

fn is_unplain(character: char) -> bool {
    character >= '\u{7F}' && UNPLAIN.iter().any(|(first, last)| (*first..=*last).contains(&character))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_escaped_means_the_same_in_json() {
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
