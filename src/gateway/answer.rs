//! The form of responses: the gateway's headers, problem documents, and bodies that stream.
//!
//! Every response of the gateway carries its outcome, what a client may do about it, and the request id.

use std::cell::RefCell;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Response, header};
use hyper::body::{Body, Frame, SizeHint};

use super::RequestOrigin;
use crate::error::Error;
use crate::exchange::{BodyPart, BrokenOff, RelayedBody, Reply};
use crate::model::code::Code;
use crate::model::outcome::{Outcome, Retry};
use crate::model::request_id::{FirstCall, RequestId};
use crate::model::stage::Stage;

const OUTCOME: HeaderName = HeaderName::from_static("x-gateway-outcome");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-gateway-request-id");
const ERROR: HeaderName = HeaderName::from_static("x-gateway-error");
const RETRY: HeaderName = HeaderName::from_static("x-gateway-retry");
const FIRST: HeaderName = HeaderName::from_static("x-gateway-first-request-id");
const FIRST_OUTCOME: HeaderName = HeaderName::from_static("x-gateway-first-outcome");
const CALLER_ID: HeaderName = HeaderName::from_static("x-request-id");
const PROBLEM: HeaderValue = HeaderValue::from_static("application/problem+json");

/// The header values of all outcomes, and of all words about what a client may do, by their place in `ALL`.
// Made once: to make a header value checks each of its bytes, and each response needs two.
static OUTCOMES: [HeaderValue; 6] = {
    const fn word(index: usize) -> HeaderValue {
        HeaderValue::from_static(Outcome::ALL[index].as_str())
    }
    [word(0), word(1), word(2), word(3), word(4), word(5)]
};

static RETRIES: [HeaderValue; 6] = {
    const fn word(index: usize) -> HeaderValue {
        HeaderValue::from_static(Retry::ALL[index].as_str())
    }
    [word(0), word(1), word(2), word(3), word(4), word(5)]
};

/// The body of a response.
#[derive(Debug)]
pub struct ResponseBody {
    content: Content,
    /// The connection ends after this body.
    // Here as well as in the head: to search the headers of each response for `Connection` costs more.
    ends_connection: bool,
}

impl ResponseBody {
    /// Whether the connection ends after this body, as its head says.
    pub fn ends_connection(&self) -> bool {
        self.ends_connection
    }
}

#[derive(Debug)]
enum Content {
    /// The whole body; `None` once it was taken.
    Whole(Option<Bytes>),
    /// The pieces of a long reply; `None` after the last one.
    Long(Option<tokio::sync::mpsc::Receiver<BodyPart>>),
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        match &mut self.get_mut().content {
            Content::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Content::Long(pieces) => {
                let Some(coming) = pieces else { return Poll::Ready(None) };
                Poll::Ready(Some(match ready!(coming.poll_recv(cx)) {
                    Some(BodyPart::More(bytes)) => Ok(Frame::data(bytes)),
                    Some(BodyPart::Last(bytes)) => {
                        *pieces = None;
                        Ok(Frame::data(bytes))
                    }
                    // The head is gone, so the only way to report a failure is to abort the connection: at this error hyper ends
                    // it without the end of the body. Test in tests/it/http2.rs:
                    // no_error_reset_of_a_long_reply_aborts_the_caller_connection
                    None => Err(BrokenOff),
                }))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.content, Content::Whole(None) | Content::Long(None))
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Content::Long(_) => SizeHint::default(),
        }
    }
}

/// The response that passes a reply on. Hands the delivery of a success to the connection.
pub(super) fn answer(reply: Box<Reply>, from: &RequestOrigin<'_>) -> Response<ResponseBody> {
    let Reply { status, headers, body, outcome, retry, first, delivery } = *reply;
    let content = match body {
        RelayedBody::Whole(bytes) => Content::Whole(Some(bytes)),
        RelayedBody::Long(pieces) => Content::Long(Some(pieces)),
    };
    let mut response = Response::new(ResponseBody { content, ends_connection: false });
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    say(response.headers_mut(), outcome, retry, first);
    if let Some(delivery) = delivery {
        from.delivery.put(delivery, !from.presence.has_ended());
    }
    response
}

/// The response of a failure: a problem document (RFC 9457). Unless `keep_alive`, the connection ends after it.
pub(super) fn refuse(
    error: &Error,
    stage: Stage,
    id: RequestId,
    retry: Retry,
    keep_alive: bool,
) -> Response<ResponseBody> {
    let content = Content::Whole(Some(error.problem(stage, id, retry)));
    let mut response = Response::new(ResponseBody { content, ends_connection: !keep_alive });
    *response.status_mut() = error.code.status();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, PROBLEM);
    say(headers, error.outcome, retry, error.first);
    headers.insert(ERROR, HeaderValue::from_static(error.code.as_str()));
    // Generic clients obey `Retry-After`, and a call of unknown outcome must not be repeated. One exception: with the key of a
    // call at work a repetition only asks, and sends nothing.
    let may_repeat = error.outcome != Outcome::Unknown || error.code == Code::RequestInProgress;
    if let Some(wait) = error.retry_after.filter(|_| may_repeat) {
        headers.insert(header::RETRY_AFTER, whole_seconds(wait).into());
    }
    if error.code == Code::MethodNotAllowed {
        headers.insert(header::ALLOW, HeaderValue::from_static("POST"));
    }
    if !keep_alive {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Sets the request id, and sends the caller's own one back.
pub(super) fn name(headers: &mut HeaderMap, id: RequestId, caller_id: Option<&HeaderValue>) {
    headers.insert(REQUEST_ID, request_id(id));
    if let Some(id) = caller_id {
        headers.insert(CALLER_ID, id.clone());
    }
}

/// Sets the headers that say what became of the call and of the first one, and what the caller may do.
fn say(headers: &mut HeaderMap, outcome: Outcome, retry: Retry, first: Option<FirstCall>) {
    headers.insert(OUTCOME, OUTCOMES[outcome as usize].clone());
    headers.insert(RETRY, RETRIES[retry as usize].clone());
    if let Some(first) = first {
        headers.insert(FIRST, request_id(first.request_id()));
        headers.insert(FIRST_OUTCOME, OUTCOMES[first.outcome as usize].clone());
    }
}

/// The value of `Retry-After`: seconds, rounded up, and at least one.
// Rounded down, a client that waits just so long would be refused once more; 0 would have it call in a loop.
fn whole_seconds(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0).max(u64::from(wait.is_zero()))
}

/// A request id as a header value.
#[expect(clippy::expect_used, reason = "a UUID is plain ASCII")]
fn request_id(id: RequestId) -> HeaderValue {
    thread_local! {
        /// A buffer that about a hundred ids share, which saves each response an allocation.
        static TEXT: RefCell<BytesMut> = RefCell::new(BytesMut::with_capacity(4096));
    }
    TEXT.with_borrow_mut(|text| {
        text.extend_from_slice(id.as_bytes());
        HeaderValue::from_maybe_shared(text.split().freeze()).expect("ASCII")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcome_and_retry_words_match_their_variants() {
        assert!(Outcome::ALL.iter().all(|outcome| OUTCOMES[*outcome as usize] == outcome.as_str()));
        assert!(Retry::ALL.iter().all(|retry| RETRIES[*retry as usize] == retry.as_str()));
    }
}
