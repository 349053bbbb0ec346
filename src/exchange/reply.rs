//! What comes of an exchange, on its way to the caller.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use thiserror::Error;
use tokio::sync::mpsc;

use crate::{
    audit::unresolved::Resolution,
    idempotency::{Delivery, Replay},
    model::{
        cause::Cause,
        code::Code,
        outcome::{Outcome, Retry},
        request_id::FirstCall,
    },
    result_rule::ResultRule,
};

/// Says that a person resolved the first call.
const RESOLVED: HeaderName = HeaderName::from_static("x-gateway-resolved");

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
    /// Longer than what decides: handed on as it comes. Without a [`Piece::Last`] it broke off, and the
    /// caller's connection is aborted.
    Long(mpsc::Receiver<Piece>),
}

/// A piece of a long reply.
#[derive(Debug)]
pub enum Piece {
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
    /// The answer of the first call with the same key, as its caller got it.
    pub fn replayed(replay: Replay, rule: &ResultRule) -> Self {
        let (first, is_resolved) = (replay.first(), replay.is_resolved());
        let (stored, delivery) = replay.into_parts(rule);
        let mut headers = HeaderMap::new();
        if let Some(media_type) =
            stored.content_type.as_ref().and_then(|text| HeaderValue::from_str(text).ok())
        {
            headers.insert(header::CONTENT_TYPE, media_type);
        }
        if is_resolved {
            headers.insert(RESOLVED, HeaderValue::from_static(Resolution::Done.as_str()));
        }
        let is_success = first.outcome == Outcome::Succeeded;
        Self {
            status: StatusCode::from_u16(stored.status).unwrap_or_default(),
            headers,
            body: ReplyBody::Whole(stored.body.clone()),
            outcome: Outcome::Replayed,
            retry: if is_success { Retry::NotNeeded } else { Retry::AfterCorrection },
            first: Some(first),
            delivery: is_success.then_some(delivery),
        }
    }
}
