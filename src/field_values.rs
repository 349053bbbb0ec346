//! Values of HTTP header fields, from callers and from the upstream alike.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue, header};

/// How long `Retry-After` asks to wait: a number of seconds, or the time until a date (RFC 9110, section
/// 10.2.3). `None` if there is none, or if it cannot be parsed. A date in the past gives zero.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let asked = text(header::RETRY_AFTER)?;
    if let Ok(seconds) = asked.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = httpdate::parse_http_date(asked).ok()?;
    // A date is compared with the `Date` of the same message: the clock of the other side may differ from ours.
    let now = text(header::DATE).and_then(|date| httpdate::parse_http_date(date).ok());
    Some(until.duration_since(now.unwrap_or_else(SystemTime::now)).unwrap_or_default())
}

/// Whether a `Content-Encoding` names a coding. `identity` is not one.
// A sender should not use `identity` (RFC 9110, section 8.4.1), but many do. Taken for a coding, it made every
// success `unknown`.
pub(crate) fn is_coding(value: &HeaderValue) -> bool {
    let mut named = value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
    named.any(|coding| !coding.is_empty() && !coding.eq_ignore_ascii_case(b"identity"))
}

/// The highest `q` that a field such as `Accept` gives to `range`, of those without a parameter `version` or
/// with this one (RFC 9110, section 12.4.2). `None` if the field does not list the range. An item with an
/// invalid `q` counts as not listed.
pub(crate) fn quality(headers: &HeaderMap, field: HeaderName, range: &str, version: &str) -> Option<f32> {
    let texts = headers.get_all(field).into_iter().filter_map(|value| value.to_str().ok());
    let qualities = texts.flat_map(|text| text.split(',')).filter_map(|item| {
        let mut parts = item.split(';').map(str::trim);
        let mut quality = Some(1.0);
        if !parts.next()?.eq_ignore_ascii_case(range) {
            return None;
        }
        for (name, value) in parts.filter_map(|part| part.split_once('=')) {
            match name.trim().to_ascii_lowercase().as_str() {
                "q" => quality = value.trim().parse().ok().filter(|q| (0.0..=1.0).contains(q)),
                "version" if value.trim().trim_matches('"') != version => return None,
                _ => {}
            }
        }
        quality
    });
    qualities.reduce(f32::max)
}
