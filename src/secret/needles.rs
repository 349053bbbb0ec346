//! The credential as something to look for in what the other side says: a server that echoes a request would give it away.

use std::borrow::Cow;

use memchr::{memchr, memmem};
use zeroize::Zeroizing;

use super::Secret;
use crate::config::{Config, SecretSource};

/// A shorter one is not looked for: it would be found where nobody quoted it.
pub const SHORTEST: usize = 16;

/// JSON within JSON is escaped once more. We look this deep.
const DEPTH: usize = 3;

/// What JSON's escapes begin with.
const ESCAPE: u8 = b'\\';

/// So many bytes are looked at in one step.
const LANES: usize = 16;

/// `\u00xx`: so many bytes may stand for one.
const ESCAPED: usize = 6;

/// Says which secrets of a configuration are too short to be looked for. One that cannot be read is not told here.
pub fn notices(config: &Config) -> Vec<String> {
    let is_short =
        |source: &SecretSource| Secret::load(source).is_ok_and(|secret| secret.expose().len() < SHORTEST);
    let notice = |what: &str, quoting: &str| {
        format!("{what} has fewer than {SHORTEST} bytes: {quoting} that quote it are not noticed")
    };
    let of_credentials = config
        .credentials
        .iter()
        .flat_map(|of| [(&of.name, "app key", of.app_key()), (&of.name, "app secret", of.app_secret())])
        .filter(|(.., source)| is_short(source))
        .map(|(credential, what, _)| notice(&format!("the {what} of credential {credential}"), "replies"));
    let login = config.upstream.proxy_password_file.clone().map(SecretSource::File);
    let of_proxy = login.filter(is_short).map(|_| {
        notice(
            "the password in upstream.proxy_password_file",
            "certificates, as of a proxy that breaks TLS open,",
        )
    });
    of_credentials.chain(of_proxy).collect()
}

/// What must not be quoted: three texts at most, in buffers that are overwritten.
pub struct Needles {
    needles: Vec<Zeroizing<Vec<u8>>>,
    /// Two neighbours out of each that are rare in JSON and in headers, each so often that it can be compared with as many
    /// bytes of a text. One without them and without escapes need not be searched.
    pairs: [[[u8; LANES]; 2]; 3],
    /// The length of the shortest one.
    shortest: usize,
}

impl Needles {
    /// Of these texts, those that are long enough.
    pub fn new(texts: [&[u8]; 3]) -> Self {
        let long = texts.into_iter().filter(|text| text.len() >= SHORTEST);
        let needles: Vec<_> = long.map(|text| Zeroizing::new(text.to_vec())).collect();
        let pair = |index: usize| {
            let needle = needles.get(index).or(needles.first());
            needle.map_or([0; 2], |needle| rarest_pair(needle)).map(|byte| [byte; LANES])
        };
        let shortest = needles.iter().map(|needle| needle.len()).min().unwrap_or(usize::MAX);
        Self { pairs: [pair(0), pair(1), pair(2)], shortest, needles }
    }

    /// Whether one of them stands in a text, literally or with JSON's escapes.
    pub fn are_in(&self, text: &[u8]) -> bool {
        text.len() >= self.shortest
            && self.may_be_in(text)
            && (self.are_literally_in(text) || self.are_escaped_in(text))
    }

    /// Whether one of the pairs, or an escape, stands in a text. Most replies are short and have none: this costs a quarter of
    /// a search. Without an early exit, so that many places are looked at in one instruction.
    fn may_be_in(&self, text: &[u8]) -> bool {
        let (Some((_, left)), Some((_, right))) = (text.split_last(), text.split_first()) else {
            return false;
        };
        let (Some(last_left), Some(last_right)) = (left.last_chunk(), right.last_chunk()) else {
            return true;
        };
        let pieces = left.as_chunks().0.iter().zip(right.as_chunks().0);
        let mut found = [0; LANES];
        let mut look = |left: &[u8; LANES], right: &[u8; LANES]| {
            for place in 0..LANES {
                let is = |[a, b]: &[[u8; LANES]; 2]| (left[place] == a[place]) & (right[place] == b[place]);
                let [first, second, third] = &self.pairs;
                let is_any = is(first) | is(second) | is(third) | (left[place] == ESCAPE);
                found[place] |= u8::from(is_any);
            }
        };
        pieces.for_each(|(left, right)| look(left, right));
        look(last_left, last_right);
        found != [0; LANES]
    }

    fn are_escaped_in(&self, text: &[u8]) -> bool {
        let mut text = Cow::Borrowed(text);
        for _ in 0..DEPTH {
            let Some(first) = memchr(ESCAPE, &text) else { return false };
            text = unescaped(&text, first).into();
            if self.are_literally_in(&text) {
                return true;
            }
        }
        false
    }

    fn are_literally_in(&self, text: &[u8]) -> bool {
        self.needles.iter().any(|needle| memmem::find(text, needle).is_some())
    }

    /// Whether this is one of them, or is too short to be.
    pub(crate) fn are_of(&self, secret: &Secret) -> bool {
        let secret = secret.expose();
        secret.len() < SHORTEST || self.needles.iter().any(|needle| **needle == secret)
    }

    /// How many bytes one of them may take, escaped once.
    pub fn longest(&self) -> usize {
        self.needles.iter().map(|needle| ESCAPED * needle.len()).max().unwrap_or(0)
    }
}

