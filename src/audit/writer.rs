//! The writer's thread: chains and writes, one write a batch.
//!
//! Many records are written in parts, none longer than a file may be. A stuck disk holds this thread, never a worker.
//!
//! [`space`] reserves what outcomes need and says when a new segment begins, [`disk`] writes, and [`lost_files`] looks after what
//! others do to the files.

mod disk;
mod lost_files;
mod space;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::batch::Batch;
use super::chain::{Link, segments};
use super::clocks::Clocks;
use super::directory::{Directory, Identity};
use super::ledger::Ledger;
use super::lock::{Lock, Stated};
use super::queue::{Next, Shared};
use super::retention::{Excess, Keeping, Old, Place};
use super::segment::Segment;
use super::start::Resumed;
use super::sync::Syncs;
use super::unresolved::{UnresolvedCall, UnresolvedList};
use super::{Options, Unfinished, age, clocks, limit, retention};
use crate::config::trail::SLACK;
use crate::keyed_hash::Keys;
use crate::model::durability::Durability;
use crate::supervisor::fault;
use lost_files::Mishap;
use space::room;

/// So much room for text is kept from batch to batch, in bytes; 256 busy connections use a third.
const KEPT_TEXT: usize = 1 << 20;

/// An outcome takes no more than this, but for one with a long reply or code.
pub(super) const OUTCOME: u64 = 2 * 1024;

/// So many bytes of queued records are written at once: under any limit on file sizes that [`limit::check`] lets pass, each such
/// part has room in a file. Queued may be 64 MiB and the outcomes of all in flight. To refuse each limit below that would be as
/// simple, and would refuse limits that are of use.
pub(super) const MOST_AT_ONCE: usize = 4 << 20;

/// How often an old segment is looked for while there is something to write, beside each time that one is begun. One goes at
/// a time.
const LOOK: Duration = Duration::from_secs(60);

/// Where the trail stands.
pub(super) struct Writer {
    options: Options,
    directory: Directory,
    /// When the files were last looked at.
    looked_around: Option<Instant>,
    /// What is not in its place, of directory and lock file.
    away: Option<&'static str>,
    keeping: Keeping,
    pub(super) clocks: Arc<Clocks>,
    ledger: Ledger,
    /// How much of the open segment is the list in its first batch, in bytes.
    list_length: u64,
    /// The length of the list that was last written into a batch, which may begin a segment yet.
    list_filled: u64,
    /// The open segment was begun in the place of a lost one, with no list in its first batch: the next one has it.
    lacks_list: bool,
    /// When there was no space for a new segment.
    list_refused: Option<Instant>,
    /// The open segment is at the limit on file sizes, and there is space for a new one.
    is_outgrown: bool,
    /// When the last anchor was written, by `CLOCK_BOOTTIME` in milliseconds, and whether the segment has none yet.
    pub(super) anchored: i64,
    is_unanchored: bool,
    /// When old segments were last looked for.
    looked: Option<Instant>,
    /// To be removed once the record that says so is written.
    old: Option<Old>,
    keys: Arc<Keys>,
    /// Of the last record that is committed, and its number.
    link: Link,
    seq: u64,
    /// Where records go.
    segment: Option<Segment>,
    /// Those that are full, or were left for another one.
    closed: BTreeMap<String, Identity>,
    /// They could be looked for.
    is_listed: bool,
    /// The segment whose last fdatasync failed, until its batch is elsewhere.
    disproven: Option<Segment>,
    syncs: Syncs,
    mishaps: Vec<Mishap>,
    /// Held for as long as the trail is written.
    lock: Lock,
    /// The last statement was written to it.
    is_stated: bool,
}

