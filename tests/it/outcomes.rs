//! The table of answers: for each code, and for each kind of reply that is passed on or made, what the caller is told, what
//! the upstream receives, and what the trail and the metrics say. Each row is triggered with and without an
//! `Idempotency-Key`, on real sockets.

mod equal_bodies;
pub(crate) mod triggers;

use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use ccsqm_gateway::{
    error::Error,
    model::{code::Code, outcome::Outcome, request_id::RequestId, stage::Stage},
    sandbox::{self, Fault, Sandbox},
};
use serde_json::Value;

use crate::{messages, support::*};
use triggers::*;

/// An answer, and how it is brought about.
struct Row {
    /// Empty for a reply that is passed on, replayed, or made by a dry run.
    code: &'static str,
    /// What tells rows of one code apart.
    case: &'static str,
    status: u16,
    outcome: &'static str,
    /// Without and with a key; empty where there is no such call.
    retry: [&'static str; 2],
    has_retry_after: bool,
    /// What became of the call that the answer is about; empty if it is about none.
    first_outcome: &'static str,
    /// How often the upstream receives the call.
    received: usize,
    /// The call's own outcome, in its record and in the metrics.
    own_outcome: &'static str,
    /// Makes the call; the argument is the header line of its key, or empty.
    trigger: fn(&str) -> Trial,
}

/// A call that was answered, with all that must live until its traces were looked at.
struct Trial {
    sandbox: Sandbox,
    gateway: Gateway,
    reply: Reply,
    /// The request id of the call that the answer is about, if it is about one.
    first: Option<String>,
    /// How often the upstream received the call.
    received: usize,
    /// Ends what keeps the call's record from being written, and holds what must stay open until then.
    end: Box<dyn FnOnce()>,
}

impl Row {
    /// Code and case.
    fn name(&self) -> String {
        let parts = [self.code, self.case];
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ")
    }
}

const UNCHANGED: [&str; 2] = ["safe", "same-key"];

/// Refused for the moment.
const BUSY: Row = Row {
    code: "",
    case: "",
    status: 503,
    outcome: "not_sent",
    retry: UNCHANGED,
    has_retry_after: true,
    first_outcome: "",
    received: 0,
    own_outcome: "not_sent",
    trigger: |_| unreachable!(),
};

/// Refused until operators act.
const DENIED: Row = Row { status: 403, retry: ["later"; 2], has_retry_after: false, ..BUSY };

/// Refused until the request is another one.
const WRONG: Row = Row { status: 400, retry: ["after-correction"; 2], has_retry_after: false, ..BUSY };

/// Nobody knows whether it was done.
const DOUBT: Row = Row {
    outcome: "unknown",
    own_outcome: "unknown",
    retry: ["check-first"; 2],
    has_retry_after: false,
    received: 1,
    ..BUSY
};

/// An equal call stands in the way.
const DUPLICATE: Row =
    Row { code: "duplicate_suspected", status: 409, own_outcome: "not_sent", received: 0, ..DOUBT };

/// The upstream refused it.
const REFUSED: Row =
    Row { outcome: "refused", own_outcome: "refused", retry: ["later"; 2], received: 1, ..BUSY };

/// The upstream's reply, passed on.
const PASSED: Row = Row { status: 200, has_retry_after: false, received: 1, ..BUSY };

/// The stored reply of the first call with this key.
const REPLAYED: Row = Row { outcome: "replayed", own_outcome: "replayed", received: 0, ..PASSED };

const ROWS: &[Row] = &[
    Row { code: "draining", trigger: draining, ..BUSY },
    Row { code: "overloaded", case: "requests", trigger: overloaded, ..BUSY },
    Row { code: "overloaded", case: "connections", trigger: overloaded_by_connections, ..BUSY },
    Row { code: "overloaded", case: "upstream connections", trigger: overloaded_upstream, ..BUSY },
    Row { code: "rate_limited", status: 429, trigger: rate_limited, ..BUSY },
    Row { code: "quota_exhausted", status: 429, trigger: quota_exhausted, ..BUSY },
    Row { code: "upstream_suspended", trigger: upstream_suspended, ..BUSY },
    Row {
        code: "upstream_unreachable",
        status: 502,
        has_retry_after: false,
        trigger: upstream_unreachable,
        ..BUSY
    },
    Row { code: "body_timeout", status: 408, has_retry_after: false, trigger: body_timeout, ..BUSY },
    Row { code: "body_incomplete", status: 400, has_retry_after: false, trigger: body_incomplete, ..BUSY },
    Row { code: "audit_unavailable", trigger: audit_unavailable, ..BUSY },
    Row { code: "idempotency_unavailable", trigger: idempotency_unavailable, ..BUSY },
    Row { code: "token_unavailable", case: "nothing sent", trigger: token_unavailable, ..BUSY },
    Row {
        code: "token_unavailable",
        case: "after the upstream refused a token",
        status: 503,
        retry: UNCHANGED,
        trigger: token_unavailable_after_a_refusal,
        ..REFUSED
    },
    Row {
        code: "credential_refused",
        status: 502,
        has_retry_after: true,
        trigger: credential_refused,
        ..DENIED
    },
    Row { code: "credential_rejected", status: 502, received: 2, trigger: credential_rejected, ..REFUSED },
    Row { code: "caller_left", case: "its own side is closed", trigger: caller_left, ..BUSY },
    Row { code: "browser_refused", trigger: browser_refused, ..DENIED },
    Row { code: "caller_denied", trigger: caller_denied, ..DENIED },
    Row { code: "route_denied", trigger: route_denied, ..DENIED },
    Row { code: "operator_denied", trigger: operator_denied, ..DENIED },
    Row { code: "frozen", case: "caller", trigger: frozen_caller, ..DENIED },
    Row { code: "frozen", case: "route", trigger: frozen_route, ..DENIED },
    Row { code: "head_invalid", trigger: head_invalid, ..WRONG },
    Row { code: "host_unknown", status: 421, trigger: host_unknown, ..WRONG },
    Row { code: "header_missing", status: 403, trigger: header_missing, ..WRONG },
    Row { code: "route_unknown", status: 404, trigger: route_unknown, ..WRONG },
    Row { code: "method_not_allowed", status: 405, trigger: method_not_allowed, ..WRONG },
    Row { code: "target_invalid", trigger: target_invalid, ..WRONG },
    Row { code: "body_too_large", status: 413, trigger: body_too_large, ..WRONG },
    Row { code: "media_type_unsupported", status: 415, trigger: media_type_unsupported, ..WRONG },
    Row { code: "expectation_failed", status: 417, trigger: expectation_failed, ..WRONG },
    Row { code: "trailers", trigger: trailers, ..WRONG },
    Row { code: "body_not_json", trigger: body_not_json, ..WRONG },
    Row { code: "contract_violation", status: 422, trigger: contract_violation, ..WRONG },
    Row { code: "idempotency_key_invalid", trigger: idempotency_key_invalid, ..WRONG },
    Row { code: "idempotency_key_invalid", case: "force", trigger: idempotency_force_invalid, ..WRONG },
    Row {
        code: "idempotency_mismatch",
        status: 422,
        retry: ["", "after-correction"],
        first_outcome: "succeeded",
        trigger: idempotency_mismatch,
        ..WRONG
    },
    Row {
        code: "request_in_progress",
        case: "at work",
        retry: ["", "same-key"],
        has_retry_after: true,
        first_outcome: "unknown",
        trigger: request_in_progress,
        ..DUPLICATE
    },
    Row {
        code: "request_in_progress",
        case: "its answer is not on record yet",
        status: 409,
        retry: ["", "same-key"],
        has_retry_after: true,
        own_outcome: "succeeded",
        trigger: answer_not_on_record,
        ..DOUBT
    },
    Row {
        code: "outcome_unknown",
        retry: ["", "check-first"],
        first_outcome: "unknown",
        trigger: outcome_unknown,
        ..DUPLICATE
    },
    Row {
        case: "the first is at work",
        first_outcome: "unknown",
        trigger: duplicate_of_one_at_work,
        ..DUPLICATE
    },
    Row {
        case: "the first is unknown",
        first_outcome: "unknown",
        trigger: duplicate_of_an_unknown_one,
        ..DUPLICATE
    },
    Row {
        case: "the first succeeded, undelivered",
        outcome: "succeeded",
        retry: ["not-needed"; 2],
        first_outcome: "succeeded",
        trigger: duplicate_of_an_undelivered_one,
        ..DUPLICATE
    },
    Row {
        case: "the first succeeded, `block`",
        outcome: "succeeded",
        retry: ["not-needed", ""],
        first_outcome: "succeeded",
        trigger: duplicate_that_is_blocked,
        ..DUPLICATE
    },
    Row {
        case: "the first was resolved as done",
        outcome: "succeeded",
        retry: ["not-needed"; 2],
        first_outcome: "succeeded",
        trigger: duplicate_of_a_resolved_one,
        ..DUPLICATE
    },
    Row { code: "upstream_timeout", status: 504, trigger: upstream_timeout, ..DOUBT },
    Row { code: "upstream_broken", status: 502, trigger: upstream_broken, ..DOUBT },
    Row {
        case: "passed on: succeeded",
        outcome: "succeeded",
        own_outcome: "succeeded",
        retry: ["not-needed"; 2],
        trigger: |key| passed(key, Fault::default()),
        ..PASSED
    },
    Row {
        case: "passed on: succeeded, longer than what decides",
        outcome: "succeeded",
        own_outcome: "succeeded",
        retry: ["not-needed"; 2],
        trigger: |key| passed(key, Fault::sized(200_000)),
        ..PASSED
    },
    Row {
        case: "passed on: failed, 200",
        outcome: "failed",
        own_outcome: "failed",
        retry: ["after-correction"; 2],
        trigger: |key| passed(key, Fault::failure("0409001")),
        ..PASSED
    },
    Row {
        case: "passed on: failed, 400",
        status: 400,
        outcome: "failed",
        own_outcome: "failed",
        retry: ["after-correction"; 2],
        trigger: |key| passed(key, Fault::status(400)),
        ..PASSED
    },
    Row {
        case: "passed on: unknown, 200",
        status: 200,
        trigger: |key| passed(key, Fault::code(sandbox::Code::Absent)),
        ..DOUBT
    },
    Row {
        case: "passed on: unknown, 503",
        trigger: |key| passed(key, Fault::status(503).with_header("Retry-After", "7")),
        ..DOUBT
    },
    Row {
        case: "passed on: 429",
        status: 429,
        retry: UNCHANGED,
        trigger: |key| passed(key, Fault::status(429)),
        ..REFUSED
    },
    Row { case: "passed on: 403", status: 403, trigger: |key| passed(key, Fault::status(403)), ..REFUSED },
    Row { case: "passed on: 418", status: 418, trigger: |key| passed(key, Fault::status(418)), ..REFUSED },
    Row {
        case: "replayed: the first succeeded",
        retry: ["", "not-needed"],
        first_outcome: "succeeded",
        trigger: |key| replayed(key, Fault::default()),
        ..REPLAYED
    },
    Row {
        case: "replayed: the first failed, 200",
        retry: ["", "after-correction"],
        first_outcome: "failed",
        trigger: |key| replayed(key, Fault::failure("0409001")),
        ..REPLAYED
    },
    Row {
        case: "replayed: the first failed, 422",
        status: 422,
        retry: ["", "after-correction"],
        first_outcome: "failed",
        trigger: |key| replayed(key, Fault::status(422)),
        ..REPLAYED
    },
    Row {
        case: "replayed: the first was resolved as done",
        retry: ["", "not-needed"],
        first_outcome: "succeeded",
        trigger: replayed_after_resolution,
        ..REPLAYED
    },
    Row { case: "dry run", received: 0, trigger: dry_run, ..PASSED },
    Row {
        case: "dry run, the first is unknown",
        first_outcome: "unknown",
        trigger: dry_run_of_a_duplicate,
        ..DUPLICATE
    },
];

/// The code without a row: no request is known to cause a panic. See `internal_error_states_whether_anything_was_sent`.
const EXEMPT: &str = "internal";

#[test]
fn each_code_has_a_row_and_each_row_a_code() {
    let codes: BTreeSet<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
    assert_eq!(codes.len(), Code::ALL.len(), "a code stands twice");
    let mut rows: BTreeSet<_> = ROWS.iter().map(|row| row.code).filter(|code| !code.is_empty()).collect();
    assert!(rows.insert(EXEMPT), "{EXEMPT} has a row");
    assert_eq!(rows, codes);
}

#[test]
fn each_reply_has_a_text_and_each_text_a_reply() {
    let answers: BTreeSet<_> = ROWS.iter().filter(|row| !row.code.is_empty()).map(Row::name).collect();
    assert_eq!(messages::answers(), answers);
}

#[test]
fn each_reply_matches_its_row_in_the_table() {
    let calls: Vec<_> = ROWS.iter().flat_map(|row| [(row, ""), (row, KEY)]).collect();
    let (next, differences) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some((row, key)) = calls.get(next.fetch_add(1, Ordering::Relaxed)) {
            let found = differences_of(row, key);
            differences.lock().unwrap().extend(found);
        }
    };
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(work);
        }
    });
    let differences = differences.into_inner().unwrap();
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
}

