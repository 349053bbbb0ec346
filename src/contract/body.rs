//! Buffers a request body: checks media type, encoding and size by the head, then receives the whole body within its deadline.
//!
//! A body is at most [`ReceiveLimits::size`] bytes long and arrives within [`ReceiveLimits::time`]. Until it is whole, its
//! bytes count against the budget of unfinished requests that all connections share. The content is not checked here.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use thiserror::Error;
use tokio::time::timeout;

use crate::concurrency::Limits;
use crate::request_head::Inbound;

/// Why a body was not received.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum NotReceived {
    /// The head has an `Expect` other than `100-continue` (RFC 9110 §10.1.1).
    #[error("the only Expect that is understood is `100-continue`; leave the header out")]
    Expectation,
    /// The `Content-Type` is absent, is not `application/json`, or names another charset than UTF-8.
    #[error("send `Content-Type: application/json`; the only parameter that may follow is `charset=utf-8`")]
    MediaType,
    /// The head has more than one `Content-Type`.
    // Two parsers may choose different ones, so the gateway chooses none.
    #[error("Content-Type is given more than once; send it once")]
    MediaTypes,
    /// The head has a `Content-Encoding`: the body is compressed.
    // No decompression: a small body could expand without bound, and the checked bytes would not be those on the wire.
    #[error("Content-Encoding is not supported; send the body uncompressed and without this header")]
    ContentCoding,
    /// The body is larger than `max_body`; the value is that bound in bytes.
    #[error(
        "the body is larger than {0} bytes; make it smaller, or ask the operators of the gateway to raise max_body"
    )]
    TooLarge(usize),
    /// The unfinished heads and bodies of all connections use up `max_unfinished`.
    #[error("the gateway has reached its limit on unfinished requests (max_unfinished); call again shortly")]
    NoRoom,
    /// The body was not whole within `body_timeout`; the value is that time.
    #[error("the body did not arrive within {0:?}; send the whole of it at once")]
    Timeout(Duration),
    /// The body ended early, or its framing is invalid.
    #[error("the body ended before its announced length, or its chunks are malformed; nothing was sent")]
    Incomplete,
    /// The body has trailer fields after its last chunk.
    // Request smuggling: if the trailer section begins with a bare LF, hyper reads on to the next empty line, where a proxy in
    // front may see the end of the body and the next request. No caller of this API needs trailers.
    // tests/hyper.rs: bare_lf_after_the_last_chunk_starts_a_trailer
    #[error("the body has trailer fields after its last chunk; send it without them")]
    Trailers,
}

/// Limits on one body.
#[derive(Clone, Copy, Debug)]
pub struct ReceiveLimits {
    /// The largest size in bytes.
    pub size: usize,
    /// The longest time from the end of the head to the end of the body.
    pub time: Duration,
}

/// Returns the whole body. Until it is whole, the bytes that have arrived count against the budget of unfinished requests
/// in `in_flight`.
///
/// If this future is dropped, the rest of the body stays unread, and the bytes that have arrived no longer count.
///
/// # Errors
///
/// See [`NotReceived`]. An error that depends on the head alone is returned before the body is polled.
// hyper sends `100 Continue` at the first poll of the body. With the checks of the head in front of it, a caller that waits for
// `100 Continue` is refused before it has sent a large body in vain.
// tests/hyper.rs: hyper_sends_continue_only_when_the_body_is_polled
pub(crate) async fn receive(
    head: &Inbound<'_>,
    body: &mut Incoming,
    limits: ReceiveLimits,
    in_flight: &Limits,
) -> Result<Bytes, NotReceived> {
    check_head(head)?;
    if body.size_hint().lower() > limits.size as u64 {
        return Err(NotReceived::TooLarge(limits.size));
    }
    let mut collected = pin!(collect(body, limits.size, in_flight));
    // Most bodies arrive with their head. They are complete at the first poll, and save the cost of a timer.
    if let Poll::Ready(received) = poll_fn(|cx| Poll::Ready(collected.as_mut().poll(cx))).await {
        return received;
    }
    // Boxed, since a timer in this future would make every request's future larger, though few need one.
    let in_time = Box::pin(timeout(limits.time, collected)).await;
    in_time.unwrap_or(Err(NotReceived::Timeout(limits.time)))
}

fn check_head(head: &Inbound<'_>) -> Result<(), NotReceived> {
    if head.has_unknown_expectation {
        return Err(NotReceived::Expectation);
    }
    if head.has_content_encoding {
        return Err(NotReceived::ContentCoding);
    }
    match head.content_type.only().and_then(|value| value.to_str().ok()) {
        Some(media_type) if is_json(media_type) => Ok(()),
        _ if head.content_type.count > 1 => Err(NotReceived::MediaTypes),
        _ => Err(NotReceived::MediaType),
    }
}

fn is_json(media_type: &str) -> bool {
    // The usual value needs no parsing.
    if media_type == "application/json" {
        return true;
    }
    let mut parts = media_type.split(';').map(str::trim);
    let essence = parts.next().unwrap_or_default();
    essence.eq_ignore_ascii_case("application/json") && parts.all(is_utf8_charset)
}

fn is_utf8_charset(parameter: &str) -> bool {
    // Empty after a trailing `;`, which some clients send.
    let Some((name, value)) = parameter.split_once('=') else { return parameter.is_empty() };
    let value = value.trim_matches('"');
    // `utf8` is not a registered name of the charset, but common clients send it, and it can mean nothing else.
    let is_utf8 = value.eq_ignore_ascii_case("utf-8") || value.eq_ignore_ascii_case("utf8");
    name.eq_ignore_ascii_case("charset") && is_utf8
}

/// Reads the frames of the body to its end. Only a body that arrives in several frames is copied.
async fn collect(body: &mut Incoming, limit: usize, in_flight: &Limits) -> Result<Bytes, NotReceived> {
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    let mut held = None;
    // Nothing follows the last byte of a body whose length is known. Without this check hyper would register a waker only
    // to report that.
    // tests/hyper.rs: body_of_known_length_ends_with_its_last_byte
    while !body.is_end_stream()
        && let Some(frame) = body.frame().await
    {
        let frame = frame.map_err(|_| NotReceived::Incomplete)?;
        let data = frame.into_data().map_err(|_| NotReceived::Trailers)?;
        // Checked for each frame, since a chunked body announces no length.
        if first.len() + rest.len() + data.len() > limit {
            return Err(NotReceived::TooLarge(limit));
        }
        // A body that is whole with this frame takes nothing from the budget: it is not waiting for more.
        if !body.is_end_stream() && !held.get_or_insert_with(|| in_flight.unfinished()).grow(data.len()) {
            return Err(NotReceived::NoRoom);
        }
        if first.is_empty() {
            // Most bodies are one frame, which is passed on without a copy.
            first = data;
        } else {
            rest.extend_from_slice(&data);
        }
    }
    if rest.is_empty() { Ok(first) } else { Ok([first, rest.freeze()].concat().into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_json_in_utf8_is_an_accepted_media_type() {
        for good in [
            "application/json",
            "Application/JSON",
            "application/json;charset=UTF-8",
            "application/json; charset=\"utf-8\"",
            "application/json; charset=utf8",
            "application/json;",
        ] {
            assert!(is_json(good), "{good}");
        }
        for bad in [
            "",
            "text/plain",
            "application/json; charset=latin1",
            "application/jsonp",
            "application/json; x=1",
        ] {
            assert!(!is_json(bad), "{bad}");
        }
    }
}
