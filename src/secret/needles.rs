//! The search for quoted secrets in replies: a server that echoes a request would otherwise disclose the credential to callers.
//!
//! A secret is found literally and with JSON's escapes, up to three levels deep. Secrets of fewer than 16 bytes are not
//! searched for, nor are other encodings such as base64. A filter passes most texts in one vectorised loop before the exact
//! search.

use std::borrow::Cow;

use memchr::{memchr, memmem};
use zeroize::Zeroizing;

use super::Secret;
use crate::config::{Config, SecretSource};

/// The least length in bytes of a secret that is searched for.
// A shorter one would be found in texts that do not quote it, and a reply would be withheld without need.
pub const SHORTEST: usize = 16;

/// How many levels of JSON's escapes are undone. Each JSON text within a JSON string adds one.
const DEPTH: usize = 3;

/// The first byte of JSON's escapes.
const ESCAPE: u8 = b'\\';

/// The bytes that one step of the filter compares: a vector register of 128 bits, which every x86-64 and AArch64 CPU has.
const LANES: usize = 16;

/// The most bytes that JSON's escapes make of one byte: `\u00xx`.
const ESCAPED: usize = 6;

/// Returns a warning for each secret of a configuration that is too short to be searched for. Reads the secrets; one that
/// cannot be read is skipped, since it is an error elsewhere.
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
            "certificates, such as that of a proxy that intercepts TLS,",
        )
    });
    of_credentials.chain(of_proxy).collect()
}

/// Up to three secrets that a text must not quote, in buffers that are overwritten.
pub struct Needles {
    needles: Vec<Zeroizing<Vec<u8>>>,
    /// Of each secret two adjacent bytes that are rare in JSON and headers, each repeated for all lanes. A text with neither of
    /// these pairs and no escape quotes no secret.
    pairs: [[[u8; LANES]; 2]; 3],
    /// The length of the shortest secret; `usize::MAX` if there is none.
    shortest: usize,
}

impl Needles {
    /// Takes those of the texts that are at least [`SHORTEST`] long. Pass empty texts for fewer than three.
    pub fn new(texts: [&[u8]; 3]) -> Self {
        let long = texts.into_iter().filter(|text| text.len() >= SHORTEST);
        let needles: Vec<_> = long.map(|text| Zeroizing::new(text.to_vec())).collect();
        // With fewer than three secrets the first one's pair is repeated: the loop of the filter has three in any case.
        let pair = |index: usize| {
            let needle = needles.get(index).or(needles.first());
            needle.map_or([0; 2], |needle| rarest_pair(needle)).map(|byte| [byte; LANES])
        };
        let shortest = needles.iter().map(|needle| needle.len()).min().unwrap_or(usize::MAX);
        Self { pairs: [pair(0), pair(1), pair(2)], shortest, needles }
    }

    /// Whether a text quotes one of the secrets, literally or with JSON's escapes.
    pub fn are_in(&self, text: &[u8]) -> bool {
        text.len() >= self.shortest
            && self.may_be_in(text)
            && (self.are_literally_in(text) || self.are_escaped_in(text))
    }

    /// The filter: whether a text has one of the pairs, or an escape. Most replies are short and have neither, and this costs a
    /// quarter of a search. It may be true for a text without a quote, never false for one with a quote.
    fn may_be_in(&self, text: &[u8]) -> bool {
        // Two views of the text, one byte apart, so that the bytes of a pair are compared at the same place.
        let (Some((_, left)), Some((_, right))) = (text.split_last(), text.split_first()) else {
            return false;
        };
        let (Some(last_left), Some(last_right)) = (left.last_chunk(), right.last_chunk()) else {
            return true;
        };
        let pieces = left.as_chunks().0.iter().zip(right.as_chunks().0);
        let mut found = [0; LANES];
        // No early exit and no short-circuit `&&` or `||`: each branch would keep the compiler from comparing all lanes at once.
        let mut compare = |left: &[u8; LANES], right: &[u8; LANES]| {
            for at in 0..LANES {
                let is = |[a, b]: &[[u8; LANES]; 2]| (left[at] == a[at]) & (right[at] == b[at]);
                let [first, second, third] = &self.pairs;
                let is_any = is(first) | is(second) | is(third) | (left[at] == ESCAPE);
                found[at] |= u8::from(is_any);
            }
        };
        pieces.for_each(|(left, right)| compare(left, right));
        // The chunks leave a rest. The last full chunk overlaps them and covers it, without a loop over single bytes.
        compare(last_left, last_right);
        found != [0; LANES]
    }

