//! What the values of header fields say, whoever sent them.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderValue, header};

/// For how long `Retry-After` asks to wait: seconds, or a date (RFC 9110, section 10.2.3), which is measured by the `Date` beside it,
/// where there is one, since the other side's clock may be another than ours. `None` without one that can be read.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let asked = text(header::RETRY_AFTER)?;
    if let Ok(seconds) = asked.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = httpdate::parse_http_date(asked).ok()?;
    let now = text(header::DATE).and_then(|date| httpdate::parse_http_date(date).ok());
    Some(until.duration_since(now.unwrap_or_else(SystemTime::now)).unwrap_or_default())
}

/// Whether a `Content-Encoding` names a coding. `identity` is none, and ought not to be sent (RFC 9110, section 8.4.1); many do.
pub(crate) fn is_coding(value: &HeaderValue) -> bool {
    let mut named = value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
    named.any(|coding| !coding.is_empty() && !coding.eq_ignore_ascii_case(b"identity"))
}
