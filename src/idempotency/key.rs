//! Parses the headers `Idempotency-Key` and `Idempotency-Force`.
//!
//! The form of a key in quotes is that of draft-ietf-httpapi-idempotency-key-header. Many clients send a key without quotes,
//! so that is accepted, too.

use http::HeaderValue;
use thiserror::Error;
use uuid::Uuid;

use crate::request_head::Inbound;

/// Why a header is not accepted.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum BadKey {
    /// One of the headers is given more than once.
    #[error("Idempotency-Key and Idempotency-Force must not be given more than once")]
    Twice,
    /// The key is empty, longer than 255 bytes, or has characters that are not allowed.
    #[error("Idempotency-Key must be 1 to 255 visible characters, bare or in double quotes")]
    Key,
    /// `Idempotency-Force` is not the id of a request.
    #[error("Idempotency-Force must be the request id that the refusal named in x-gateway-first-request-id")]
    Force,
}

/// What the headers of a call say.
pub(crate) struct Given<'a> {
    /// `Idempotency-Key`, without its quotes.
    pub(crate) key: Option<&'a [u8]>,
    /// `Idempotency-Force`: the request id of the call that is to be repeated.
    pub(crate) force: Option<Uuid>,
}

/// Reads both headers. Fails if one of them breaks its rules; a header that is not there breaks none.
pub(crate) fn read<'a>(head: &Inbound<'a>) -> Result<Given<'a>, BadKey> {
    // Refused instead of taking the first: with two keys, software on the way may have used the other one.
    if head.idempotency_key.count > 1 || head.idempotency_force.count > 1 {
        return Err(BadKey::Twice);
    }
    let key = head.idempotency_key.first.map(|key| bare(key.as_bytes()).ok_or(BadKey::Key)).transpose()?;
    let parse = |id: &HeaderValue| Uuid::try_parse_ascii(id.as_bytes()).map_err(|_| BadKey::Force);
    let force = head.idempotency_force.first.map(parse).transpose()?;
    Ok(Given { key, force })
}

/// The key without its quotes; `None` if it breaks the rules. A key in quotes and the same key without them are one key.
// No escapes: `"a\"b"` could be read as two different keys, so a quote or a backslash inside is refused.
fn bare(value: &[u8]) -> Option<&[u8]> {
    let key = match value {
        [b'"', key @ .., b'"'] => key,
        key => key,
    };
    let is_plain = key.iter().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\'));
    (is_plain && (1..=255).contains(&key.len())).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_and_quoted_keys_are_equal() {
        let long = [b'k'; 255];
        for (value, key) in [
            (&b"k"[..], Some(&b"k"[..])),
            (b"\"k\"", Some(b"k")),
            (b"a-b_c.d~!#,;=", Some(b"a-b_c.d~!#,;=")),
            (&long, Some(&long)),
            (&[b'k'; 256], None),
            (b"", None),
            (b"\"\"", None),
            (b"\"", None),
            (b"\"k", None),
            (b"k\"", None),
            (b"a b", None),
            (b"a\tb", None),
            (b"a\\b", None),
            (b"\xc3\xa9", None),
        ] {
            assert_eq!(bare(value), key, "{}", value.escape_ascii());
        }
    }
}
