//! A dry run: answers what would be sent, or with the refusal that the call would get.
//!
//! It passes the stages up to the contract as any request does, and so spends the caller's own limit. Beyond these it takes no
//! quota and no key, registers no call and sends nothing.

use std::pin::pin;

use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::{Map, Value, json};

use super::{Entered, Gateway, RequestParts};
use crate::audit::OpenRecord;
use crate::contract::CheckedBody;
use crate::error::Error;
use crate::exchange::{RelayedBody, Reply};
use crate::idempotency::{Call, DryRunDecision};
use crate::model::outcome::{Outcome, Retry};
use crate::model::stage::Stage;

impl Gateway {
    /// The rest of a dry run: asks deduplication, token and quota, and answers with what would be sent. Fails with the refusal
    /// that the call would get.
    pub(super) async fn dry_run(
        &self,
        RequestParts { state, from, head, .. }: &RequestParts<'_>,
        Entered { routed, .. }: &Entered<'_>,
        call: Call<'_>,
        body: &CheckedBody,
        record: &mut OpenRecord,
    ) -> Result<Box<Reply>, Error> {
        let would = self.idempotency.peek(call, head)?;

        // A token is fetched if there is none: only that shows whether the call would be sent.
        record.enter(Stage::Token);
        let slot = state.terms.slot(routed.credential);
        let token = from.presence.unless_disconnected(pin!(slot.token())).await??;

        record.enter(Stage::Quota);
        state.terms.quota.peek()?;

        let size = body.bytes().len();
        let headers = state.terms.outbound.with(&token, routed.operator, size);
        let (would, first) = match would {
            DryRunDecision::BeSent(first) => ("be sent", first),
            DryRunDecision::BeReplayed(first) => {
                ("be answered as the first call with its key was", Some(first))
            }
        };
        record.dry_run(StatusCode::OK.as_u16());
        let answer = json!({
            "dry_run": true,
            "would": would,
            "first_request_id": first.map(|first| first.request_id().to_string()),
            "first_outcome": first.map(|first| first.outcome.as_str()),
            "caller": call.caller,
            "route": call.route,
            "credential": slot.name(),
            "request": {
                "method": "POST",
                "target": routed.route.exchange.target.path(),
                "headers": masked(&headers),
                "body_size": size,
            },
        });
        let headers =
            HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
        let body = RelayedBody::Whole(answer.to_string().into());
        let retry = Retry::unchanged(head.idempotency_key.count > 0);
        let (status, outcome) = (StatusCode::OK, Outcome::NotSent);
        Ok(Box::new(Reply { status, headers, body, outcome, retry, first, delivery: None }))
    }
}

/// The headers as JSON, with `***` in the place of each sensitive value.
fn masked(headers: &HeaderMap) -> Map<String, Value> {
    let shown = |value: &HeaderValue| {
        if value.is_sensitive() { "***".into() } else { String::from_utf8_lossy(value.as_bytes()).into() }
    };
    headers.iter().map(|(name, value)| (name.to_string(), Value::String(shown(value)))).collect()
}
