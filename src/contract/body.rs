//! Receives a body: media type, encoding and size from the head, then the whole body within its deadline.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use thiserror::Error;
use tokio::time::timeout;

use crate::concurrency::Bounds as Room;
use crate::request_head::Inbound;

/// Why a body was not received.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum NotReceived {
    /// An `Expect` other than `100-continue`.
    #[error("the only Expect that is understood is `100-continue`; leave the header out")]
    Expectation,
    /// Not `application/json`, or not in UTF-8.
    #[error("send `Content-Type: application/json`; the only parameter that may follow is `charset=utf-8`")]
    MediaType,
    /// It stands more than once.
    #[error("Content-Type is given more than once; send it once")]
    MediaTypes,
    /// Compressed.
    #[error("Content-Encoding is not supported; send the body uncompressed and without this header")]
    ContentCoding,
    /// Larger than `max_body` bytes.
    #[error(
        "the body is larger than {0} bytes; make it smaller, or ask the operators of the gateway to raise max_body"
    )]
    TooLarge(usize),
    /// Unfinished heads and bodies hold as much as they may.
    #[error("the gateway holds as many unfinished requests as it may (max_unfinished); call again shortly")]
    NoRoom,
    /// Not whole within `body_timeout`.
    #[error("the body did not arrive within {0:?}; send the whole of it at once")]
    Timeout(Duration),
    /// Ended early, or its framing is broken.
    #[error("the body ended before its announced length, or its chunks are malformed; nothing was sent")]
    Incomplete,
    /// Fields behind the last chunk. Nobody needs them, and hyper reads on to the next empty line when they begin
    /// with a bare LF, where others see the end of the body.
    // tests/hyper.rs: a_bare_lf_behind_the_last_chunk_begins_a_trailer
    #[error("the body has trailer fields behind its last chunk; send it without them")]
    Trailers,
}

/// Bounds of one body.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Bytes.
    pub size: usize,
    /// From the end of the head to the end of the body.
    pub time: Duration,
}

/// Receives a whole body. What the head alone rules out is refused before a byte is read, so that a caller
/// that waits for `100 Continue` sends nothing in vain.
/// What there is of a body that is not whole yet takes `room`.
// tests/hyper.rs: hyper_says_continue_only_when_the_body_is_asked_for
pub(crate) async fn receive(
    head: &Inbound<'_>,
    body: &mut Incoming,
    bounds: Bounds,
    room: &Room,
) -> Result<Bytes, NotReceived> {
    check_head(head)?;
    if body.size_hint().lower() > bounds.size as u64 {
        return Err(NotReceived::TooLarge(bounds.size));
    }
    let mut collected = pin!(collect(body, bounds.size, room));
    // Most bodies come with their head: those need no timer.
    if let Poll::Ready(received) = poll_fn(|cx| Poll::Ready(collected.as_mut().poll(cx))).await {
        return received;
    }
    // In a box, so that the others hold no place for it.
    let in_time = Box::pin(timeout(bounds.time, collected)).await;
    in_time.unwrap_or(Err(NotReceived::Timeout(bounds.time)))
}

fn check_head(head: &Inbound<'_>) -> Result<(), NotReceived> {
    if head.expects_more {
        return Err(NotReceived::Expectation);
    }
    if head.is_coded {
        return Err(NotReceived::ContentCoding);
    }
    match head.content_type.only().and_then(|value| value.to_str().ok()) {
        Some(media_type) if is_json(media_type) => Ok(()),
        _ if head.content_type.count > 1 => Err(NotReceived::MediaTypes),
        _ => Err(NotReceived::MediaType),
    }
}

fn is_json(media_type: &str) -> bool {
    if media_type == "application/json" {
        return true; // the usual case
    }
    let mut parts = media_type.split(';').map(str::trim);
    let essence = parts.next().unwrap_or_default();
    essence.eq_ignore_ascii_case("application/json") && parts.all(is_utf8_charset)
}

fn is_utf8_charset(parameter: &str) -> bool {
    let Some((name, value)) = parameter.split_once('=') else { return parameter.is_empty() };
    let value = value.trim_matches('"');
    // The second is no registered name, and means the same.
    let is_utf8 = value.eq_ignore_ascii_case("utf-8") || value.eq_ignore_ascii_case("utf8");
    name.eq_ignore_ascii_case("charset") && is_utf8
}

async fn collect(body: &mut Incoming, limit: usize, room: &Room) -> Result<Bytes, NotReceived> {
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    let mut held = None;
    // Of a body whose length is known, nothing comes behind its last byte.
    // tests/hyper.rs: a_body_of_known_length_is_at_its_end_behind_its_last_byte
    while !body.is_end_stream()
        && let Some(frame) = body.frame().await
    {
        let frame = frame.map_err(|_| NotReceived::Incomplete)?;
        let data = frame.into_data().map_err(|_| NotReceived::Trailers)?;
        if first.len() + rest.len() + data.len() > limit {
            return Err(NotReceived::TooLarge(limit));
        }
        if !body.is_end_stream() && !held.get_or_insert_with(|| room.unfinished()).grow(data.len()) {
            return Err(NotReceived::NoRoom);
        }
        if first.is_empty() {
            first = data; // the common case: one piece, passed on without a copy
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
    fn only_json_in_utf8_is_a_media_type_of_ours() {
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
