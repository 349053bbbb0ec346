//! The headers `Idempotency-Key` and `Idempotency-Force`.

use http::HeaderValue;
use thiserror::Error;
use uuid::Uuid;

use crate::request_head::Inbound;

/// A header that breaks its rules.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum BadKey {
    /// More than one.
    #[error("Idempotency-Key and Idempotency-Force must not be given more than once")]
    Twice,
    /// Empty, too long, or with characters that are not allowed.
    #[error("Idempotency-Key must be 1 to 255 visible characters, bare or in double quotes")]
    Key,
    /// Not the id of a request.
    #[error("Idempotency-Force must be the request id that the refusal named in x-gateway-first-request-id")]
    Force,
}

/// The headers of a call.
pub(crate) struct Given<'a> {
    /// `Idempotency-Key`, without its quotes.
    pub(crate) key: Option<&'a [u8]>,
    /// `Idempotency-Force`: the call that is to be repeated.
    pub(crate) force: Option<Uuid>,
}

/// Reads the headers.
pub(crate) fn read<'a>(head: &Inbound<'a>) -> Result<Given<'a>, BadKey> {
    if head.idempotency_key.count > 1 || head.idempotency_force.count > 1 {
        return Err(BadKey::Twice);
    }
    let key = head.idempotency_key.first.map(|key| bare(key.as_bytes()).ok_or(BadKey::Key)).transpose()?;
    let parse = |id: &HeaderValue| Uuid::try_parse_ascii(id.as_bytes()).map_err(|_| BadKey::Force);
    let force = head.idempotency_force.first.map(parse).transpose()?;
    Ok(Given { key, force })
}

/// A quoted key and the same one bare are one key. No escapes: a quote or a backslash inside is refused.
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
    fn a_key_is_the_same_bare_or_quoted() {
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
