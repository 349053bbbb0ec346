//! The writer's thread of the audit trail: links a batch into the hash chain, writes it and commits it (group
//! commit).
//!
//! There is one write per batch; a long batch is written in parts that fit into a file. Only this thread calls the
//! disk for records, so that a stuck disk holds it and never a worker. Where the disk fails, nothing that is queued
//! is given up before the trail closes.
//!
//! [`space`] reserves space for outcomes and decides when a segment begins, [`disk`] writes, and [`lost_files`]
//! reacts to files that others moved, deleted or changed.

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
use super::directory::{Directory, FileIdentity};
use super::ledger::Ledger;
use super::lock::{ClosingStatement, Lock};
use super::queue::{Shared, WriterWork};
use super::retention::{ChainPosition, Excess, Keeping, Old};
use super::segment::Segment;
use super::start::Resumed;
use super::sync::Syncs;
use super::unresolved_calls::{UnresolvedCall, UnresolvedList};
use super::{Options, Unfinished, age, clocks, limit, retention};
use crate::config::trail::SLACK;
use crate::keyed_hash::Keys;
use crate::model::durability::Durability;
use crate::supervisor::fault;
use lost_files::Mishap;
use space::room;

/// How much of a batch's memory is kept for the next batch, in bytes. A batch of 256 busy connections takes a third
/// of it.
const KEPT_TEXT: usize = 1 << 20;

/// The space that is reserved for an outcome, in bytes. Only an outcome with a stored reply or a long result code
/// takes more.
pub(super) const OUTCOME: u64 = 2 * 1024;

/// The length of a part in which queued records are written, in bytes.
// The queue can hold 64 MiB, and a batch of that length would not fit into a file under a low limit on file sizes.
// Each part fits under any limit that `limit::check` accepts. To refuse all limits below 64 MiB would be as simple,
// but such limits are in use.
pub(super) const MOST_AT_ONCE: usize = 4 << 20;

/// How often the writer looks for a segment that retention may remove, beside each time that a segment begins. Each
/// look removes one segment at most.
// One at a time: a clock or a setting that is wrong for a moment must not cost more than one segment.
const LOOK: Duration = Duration::from_secs(60);

/// The state of the writer.
pub(super) struct Writer {
    options: Options,
    directory: Directory,
    /// When the files and the free space were last checked.
    looked_around: Option<Instant>,
    /// What was missing at the last check: the directory or the lock file.
    away: Option<&'static str>,
    keeping: Keeping,
    pub(super) clocks: Arc<Clocks>,
    ledger: Ledger,
    /// The length of the list in the open segment's first batch, in bytes.
    // It does not count towards `segment_size`: a list that is longer than that would otherwise end each segment with
    // its first batch.
    list_length: u64,
    /// The length of the list that was last written into a batch, in bytes. That batch may begin a segment.
    list_filled: u64,
    /// Whether the open segment replaced a lost one and so began without a list. The next segment must have it.
    lacks_list: bool,
    /// When a new segment was last given up for want of space.
    list_refused: Option<Instant>,
    /// Whether the open segment is at the limit on file sizes and a new one would have space.
    is_outgrown: bool,
    /// When the last clock anchor was written, by `CLOCK_BOOTTIME` in milliseconds.
    pub(super) anchored: i64,
    /// Whether the open segment has no clock anchor yet.
    is_unanchored: bool,
    /// When retention last looked for old segments.
    looked: Option<Instant>,
    /// A segment to be removed once the record that announces it is committed.
    old: Option<Old>,
    keys: Arc<Keys>,
    /// The link of the last committed record.
    link: Link,
    /// The number of that record.
    seq: u64,
    /// The open segment. `None` until the first batch, and while a lost or failed one is being replaced.
    segment: Option<Segment>,
    /// The segments that are complete, with the identity of their files, so that their loss is noticed.
    closed: BTreeMap<String, FileIdentity>,
    /// Whether the last look for closed segments succeeded.
    is_listed: bool,
    /// The segment whose last fdatasync failed, until its batch is in another segment.
    disproven: Option<Segment>,
    syncs: Syncs,
    mishaps: Vec<Mishap>,
    /// Locked for as long as the trail is written.
    lock: Lock,
    /// Whether the last write to the lock file succeeded.
    is_stated: bool,
}

impl Writer {
    /// Returns a writer that goes on after the last record found, and has written the records of recovery. `what`
    /// names these records in an error. Fails if they cannot be written.
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

