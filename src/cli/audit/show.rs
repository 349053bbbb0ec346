//! The command `audit show`: prints all records of one request as a timeline.

use std::path::Path;

use ccsqm_gateway::audit::history::records_of;
use serde_json::Value;
use uuid::Uuid;

use super::{named, word};
use crate::cli::out::{complain, out};

/// Prints all records that name a request, as lines for people or as JSON. Returns false if there is none.
///
/// # Errors
///
/// The trail cannot be read.
pub(super) fn show(directory: &Path, id: Uuid, json: bool) -> anyhow::Result<bool> {
    let records = records_of(directory, id).map_err(|error| named(directory, &error))?;
    if records.is_empty() {
        complain!("ccsqm-gateway: the trail has no request {id}");
        return Ok(false);
    }
    for naming in &records {
        // The line as it is in the trail, not the record printed again, so that its hash can be recomputed.
        if json {
            out!("{}", naming.line);
        } else {
            out!("{}", line(&naming.record, &id.to_string()));
        }
    }
    Ok(true)
}

/// Returns one record as a line: of the request, or of another one that names it.
// Texts pass through `word`. A result code of the upstream could otherwise look like more members of the line.
fn line(record: &Value, id: &str) -> String {
    let kind = record["kind"].as_str().unwrap_or_default();
    let time = word(record["time"].as_str().unwrap_or("-"));
    let event = word(record["event"].as_str().unwrap_or(kind));
    let members: &[&str] = match kind {
        "intent" => &[
            "caller",
            "route",
            "operator",
            "peer",
            "task",
            "take_effect",
            "body_size",
            "caller_id",
            "forced",
            "first",
        ],
        "event" => &["result", "by", "note", "uid", "correct"],
        _ => &[
            "caller",
            "first_outcome",
            "outcome",
            "code",
            "stage",
            "status",
            "upstream_status",
            "upstream_request_id",
            "result_code",
            "attempts",
            "note",
            "count",
        ],
    };
    let mut text = format!("{time} {event}");
    if record["id"] != id {
        let other = word(record["id"].as_str().unwrap_or("-"));
        text += &format!(
            " of {other}, which {}",
            if record["forced"] == id { "repeats it by force" } else { "follows it" }
        );
    }
    for name in members {
        match &record[*name] {
            Value::Null => {}
            Value::String(value) => text += &format!(" {name} {}", word(value)),
            value => text += &format!(" {name} {value}"),
        }
    }
    if let Some(stages) = record["ms"].as_object() {
        let stages: Vec<_> = stages.iter().map(|(stage, ms)| format!("{} {ms}", word(stage))).collect();
        text += &format!(" ms [{}]", stages.join(", "));
    }
    if let Some(reply) = record["reply"].as_object() {
        let body = reply.get("body").map_or("not text".into(), ToString::to_string);
        text += &format!(" reply {body}");
    }
    text
}
