//! A dry run: what would be sent, and what would refuse it.

use std::pin::pin;

use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::{Map, Value, json};

use super::{Entered, Gateway, RequestParts};
use crate::audit::OpenRecord;
use crate::contract::CheckedBody;
use crate::error::Error;
use crate::exchange::{Reply, ReplyBody};
use crate::idempotency::{Call, Would};
use crate::model::outcome::{Outcome, Retry};
use crate::model::stage::Stage;

impl Gateway {
    /// The rest of the way of a dry run, up to the quota: all that could refuse it is asked, nothing is spent or
    /// remembered, and the answer is what would be sent.
    pub(super) async fn dry_run(
        &self,
        RequestParts { state, from, head, .. }: &RequestParts<'_>,
        Entered { routed, .. }: &Entered<'_>,
        call: Call<'_>,
        body: &CheckedBody,
        record: &mut OpenRecord,
    ) -> Result<Box<Reply>, Error> {
        let would = self.idempotency.look(call, head)?;

        record.enter(Stage::Token);
        let slot = state.terms.slot(routed.credential);
        let token = from.presence.during(pin!(slot.token())).await??;

        record.enter(Stage::Quota);
        state.terms.quota.look()?;

        let size = body.bytes().len();
        let headers = state.terms.outbound.with(&token, routed.operator, size);
        let (would, first) = match would {
            Would::BeSent(first) => ("be sent", first),
            Would::BeReplayed(first) => ("be answered as the first call with its key was", Some(first)),
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
        let body = ReplyBody::Whole(answer.to_string().into());
        let retry = Retry::unchanged(head.idempotency_key.count > 0);
        let (status, outcome) = (StatusCode::OK, Outcome::NotSent);
        Ok(Box::new(Reply { status, headers, body, outcome, retry, first, delivery: None }))
    }
}

/// A head for people to see.
fn masked(headers: &HeaderMap) -> Map<String, Value> {
    let shown = |value: &HeaderValue| {
        if value.is_sensitive() { "***".into() } else { String::from_utf8_lossy(value.as_bytes()).into() }
    };
    headers.iter().map(|(name, value)| (name.to_string(), Value::String(shown(value)))).collect()
}
