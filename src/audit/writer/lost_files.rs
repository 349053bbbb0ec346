//! Files of the trail that others moved, deleted, replaced or cut.
//!
//! The open segment is copied back to its name; one that was cut shorter is given up for a new one. Once a second, at rest, too,
//! the writer looks for the directory, the lock file and the closed segments. Without the first two nothing new is sent.

use std::io;
use std::time::Instant;

use serde_json::{Value, json};

use super::{Durability, Identity, Shared, Writer};
use crate::audit::lock;
use crate::audit::queue::LOOK_AROUND;

/// To look at the files and the free space takes as long as to write so many records.
const LOOK_AROUND_COSTS: usize = 100;

/// What happened to a file of the trail, while no record says so yet.
pub(super) enum Mishap {
    /// An fdatasync of a segment failed.
    Disproven,
    /// A file is not in its place.
    Lost(Lost),
}

/// A file that somebody else moved, deleted, replaced or cut.
pub(super) struct Lost {
    pub(super) file: String,
    pub(super) what: &'static str,
    /// Nothing is lost: it is there again.
    pub(super) is_restored: bool,
    /// What the foreign file in its place is called now.
    pub(super) aside: Option<String>,
    /// What the lost file is called now.
    pub(super) found_as: Option<String>,
}
impl Writer {
    /// Looks around once a second. That makes no prompt writer a slow one, nor a slow one prompt; a stuck disk does.
    pub(super) fn look_around_in_turn(&mut self, shared: &Shared) {
        if self.looked_around.is_some_and(|looked| looked.elapsed() < LOOK_AROUND) {
            return;
        }
        self.looked_around = Some(Instant::now());
        let was_prompt = shared.is_prompt();
        let due = shared.begin(LOOK_AROUND_COSTS);
        self.look_around(shared);
        if was_prompt {
            self.rest(shared, due);
        }
    }

    /// Looks whether there is space for refusals, and whether every file is in its place. Here, since asking a stuck
    /// disk takes for ever.
    fn look_around(&mut self, shared: &Shared) {
        let free = self.directory.free_space();
        shared.metrics.free.set(i64::try_from(free).unwrap_or(i64::MAX));
        shared.space_left.replace(free >= self.options.low_water);
        if self.look_for_place(shared) {
            let listed = self.look_for_closed();
            let was_listed = std::mem::replace(&mut self.is_listed, listed.is_ok());
            if let Err(error) = listed
                && was_listed
            {
                tracing::warn!(%error, "the segments of the audit trail cannot be looked for");
            }
            self.look_for_open(shared);
            self.state(false);
        }
        self.report(shared);
        if shared.is_healthy() {
            shared.trouble.ends();
        }
    }

    /// Whether directory and lock file are those that were opened. Says once that they are not, and that they are again.
    pub(super) fn look_for_place(&mut self, shared: &Shared) -> bool {
        let lost = match (self.directory.check(), self.directory.leads_to(lock::NAME, self.lock.identity())) {
            (Err(_), _) => Some("the directory was moved, deleted or replaced, or cannot be reached"),
            (Ok(()), Ok(true)) => None,
            (Ok(()), _) => Some("the lock file was moved, deleted or replaced"),
        };
        shared.in_place.replace(lost.is_none());
        if lost == self.away {
            return lost.is_none();
        }
        self.away = lost;
        match lost {
            Some(what) => {
                shared.trouble.begins(None, what.to_owned());
                let directory = self.directory.path().display().to_string();
                tracing::error!(%directory, "{what}; nothing is sent until it is back");
                shared.metrics.files_lost(false);
                shared.event("gap", json!({ "what": what, "directory": directory, "result": "lost" }));
            }
            None => {
                let what = "directory and lock file are in their place again";
                tracing::info!("{what}");
                shared.event("recovery", json!({ "what": what }));
            }
        }
        lost.is_none()
    }

