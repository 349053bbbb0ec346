//! Stage 9: one exchange with the upstream. Sends the request, reads the reply, classifies it, and closes the record.
//!
//! An [`Exchange`] owns all that it needs. From the intent on it runs to its end or deadline whatever the caller does, and
//! nothing else closes its record. The upstream is not idempotent, so a request is sent again in these cases only:
//!
//! * Not a byte of it was written.
//! * Over HTTP/2 the upstream said that it did not process the request, and had sent nothing on its stream (RFC 9113,
//!   section 8.7).
//! * The upstream refused the token, and there is a different one. That happens once.
//!
//! There is no retry after a time-out, a reset or a 5xx: bytes may have arrived, so the outcome is unknown.

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
use crate::concurrency::InFlightPermit;
use crate::idempotency::Claim;
use crate::model::cause::Cause;
use crate::model::code::Code;
use crate::model::index::CredentialIndex;
use crate::token::Token;
use crate::upstream::breaker::{CircuitPermit, Health};
use crate::upstream::pool::PooledConnection;
use attempt::BufferedReply;
pub use cooldown::Cooldown;
pub use detached::{Detached, Exchanges};
pub use reply::{BodyPart, BrokenOff, ExchangeReply, Failure, RelayedBody, Reply};
pub use route::UpstreamRoute;
pub use terms::{ExchangeMetrics, ExchangeTerms};

/// One exchange with the upstream, under one intent.
#[derive(Debug)]
pub struct Exchange {
    /// What all exchanges have in common.
    pub terms: Arc<ExchangeTerms>,
    /// The route.
    pub route: Arc<UpstreamRoute>,
    /// The credential. All tokens of this exchange belong to it.
    pub credential: CredentialIndex,
    /// The circuit breaker's permit to use the upstream.
    pub circuit_permit: CircuitPermit,
    /// The connection, reserved before the intent.
    pub connection: PooledConnection,
    /// The token to send with. A replay replaces it.
    pub token: Token,
    /// The operator, for `x-UserId`.
    pub operator: HeaderValue,
    /// The body, as it was checked.
    pub body: Bytes,
    /// The request's record, whose intent is committed.
    pub record: IntendedRecord,
    /// The call's right to be sent, marked as sent.
    pub claim: Claim,
    /// The request's permit under the bound on concurrent work. A stop of the gateway waits until it is dropped.
    pub permit: InFlightPermit,
}

/// How far an exchange got. Decides the outcome if it ends without a reply.
#[derive(Debug)]
struct Progress {
    /// The number of attempts that got a reply.
    answered: u32,
    /// How many bytes the connection had written before the attempt that has no reply yet.
    // More than this at the end means that bytes may have arrived, so that the outcome is unknown.
    written_before: u64,
    /// The status of the reply that refused the token.
    refused: Option<StatusCode>,
    /// The token that was refused, if another one was sent after it.
    first_token: Option<Token>,
    /// Whether another token does not help: a fresh one was refused too, or the same one was handed out again.
    is_rejected: bool,
    /// The cause of the failed fetch, if no other token could be fetched.
    no_token: Option<Cause>,
    /// The last reply.
    // Here instead of in results: there each return would move it once more.
    arrived: Option<BufferedReply>,
}

impl Progress {
    /// The code of an exchange that a refused token ends.
    // "Not purchased" is only said where a fresh token was refused, too. A token endpoint that is down is another fault.
    fn refusal(&self) -> Code {
        if self.is_rejected { Code::CredentialRejected } else { Code::TokenUnavailable }
    }

    /// Whether the token was refused and no other one was sent yet. The exchange then waits for the token endpoint, not for the
    /// upstream.
    // Not decided by written bytes: the upstream may refuse a token before it has read the whole request, and the rest of that
    // is sent while the token is fetched. A decision by bytes gave such calls an unknown outcome, and counted them as failures
    // of the upstream.
    fn awaits_token(&self) -> bool {
        self.refused.is_some() && self.first_token.is_none()
    }
}

impl Exchanges {
    /// Runs an exchange to its end or to the route's `timeout`, which covers a replay and the fetch of its token.
    ///
    /// Cancellation-safe: dropping the returned future does not stop the exchange, see [`Detached`].
    pub fn run(self: &Arc<Self>, mut exchange: Exchange) -> Detached {
        // An async block, since the future of an async function would hold its argument twice.
        let run = async move {
            let deadline = clock::now() + exchange.route.timeout;
            let written_before = exchange.connection.written();
            let mut progress = Progress {
                answered: 0,
                written_before,
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
                // The upstream has answered. What took so long was another token, which says nothing about its health.
                None if progress.awaits_token() => Health::Inconclusive,
                None => Health::Down(Cause::Timeout),
            };
            exchange.terms.breaker.on_result(&mut exchange.circuit_permit, health);
            let (reply, uncommitted) = match (arrived, status) {
                (Some(arrived), _) => exchange.conclude(arrived, &progress, deadline),
                (None, Some(Err(broken))) => {
                    let (code, reason) = broken.code_and_reason();
                    reason.into_iter().for_each(|reason| exchange.report(reason, &progress));
                    exchange.fail(&progress, code, reason.map(|reason| reason.cause))
                }
                (None, _) => exchange.time_out(&progress),
            };
            match uncommitted {
                None => reply,
                Some(uncommitted) => Box::pin(uncommitted.release_when_committed(reply, deadline)).await,
            }
        };
        self.detach(run)
    }
}