    fn are_escaped_in(&self, text: &[u8]) -> bool {
        let mut text = Cow::Borrowed(text);
        // Bounded: each level copies the text, and a hostile reply could be escaped any number of times.
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

    /// Whether these search for `secret`, or it is too short to be searched for.
    pub(crate) fn are_of(&self, secret: &Secret) -> bool {
        let secret = secret.expose();
        secret.len() < SHORTEST || self.needles.iter().any(|needle| **needle == secret)
    }

    /// The most bytes that a quote of one of the secrets takes, escaped once; 0 without a secret. A reader of a stream holds
    /// back as many bytes, so that no quote is passed on before it is complete.
    pub fn longest(&self) -> usize {
        self.needles.iter().map(|needle| ESCAPED * needle.len()).max().unwrap_or(0)
    }
}

/// Returns the two adjacent bytes of a secret that are the rarest in English words, numbers and dates.
// A pair that is found in most replies would cost the filter and the search. A wrong guess costs time only.
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

/// Returns a text with one level of JSON's escapes undone, of which the first is at `first`.
// Lenient where JSON is strict: a sender's own reader may be lenient as well, and what it reads must be searched.
fn unescaped(text: &[u8], first: usize) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let (mut rest, mut next) = (text, Some(first));
    while let Some(at) = next {
        plain.extend_from_slice(&rest[..at]);
        rest = &rest[at + 1..];
        rest = match rest {
            [b'u', after @ ..] => match code_point(after) {
                Some((character, after)) => {
                    plain.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                    after
                }
                // `\u` without four digits is no escape, so it stays as it is.
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

/// Returns the character of a `\u` escape and the text behind it, given the text behind the `u`. `None` without four
/// hexadecimal digits.
fn code_point(text: &[u8]) -> Option<(char, &[u8])> {
    let unit = |text: &[u8]| -> Option<u32> {
        let digits = text.get(..4).filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))?;
        u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    };
    let (high, rest) = (unit(text)?, &text[4..]);
    if let Some(character) = char::from_u32(high) {
        return Some((character, rest));
    }
    // A surrogate (RFC 8259, section 7): a high one needs a low one behind it, and any other is replaced, as JSON readers do.
    let low = rest.strip_prefix(b"\\u").and_then(unit).filter(|low| (0xDC00..0xE000).contains(low));
    match low.filter(|_| (0xD800..0xDC00).contains(&high)) {
        Some(low) => Some((char::from_u32(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))?, &rest[6..])),
        None => Some((char::REPLACEMENT_CHARACTER, rest)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // All that JSON escapes or may escape: a slash, quotes, a backslash, letters beyond ASCII and beyond the basic plane.
    const SECRET: &str = "AbC/d\"e\\f+0123456789é\u{1F600}=";

    /// Spells each character as `\u` escapes.
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
        // Without its first or last byte, and with escapes that the text ends in.
        for other in [&SECRET[1..], &SECRET[..SECRET.len() - 1], "", "\\", "\\u", "\\u12", "A\\"] {
            assert!(!needles.are_in(format!("a text that holds no secret: {other}").as_bytes()), "{other}");
        }
    }

    #[test]
    fn secret_is_found_at_every_position_in_texts_of_any_length() {
        let key = "AKIDz8krbsJ5yKBZQpn74WFkmLPx3EXAMPLE";
        // A usual key, one of the shortest length, one in which every place looks alike, and one of rare bytes in a row.
        for secret in [key, "0123456789abcdef", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "-----BEGIN KEY-----"] {
            let needles = Needles::new([secret.as_bytes(), b"another-secret-0", b""]);
            // Up to 40 bytes on each side: more than two steps of the filter, so that a quote lies across every border of its
            // chunks.
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
    fn needle_below_the_minimum_length_is_not_searched() {
        let text = b"resultCode 0123456789abcdef";
        assert!(Needles::new([b"", b"x", b"0123456789abcdef"]).are_in(text), "the control");
        assert!(!Needles::new([b"", b"x", b"123456789abcdef"]).are_in(text));
    }

    #[test]
    fn unescaped_text_equals_the_decoded_json_string() {
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