impl Writer {
    /// A writer that goes on behind what was found, and has written what that tells. `what` names that for people.
    pub(super) fn go_on(
        options: &Options,
        keys: Arc<Keys>,
        clocks: Arc<Clocks>,
        resumed: Resumed,
        what: &str,
    ) -> io::Result<Self> {
        let Resumed { directory, lock, mut batch, last, segment, .. } = resumed;
        let open = segment.as_ref().map(Segment::name);
        let mut closed = BTreeMap::new();
        for path in segments(directory.path())? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(found) = directory.find(&name)?.filter(|_| Some(&name) != open.as_ref()) {
                closed.insert(name, found.identity);
            }
        }
        let mut writer = Self {
            options: options.clone(),
            directory,
            looked_around: None,
            away: None,
            keeping: Keeping::new(options),
            clocks,
            ledger: Ledger::default(),
            list_length: 0,
            list_filled: 0,
            lacks_list: false,
            list_refused: None,
            is_outgrown: false,
            anchored: clocks::boottime(),
            is_unanchored: false,
            looked: None,
            old: None,
            keys,
            link: Link::new(last.hash),
            seq: last.seq,
            segment,
            closed,
            is_listed: true,
            disproven: None,
            syncs: Syncs::default(),
            mishaps: Vec::new(),
            lock,
            is_stated: true,
        };
        writer.append(&mut batch).map_err(|error| limit::explain(error, what))?;
        Ok(writer)
    }

    /// Writes until the trail is closed and everything queued is written, or the last write failed.
    pub(super) fn run(mut self, shared: &Shared) -> Result<(), Unfinished> {
        let (mut batch, mut part, mut due) = (Batch::default(), Batch::default(), shared.begin(0));
        loop {
            fault::look("the audit writer");
            self.anchor(shared);
            self.look_for_old(shared);
            self.rest(shared, due);
            self.look_around_in_turn(shared);
            let begins = self.begins(shared);
            let next = shared.next_batch(&mut batch, begins);
            due = shared.begin(batch.len());
            match next {
                Next::Write => {}
                Next::Look => {
                    self.reserve(shared, 0);
                    continue;
                }
                Next::End => {
                    self.close();
                    return Ok(());
                }
            }
            // Only the last part may begin a segment: it has the list.
            while batch.cut(MOST_AT_ONCE, &mut part) {
                self.put(&mut part, &batch, shared)?;
            }
            self.put(&mut batch, &Batch::default(), shared)?;
            self.remove_old(shared);
            batch.shrink_to(KEPT_TEXT);
            self.report(shared);
        }
    }

    /// Writes and commits a batch, before another one that waits.
    fn put(&mut self, batch: &mut Batch, behind: &Batch, shared: &Shared) -> Result<(), Unfinished> {
        if batch.has_list() {
            self.fill_list(batch, shared);
        }
        let link = self.link(batch);
        let waiting = behind.size() as u64;
        self.reserve(shared, batch.size() as u64 + waiting);
        if !self.write_persistently(batch, shared) {
            let records = batch.len() + behind.len();
            tracing::error!(records, "the audit trail closes with records that could not be written");
            return Err(Unfinished::Unwritten);
        }
        self.commit(link, batch.last());
        if let Some(segment) = &self.segment {
            self.ledger.take(batch, segment, shared);
        }
        self.lacks_list &= !batch.begins_segment;
        shared.written(batch);
        self.reserve(shared, waiting); // a new segment has none yet
        Ok(())
    }

    /// Writes the list of the unresolved, as it is behind the batch, into the place that the batch keeps for it. A list that makes
    /// the batch longer than a file may be is left out, and no segment begins with it: that could not be written at all. How long the
    /// list is, is certain only here: the batch adds to it, and a number may be longer there than in its intent.
    fn fill_list(&mut self, batch: &mut Batch, shared: &Shared) {
        if let Some(segment) = &self.segment {
            self.ledger.leave(segment);
        }
        let (forgotten, list) = {
            let mut list = shared.unresolved();
            (self.prune(&mut list), list.clone())
        };
        for call in &forgotten {
            let (id, caller, route, task) = (call.id, &call.caller, &call.route, call.task.as_ref());
            let task = task.map(ToString::to_string);
            tracing::error!(%id, caller, route, task, "too many outcomes are unresolved: the oldest leaves their list");
        }
        let forgotten: Vec<_> = forgotten.iter().map(|call| call.id).collect();
        let behind = self.ledger.list_behind(list, batch);
        self.list_filled = batch.fill_list(&behind, &forgotten) as u64;
        if batch.size() as u64 + room(shared) > limit::of_files() {
            let (calls, bytes, raise) = (behind.calls().count(), self.list_filled, limit::RAISE);
            tracing::error!(calls, bytes, raise, "the list of unresolved calls has no room in a file");
            batch.leave_list_out(json!({ "calls": calls, "bytes": bytes, "forgotten": forgotten }));
            self.list_refused = Some(Instant::now());
        }
    }

    /// Forgets calls whose window is certainly over. Returns those of unknown outcome.
    fn prune(&self, list: &mut UnresolvedList) -> Vec<Arc<UnresolvedCall>> {
        let Some(anchors) = self.clocks.anchors() else { return Vec::new() };
        let (ages, window) = (self.clocks.ages(), self.options.window + SLACK);
        list.prune(|call| {
            let place = call.seq.zip(age::millis(&call.time));
            place.is_some_and(|(seq, time)| ages.clone().at(seq, anchors).age(time) > window)
        })
    }

    /// A writer that waits for the disk is never prompt: what is queued meanwhile shares the next fdatasync.
    fn rest(&self, shared: &Shared, due: u64) {
        if self.options.durability == Durability::Kernel {
            shared.rest(due);
        }
    }

    /// Links and writes records, once.
    fn append(&mut self, batch: &mut Batch) -> io::Result<()> {
        let link = self.link(batch);
        self.write(batch)?;
        self.commit(link, batch.last());
        Ok(())
    }

    /// Links each record to the one before; returns the last one's link.
    fn link(&self, batch: &mut Batch) -> Link {
        batch.lines_mut().fold(self.link.clone(), |link, line| self.keys.seal(line, &link))
    }

    /// The records up to here are where they belong. A new segment is in the lock file before anybody relies on it.
    fn commit(&mut self, link: Link, seq: u64) {
        (self.link, self.seq) = (link, seq);
        if self.segment.as_ref().map(|segment| segment.first) != self.lock.newest() {
            self.state(false);
        }
    }

    /// Writes into the lock file what a start must find.
    fn state(&mut self, is_stopped: bool) {
        let Some(segment) = &self.segment else { return };
        let last = Place { seq: self.seq, hash: self.link.hash() };
        let stated = Stated { newest: segment.first, last, is_stopped };
        // What is said each second may be lost with the machine: then it says less than there is.
        let is_news = is_stopped || self.lock.newest() != Some(segment.first);
        let done = self.lock.state(&stated, is_news && self.options.durability == Durability::Disk);
        let was_stated = std::mem::replace(&mut self.is_stated, done.is_ok());
        if let Err(error) = done
            && was_stated
        {
            tracing::warn!(%error, "the lock file of the audit trail cannot be written");
        }
    }

    /// Everything is written. Gives back what was reserved and not needed.
    pub(super) fn close(&mut self) {
        if let Some(segment) = &self.segment {
            segment.release();
        }
        self.state(true);
    }

    /// Queues what ties the times of records to the time that has passed: once an hour, and in each segment, so that nobody
    /// has to read far for it.
    fn anchor(&mut self, shared: &Shared) {
        let boottime = clocks::boottime();
        let every = if self.is_unanchored { age::AT_MOST_EVERY } else { age::EVERY };
        if boottime - self.anchored >= every && !shared.is_closing() {
            (self.anchored, self.is_unanchored) = (boottime, false);
            shared.event(age::CLOCK, Value::Object(self.clocks.members()));
        }
    }

    /// Looks for a segment that is to go, and queues the record that says so.
    fn look_for_old(&mut self, shared: &Shared) {
        if !self.keeping.is_bounded() || self.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return;
        }
        // In another directory there are other segments. A start looks as soon as it may.
        if shared.is_closing() || self.directory.check().is_err() || self.clocks.anchors().is_none() {
            return;
        }
        self.looked = Some(Instant::now());
        self.clocks.look(shared);
        match self.keeping.find(&self.directory, &self.keys, &self.clocks) {
            Ok(old) => self.old = old,
            Err(error) => tracing::warn!(%error, "old segments of the audit trail cannot be looked for"),
        }
        if let Some(old) = &self.old {
            shared.event(retention::EVENT, old.details());
        }
    }

    /// Removes it, when that is written.
    fn remove_old(&mut self, shared: &Shared) {
        let Some(old) = self.old.take() else { return };
        let name = old.path.file_name().unwrap_or_default().to_string_lossy();
        if let Err(error) = self.directory.remove(&name) {
            return tracing::warn!(%error, "an old segment of the audit trail cannot be removed");
        }
        self.closed.remove(&*name);
        shared.metrics.removed.inc();
        if let Some(Excess { size, max_size }) = old.early {
            shared.metrics.removed_early.inc();
            tracing::warn!(
                file = &*name,
                size,
                max_size,
                "a segment of the audit trail was removed before `retain` had passed, since the trail was larger than \
                 max_size; none of its records is of the idempotency window. To keep records for longer, raise [audit] \
                 max_size, and its volume with it, or copy segments elsewhere before they go"
            );
        }
    }
}
