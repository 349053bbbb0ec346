//! What is common to all exchanges.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, StatusCode};
use http_body_util::Full;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

use super::Route;
use crate::log::OncePerSecond;
use crate::model::index::CredentialIndex;
use crate::model::request_id::RequestId;
use crate::rate_limit::Quota;
use crate::reason::{CauseLabel, Failures, Reason};
use crate::token::{Slot, Token};
use crate::upstream::breaker;
use crate::upstream::breaker::{Breaker, Health, Passage};
use crate::upstream::head::Outbound;
use crate::upstream::pool::NoConnection;

/// What is common to all exchanges.
#[derive(Debug)]
pub struct Terms {
    /// The head of every upstream request.
    pub outbound: Outbound,
    /// Statuses that mean "token refused".
    pub refused_statuses: Vec<StatusCode>,
    /// Whether the upstream is left alone.
    pub breaker: Arc<Breaker>,
    /// The upstream's budget.
    pub quota: Quota,
    /// Where tokens come from: one slot per credential, in the configuration's order.
    pub slots: Vec<Arc<Slot>>,
    /// What failed so far.
    pub failures: Failures,
    /// Reply headers that pass to callers, beside those that always do.
    pub reply_headers: Vec<HeaderName>,
    /// What was withheld because it quotes a secret, by place.
    pub withheld: Family<PlaceLabel, Counter>,
}

/// What is counted of exchanges.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Of the breaker.
    pub breaker: breaker::Metrics,
    /// Requests that failed, by cause.
    pub failures: Family<CauseLabel, Counter>,
    /// What was withheld because it quotes a secret, by place.
    pub withheld: Family<PlaceLabel, Counter>,
}

/// The label of what was withheld.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PlaceLabel {
    place: &'static str,
}

impl Terms {
    /// Where the tokens of a credential come from.
    pub fn slot(&self, CredentialIndex(index): CredentialIndex) -> &Slot {
        &self.slots[index]
    }

    /// No connection was had for a request.
    #[cold]
    pub fn unreachable(&self, passage: &mut Passage, none: &NoConnection, id: RequestId) {
        if let NoConnection::Failed(reason) = none {
            self.breaker.judge(passage, Health::Down(reason.cause));
            self.failed(reason, id, []);
        }
    }

    /// Tells operators that a request failed. Neither the tokens that it was sent with may be quoted, nor those of the slots.
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

    /// Counts and tells that something of a reply quotes a secret.
    pub(super) fn withhold(&self, place: &'static str, id: RequestId, route: &str) {
        static QUOTED: OncePerSecond = OncePerSecond::new();
        self.withheld.get_or_create(&PlaceLabel { place }).inc();
        if let Some(times) = QUOTED.times() {
            tracing::warn!(%id, route, place, times, "the upstream's reply quotes the credential, and was not passed on");
        }
    }

    pub(super) fn request(
        &self,
        route: &Route,
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