    /// Looks whether the closed segments are still there. What is not is said once.
    fn look_for_closed(&mut self) -> io::Result<()> {
        let names = self.directory.names()?;
        let mut lost = Vec::new();
        for (name, identity) in &self.closed {
            // Some file systems tell other inodes in a listing.
            if names.get(name.as_bytes()) != Some(&identity.inode())
                && !self.directory.leads_to(name, *identity)?
            {
                lost.push(name.clone());
            }
        }
        for file in lost {
            let what = if names.contains_key(file.as_bytes()) {
                "another file took the place of a closed segment"
            } else {
                "a closed segment was moved or deleted"
            };
            let inode = self.closed.remove(&file).map(Identity::inode);
            let found = names.iter().find(|(_, other)| Some(**other) == inode);
            let found_as = found.map(|(name, _)| String::from_utf8_lossy(name).into_owned());
            self.mishaps.push(Mishap::Lost(Lost { file, what, is_restored: false, aside: None, found_as }));
        }
        Ok(())
    }

    /// Looks whether the open segment is in its place, and puts it back.
    fn look_for_open(&mut self, shared: &Shared) {
        let is_lost = self.segment.as_ref().is_some_and(|segment| !segment.is_in_place());
        let rescued = if is_lost { self.rescue(&[]) } else { Ok(()) };
        let was_healthy = shared.writable.replace(rescued.is_ok());
        if let Err(error) = rescued
            && was_healthy
        {
            shared.trouble.begins(None, format!("the open segment is lost and cannot be put back: {error}"));
            tracing::error!(%error, "the open segment of the audit trail is lost and cannot be put back yet");
        }
    }

    /// The open segment is not in its place. Copies it back from the open file, so that nothing is lost; if that does not
    /// have all records any more, the next write begins a new one. `pending` is what was written and is not committed.
    pub(super) fn rescue(&mut self, pending: &[u8]) -> io::Result<()> {
        self.directory.check()?;
        let Some(segment) = &mut self.segment else { return Ok(()) };
        let (file, what) = (segment.name(), segment.mishap(&self.directory)?);
        let is_whole = segment.is_whole(&self.link)?;
        let mut aside = None;
        if is_whole {
            let syncs = (self.options.durability == Durability::Disk).then_some(&mut self.syncs);
            (*segment, aside) = segment.copy_back(&self.directory, syncs)?;
        } else {
            segment.take_back(pending)?;
            self.give_up_segment()?;
        }
        self.mishaps.push(Mishap::Lost(Lost { file, what, is_restored: is_whole, aside, found_as: None }));
        Ok(())
    }

    /// Leaves the open segment for a new one. What is left of it counts as a closed one.
    fn give_up_segment(&mut self) -> io::Result<()> {
        let Some(segment) = self.segment.take() else { return Ok(()) };
        self.ledger.leave(&segment);
        if self.directory.leads_to(&segment.name(), segment.identity())? {
            self.closed.insert(segment.name(), segment.identity());
        }
        Ok(())
    }

    /// Says what happened to files, in log, metrics and trail.
    pub(super) fn report(&mut self, shared: &Shared) {
        for mishap in self.mishaps.drain(..) {
            match mishap {
                Mishap::Disproven => {
                    let what = "an fdatasync failed; its records were written again";
                    tracing::error!("{what}; a new segment is begun");
                    shared.event("recovery", json!({ "what": what }));
                }
                Mishap::Lost(lost) => {
                    let Lost { file, what, is_restored, aside, found_as } = &lost;
                    let (result, aside, found_as) = (lost.result(), aside.as_deref(), found_as.as_deref());
                    tracing::warn!(file, result, aside, found_as, "the audit trail has lost a file: {what}");
                    shared.metrics.files_lost(*is_restored);
                    shared.event("gap", lost.details());
                }
            }
        }
    }
}

impl Lost {
    /// The value of the event's member, and of the metric's label.
    fn result(&self) -> &'static str {
        if self.is_restored { "restored" } else { "lost" }
    }

    /// What the event says.
    fn details(&self) -> Value {
        let mut details = json!({ "what": self.what, "file": self.file, "result": self.result() });
        for (name, value) in [("aside", &self.aside), ("found_as", &self.found_as)] {
            if let Some(value) = value {
                details[name] = json!(value);
            }
        }
        details
    }
}
