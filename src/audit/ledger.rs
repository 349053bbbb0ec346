//! The writer's ledger of calls at work: intents that are committed and whose outcomes are not.
//!
//! It adds calls of unknown outcome to the list of unresolved calls, and completes that list at the beginning of each
//! segment. Of a call at work it keeps only where its intent is in the open segment, since nearly all calls end
//! before that line is read again.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use uuid::Uuid;

use super::batch::{Batch, ListChange};
use super::queue::Shared;
use super::segment::Segment;
use super::unresolved_calls::{LIST, UnresolvedCall, UnresolvedList};
use crate::model::outcome::Outcome;

/// The calls whose intents are committed and whose outcomes are not.
#[derive(Default)]
pub(super) struct Ledger {
    at_work: HashMap<Uuid, Intent, foldhash::fast::RandomState>,
}

/// The intent of a call at work.
enum Intent {
    /// The range of its line in the open segment, in bytes.
    Line(Range<u64>),
    /// The parsed intent. Its line is in an earlier segment.
    Read(Arc<UnresolvedCall>),
}

impl Ledger {
    /// Follows a batch that was just committed at the end of `segment`.
    pub(super) fn take(&mut self, batch: &Batch, segment: &Segment, shared: &Shared) {
        let base = segment.length - batch.size() as u64;
        for (change, line) in batch.changes() {
            match *change {
                // The list that was just written contains the calls at work, too. Taken over, they would stay on the
                // list after they end, and the next start would give them a second outcome.
                ListChange::None | ListChange::Event { name: LIST, .. } => {}
                ListChange::Intent(id) => {
                    let range = base + line.start as u64..base + line.end as u64;
                    self.at_work.insert(id, Intent::Line(range));
                }
                ListChange::Outcome { id, outcome, is_forced } => {
                    let Some(intent) = self.at_work.remove(&id) else { continue };
                    if outcome == Outcome::Unknown || is_forced {
                        end(intent.read(id, segment), outcome, shared);
                    }
                }
                ListChange::Event { name, id } => {
                    shared.unresolved().take_event(name, id, &batch.text()[line]);
                }
            }
        }
    }

    /// An upper bound on the length of the calls at work on the list, in bytes.
    pub(super) fn size(&self) -> u64 {
        self.at_work.values().map(Intent::size).sum()
    }

    /// Whether no call is at work.
    pub(super) fn is_empty(&self) -> bool {
        self.at_work.is_empty()
    }

    /// Reads the intents that are in a segment. To be called before another segment takes its place.
    pub(super) fn leave(&mut self, segment: &Segment) {
        for (id, intent) in &mut self.at_work {
            if let Intent::Line(_) = intent {
                let line = std::mem::replace(intent, Intent::Line(0..0));
                *intent = Intent::Read(Arc::new(line.read(*id, segment)));
            }
        }
    }

    /// The list as it will be after a batch. To be called after [`Self::leave`].
    pub(super) fn list_behind(&self, mut behind: UnresolvedList, batch: &Batch) -> UnresolvedList {
        for intent in self.at_work.values() {
            if let Intent::Read(call) = intent {
                behind.insert(call.clone());
            }
        }
        for (_, line) in batch.changes() {
            // The lines are not linked yet. The list does not depend on links.
            behind.follow(&batch.text()[line]);
        }
        behind
    }
}

impl Intent {
    /// An upper bound on its length on the list, in bytes.
    // The line of an intent has all that the list has of the call, and two hashes.
    fn size(&self) -> u64 {
        match self {
            Self::Line(range) => range.end - range.start,
            Self::Read(call) => call.size(),
        }
    }

    /// Returns the call. If its intent cannot be read, only the id is known.
    // An error here must not stop the writer: a call on the list without its caller is better than one that is not on
    // it.
    fn read(self, id: Uuid, segment: &Segment) -> UnresolvedCall {
        match self {
            Self::Read(call) => Arc::unwrap_or_clone(call),
            Self::Line(range) => segment
                .read(range)
                .ok()
                .and_then(|line| serde_json::from_slice(&line).ok())
                .unwrap_or_else(|| UnresolvedCall::of(id)),
        }
    }
}

/// Ends a call of unknown outcome, or one that repeated another by force.
fn end(call: UnresolvedCall, outcome: Outcome, shared: &Shared) {
    if outcome == Outcome::Unknown {
        let UnresolvedCall { id, caller, route, .. } = &call;
        let task = call.task.as_ref().map(ToString::to_string);
        tracing::warn!(
            %id, caller, route, task,
            "the outcome of a call is unknown: check in the cloud whether the task is done, then run `ccsqm-gateway \
             audit resolve`"
        );
    }
    shared.unresolved().finish(call, outcome);
}