/// A panic cannot be brought about from outside: the answer is looked at where it is made.
#[test]
fn internal_error_states_whether_anything_was_sent() {
    for (sent, outcome, retry) in
        [(false, Outcome::NotSent, UNCHANGED), (true, Outcome::Unknown, ["check-first"; 2])]
    {
        let error = Error::internal(sent);
        assert_eq!((error.code, error.outcome, error.code.status().as_u16()), (Code::Internal, outcome, 500));
        assert_eq!(error.retry_after, None);
        for (is_keyed, retry) in [false, true].into_iter().zip(retry) {
            let word = error.code.retry(error.outcome, is_keyed);
            assert_eq!(word.as_str(), retry);
            let id = RequestId::from(uuid::Uuid::from_u128(1));
            let problem: Value = serde_json::from_slice(&error.problem(Stage::Audit, id, word)).unwrap();
            assert_eq!((&problem["outcome"], &problem["retry"]), (&outcome.as_str().into(), &retry.into()));
        }
    }
}

/// Triggers a row and tells each difference in a line of its own.
fn differences_of(row: &Row, key: &str) -> Vec<String> {
    let retry = row.retry[usize::from(!key.is_empty())];
    if retry.is_empty() {
        return Vec::new();
    }
    let name = format!("{}, {}", row.name(), if key.is_empty() { "no key" } else { "key" });
    let look = || {
        let mut found = Differences(Vec::new());
        found.look_at((row.trigger)(key), row, !key.is_empty());
        found.0
    };
    let found = caught(look).unwrap_or_else(|panic| vec![format!("panicked: {panic}")]);
    found.iter().map(|difference| format!("{}: {difference}", name.trim())).collect()
}

