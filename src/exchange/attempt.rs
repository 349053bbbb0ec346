//! The attempts of an exchange: sends, reads as much of the reply as decides the outcome, and replays once after a refused
//! token.
//!
//! Decides whether an attempt may have reached the upstream, by the bytes that its connection has written. Does not decide
//! the outcome.

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Response, StatusCode, Version};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};

use super::{Cooldown, Exchange, Progress};
use crate::model::cause::Cause;
use crate::model::code::Code;
use crate::reason::Reason;
use crate::token::{ReplaceError, Slot, Token};
use crate::upstream::breaker::Health;
use crate::upstream::pool::NoConnection;

/// How many bytes of a reply's body are read before its head is sent to the caller. They decide the outcome.
// A whole reply of the API is far shorter. The bound limits what one request holds in memory; see `streaming` for the rest.
const DECISIVE: usize = 64 * 1024;

/// Why an attempt brought no reply.
#[derive(Debug)]
pub(super) enum Broken {
    /// There was no connection, and no byte of this attempt was sent.
    Unreachable(NoConnection),
    /// The exchange broke off after a byte was sent.
    BrokeOff(Reason),
}

/// The error of an attempt.
// In a box: otherwise every result, also that of a reply, would be as large.
pub(super) type NoAnswer = Box<Broken>;

impl Broken {
    fn unreachable(none: NoConnection) -> NoAnswer {
        Box::new(Self::Unreachable(none))
    }

    fn broke_off(reason: Reason) -> NoAnswer {
        Box::new(Self::BrokeOff(reason))
    }

    /// What the circuit breaker learns about the upstream's health.
    pub(super) fn health(&self) -> Health {
        match self {
            Self::Unreachable(NoConnection::Failed(reason)) => Health::Down(reason.cause),
            // Busy is the gateway's own bound, and a connection that breaks off was accepted before: neither shows that the
            // upstream is down.
            Self::Unreachable(NoConnection::Busy) | Self::BrokeOff(_) => Health::Inconclusive,
        }
    }

    /// Returns the code of an exchange that ends with this error after bytes were sent, and the reason. The reason is `None` if
    /// all connections were busy.
    pub(super) fn code_and_reason(&self) -> (Code, Option<&Reason>) {
        match self {
            Self::Unreachable(NoConnection::Failed(reason)) => (Code::UpstreamUnreachable, Some(reason)),
            Self::Unreachable(NoConnection::Busy) => (Code::Overloaded, None),
            Self::BrokeOff(reason) => (Code::UpstreamBroken, Some(reason)),
        }
    }
}

impl Exchange {
    /// Makes the first attempt and, if the upstream refuses the token, the replay. Returns the status of the last reply, and
    /// stores the reply in `progress`.
    pub(super) async fn attempts(&mut self, progress: &mut Progress) -> Result<StatusCode, NoAnswer> {
        let first = self.attempt(progress).await?;
        if self.is_refusal(first) { Box::pin(self.replay(first, progress)).await } else { Ok(first) }
    }

    /// Sends once more after the token was refused, if there is a different one. Returns the status of the last reply.
    // A replay is no double send: only statuses that mean that nothing was done can be configured as refusals of the token.
    #[cold]
    async fn replay(&mut self, first: StatusCode, progress: &mut Progress) -> Result<StatusCode, NoAnswer> {
        progress.refused = Some(first);
        if let Some(first) = &mut progress.arrived {
            // Dropped, not read: a 401 with a long body held up its own replay. The drop closes the connection (of HTTP/2, the
            // stream), and the replay takes a new one.
            // tests/hyper.rs: dropping_an_unfinished_reply_closes_its_connection
            first.rest = None;
        }
        let refused = self.token.generation();
        // Asked before the fetch below. Some endpoints let only the last token live, so that the fetch itself ends this token.
        // After it a refusal of this token would say nothing about another client.
        let had_worked = self.cooldown().has_accepted(refused) && self.slot().has_left_alone(refused);
        let Some(token) = self.another_token(had_worked, progress).await else { return Ok(first) };
        progress.first_token = Some(std::mem::replace(&mut self.token, token));
        // The upstream counts a replay as a request. It goes out even if no quota is left, since the call is under way.
        self.terms.quota.take_unchecked();
        let second = self.attempt(progress).await?;
        progress.is_rejected = self.is_refusal(second);
        if progress.is_rejected {
            self.cooldown().rejected();
        } else if had_worked && second.is_success() {
            // The same call succeeds with another token, so the first one was ended, and the caller is not to blame.
            self.slot().was_ended(refused);
        }
        Ok(second)
    }