    /// Runs until the trail is closed and everything queued is written. Fails if the trail is closing and the last
    /// write failed.
    pub(super) fn run(mut self, shared: &Shared) -> Result<(), Unfinished> {
        let (mut batch, mut part, mut batch_deadline) = (Batch::default(), Batch::default(), shared.begin(0));
        loop {
            fault::check("the audit writer");
            // Before the next batch is taken: the events that these steps queue are then in it, and `remove_old`
            // relies on that.
            self.anchor(shared);
            self.look_for_old(shared);
            self.finished(shared, batch_deadline);
            self.look_around_in_turn(shared);
            let begins = self.begins(shared);
            let next = shared.next_batch(&mut batch, begins);
            batch_deadline = shared.begin(batch.len());
            match next {
                WriterWork::Write => {}
                // Without space no intent is accepted, so that nothing but this would notice that there is space
                // again.
                WriterWork::Look => {
                    self.reserve(shared, 0);
                    continue;
                }
                WriterWork::End => {
                    self.close();
                    return Ok(());
                }
            }
            // Only the last part may begin a segment: it has the list.
            while batch.cut(MOST_AT_ONCE, &mut part) {
                self.put(&mut part, &batch, shared)?;
            }
            self.put(&mut batch, &Batch::default(), shared)?;
            // Only now: the event that names the segment is committed.
            self.remove_old(shared);
            batch.shrink_to(KEPT_TEXT);
            self.report(shared);
        }
    }

    /// Writes and commits a batch. `behind` holds the records that are written after it, for which space is reserved,
    /// too. Fails if the trail closes before the batch is written.
    fn put(&mut self, batch: &mut Batch, behind: &Batch, shared: &Shared) -> Result<(), Unfinished> {
        if batch.has_list() {
            self.fill_list(batch, shared);
        }
        let link = self.link(batch);
        let waiting = behind.size() as u64;
        self.reserve(shared, batch.size() as u64 + waiting);
        if !self.write_persistently(batch, shared) {
            let records = batch.len() + behind.len();
            tracing::error!(records, "the audit trail was closed, but some records could not be written");
            return Err(Unfinished::Unwritten);
        }
        self.commit(link, batch.last());
        if let Some(segment) = &self.segment {
            self.ledger.take(batch, segment, shared);
        }
        self.lacks_list &= !batch.begins_segment;
        // After the lock file and the list are up to date: a request that is woken relies on both.
        shared.written(batch);
        // Once more: if the batch began a segment, that segment has no space reserved yet.
        self.reserve(shared, waiting);
        Ok(())
    }

    /// Writes the list of unresolved calls, as it is after the batch, in place of the batch's placeholder.
    ///
    /// A list that makes the batch longer than a file may be is left out, and the batch begins no segment.
    // Its length is known only here: the batch adds to the list, and a number may be longer on the list than in its
    // intent. A batch that no file can hold would be tried for ever, and all records after it would be lost at the
    // stop.
    fn fill_list(&mut self, batch: &mut Batch, shared: &Shared) {
        // The intents of calls at work are still only in the open segment. They must be read before another segment
        // takes its place.
        if let Some(segment) = &self.segment {
            self.ledger.leave(segment);
        }
        // The lock of the list is held for the pruning and the copy only, since other threads take it, too. The copy
        // shares the calls.
        let (forgotten, list) = {
            let mut list = shared.unresolved();
            (self.prune(&mut list), list.clone())
        };
        for call in &forgotten {
            let (id, caller, route, task) = (call.id, &call.caller, &call.route, call.task.as_ref());
            let task = task.map(ToString::to_string);
            tracing::error!(
                %id, caller, route, task,
                "too many calls have an unknown outcome: the oldest was removed from the list of unresolved calls"
            );
        }
        let forgotten: Vec<_> = forgotten.iter().map(|call| call.id).collect();
        let behind = self.ledger.list_behind(list, batch);
        self.list_filled = batch.fill_list(&behind, &forgotten) as u64;
        if batch.size() as u64 + room(shared) > limit::of_files() {
            let (calls, bytes, raise) = (behind.calls().count(), self.list_filled, limit::RAISE);
            tracing::error!(
                calls,
                bytes,
                raise,
                "the list of unresolved calls does not fit into a file, so it is not written"
            );
            batch.leave_list_out(json!({ "calls": calls, "bytes": bytes, "forgotten": forgotten }));
            self.list_refused = Some(Instant::now());
        }
    }