/// What a function returns, or the text with which it panicked.
pub(crate) fn caught<T>(what: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(what)).map_err(|panic| {
        let text =
            panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        text.unwrap_or_default().to_owned()
    })
}

struct Differences(Vec<String>);

impl Differences {
    #[allow(clippy::needless_pass_by_value, reason = "literals read better without an ampersand")]
    fn compare<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, is: T, must_be: T) {
        if is != must_be {
            self.0.push(format!("{what} is {is:?}, must be {must_be:?}"));
        }
    }

    fn look_at(&mut self, trial: Trial, row: &Row, is_keyed: bool) {
        let retry = row.retry[usize::from(is_keyed)];
        let Trial { sandbox, gateway, reply, first, received, end } = trial;
        let header = |name: &str| reply.headers.get(name).map_or("", String::as_str);
        let first = first.as_deref().unwrap_or_default();
        self.compare("the status", reply.status, row.status);
        self.compare("x-gateway-error", header("x-gateway-error"), row.code);
        self.compare("x-gateway-outcome", header("x-gateway-outcome"), row.outcome);
        self.compare("x-gateway-retry", header("x-gateway-retry"), retry);
        self.compare("x-gateway-first-outcome", header("x-gateway-first-outcome"), row.first_outcome);
        self.compare("x-gateway-first-request-id", header("x-gateway-first-request-id"), first);
        let has_retry_after = reply.headers.contains_key("retry-after");
        self.compare("whether there is a Retry-After", has_retry_after, row.has_retry_after);
        self.compare("what the upstream received", received, row.received);
        if !row.code.is_empty() {
            self.look_at_problem(&reply, row, retry, first);
            self.look_at_detail(&reply, row, is_keyed);
        }
        end();
        let id = header("x-gateway-request-id");
        self.look_at_record(&gateway, id, row, first);
        self.look_at_metrics(&gateway, row);
        drop((gateway, sandbox));
    }

    fn look_at_problem(&mut self, reply: &Reply, row: &Row, retry: &str, first: &str) {
        let media_type = reply.headers.get("content-type").map_or("", String::as_str);
        self.compare("the media type", media_type, "application/problem+json");
        let problem: Value = serde_json::from_str(&reply.body).unwrap_or_default();
        self.compare("the problem's status", problem["status"].as_u64(), Some(row.status.into()));
        let id = reply.headers.get("x-gateway-request-id").map_or("", String::as_str);
        for (name, must_be) in [
            ("code", row.code),
            ("outcome", row.outcome),
            ("retry", retry),
            ("first_outcome", row.first_outcome),
            ("first_request_id", first),
            ("request_id", id),
        ] {
            self.compare(
                &format!("the problem's {name}"),
                problem[name].as_str().unwrap_or_default(),
                must_be,
            );
        }
    }

    /// Its text is the one of `tests/messages.toml`.
    fn look_at_detail(&mut self, reply: &Reply, row: &Row, is_keyed: bool) {
        let detail = reply.json()["detail"].as_str().unwrap_or_default().to_owned();
        self.compare("the detail", &*messages::without_ids(&detail), messages::answer(&row.name(), is_keyed));
    }

    /// The call's last record keeps its own outcome and names the call that the answer is about.
    fn look_at_record(&mut self, gateway: &Gateway, id: &str, row: &Row, first: &str) {
        let record = wait_for("the record", || {
            let mut all = records(&gateway.audit_directory(), "");
            all.retain(|record| record["id"] == id && record["kind"] != "intent");
            all.pop()
        });
        for (name, must_be) in
            [("outcome", row.own_outcome), ("first", first), ("first_outcome", row.first_outcome)]
        {
            self.compare(&format!("the record's {name}"), record[name].as_str().unwrap_or_default(), must_be);
        }
    }

    /// The call is counted with its own outcome, so that no task counts twice.
    fn look_at_metrics(&mut self, gateway: &Gateway, row: &Row) {
        let metrics = gateway.admin("/metrics").body;
        let of_code = format!("ccsqm_gateway_requests_total{{code=\"{}\",", row.code);
        let counted: BTreeSet<_> = metrics
            .lines()
            .filter(|line| line.starts_with(&of_code) && !line.ends_with(" 0"))
            .filter_map(|line| line.split("outcome=\"").nth(1)?.split('"').next())
            .collect();
        let told = if row.received > 0 { row.outcome } else { row.own_outcome };
        if row.code.is_empty() {
            self.compare("whether it is counted with its own outcome", counted.contains(told), true);
        } else {
            self.compare("what it is counted as", counted, BTreeSet::from([told]));
        }
    }
}
