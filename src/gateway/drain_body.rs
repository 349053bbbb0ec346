//! Drains the rest of a body that is refused, within bounds, so that its caller receives the refusal.

use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use tokio::time::timeout;

use crate::request_head::Inbound;

/// The bytes of a refused body that are read and discarded at the most.
const MAX_BYTES: u64 = 256 * 1024;

/// The longest time that this takes. A caller that sends slowly must not hold its place by it.
const MAX_TIME: Duration = Duration::from_secs(1);

/// Reads and discards the rest of a refused body, within bounds. Returns whether its end was reached, so that the connection can
/// take another request.
// A caller that waits for `100 Continue` is not asked to go on: polling the body would have hyper send that, and the caller would
// send a body for nothing.
// tests/hyper.rs: hyper_sends_continue_only_when_the_body_is_polled
pub(super) async fn drain_body(head: &Inbound<'_>, mut body: Incoming) -> bool {
    if body.is_end_stream() {
        return true;
    }
    if head.expects_continue || head.has_unknown_expectation || body.size_hint().lower() > MAX_BYTES {
        return false;
    }
    let drained = async {
        let mut left = MAX_BYTES;
        while let Some(frame) = body.frame().await {
            let read =
                frame.ok().and_then(|frame| frame.into_data().ok()).map_or(0, |data| data.len() as u64);
            // An error, trailers or an empty frame end it, too: where the next request begins is then not certain enough.
            left = match left.checked_sub(read) {
                Some(left) if read > 0 => left,
                _ => return false,
            };
        }
        true
    };
    timeout(MAX_TIME, drained).await.unwrap_or(false)
}
