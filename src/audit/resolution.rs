//! Resolutions: a person states what became of a call of unknown outcome.
//!
//! [`Audit::resolve`] resolves calls of a running gateway, [`resolve`] those of a trail that no gateway writes.
//! Resolutions are handled one at a time, each against the committed records of the call, so that of two at
//! once exactly one is recorded. Both functions return after the event `resolution` is committed. The event
//! repeats the members of the call's intent, so that it is complete when retention has removed the intent.
//!
//! The name of the person is not verified.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use thiserror::Error;
use uuid::Uuid;

use super::entry::Entry;
use super::history::{Naming, records_of};
use super::offline::{append, check_trail};
use super::start::open_error;
use super::unresolved_calls::{CallState, RESOLUTION, Resolution, UnresolvedCall, UnresolvedList};
use super::{Audit, OpenError};
use crate::keyed_hash::Keys;
use crate::model::outcome::Outcome;

/// The longest name of a person, in bytes.
const MAX_NAME: usize = 128;

/// The longest note, in bytes.
const MAX_NOTE: usize = 1024;

/// What a person found out about a call.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Finding {
    /// The call's request id.
    pub id: Uuid,
    /// Whether the task is done.
    pub result: Resolution,
    /// The person's name, which nothing verifies.
    pub by: String,
    /// A note to keep with the resolution.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Whether this may contradict an earlier resolution. Both stay on record.
    #[serde(default)]
    pub correct: bool,
}

/// The result of a request to resolve a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolved {
    /// The resolution was recorded in the event with this number.
    Recorded(u64),
    /// The same resolution was recorded before; nothing was added.
    Before(Earlier),
}

/// An earlier resolution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Earlier {
    /// What was found.
    pub result: Resolution,
    /// The person's name.
    pub by: String,
    /// When it was recorded (RFC 3339).
    pub time: String,
}