    /// A token of a later generation than the refused one, fetched if need be. `None` if there is none, or if a cool-down
    /// forbids a fetch; `progress` then says why.
    async fn another_token(&self, had_worked: bool, progress: &mut Progress) -> Option<Token> {
        let refused = self.token.generation();
        // Another request may have met the same refusal earlier, and have caused a fetch. Its token serves all.
        if let Some(token) = self.slot().newer(refused) {
            return Some(token);
        }
        if !self.cooldown().may_fetch(refused) {
            progress.is_rejected = true;
            return None;
        }
        match self.slot().replace(refused, had_worked).await {
            Ok(token) => return Some(token),
            Err(ReplaceError::Failed(cause)) => progress.no_token = Some(cause),
            Err(ReplaceError::Same) => {
                progress.is_rejected = true;
                self.cooldown().rejected();
            }
        }
        None
    }

    /// The slot of the exchange's credential.
    fn slot(&self) -> &Slot {
        self.terms.slot(self.credential)
    }

    /// The cool-down of the exchange's credential on its route.
    pub(super) fn cooldown(&self) -> &Cooldown {
        &self.route.cooldowns[self.credential.0]
    }

    /// Whether a status means that the upstream refused the token.
    pub(super) fn is_refusal(&self, status: StatusCode) -> bool {
        self.terms.refused_statuses.contains(&status)
    }

    /// Sends once, reads the reply into `progress` and returns its status. A connection that dies before a byte was written is
    /// replaced, once.
    ///
    /// Fails if there is no connection, or if the exchange broke off after bytes were written.
    // The upstream may close an idle connection at any moment (RFC 9112, section 9.5), so the reserved one may be dead. That no
    // byte was written is known by the count of the socket below hyper, not by hyper's error.
    async fn attempt(&mut self, progress: &mut Progress) -> Result<StatusCode, NoAnswer> {
        let mut fresh = false;
        loop {
            if self.connection.is_stale() {
                self.connection.reconnect().await.map_err(Broken::unreachable)?;
                fresh = true;
            }
            progress.written_before = self.connection.written();
            let sent = match self.connection.ready().await {
                Ok(()) => {
                    let Self { terms, route, token, operator, body, connection, .. } = &mut *self;
                    connection.send(|| terms.request(route, token, operator, body)).await
                }
                Err(error) => Err(error),
            };
            match sent {
                Ok(response) => {
                    // 101 is not a final reply, and no upgrade was asked for: nothing that follows could be believed.
                    // tests/hyper.rs: only_interim_response_101_is_returned
                    if response.status().is_informational() {
                        let text = format!("status {}: no other protocol was asked for", response.status());
                        return Err(Broken::broke_off(Reason::new(Cause::ReplyUnreadable, text)));
                    }
                    let arrived = progress.arrived.insert(BufferedReply::new(response));
                    arrived.read().await?;
                    let status = arrived.status;
                    progress.written_before = self.connection.written();
                    progress.answered += 1;
                    return Ok(status);
                }
                Err(error) if self.connection.written() != progress.written_before => {
                    return Err(Broken::broke_off(error.reason()));
                }
                // A new connection that fails before its first byte: the next one would fare no better.
                Err(error) if fresh => return Err(Broken::unreachable(error.reason().into())),
                Err(_) => {
                    self.connection.reconnect().await.map_err(Broken::unreachable)?;
                    fresh = true;
                }
            }
        }
    }
}

/// A reply whose head and first bytes are read.
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
    /// A reply of which nothing but the head is read.
    fn new(response: Response<Incoming>) -> Self {
        let (head, rest) = response.into_parts();
        let (version, status, headers) = (head.version, head.status, head.headers);
        Self { version, status, headers, body: Bytes::new(), rest: Some(rest) }
    }

    /// Reads the body to its end, or until more than [`DECISIVE`] bytes are there. Fails if the body breaks off.
    async fn read(&mut self) -> Result<(), NoAnswer> {
        let mut more = BytesMut::new();
        while let Some(rest) = &mut self.rest {
            // Of a body with a known length nothing comes after its last byte. Asking hyper again would cost a lock and a waker.
            // tests/hyper.rs: body_of_known_length_ends_with_its_last_byte
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
                // The common case: the body comes in one piece, which is passed on without a copy.
                self.body = data;
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

/// The reason of a reply that ended before its end.
pub(super) fn cut_short() -> Reason {
    Reason::new(Cause::ReplyCut, "the stream of the reply was reset before its end")
}

/// Whether a body without a next frame has come to its end.
// Over HTTP/2 hyper ends a body without an error also when its stream is reset, or denied by a GOAWAY, with the reason NO_ERROR.
// So a cut reply was once passed on as a whole one, and after a cut 401 the request was sent again.
// tests/hyper.rs: only_end_stream_shows_that_an_http2_body_is_complete
// tests/hyper.rs: truncated_and_misframed_http1_replies_have_distinct_errors
pub(super) fn is_whole(body: &Incoming, version: Version) -> bool {
    version != Version::HTTP_2 || body.is_end_stream()
}