/// The two neighbours that English words, numbers and dates have most seldom: what is found often costs more than it saves.
fn rarest_pair(text: &[u8]) -> [u8; 2] {
    let rarity = |byte: u8| match byte {
        b'j' | b'q' | b'x' | b'z' | b'K' | b'Q' | b'X' | b'Y' | b'Z' => 4,
        b'A'..=b'Z' => 3,
        b'b' | b'f' | b'k' | b'v' | b'w' => 2,
        b'1'..=b'9' | b'g' | b'h' | b'm' | b'y' => 1,
        _ => 0,
    };
    let pairs = text.array_windows().copied();
    pairs.max_by_key(|[left, right]| rarity(*left) + rarity(*right)).unwrap_or_default()
}

/// A text without JSON's escapes, of which the first stands at `first`. What is no escape stays.
fn unescaped(text: &[u8], first: usize) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let (mut rest, mut next) = (text, Some(first));
    while let Some(place) = next {
        plain.extend_from_slice(&rest[..place]);
        rest = &rest[place + 1..];
        rest = match rest {
            [b'u', after @ ..] => match code_point(after) {
                Some((character, after)) => {
                    plain.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                    after
                }
                None => {
                    plain.push(b'\\');
                    rest
                }
            },
            [escaped, after @ ..] => {
                let byte = match escaped {
                    b'b' => 8,
                    b'f' => 12,
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    other => *other,
                };
                plain.push(byte);
                after
            }
            [] => rest,
        };
        next = memchr(ESCAPE, rest);
    }
    plain.extend_from_slice(rest);
    plain
}

/// The character of `\u` and what stands behind it.
fn code_point(text: &[u8]) -> Option<(char, &[u8])> {
    let unit = |text: &[u8]| -> Option<u32> {
        let digits = text.get(..4).filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))?;
        u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    };
    let (high, rest) = (unit(text)?, &text[4..]);
    if let Some(character) = char::from_u32(high) {
        return Some((character, rest));
    }
    let low = rest.strip_prefix(b"\\u").and_then(unit).filter(|low| (0xDC00..0xE000).contains(low));
    match low.filter(|_| (0xD800..0xDC00).contains(&high)) {
        Some(low) => Some((char::from_u32(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))?, &rest[6..])),
        None => Some((char::REPLACEMENT_CHARACTER, rest)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "AbC/d\"e\\f+0123456789é\u{1F600}=";

    /// Each character as `\u`.
    fn spelled(text: &str) -> String {
        text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect()
    }

    #[test]
    fn secret_is_found_literally_and_escaped() {
        let needles = Needles::new([SECRET.as_bytes(), b"", b""]);
        let escaped = serde_json::to_string(SECRET).unwrap();
        let once = escaped.trim_matches('"');
        let twice = serde_json::to_string(&format!("{{\"a\":{escaped}}}")).unwrap();
        let upper = spelled(SECRET).to_uppercase().replace("\\U", "\\u");
        for quoted in [
            SECRET.to_owned(),
            once.to_owned(),
            once.replace('/', "\\/"),
            spelled(SECRET),
            upper,
            twice.clone(),
            serde_json::to_string(&twice).unwrap(),
            format!("\\u00{SECRET}"),
            format!("\\\\\\u0041{}", &once[1..]),
        ] {
            assert!(needles.are_in(quoted.as_bytes()), "{quoted}");
            assert!(needles.are_in(format!("{{\"x\":\"{quoted}\\n\"}}").as_bytes()), "{quoted}");
        }
        for other in [&SECRET[1..], &SECRET[..SECRET.len() - 1], "", "\\", "\\u", "\\u12", "A\\"] {
            assert!(!needles.are_in(format!("a text that holds no secret: {other}").as_bytes()), "{other}");
        }
    }

    #[test]
    fn secret_is_found_at_each_place_of_a_text_of_any_length() {
        let key = "AKIDz8krbsJ5yKBZQpn74WFkmLPx3EXAMPLE";
        for secret in [key, "0123456789abcdef", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "-----BEGIN KEY-----"] {
            let needles = Needles::new([secret.as_bytes(), b"another-secret-0", b""]);
            for (before, behind) in (0..40).flat_map(|before| (0..40).map(move |behind| (before, behind))) {
                let [before, behind] = [before, behind].map(|length| "t".repeat(length));
                assert!(
                    needles.are_in(format!("{before}{secret}{behind}").as_bytes()),
                    "{before}{secret}{behind}"
                );
                let control = format!("{before}{}{behind}", &secret[1..]);
                assert_eq!(needles.are_in(control.as_bytes()), control.contains(secret), "{control}");
                let escaped = format!("{before}\\u00{:02x}{}{behind}", secret.as_bytes()[0], &secret[1..]);
                assert!(needles.are_in(escaped.as_bytes()), "{escaped}");
            }
        }
    }

    #[test]
    fn needle_that_is_too_short_is_not_looked_for() {
        let text = b"resultCode 0123456789abcdef";
        assert!(Needles::new([b"", b"x", b"0123456789abcdef"]).are_in(text), "the control");
        assert!(!Needles::new([b"", b"x", b"123456789abcdef"]).are_in(text));
    }

    #[test]
    fn what_is_left_of_a_text_without_escapes_is_what_json_says() {
        for text in ["", "plain", SECRET, "\u{8}\u{c}\n\r\t\u{0}", "\u{FFFF}\u{10000}\u{10FFFF}"] {
            for json in [serde_json::to_string(text).unwrap(), format!("\"{}\"", spelled(text))] {
                let first = memchr(b'\\', json.as_bytes()).unwrap_or(json.len());
                let plain = match first < json.len() {
                    true => unescaped(json.as_bytes(), first),
                    false => json.into_bytes(),
                };
                assert_eq!(plain, format!("\"{text}\"").into_bytes());
            }
        }
    }
}