    /// Removes calls whose idempotency window is certainly over. Returns those of unknown outcome among them.
    fn prune(&self, list: &mut UnresolvedList) -> Vec<Arc<UnresolvedCall>> {
        // Without anchors no age is certain, and a wrong clock must remove no call.
        let Some(anchors) = self.clocks.anchors() else { return Vec::new() };
        let (ages, window) = (self.clocks.ages(), self.options.window + SLACK);
        list.prune(|call| {
            let place = call.seq.zip(age::millis(&call.time));
            place.is_some_and(|(seq, time)| ages.clone().at(seq, anchors).age(time) > window)
        })
    }

    /// Notes that the batch is done, unless durability is `disk`.
    // A writer that waits for fdatasync never counts as keeping up: then requests need no permit, and all that queue
    // meanwhile share the next fdatasync.
    fn finished(&self, shared: &Shared, batch_deadline: u64) {
        if self.options.durability == Durability::Kernel {
            shared.finished(batch_deadline);
        }
    }

    /// Links, writes and commits records, without a retry. Used before there are requests.
    fn append(&mut self, batch: &mut Batch) -> io::Result<()> {
        let link = self.link(batch);
        self.write(batch)?;
        self.commit(link, batch.last());
        Ok(())
    }

    /// Writes into each record the hash of the record before it, and its own. Returns the link of the last one.
    fn link(&self, batch: &mut Batch) -> Link {
        batch.lines_mut().fold(self.link.clone(), |link, line| self.keys.seal(line, &link))
    }

    /// Notes that the records up to `seq` are in their place.
    // The lock file names a new segment before a request relies on it. Otherwise a start could not tell that the
    // segment was lost. An error is only logged: the check once a second tries again.
    fn commit(&mut self, link: Link, seq: u64) {
        (self.link, self.seq) = (link, seq);
        if self.segment.as_ref().map(|segment| segment.first) != self.lock.newest() {
            self.state(false);
        }
    }

    /// Writes into the lock file what a start must find.
    fn state(&mut self, is_stopped: bool) {
        let Some(segment) = &self.segment else { return };
        let last = ChainPosition { seq: self.seq, hash: self.link.hash() };
        let stated = ClosingStatement { newest: segment.first, last, is_stopped };
        // Only a new segment and a stop need fdatasync. If the machine loses what is written each second, the lock
        // file names an earlier record: a start then expects less than there is, and still finds it.
        let is_news = is_stopped || self.lock.newest() != Some(segment.first);
        let done = self.lock.state(&stated, is_news && self.options.durability == Durability::Disk);
        let was_stated = std::mem::replace(&mut self.is_stated, done.is_ok());
        if let Err(error) = done
            && was_stated
        {
            tracing::warn!(%error, "the lock file of the audit trail cannot be written");
        }
    }

    /// Called when everything is written. Releases the space that was reserved and not used.
    pub(super) fn close(&mut self) {
        if let Some(segment) = &self.segment {
            segment.release();
        }
        self.state(true);
    }

    /// Queues a clock anchor, which ties the times of records to the time that has passed: once an hour, and once in
    /// each segment.
    // In each segment, since a reader otherwise had to read many segments back for one on a busy trail.
    fn anchor(&mut self, shared: &Shared) {
        let boottime = clocks::boottime();
        let every = if self.is_unanchored { age::AT_MOST_EVERY } else { age::EVERY };
        if boottime - self.anchored >= every && !shared.is_closing() {
            (self.anchored, self.is_unanchored) = (boottime, false);
            shared.event(age::CLOCK, Value::Object(self.clocks.members()));
        }
    }

    /// Looks for a segment that retention may remove, and queues the event that announces it.
    fn look_for_old(&mut self, shared: &Shared) {
        if !self.keeping.is_bounded() || self.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return;
        }
        // A directory that was replaced has other segments, which are not ours to remove. Without anchors no age is
        // known: the time of this look is then not noted, so that the first one comes as soon as they are.
        if shared.is_closing() || self.directory.check().is_err() || self.clocks.anchors().is_none() {
            return;
        }
        self.looked = Some(Instant::now());
        self.clocks.update(shared);
        match self.keeping.find(&self.directory, &self.keys, &self.clocks) {
            Ok(old) => self.old = old,
            Err(error) => tracing::warn!(%error, "the audit directory cannot be searched for old segments"),
        }
        if let Some(old) = &self.old {
            shared.event(retention::EVENT, old.details());
        }
    }

    /// Removes the segment that was found, after the event that announces it is committed.
    // In the other order a crash in between would leave a trail whose beginning is missing without a record of it,
    // which counts as damage.
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
                 max_size; none of its records is within the idempotency window. To keep records for longer, raise \
                 [audit] max_size, and its volume with it, or copy segments elsewhere before they are removed"
            );
        }
    }
}
