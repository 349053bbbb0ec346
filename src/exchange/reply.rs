//! The result of an exchange on its way to the caller: a reply of the upstream, a replayed one, or a failure.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serde_json::{Map, json};
use thiserror::Error;
use tokio::sync::mpsc;

use crate::audit::unresolved_calls::Resolution;
use crate::idempotency::{Delivery, Replay, StoredResult};
use crate::model::cause::Cause;
use crate::model::code::Code;
use crate::model::outcome::{Outcome, Retry};
use crate::model::request_id::FirstCall;
use crate::result_rule::ResultRule;

/// The header that says that a person resolved the first call.
const RESOLVED: HeaderName = HeaderName::from_static("x-gateway-resolved");

/// The media type of bodies that the gateway writes itself.
pub(super) const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// A reply on its way to the caller.
#[derive(Debug)]
pub struct Reply {
    /// The HTTP status.
    pub status: StatusCode,
    /// The headers, as far as they pass by the allow-list.
    pub headers: HeaderMap,
    /// The body.
    pub body: RelayedBody,
    /// What became of the task.
    pub outcome: Outcome,
    /// Whether, and how, the client should repeat the call.
    pub retry: Retry,
    /// The earlier call that this one repeats or equals.
    pub first: Option<FirstCall>,
    /// The delivery of a success, to be settled by the caller's connection.
    pub delivery: Option<Delivery>,
}

/// The body of a reply.
#[derive(Debug)]
pub enum RelayedBody {
    /// A body that was read whole.
    Whole(Bytes),
    /// A body of more than 64 KiB, which is passed on as it comes. If the channel ends without a [`BodyPart::Last`], the reply
    /// broke off, and the caller's connection must be aborted.
    Long(mpsc::Receiver<BodyPart>),
}

/// A piece of a long reply.
// The last one says that it is the last. When the end of the channel meant that, a cut reply reached a slow caller as a complete
// one.
#[derive(Debug)]
pub enum BodyPart {
    /// A piece that is not the last one.
    More(Bytes),
    /// The last piece.
    Last(Bytes),
}

/// The error of a long reply that broke off.
#[derive(Clone, Copy, Debug, Error)]
#[error("the upstream's reply broke off")]
pub struct BrokenOff;

/// Why an exchange ended without a reply for the caller. The record of the request is closed already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The code for the caller.
    pub code: Code,
    /// What became of the task.
    pub outcome: Outcome,
    /// The cause, if the upstream, the token endpoint or the way to one of them failed.
    pub cause: Option<Cause>,
    /// How long the caller should wait before it calls again. Set only where a repetition cannot send the task twice.
    pub retry_after: Option<Duration>,
}

/// The result of an exchange, for the caller.
// In a box, since a reply is moved some twenty times between the exchange and the connection.
pub type ExchangeReply = Result<Box<Reply>, Failure>;

impl Reply {
    /// Builds the reply to a repetition: the stored reply of the first call with the key. If that was evicted, the body is JSON
    /// with the result code. If a person resolved the call as done, the body is JSON that says so.
    pub fn replayed(replay: Replay, rule: &ResultRule) -> Self {
        let Replay {
            first,
            result: StoredResult { is_success, status, result_code, is_resolved },
            stored,
            delivery,
        } = replay;
        let mut headers = HeaderMap::new();
        let (media_type, body) = match stored {
            Some(stored) => {
                let media_type = stored.content_type.as_deref().map(HeaderValue::from_str);
                (media_type.and_then(Result::ok), stored.body.clone())
            }
            None => {
                let body = match is_resolved {
                    true => substitute(rule.field(), Some(rule.success_code().as_bytes()), "resolved", None),
                    false => substitute(rule.field(), result_code.as_deref(), "truncated", Some(first)),
                };
                (Some(JSON), body)
            }
        };
        headers.extend(media_type.map(|media_type| (header::CONTENT_TYPE, media_type)));
        if is_resolved {
            headers.insert(RESOLVED, HeaderValue::from_static(Resolution::Done.as_str()));
        }
        Self {
            status: StatusCode::from_u16(status).unwrap_or_default(),
            headers,
            body: RelayedBody::Whole(body),
            outcome: Outcome::Replayed,
            // The outcome `replayed` alone reads as "no need to repeat". After a failure that would lose the task.
            retry: if is_success { Retry::NotNeeded } else { Retry::AfterCorrection },
            first: Some(first),
            delivery: is_success.then_some(delivery),
        }
    }
}

/// Returns the JSON that takes the place of a body that cannot be passed on. Its members are the result code under `field`, if
/// it is known; `why`, with the value `true`; and `request_id`, the id of the call `of`, if there is one.
// Under the route's own field, so that a client that reads the result code finds it where it always is.
pub(super) fn substitute(field: &str, result_code: Option<&[u8]>, why: &str, of: Option<FirstCall>) -> Bytes {
    let mut members = Map::new();
    if let Some(code) = result_code {
        members.insert(field.to_owned(), String::from_utf8_lossy(code).into());
    }
    members.insert(why.to_owned(), true.into());
    if let Some(first) = of {
        members.insert("request_id".into(), first.request_id().as_str().into());
    }
    json!(members).to_string().into()
}
