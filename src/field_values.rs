//! What the values of header fields say, whoever sent them.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue, header};

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

/// The largest `q` that a field such as `Accept` gives to a range, of those with no `version` or with this one (RFC 9110, section
/// 12.4.2). `None` if the field does not list the range. What has an invalid `q` counts as not listed.
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
