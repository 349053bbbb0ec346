//! Sends, and reads as much of the answer as decides; replays once after a refused token.

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Response, StatusCode, Version};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};

use super::{Cooldown, Exchange, Progress};
use crate::model::cause::Cause;
use crate::model::code::Code;
use crate::reason::Reason;
use crate::token::{NoOther, Slot, Token};
use crate::upstream::breaker::Health;
use crate::upstream::pool::NoConnection;

/// As much of a reply is read before its head goes out, and decides the outcome.
const DECISIVE: usize = 64 * 1024;

/// Why an attempt brought no answer.
#[derive(Debug)]
pub(super) enum Broken {
    /// There is no connection, and nothing of this attempt was sent.
    Unreachable(NoConnection),
    /// It may have been sent.
    BrokeOff(Reason),
}

/// In a box, since each answer would be as large.
pub(super) type NoAnswer = Box<Broken>;

impl Broken {
    fn unreachable(none: NoConnection) -> NoAnswer {
        Box::new(Self::Unreachable(none))
    }

    fn broke_off(reason: Reason) -> NoAnswer {
        Box::new(Self::BrokeOff(reason))
    }

    /// What it tells of the upstream's health.
    pub(super) fn health(&self) -> Health {
        match self {
            Self::Unreachable(NoConnection::Failed(reason)) => Health::Down(reason.cause),
            Self::Unreachable(NoConnection::Busy) | Self::BrokeOff(_) => Health::Unclear,
        }
    }

    /// The code for what may have been sent, and why; without a reason all connections were busy.
    pub(super) fn told(&self) -> (Code, Option<&Reason>) {
        match self {
            Self::Unreachable(NoConnection::Failed(reason)) => (Code::UpstreamUnreachable, Some(reason)),
            Self::Unreachable(NoConnection::Busy) => (Code::Overloaded, None),
            Self::BrokeOff(reason) => (Code::UpstreamBroken, Some(reason)),
        }
    }
}

impl Exchange {
    /// Returns the status of the answer, which is with the progress.
    pub(super) async fn attempts(&mut self, progress: &mut Progress) -> Result<StatusCode, NoAnswer> {
        let first = self.attempt(progress).await?;
        if self.is_refusal(first) { Box::pin(self.replay(first, progress)).await } else { Ok(first) }
    }

    /// The token was refused: sends once more, if there is a different one.
    #[cold]
    async fn replay(&mut self, first: StatusCode, progress: &mut Progress) -> Result<StatusCode, NoAnswer> {
        progress.refused = Some(first);
        if let Some(first) = &mut progress.arrived {
            // tests/hyper.rs: a_reply_that_is_dropped_before_its_end_takes_its_connection_along
            first.rest = None; // nobody reads it: its connection closes, and the replay takes a new one
        }
        let refused = self.token.generation();
        // Looked at before another fetch may end it.
        let had_worked = self.cooldown().has_accepted(refused) && self.slot().has_left_alone(refused);
        let Some(token) = self.another_token(had_worked, progress).await else { return Ok(first) };
        progress.first_token = Some(std::mem::replace(&mut self.token, token));
        self.terms.quota.overdraw(); // a replay is a request, too
        let second = self.attempt(progress).await?;
        progress.is_rejected = self.is_refusal(second);
        if progress.is_rejected {
            self.cooldown().rejected();
        } else if had_worked && second.is_success() {
            self.slot().was_ended(refused); // the same call succeeds, so that it was the token
        }
        Ok(second)
    }

    /// Another token than the one that was refused. A cool-down causes no fetch.
    async fn another_token(&self, had_worked: bool, progress: &mut Progress) -> Option<Token> {
        let refused = self.token.generation();
        if let Some(token) = self.slot().newer(refused) {
            return Some(token);
        }
        if !self.cooldown().may_fetch(refused) {
            progress.is_rejected = true;
            return None;
        }
        match self.slot().replace(refused, had_worked).await {
            Ok(token) => return Some(token),
            Err(NoOther::Failed(cause)) => progress.no_token = Some(cause),
            Err(NoOther::Same) => {
                progress.is_rejected = true;
                self.cooldown().rejected();
            }
        }
        None
    }

    /// Where another token comes from.
    fn slot(&self) -> &Slot {
        self.terms.slot(self.credential)
    }

