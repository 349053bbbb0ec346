//! The ids that callers give their requests.

use http::HeaderValue;

/// Whether a caller's own id of a request is one that can be echoed.
pub(super) fn can_be_echoed(id: &HeaderValue) -> bool {
    let plain = id.as_bytes().iter().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(b));
    plain && (1..=128).contains(&id.len())
}
