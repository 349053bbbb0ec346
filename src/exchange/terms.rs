//! The parts that all exchanges share: circuit breaker, quota, token slots, and the head of upstream requests.
//!
//! They outlive a reload. One pointer to all of them costs a request one reference count instead of one for each.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, StatusCode};
use http_body_util::Full;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

use super::UpstreamRoute;
use crate::log::OncePerSecond;
use crate::model::index::CredentialIndex;
use crate::model::request_id::RequestId;
use crate::rate_limit::Quota;
use crate::reason::{CauseLabel, Failures, Reason};
use crate::token::{Slot, Token};
use crate::upstream::breaker;
use crate::upstream::breaker::{Breaker, CircuitPermit, Health};
use crate::upstream::head::Outbound;
use crate::upstream::pool::NoConnection;

/// The parts that all exchanges share.
#[derive(Debug)]
pub struct ExchangeTerms {
    /// The head of every upstream request.
    pub outbound: Outbound,
    /// The statuses that mean that the upstream refused the token. They cause a replay.
    pub refused_statuses: Vec<StatusCode>,
    /// The circuit breaker of the upstream.
    pub breaker: Arc<Breaker>,
    /// The upstream's quota, shared by all callers.
    pub quota: Quota,
    /// The token slots: one per credential, in the configuration's order.
    pub slots: Vec<Arc<Slot>>,
    /// The failures so far, for metrics and `/status`.
    pub failures: Failures,
    /// Reply headers that pass to callers, in addition to those that always do.
    pub reply_headers: Vec<HeaderName>,
    /// Parts of replies that were withheld because they quote a secret, by place.
    pub withheld: Family<PlaceLabel, Counter>,
}

/// The metrics of exchanges.
#[derive(Clone, Debug)]
pub struct ExchangeMetrics {
    /// The metrics of the circuit breaker.
    pub breaker: breaker::CircuitMetrics,
    /// Requests that failed, by cause.
    pub failures: Family<CauseLabel, Counter>,
    /// Parts of replies that were withheld because they quote a secret, by place.
    pub withheld: Family<PlaceLabel, Counter>,
}

/// The label that says which part of a reply was withheld: its body, a header, or its tail.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PlaceLabel {
    place: &'static str,
}

impl ExchangeTerms {
    /// The token slot of a credential.
    ///
    /// # Panics
    ///
    /// If the index is not one of this configuration.
    pub fn slot(&self, CredentialIndex(index): CredentialIndex) -> &Slot {
        &self.slots[index]
    }

    /// Reports to the circuit breaker and to operators that no connection could be made for a request. Does nothing if all
    /// connections were busy.
    // Busy connections are a bound of the gateway's own, and no failure of the upstream.
    #[cold]
    pub fn unreachable(&self, circuit_permit: &mut CircuitPermit, none: &NoConnection, id: RequestId) {
        if let NoConnection::Failed(reason) = none {
            self.breaker.on_result(circuit_permit, Health::Down(reason.cause));
            self.failed(reason, id, []);
        }
    }

    /// Reports to operators that a request failed.
    // The text may be the upstream's. So the tokens that the request was sent with, and those of the slots, are searched for in
    // it before it reaches the log or `/status`.
    #[cold]
    pub(super) fn failed<'a>(
        &self,
        reason: &Reason,
        id: RequestId,
        sent_with: impl IntoIterator<Item = &'a Token>,
    ) {
        let held = self.slots.iter().filter_map(|slot| slot.last_token());
        let tokens: Vec<_> = held.chain(sent_with.into_iter().cloned()).collect();
        if let Some((error, times)) = self.failures.failed(reason, tokens.iter().map(Token::needles)) {
            tracing::warn!(cause = %reason.cause, error, %id, times, "the upstream failed");
        }
    }

    /// Counts and reports that a part of a reply quotes a secret.
    pub(super) fn withhold(&self, place: &'static str, id: RequestId, route: &str) {
        // An upstream that echoes does so in each reply. The metric counts all of them.
        static QUOTED: OncePerSecond = OncePerSecond::new();
        self.withheld.get_or_create(&PlaceLabel { place }).inc();
        if let Some(times) = QUOTED.times() {
            tracing::warn!(%id, route, place, times, "the upstream's reply quotes the credential, and was not passed on");
        }
    }

    /// Builds the upstream request of a checked body. Of the caller's head it contains only the operator.
    pub(super) fn request(
        &self,
        route: &UpstreamRoute,
        token: &Token,
        operator: &HeaderValue,
        body: &Bytes,
    ) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = route.target.clone();
        *request.headers_mut() = self.outbound.with(token, operator, body.len());
        request
    }
}
