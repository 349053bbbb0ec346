//! The control API under `/_sandbox/`: reads the records, reads and replaces the script of faults. All bodies are JSON.
//!
//! Received bytes are text where they are UTF-8 (otherwise null), and base64 beside it. Control calls are never recorded, and
//! faults of calls do not apply to them.

use serde_json::{Value, json};

use super::faults::Faults;
use super::http::{Head, Reply};
use super::journal::{Received, TokenCall};
use super::{Cloud, lock};
use crate::base64::base64;

/// The prefix of all control paths.
pub(super) const PREFIX: &str = "/_sandbox/";

/// The list that `GET /_sandbox/` returns.
const CALLS: [&str; 8] = [
    "GET /_sandbox/requests",
    "GET /_sandbox/token-calls",
    "GET /_sandbox/tasks",
    "GET /_sandbox/connections",
    "GET /_sandbox/faults",
    "PUT /_sandbox/faults",
    "POST /_sandbox/reset",
    "POST /_sandbox/revoke",
];

/// Answers a control call.
pub(super) fn answer(cloud: &Cloud, head: &Head, body: &[u8]) -> Reply {
    let path = head.path.strip_prefix(PREFIX).unwrap_or_default();
    match (head.method.as_str(), path) {
        ("GET", "") => ok(&json!(CALLS)),
        ("GET", "requests") => ok(&cloud.journal().requests().iter().map(received).collect()),
        ("GET", "token-calls") => ok(&cloud.journal().token_calls().iter().map(token_call).collect()),
        ("GET", "tasks") => ok(&json!(&*lock(&cloud.tasks))),
        ("GET", "connections") => ok(&json!(cloud.connections())),
        ("GET", "faults") => ok(&json!(cloud.script().faults)),
        ("PUT", "faults") => put_faults(cloud, body),
        ("POST", "reset") => {
            cloud.reset();
            ok(&json!({}))
        }
        ("POST", "revoke") => {
            lock(&cloud.tokens).revoke();
            ok(&json!({}))
        }
        _ => Reply::error(404, "no such control call; GET /_sandbox/ lists them"),
    }
}

fn put_faults(cloud: &Cloud, body: &[u8]) -> Reply {
    let applied =
        serde_json::from_slice::<Faults>(body).map_err(|error| error.to_string()).and_then(|faults| {
            // Over HTTP only: a test that holds the `Sandbox` can end any script.
            if faults.locks_out() && cloud.token.is_none() {
                return Err(
                    "nobody could end this script over HTTP: it needs a token listener or `times`".to_owned()
                );
            }
            cloud.apply(faults)
        });
    match applied {
        Ok(()) => ok(&json!(cloud.script().faults)),
        Err(reason) => Reply::error(400, &reason),
    }
}

fn ok(body: &Value) -> Reply {
    Reply::json(200, body)
}

fn token_call(call: &TokenCall) -> Value {
    let mut value = received(&call.request);
    value["asked"] = json!(call.asked);
    value["issued"] = json!(call.issued);
    value
}

fn received(request: &Received) -> Value {
    json!({
        "connection": request.connection,
        "time": jiff::Timestamp::try_from(request.time).map(|time| time.to_string()).ok(),
        "at_ms": u64::try_from(request.at.as_millis()).unwrap_or(u64::MAX),
        "complete": request.complete,
        "status": request.status,
        "head": std::str::from_utf8(&request.head).ok(),
        "head_base64": base64(&request.head),
        "body": std::str::from_utf8(&request.body).ok(),
        "body_base64": base64(&request.body),
    })
}
