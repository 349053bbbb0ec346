//! The ids that callers give their requests in `x-request-id`.

use http::HeaderValue;

/// Whether a caller's own request id may be recorded and sent back: 1 to 128 letters, digits, `.`, `_` or `-`.
// It goes into a header, the trail and logs. Such characters need no escape in any of them.
pub(super) fn can_be_echoed(id: &HeaderValue) -> bool {
    let plain = id.as_bytes().iter().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(b));
    plain && (1..=128).contains(&id.len())
}
