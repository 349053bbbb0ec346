//! Streams the rest of a reply of more than 64 KiB to the caller.
//!
//! The outcome is decided by the first 64 KiB and was announced in the head. So a reply that breaks off later aborts the
//! caller's connection, and the record says so.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::Version;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::attempt::{cut_short, is_whole};
use super::conclude::quotes;
use super::settlement::{Finished, committed, finish};
use super::{BodyPart, ExchangeTerms, UpstreamRoute};
use crate::audit::{ExchangeResult, IntendedRecord};
use crate::clock;
use crate::concurrency::InFlightPermit;
use crate::idempotency::{Claim, Delivery};
use crate::model::cause::Cause;
use crate::reason::Reason;
use crate::token::Token;
use crate::upstream::pool::PooledConnection;

/// The rest of a long reply. It is read on after the caller has disconnected, so that the record says how it ended.
pub(super) struct StreamedReply {
    pub(super) version: Version,
    pub(super) rest: Incoming,
    pub(super) terms: Arc<ExchangeTerms>,
    pub(super) route: Arc<UpstreamRoute>,
    pub(super) token: Token,
    pub(super) first_token: Option<Token>,
    /// The way to the caller. `None` once the caller has disconnected, or did not take a piece by the deadline.
    pub(super) sender: Option<mpsc::Sender<BodyPart>>,
    /// The record, its content so far, and the claim; `None` once they are closed.
    pub(super) open: Option<(IntendedRecord, ExchangeResult, Claim)>,
    pub(super) _permit: InFlightPermit,
}

impl StreamedReply {
    /// Passes the reply on to its end, to a quoted secret, or to the deadline.
    // Holds back as many bytes as the longest searched secret has: a quote may begin in one piece and end in the next. At least
    // one byte, so that the outcome is recorded before the last byte leaves. The search runs once twice as many bytes are held:
    // otherwise small pieces would have the same bytes searched over and over.
    pub(super) async fn run(mut self, first: Bytes, connection: PooledConnection, deadline: Instant) {
        let first_token = self.first_token.as_ref().map_or(0, |token| token.needles().longest());
        let held_back = self.token.needles().longest().max(first_token).max(1);
        let mut held = BytesMut::from(first);
        loop {
            if held.len() >= 2 * held_back {
                if quotes(&held, &self.token, self.first_token.as_ref()) {
                    return self.cut_off(deadline).await;
                }
                let piece = held.split_to(held.len() - held_back).freeze();
                self.hand_on(BodyPart::More(piece), deadline).await;
                // If pieces come without a pause, this turn of the event loop does not end. Timers go on meanwhile, and took a
                // connection for an idle one.
                clock::refresh();
            }
            match timeout_at(deadline, self.rest.frame()).await {
                Ok(Some(Ok(frame))) => held.extend_from_slice(&frame.into_data().unwrap_or_default()),
                Ok(None) if is_whole(&self.rest, self.version) => {
                    if quotes(&held, &self.token, self.first_token.as_ref()) {
                        return self.cut_off(deadline).await;
                    }
                    let finished = self.close(self.not_taken());
                    connection.release();
                    // If the commit fails, the last piece is not sent: the caller sees the reply break off, and asks again with
                    // its key.
                    if let Ok(delivery) = committed(finished, deadline).await {
                        self.hand_on(BodyPart::Last(held.freeze()), deadline).await;
                        self.hand_over(delivery);
                    }
                    return;
                }
                broken_off => {
                    let reason = match broken_off {
                        Ok(Some(Err(error))) => Reason::of_exchange(&error),
                        Ok(_) => cut_short(),
                        Err(_) => Reason::new(Cause::Timeout, "the reply did not end in time"),
                    };
                    if let Some((record, answer, _)) = &mut self.open {
                        answer.cause = Some(reason.cause);
                        let tokens = self.first_token.iter().chain([&self.token]);
                        self.terms.failed(&reason, record.id(), tokens);
                    }
                    let note = "the reply broke off after its first 64 KiB";
                    let finished = self.close(self.not_taken().or(Some(note)));
                    self.hand_over(committed(finished, deadline).await.ok().flatten());
                    return;
                }
            }
        }
    }

    /// Ends the reply at a quoted secret. What was held back is not passed on, so no byte of the quote reaches the caller.
    #[cold]
    async fn cut_off(mut self, deadline: Instant) {
        if let Some((record, ..)) = &self.open {
            self.terms.withhold("tail", record.id(), &self.route.name);
        }
        let finished = self.close(Some("the reply quoted the credential and was cut off"));
        self.hand_over(committed(finished, deadline).await.ok().flatten());
    }

    /// The note for the record, if the caller did not take the whole reply.
    fn not_taken(&self) -> Option<&'static str> {
        self.sender.is_none().then_some("the caller did not take all of the reply")
    }

    /// Passes a piece on. If that fails, or takes until the deadline, no later piece is passed on, since the caller must not get
    /// a reply with a gap.
    async fn hand_on(&mut self, piece: BodyPart, deadline: Instant) {
        let Some(sender) = &self.sender else { return };
        if !matches!(timeout_at(deadline, sender.send(piece)).await, Ok(Ok(()))) {
            self.sender = None;
        }
    }

    /// Closes the record and passes the claim to [`finish`]. Does nothing if that was done before.
    fn close(&mut self, note: Option<&'static str>) -> Finished {
        let Some((record, answer, claim)) = self.open.take() else { return Finished::default() };
        finish(claim, record, &ExchangeResult { note, ..answer })
    }

    /// Hands over the delivery of a success if the caller took every piece so far: it then has the head, which reports the
    /// success. Otherwise drops the delivery, which makes the success undelivered.
    fn hand_over(&self, delivery: Option<Delivery>) {
        if let Some(mut delivery) = delivery.filter(|_| self.sender.is_some()) {
            delivery.hand_over();
        }
    }
}

/// Closes the record if a stop of the gateway drops the task. The record then has the outcome that the caller got with the head.
impl Drop for StreamedReply {
    fn drop(&mut self) {
        drop(self.close(Some("the gateway stopped while the reply was passed on")));
    }
}
