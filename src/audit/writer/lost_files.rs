//! Self-repair: files of the trail that others moved, deleted, replaced or cut.
//!
//! The open segment is copied back to its name. If it was cut shorter, it is closed and a new one begins. Once a
//! second, also without load, the writer checks the directory, the lock file and the closed segments. Without the
//! directory or the lock file no new intent is accepted.
//!
//! A closed segment that is gone is reported and not restored: the writer no longer has it open.

use std::io;
use std::time::Instant;

use serde_json::{Value, json};

use super::{Durability, FileIdentity, Shared, Writer};
use crate::audit::lock;
use crate::audit::queue::LOOK_AROUND;

/// The check of the files and the free space counts as a batch of this many records when it is decided whether the
/// writer keeps up.
// It takes about as long as writing them. Without this allowance each check would make the writer count as behind.
const LOOK_AROUND_COSTS: usize = 100;

/// Something that happened to a file of the trail and is not on record yet.
pub(super) enum Mishap {
    /// An fdatasync of a segment failed.
    Disproven,
    /// A file is not in its place.
    Lost(Lost),
}

/// A file that another process moved, deleted, replaced or cut.
pub(super) struct Lost {
    pub(super) file: String,
    pub(super) what: &'static str,
    /// Whether the file is in its place again, so that nothing is lost.
    pub(super) is_restored: bool,
    /// The new name of the foreign file that was in its place.
    pub(super) aside: Option<String>,
    /// The name under which the lost file was found.
    pub(super) found_as: Option<String>,
}
impl Writer {
    /// Checks files and free space, if the last check is about a second old.
    pub(super) fn look_around_in_turn(&mut self, shared: &Shared) {
        if self.looked_around.is_some_and(|looked| looked.elapsed() < LOOK_AROUND) {
            return;
        }
        self.looked_around = Some(Instant::now());
        // A check on time must not change whether the writer counts as keeping up, in either direction. A check that
        // hangs on a stuck disk must.
        let was_keeping_up = shared.is_keeping_up();
        let batch_deadline = shared.begin(LOOK_AROUND_COSTS);
        self.look_around(shared);
        if was_keeping_up {
            self.finished(shared, batch_deadline);
        }
    }

    /// Checks the free space, and whether every file is in its place.
    // On this thread, since a stuck disk may never answer.
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
                tracing::warn!(%error, "the audit directory cannot be searched for lost segments");
            }
            self.look_for_open(shared);
            // The lock file names the last record once a second, so that a start can tell if more than the last
            // second is missing.
            self.state(false);
        }
        self.report(shared);
        if shared.is_healthy() {
            shared.trouble.ends();
        }
    }

    /// Whether the directory and the lock file are those that were opened. Reports once that they are not, and once
    /// that they are again.
    pub(super) fn look_for_place(&mut self, shared: &Shared) -> bool {
        // A lock file that was replaced locks nothing. Where the file system cannot lock directories, a second
        // gateway could then write the same segments.
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
                tracing::error!(%directory, "{what}; no call is sent until it is back in its place");
                shared.metrics.files_lost(false);
                shared.event("gap", json!({ "what": what, "directory": directory, "result": "lost" }));
            }
            None => {
                let what = "the audit directory and its lock file are in their place again";
                tracing::info!("{what}");
                shared.event("recovery", json!({ "what": what }));
            }
        }
        lost.is_none()
    }

    /// Looks for closed segments that are gone, and notes each of them once. Fails if the directory cannot be listed.
    fn look_for_closed(&mut self) -> io::Result<()> {
        let names = self.directory.names()?;
        let mut lost = Vec::new();
        for (name, identity) in &self.closed {
            // A listing has all inodes for one pass over the directory. Some file systems report other inodes there
            // than for the file itself, so that a difference is checked at the file.
            if names.get(name.as_bytes()) != Some(&identity.inode())
                && !self.directory.leads_to(name, *identity)?
            {
                lost.push(name.clone());
            }
        }
        for file in lost {
            let what = if names.contains_key(file.as_bytes()) {
                "a closed segment was replaced by another file"
            } else {
                "a closed segment was moved or deleted"
            };
            // Removed from the map, so that the loss is reported once. A segment that was renamed is found by its
            // inode, and the event can name it.
            let inode = self.closed.remove(&file).map(FileIdentity::inode);
            let found = names.iter().find(|(_, other)| Some(**other) == inode);
            let found_as = found.map(|(name, _)| String::from_utf8_lossy(name).into_owned());
            self.mishaps.push(Mishap::Lost(Lost { file, what, is_restored: false, aside: None, found_as }));
        }
        Ok(())
    }

    /// Checks whether the open segment is in its place, and restores it if it is not.
    // The next write would notice it, too. Without load there is none, and a stop would lose the segment for good.
    fn look_for_open(&mut self, shared: &Shared) {
        let is_lost = self.segment.as_ref().is_some_and(|segment| !segment.is_in_place());
        let rescued = if is_lost { self.rescue(&[]) } else { Ok(()) };
        let was_healthy = shared.writable.replace(rescued.is_ok());
        if let Err(error) = rescued
            && was_healthy
        {
            shared.trouble.begins(None, format!("the open segment is lost and cannot be restored: {error}"));
            tracing::error!(
                %error,
                "the open segment of the audit trail is lost and cannot be restored yet"
            );
        }
    }

    /// Restores the open segment, which is not in its place, from the open file. If that file no longer has all
    /// committed records, the segment is closed, and the next write begins a new one. `pending` is text that was
    /// written and is not committed.
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
            // The batch goes into the new segment. Left here as well, it would follow a gap and count as damage.
            segment.take_back(pending)?;
            self.give_up_segment()?;
        }
        self.mishaps.push(Mishap::Lost(Lost { file, what, is_restored: is_whole, aside, found_as: None }));
        Ok(())
    }

    /// Closes the open segment so that the next write begins a new one. What is left of its file counts as a closed
    /// segment.
    fn give_up_segment(&mut self) -> io::Result<()> {
        let Some(segment) = self.segment.take() else { return Ok(()) };
        self.ledger.leave(&segment);
        if self.directory.leads_to(&segment.name(), segment.identity())? {
            self.closed.insert(segment.name(), segment.identity());
        }
        Ok(())
    }

    /// Reports what happened to files, in the log, in metrics and in the trail.
    // Collected until here: a file can also be lost while the start writes, when there is no queue yet.
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
    /// The value of the event's member `result`, and of the metric's label.
    fn result(&self) -> &'static str {
        if self.is_restored { "restored" } else { "lost" }
    }

    /// The members of the event.
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
