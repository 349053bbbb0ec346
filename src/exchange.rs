//! Stage 9: send, replay once after a refused token, read, classify.
//!
//! An [`Exchange`] owns all that it needs: from the intent on it runs to its end or deadline whatever the
//! caller does, and its record is closed by it alone. It sends a request again in two cases only: not a
//! byte of it was written, or over HTTP/2 the upstream said that it was not processed and had sent nothing on its
//! stream; or the upstream refused the token and a different one is at hand.

mod attempt;
mod conclude;
mod cooldown;
mod detached;
mod reply;
mod route;
mod settlement;
mod streaming;
mod terms;

use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderValue, StatusCode};

use crate::audit::IntendedRecord;
use crate::clock;
use crate::concurrency::Room;
use crate::idempotency::Claim;
use crate::model::cause::Cause;
use crate::model::code::Code;
use crate::model::index::CredentialIndex;
use crate::token::Token;
use crate::upstream::breaker::{Health, Passage};
use crate::upstream::pool::Reserved;
use attempt::BufferedReply;
pub use cooldown::Cooldown;
pub use detached::{Detached, Exchanges};
pub use reply::{BodyPart, BrokenOff, Failure, Reply, ReplyBody, Told};
pub use route::Route;
pub use terms::{Metrics, Terms};

/// One exchange with the upstream under one intent.
#[derive(Debug)]
pub struct Exchange {
    /// What is common to all exchanges.
    pub terms: Arc<Terms>,
    /// The route.
    pub route: Arc<Route>,
    /// Which credential.
    pub credential: CredentialIndex,
    /// Its leave to meet the upstream.
    pub passage: Passage,
    /// The connection reserved before the intent.
    pub connection: Reserved,
    /// The token.
    pub token: Token,
    /// Who acts.
    pub operator: HeaderValue,
    /// The checked body.
    pub body: Bytes,
    /// The request's record; its intent is safe.
    pub record: IntendedRecord,
    /// Its right to be sent.
    pub claim: Claim,
    /// The request's place under the bound on concurrent work.
    pub room: Room,
}

/// How far an exchange got, for the case that it ends without an answer.
#[derive(Debug)]
struct Progress {
    /// Attempts that were answered.
    answered: u32,
    /// Bytes that were written beyond this belong to an attempt without an answer.
    mark: u64,
    /// The answer that refused the token.
    refused: Option<StatusCode>,
    /// The token that was refused, if another one was sent behind it.
    first_token: Option<Token>,
    /// Another token does not help: a fresh one was refused too, or the same one was handed out again.
    is_rejected: bool,
    /// Why no other token could be had.
    no_token: Option<Cause>,
    /// The last answer. Here, since it would be moved with each step back.
    arrived: Option<BufferedReply>,
}

impl Progress {
    /// Why a token that was refused ends the exchange.
    fn refusal(&self) -> Code {
        if self.is_rejected { Code::CredentialRejected } else { Code::TokenUnavailable }
    }

    /// Whether the token was refused and no other one is at hand yet: what takes long then is the token endpoint. Bytes may
    /// yet leave, since the upstream may have refused the request before it had all of it.
    fn awaits_token(&self) -> bool {
        self.refused.is_some() && self.first_token.is_none()
    }
}

impl Exchanges {
    /// Runs an exchange to its end or deadline. The caller of this future may drop it: see [`Detached`].
    pub fn run(self: &Arc<Self>, mut exchange: Exchange) -> Detached {
        // A block, not a function: that would hold its argument twice.
        let run = async move {
            let deadline = clock::now() + exchange.route.timeout;
            let mark = exchange.connection.written();
            let mut progress = Progress {
                answered: 0,
                mark,
                refused: None,
                first_token: None,
                is_rejected: false,
                no_token: None,
                arrived: None,
            };
            let mut timer = exchange.connection.take_timer();
            let status = timer.until(deadline, pin!(exchange.attempts(&mut progress))).await;
            let arrived = if let Some(Ok(_)) = status { progress.arrived.take() } else { None };
            exchange.connection.keep_timer(timer);
            let health = match &status {
                Some(Ok(status)) => Health::of(*status),
                Some(Err(broken)) => broken.health(),
                // It has answered; what took so long was another token.
                None if progress.awaits_token() => Health::Unclear,
                None => Health::Down(Cause::Timeout),
            };
            exchange.terms.breaker.judge(&mut exchange.passage, health);
            let (told, pending) = match (arrived, status) {
                (Some(arrived), _) => exchange.conclude(arrived, &progress, deadline),
                (None, Some(Err(broken))) => {
                    let (code, reason) = broken.told();
                    reason.into_iter().for_each(|reason| exchange.tell(reason, &progress));
                    exchange.fail(&progress, code, reason.map(|reason| reason.cause))
                }
                (None, _) => exchange.time_out(&progress),
            };
            match pending {
                None => told,
                Some(pending) => Box::pin(pending.settle(told, deadline)).await,
            }
        };
        self.detach(run)
    }
}
