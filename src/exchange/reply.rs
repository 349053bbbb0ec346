//! What comes of an exchange, on its way to the caller.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serde_json::{Map, json};
use thiserror::Error;
use tokio::sync::mpsc;

use crate::audit::unresolved::Resolution;
use crate::idempotency::{Delivery, Ending, Replay};
use crate::model::cause::Cause;
use crate::model::code::Code;
use crate::model::outcome::{Outcome, Retry};
use crate::model::request_id::FirstCall;
use crate::result_rule::ResultRule;

/// Says that a person resolved the first call.
const RESOLVED: HeaderName = HeaderName::from_static("x-gateway-resolved");

/// The media type of what the gateway writes itself.
pub(super) const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// The upstream's reply, on its way to the caller.
#[derive(Debug)]
pub struct Reply {
    /// Its status.
    pub status: StatusCode,
    /// Its headers, cleaned.
    pub headers: HeaderMap,
    /// Its body.
    pub body: ReplyBody,
    /// What it means.
    pub outcome: Outcome,
    /// What a client may do about it.
    pub retry: Retry,
    /// The earlier call that this one repeats or equals.
    pub first: Option<FirstCall>,
    /// A success, until its caller has it.
    pub delivery: Option<Delivery>,
}

/// A reply's body.
#[derive(Debug)]
pub enum ReplyBody {
    /// Read whole.
    Whole(Bytes),
    /// Longer than what decides: handed on as it comes. Without a [`BodyPart::Last`] it broke off, and the
    /// caller's connection is aborted.
    Long(mpsc::Receiver<BodyPart>),
}

/// A piece of a long reply.
#[derive(Debug)]
pub enum BodyPart {
    /// More will come.
    More(Bytes),
    /// The end.
    Last(Bytes),
}

/// A long reply broke off.
#[derive(Clone, Copy, Debug, Error)]
#[error("the upstream's reply broke off")]
pub struct BrokenOff;

/// Why an exchange ended without a reply for the caller. The record is closed already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The code for the caller.
    pub code: Code,
    /// What became of the task.
    pub outcome: Outcome,
    /// Why, where the other side failed.
    pub cause: Option<Cause>,
    /// When the caller may come back, where repeating is safe.
    pub retry_after: Option<Duration>,
}

/// What the caller is to be told. In a box, since it is moved twenty times on its way.
pub type Told = Result<Box<Reply>, Failure>;

impl Reply {
    /// The answer of the first call with the same key, as its caller got it. Of a call that was resolved as done: that it is
    /// done.
    pub fn replayed(replay: Replay, rule: &ResultRule) -> Self {
        let Replay {
            first,
            ending: Ending { is_success, status, result_code, is_resolved },
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
                    true => stand_in(rule.field(), Some(rule.success_code().as_bytes()), "resolved", None),
                    false => stand_in(rule.field(), result_code.as_deref(), "truncated", Some(first)),
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
            body: ReplyBody::Whole(body),
            outcome: Outcome::Replayed,
            retry: if is_success { Retry::NotNeeded } else { Retry::AfterCorrection },
            first: Some(first),
            delivery: is_success.then_some(delivery),
        }
    }
}

/// What takes the place of a body that cannot be given: the result code, where it is known, `why`, and of which call it was.
pub(super) fn stand_in(field: &str, result_code: Option<&[u8]>, why: &str, of: Option<FirstCall>) -> Bytes {
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