/// Why a resolution was not recorded.
#[derive(Debug, Error)]
pub enum ResolveError {
    /// The name or the note is empty, too long, or has control characters.
    #[error("{0}")]
    Invalid(&'static str),
    /// No record names the call.
    #[error("the trail has no call {0}")]
    NotFound(Uuid),
    /// The call has no outcome yet.
    #[error("the call is in progress; its outcome is not known yet")]
    AtWork,
    /// The call's outcome is known.
    #[error("the outcome of this call is known: {0}")]
    Known(Outcome),
    /// The call was resolved with another result, and [`Finding::correct`] is not set.
    #[error(
        "the call was resolved as {} by {} at {}; `--correct` records another result beside that",
        .0.result.as_str(), .0.by, .0.time
    )]
    Otherwise(Earlier),
    /// The event is queued, but the trail closed before it was committed: it may be on record or not.
    #[error("the audit trail is closing; the resolution may or may not be recorded: run the command again")]
    NotCommitted,
    /// The trail cannot be read.
    #[error("the audit trail cannot be read: {0}")]
    Read(#[from] io::Error),
    /// The trail cannot be opened or written.
    #[error(transparent)]
    Trail(#[from] OpenError),
}

impl Finding {
    // One line without control characters: the texts are printed on terminals and end up in the trail.
    fn check(&self) -> Result<(), ResolveError> {
        let is_plain = |text: &str| !text.trim().is_empty() && !text.chars().any(char::is_control);
        if self.by.len() > MAX_NAME || !is_plain(&self.by) {
            return Err(ResolveError::Invalid("the name must have 1 to 128 bytes, on one line"));
        }
        if self.note.as_ref().is_some_and(|note| note.len() > MAX_NOTE || !is_plain(note)) {
            return Err(ResolveError::Invalid("the note must have 1 to 1024 bytes, on one line"));
        }
        Ok(())
    }

    /// The members of the event.
    fn details(&self, call: &UnresolvedCall, uid: u32) -> Map<String, Value> {
        let mut details = Map::new();
        details.insert("id".into(), json!(self.id));
        details.insert("result".into(), json!(self.result));
        details.insert("by".into(), json!(self.by));
        if let Some(note) = &self.note {
            details.insert("note".into(), json!(note));
        }
        details.insert("uid".into(), json!(uid));
        if self.correct {
            details.insert("correct".into(), json!(true));
        }
        if let Value::Object(members) = json!(call) {
            for (name, value) in members {
                match name.as_str() {
                    // Not copied: the id is there already, and the others would describe the call before this
                    // event.
                    "id" | "state" | "superseded" => {}
                    // Renamed, since the event has a number and a time of its own.
                    "seq" | "time" => drop(details.insert(format!("call_{name}"), value)),
                    _ => drop(details.insert(name, value)),
                }
            }
        }
        details
    }
}

/// What the segments say about a call.
#[derive(Debug, Default)]
struct History {
    call: Option<UnresolvedCall>,
    outcome: Option<Outcome>,
    last: Option<Earlier>,
}

impl History {
    fn read(directory: &Path, id: Uuid) -> io::Result<Self> {
        let mut history = Self::default();
        let text = json!(id);
        for Naming { record, .. } in
            records_of(directory, id)?.into_iter().filter(|it| it.record["id"] == text)
        {
            history.take(record);
        }
        Ok(history)
    }

    fn take(&mut self, record: Value) {
        let text = |name: &str| record[name].as_str().unwrap_or_default().to_owned();
        match record["kind"].as_str() {
            Some("intent") => self.call = serde_json::from_value(record).ok(),
            Some("outcome" | "refusal") => {
                self.outcome = Outcome::ALL.into_iter().find(|it| record["outcome"] == it.as_str());
            }
            Some("event") if record["event"] == RESOLUTION => {
                if let Ok(result) = serde_json::from_value(record["result"].clone()) {
                    self.last = Some(Earlier { result, by: text("by"), time: text("time") });
                }
                // An intent says more than a resolution does. Without one, which retention may have removed,
                // the copy in the resolution is used.
                if self.call.is_none() {
                    self.call = UnresolvedCall::told_by_resolution(&record);
                }
            }
            _ => {}
        }
    }
}

/// What to do with a finding.
#[derive(Debug)]
enum Decision {
    Record {
        call: Box<UnresolvedCall>,
        /// Whether the call has no outcome and no process can still give it one.
        is_abandoned: bool,
    },
    Before(Earlier),
}

/// Decides what to do with a finding. `is_live`: a gateway may be processing the call.
fn decide(
    finding: &Finding,
    list: &UnresolvedList,
    history: History,
    is_live: bool,
) -> Result<Decision, ResolveError> {
    let listed = list.get(finding.id).cloned();
    let state = listed.as_ref().map(|call| call.state);
    let call = listed.or(history.call);
    let found = call.is_some();
    let record = |is_abandoned| {
        let call = Box::new(call.unwrap_or_else(|| UnresolvedCall::of(finding.id)));
        Ok(Decision::Record { call, is_abandoned })
    };
    // A call can be `done` on the list while retention has removed the resolution: who found it is no longer
    // known then.
    let unnamed = || Earlier { result: Resolution::Done, by: "-".into(), time: "-".into() };
    let earlier = history.last.or_else(|| (state == Some(CallState::Done)).then(unnamed));
    match (state, earlier, history.outcome) {
        // The list decides: it follows proven records only, while the history is read without verifying the
        // chain.
        (Some(CallState::Unknown), ..) => record(false),
        (Some(CallState::Undelivered), ..) => Err(ResolveError::Known(Outcome::Succeeded)),
        (_, Some(earlier), _) if earlier.result == finding.result => Ok(Decision::Before(earlier)),
        (_, Some(earlier), _) if !finding.correct => Err(ResolveError::Otherwise(earlier)),
        (_, Some(_), _) | (_, None, Some(Outcome::Unknown)) => record(false),
        (_, None, Some(outcome)) => Err(ResolveError::Known(outcome)),
        (_, None, None) if !found => Err(ResolveError::NotFound(finding.id)),
        (_, None, None) if is_live => Err(ResolveError::AtWork),
        (_, None, None) => record(true),
    }
}

impl Audit {
    /// Records what a person found out about a call, and returns once that is committed. `uid` is the user who
    /// asked. `apply` is called between the commit and the next resolution. For a trail that no gateway writes,
    /// use [`resolve`].
    ///
    /// Fails with [`ResolveError`]. If the future is dropped, the event may be recorded or not, and `apply` may
    /// not run.
    pub async fn resolve(
        &self,
        directory: &Path,
        finding: &Finding,
        uid: u32,
        apply: impl FnOnce(&UnresolvedCall),
    ) -> Result<Resolved, ResolveError> {
        finding.check()?;
        // Held until `apply` has run. Two resolutions at once would otherwise both find the call unresolved,
        // and could be applied in another order than they are recorded.
        let _turn = self.0.resolving.lock().await;
        // The segments are read on the blocking pool: that may take seconds, and would delay everything else on
        // this event loop.
        let (id, path) = (finding.id, directory.to_owned());
        #[expect(clippy::disallowed_methods, reason = "on the background runtime, where no request waits")]
        let history = tokio::task::spawn_blocking(move || History::read(&path, id)).await;
        let history = history.map_err(io::Error::other)??;
        let decision = decide(finding, &self.unresolved(), history, true)?;
        let call = match decision {
            Decision::Before(earlier) => return Ok(Resolved::Before(earlier)),
            Decision::Record { call, .. } => call,
        };
        let seq = self.shared().event(RESOLUTION, Value::Object(finding.details(&call, uid)));
        self.committed(seq).await?;
        apply(&call);
        tracing::info!(%id, result = finding.result.as_str(), by = finding.by, uid, "a call was resolved");
        Ok(Resolved::Recorded(seq))
    }

    /// Waits until the record with this number is committed, however long that takes.
    ///
    /// Fails with [`ResolveError::NotCommitted`] if the writer has ended.
    // A person waits here and not a request, so a stuck disk is waited for.
    pub async fn committed(&self, seq: u64) -> Result<(), ResolveError> {
        while self.committed_within(seq, 0).await.is_err() {
            if !self.is_written() {
                return Err(ResolveError::NotCommitted);
            }
        }
        Ok(())
    }
}

/// Records what a person found out about a call of a trail that no gateway writes. A call that had no outcome
/// when its gateway ended gets the outcome `unknown` first. The event is on the disk afterwards.
///
/// Fails with [`ResolveError`]; with [`OpenError::Locked`] inside it while a gateway writes the trail.
pub fn resolve(directory: &Path, keys: Keys, finding: &Finding, uid: u32) -> Result<Resolved, ResolveError> {
    finding.check()?;
    check_trail(directory)?;
    let (resolved, last) = append(directory, keys.into(), |batch, found, _| {
        let history = History::read(directory, finding.id).map_err(|error| open_error(directory, error))?;
        match decide(finding, &found.unresolved, history, false)? {
            Decision::Before(earlier) => Ok(Some(earlier)),
            Decision::Record { call, is_abandoned } => {
                if is_abandoned {
                    batch.push(&Entry::UnknownOutcome { id: finding.id });
                }
                batch.push(&Entry::Event { name: RESOLUTION, details: &finding.details(&call, uid) });
                Ok::<_, ResolveError>(None)
            }
        }
    })?;
    Ok(resolved.map_or(Resolved::Recorded(last), Resolved::Before))
}