    /// Whether a refused token causes a fetch.
    pub(super) fn cooldown(&self) -> &Cooldown {
        &self.route.cooldowns[self.credential.0]
    }

    pub(super) fn is_refusal(&self, status: StatusCode) -> bool {
        self.terms.refused_statuses.contains(&status)
    }

    /// Sends once and reads the answer. A connection that dies before a byte was written is replaced, once.
    async fn attempt(&mut self, progress: &mut Progress) -> Result<StatusCode, NoAnswer> {
        let mut fresh = false;
        loop {
            if self.connection.is_stale() {
                self.connection.reconnect().await.map_err(Broken::unreachable)?;
                fresh = true;
            }
            progress.mark = self.connection.written();
            let sent = match self.connection.ready().await {
                Ok(()) => {
                    let Self { terms, route, token, operator, body, connection, .. } = &mut *self;
                    connection.send(|| terms.request(route, token, operator, body)).await
                }
                Err(error) => Err(error),
            };
            match sent {
                Ok(response) => {
                    // tests/hyper.rs: only_the_interim_answer_101_is_handed_out
                    if response.status().is_informational() {
                        let text = format!("status {}: no other protocol was asked for", response.status());
                        return Err(Broken::broke_off(Reason::new(Cause::ReplyUnreadable, text)));
                    }
                    let arrived = progress.arrived.insert(BufferedReply::new(response));
                    arrived.read().await?;
                    let status = arrived.status;
                    progress.mark = self.connection.written();
                    progress.answered += 1;
                    return Ok(status);
                }
                Err(error) if self.connection.written() != progress.mark => {
                    return Err(Broken::broke_off(error.reason()));
                }
                Err(error) if fresh => return Err(Broken::unreachable(error.reason().into())),
                Err(_) => {
                    self.connection.reconnect().await.map_err(Broken::unreachable)?;
                    fresh = true;
                }
            }
        }
    }
}

/// An answer whose head and first bytes are read.
#[derive(Debug)]
pub(super) struct BufferedReply {
    pub(super) version: Version,
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    /// The rest, if there is more than [`DECISIVE`] bytes.
    pub(super) rest: Option<Incoming>,
}

impl BufferedReply {
    /// An answer of which nothing but the head is read.
    fn new(response: Response<Incoming>) -> Self {
        let (head, rest) = response.into_parts();
        let (version, status, headers) = (head.version, head.status, head.headers);
        Self { version, status, headers, body: Bytes::new(), rest: Some(rest) }
    }

    /// Reads the body to its end, or as far as it decides.
    async fn read(&mut self) -> Result<(), NoAnswer> {
        let mut more = BytesMut::new();
        while let Some(rest) = &mut self.rest {
            // Of a body whose length is known, nothing comes behind its last byte.
            // tests/hyper.rs: a_body_of_known_length_is_at_its_end_behind_its_last_byte
            let frame = if rest.is_end_stream() { None } else { rest.frame().await };
            let Some(frame) = frame else {
                if !is_whole(rest, self.version) {
                    return Err(Broken::broke_off(cut_short()));
                }
                self.rest = None;
                break;
            };
            let frame = frame.map_err(|error| Broken::broke_off(Reason::of_exchange(&error)))?;
            let Ok(data) = frame.into_data() else { continue };
            if self.body.is_empty() {
                self.body = data; // the common case: one piece, passed on without a copy
            } else {
                more.extend_from_slice(&data);
            }
            if self.body.len() + more.len() > DECISIVE {
                break;
            }
        }
        if !more.is_empty() {
            self.body = [&self.body[..], &more].concat().into();
        }
        Ok(())
    }
}

/// A reply ended before its end.
pub(super) fn cut_short() -> Reason {
    Reason::new(Cause::ReplyCut, "the stream of the reply was reset before its end")
}

/// Whether a body without a next frame has come to its end. Over HTTP/2 hyper ends it, too, when the stream is reset or
/// denied by a GOAWAY with the reason NO_ERROR, at whatever byte.
// tests/hyper.rs: no_error_ends_an_http2_body_at_any_byte_and_only_its_end_stream_tells
// tests/hyper.rs: an_http1_reply_that_is_cut_short_or_badly_framed_is_an_error_that_tells_it
pub(super) fn is_whole(body: &Incoming, version: Version) -> bool {
    version != Version::HTTP_2 || body.is_end_stream()
}
