//! The ids that callers give their requests.

use http::HeaderValue;

/// Whether a caller's own id of a request is one that can be echoed.
pub(super) fn can_be_echoed(id: &HeaderValue) -> bool {
    let plain = id.as_bytes().iter().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(b));
    plain && (1..=128).contains(&id.len())
}

/// Whether it has the form of W3C Trace Context, level 1: version, trace, parent, flags; more only behind versions to come.
pub(super) fn is_traceparent(value: &[u8]) -> bool {
    let (Some(known), more) = (value.get(..55), value.get(55..).unwrap_or_default()) else { return false };
    let is_hex = |part: &[u8]| part.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let parts = [&known[..2], &known[3..35], &known[36..52], &known[53..]];
    let [version, trace, parent, _] = parts;
    let is_zero = |part: &[u8]| part.iter().all(|byte| *byte == b'0');
    [2, 35, 52].iter().all(|place| known[*place] == b'-')
        && parts.into_iter().all(is_hex)
        && version != b"ff"
        && !is_zero(trace)
        && !is_zero(parent)
        && (more.is_empty() || version != b"00" && more.starts_with(b"-") && is_short_text(more))
}

/// Visible ASCII, of 73 bytes at most: a value of 128 bytes in all.
fn is_short_text(text: &[u8]) -> bool {
    text.len() <= 73 && text.iter().all(u8::is_ascii_graphic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traceparent_has_the_form_of_w3c() {
        let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        let good = format!("00-{trace}-{parent}-01");
        let ok = |text: &str| is_traceparent(text.as_bytes());
        assert!(ok(&good) && ok(&format!("cc{}-what-comes", &good[2..])));
        for bad in [
            "",
            "00",
            &good[1..],
            &good.to_uppercase(),
            &good.replace('-', "_"),
            &good.replace("00-4", "ff-4"),
            &good.replace(trace, &"0".repeat(32)),
            &good.replace(parent, &"0".repeat(16)),
            &format!("{good}-more"),
            &format!("cc{}more", &good[2..]),
            &format!("cc{}-\u{85}", &good[2..]),
            &format!("cc{}-{}", &good[2..], "x".repeat(73)),
        ] {
            assert!(!ok(bad), "{bad}");
        }
    }
}
