//! The trace id of a request (W3C Trace Context), for audit records and for exemplars of metrics.
//!
//! A `traceparent` is recorded only; it is not sent to the upstream.

use std::fmt;

use prometheus_client::encoding::{EncodeLabelValue, LabelValueEncoder};

/// The trace id of a `traceparent`: 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceId([u8; 32]);

impl TraceId {
    /// Returns the trace id of a `traceparent` in the form of W3C Trace Context, level 1: version, trace, parent, flags. `None`
    /// for any other form.
    // Strict, since the value is recorded: a header that was taken unchecked brought control characters into the trail.
    pub fn of(traceparent: &[u8]) -> Option<Self> {
        let (known, more) = (traceparent.get(..55)?, &traceparent[55..]);
        let is_hex = |part: &[u8]| part.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let parts = [&known[..2], &known[3..35], &known[36..52], &known[53..]];
        let [version, trace, parent, _] = parts;
        let is_zero = |part: &[u8]| part.iter().all(|byte| *byte == b'0');
        // Version ff and ids of zeros are invalid by the specification. Only versions after 00 may have more behind the flags.
        let is_valid = [2, 35, 52].iter().all(|position| known[*position] == b'-')
            && parts.into_iter().all(is_hex)
            && version != b"ff"
            && !is_zero(trace)
            && !is_zero(parent)
            && (more.is_empty() || version != b"00" && more.starts_with(b"-") && is_short_text(more));
        trace.try_into().ok().filter(|_| is_valid).map(Self)
    }
}

impl EncodeLabelValue for TraceId {
    fn encode(&self, to: &mut LabelValueEncoder<'_>) -> fmt::Result {
        str::from_utf8(&self.0).unwrap_or_default().encode(to)
    }
}

/// Whether a text is visible ASCII of at most 73 bytes, which makes a value of at most 128 bytes.
fn is_short_text(text: &[u8]) -> bool {
    text.len() <= 73 && text.iter().all(u8::is_ascii_graphic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_valid_w3c_traceparent_has_a_trace_id() {
        let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        let good = format!("00-{trace}-{parent}-01");
        for good in [&good, &format!("cc{}-what-comes", &good[2..])] {
            let id = TraceId::of(good.as_bytes()).unwrap();
            assert_eq!(id.0, trace.as_bytes(), "{good}");
        }
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
            assert_eq!(TraceId::of(bad.as_bytes()), None, "{bad}");
        }
    }
}
