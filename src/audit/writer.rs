//! The writer's thread: chains and writes, one write a batch.
//!
//! Space is reserved ahead of what is written, for the outcomes of all that is in flight and some more: once that
//! can't be had, new intents are refused, and what was sent already still gets its outcome on a full disk. A limit on the size
//! of files is no full disk: there the next batch begins a new segment, after a look whether it can have that space and has more
//! room than the list of unresolved calls takes, with which it begins. Many records are written in parts, none longer than a file
//! may be.
//!
//! Nothing that failed is believed: the segment is cut back to its last good length and the batch is tried
//! again, while intents time out. A stuck disk holds this thread, never a worker.
//!
//! A batch is committed only when its segment's name still leads to the file that it was written to. A segment that
//! somebody moved, deleted or replaced is copied back to its name; one that was cut shorter is given up for a new one.
//! Once a second, at rest, too, this thread looks for the directory, the lock file and the closed segments. Without the first
//! two nothing new is sent.
//!
//! With durability `disk` one batch is one write and one fdatasync: what is queued meanwhile is the next batch.
//! After a failed fdatasync the batch is written again, to a new segment; the old one is cut back to what was
//! proven only when the new one is on the disk, so that a crash in between loses nothing. See [`super::sync`].

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};

use super::{
    Durability, Options, SLACK, Unfinished, age,
    batch::Batch,
    chain::{Link, segment_name, segments},
    clocks::{self, Clocks},
    directory::{Directory, Identity},
    ledger::Ledger,
    limit,
    lock::{self, Lock, Stated},
    queue::{Carried, LOOK_AROUND, Next, Shared},
    retention::{self, Excess, Keeping, Old, Place},
    segment::{self, AHEAD, Segment},
    sync::Syncs,
    unresolved::{UnresolvedCall, UnresolvedList},
};
use crate::{keyed_hash::Keys, supervisor::fault};

/// How long a failed write waits.
const RETRY: Duration = Duration::from_millis(100);

/// So much room for text is kept from batch to batch, in bytes; 256 busy connections use a third.
const KEPT_TEXT: usize = 1 << 20;

/// How long a segment that cannot be begun waits.
const RETRY_SEGMENT: Duration = Duration::from_secs(1);

/// An outcome takes no more than this, but for one with a long reply or code.
pub(super) const OUTCOME: u64 = 2 * 1024;

/// So many bytes of queued records are written at once: under any limit on file sizes that [`limit::check`] lets pass, each such
/// part has room in a file. Queued may be 64 MiB and the outcomes of all in flight. To refuse each limit below that would be as
/// simple, and would refuse limits that are of use.
pub(super) const MOST_AT_ONCE: usize = 4 << 20;

/// How often an old segment is looked for while there is something to write, beside each time that one is begun. One goes at
/// a time.
const LOOK: Duration = Duration::from_secs(60);

/// To look at the files and the free space takes as long as to write so many records.
const LOOK_AROUND_COSTS: usize = 100;

/// What happened to a file of the trail, while no record says so yet.
enum Mishap {
    /// An fdatasync of a segment failed.
    Disproven,
    /// A file is not in its place.
    Lost(Lost),
}

/// A file that somebody else moved, deleted, replaced or cut.
struct Lost {
    file: String,
    what: &'static str,
    /// Nothing is lost: it is there again.
    is_restored: bool,
    /// What the foreign file in its place is called now.
    aside: Option<String>,
    /// What the lost file is called now.
    found_as: Option<String>,
}

/// Where the trail stands.
pub(super) struct Writer {
    directory: Directory,
    segment_size: u64,
    durability: Durability,
    low_water: u64,
    /// When the files were last looked at.
    looked_around: Option<Instant>,
    /// What is not in its place, of directory and lock file.
    away: Option<&'static str>,
    keeping: Keeping,
    pub(super) clocks: Arc<Clocks>,
    window: Duration,
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
    /// A writer that goes on behind this record, in the segment if there is one.
    pub(super) fn new(
        options: &Options,
        keys: Arc<Keys>,
        (directory, lock): (Directory, Lock),
        clocks: Arc<Clocks>,
        last: Place,
        segment: Option<Segment>,
    ) -> io::Result<Self> {
        let open = segment.as_ref().map(Segment::name);
        let mut closed = BTreeMap::new();
        for path in segments(directory.path())? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(found) = directory.find(&name)?.filter(|_| Some(&name) != open.as_ref()) {
                closed.insert(name, found.identity);
            }
        }
        Ok(Self {
            directory,
            segment_size: options.segment_size,
            durability: options.durability,
            low_water: options.low_water,
            looked_around: None,
            away: None,
            keeping: Keeping::new(options),
            clocks,
            window: options.window,
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
        })
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

    /// What the next batch is to carry over, if it begins a segment. Where there is no space for one, or a file may not be as long as
    /// the list makes it, that is tried once a second.
    fn begins(&mut self, shared: &Shared) -> Option<Carried> {
        let is_full = self.segment.as_ref().is_none_or(|segment| self.is_full(segment));
        if !self.may_begin() || !(is_full || self.lacks_list) {
            return None;
        }
        let limit = limit::of_files();
        if !self.is_outgrown && limit < u64::MAX && self.of_new_segment(shared) > limit {
            self.list_refused = Some(Instant::now());
            return None;
        }
        Some(Carried {
            at_work: !self.ledger.is_empty(),
            listed: shared.unresolved().calls().next().is_some(),
        })
    }

    /// About what a new segment takes with its first batch, and what is to be reserved behind that: the list as it is, a batch, and
    /// as much again for what that adds to the list.
    fn of_new_segment(&self, shared: &Shared) -> u64 {
        let list = shared.unresolved().clone();
        list.size() + self.ledger.size() + 2 * MOST_AT_ONCE as u64 + room(shared)
    }

    fn may_begin(&self) -> bool {
        self.list_refused.is_none_or(|refused| refused.elapsed() >= RETRY_SEGMENT)
    }

    fn is_full(&self, segment: &Segment) -> bool {
        self.is_outgrown || segment.length.saturating_sub(self.list_length) >= self.segment_size
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
            let (calls, bytes) = (behind.calls().count(), self.list_filled);
            tracing::error!(
                calls,
                bytes,
                raise = limit::RAISE,
                "the list of unresolved calls has no room in a file"
            );
            batch.leave_list_out(json!({ "calls": calls, "bytes": bytes, "forgotten": forgotten }));
            self.list_refused = Some(Instant::now());
        }
    }

    /// Forgets calls whose window is certainly over. Returns those of unknown outcome.
    fn prune(&self, list: &mut UnresolvedList) -> Vec<Arc<UnresolvedCall>> {
        let Some(anchors) = self.clocks.anchors() else { return Vec::new() };
        let (ages, window) = (self.clocks.ages(), self.window + SLACK);
        list.prune(|call| {
            let place = call.seq.zip(age::millis(&call.time));
            place.is_some_and(|(seq, time)| ages.clone().at(seq, anchors).age(time) > window)
        })
    }

    /// A writer that waits for the disk is never prompt: what is queued meanwhile shares the next fdatasync.
    fn rest(&self, shared: &Shared, due: u64) {
        if self.durability == Durability::Kernel {
            shared.rest(due);
        }
    }

    /// Links and writes records, once.
    pub(super) fn append(&mut self, batch: &mut Batch) -> io::Result<()> {
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
        let done = self.lock.state(&stated, is_news && self.durability == Durability::Disk);
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

    /// Reserves space for so many bytes, and for the outcomes of all that is in flight; tells whether there is. At the limit
    /// on file sizes the next batch begins a new segment, but only where that has more room: its list may be longer than all records
    /// for which there is room behind it.
    fn reserve(&mut self, shared: &Shared, bytes: u64) {
        let needed = bytes + room(shared);
        let mut reserved = self.segment.as_mut().map_or(Ok(()), |segment| segment.reserve(needed));
        let is_limit = reserved.as_ref().is_err_and(is_too_large);
        self.is_outgrown &= is_limit;
        if is_limit && self.may_begin() {
            let needed = self.of_new_segment(shared);
            self.is_outgrown = segment::has_space_for(&self.directory, needed).is_ok();
            self.list_refused = (!self.is_outgrown).then(Instant::now);
        }
        if self.is_outgrown {
            reserved = Ok(());
        }
        if let Err(error) = &reserved
            && shared.has_room()
        {
            let raise = is_limit.then_some(limit::RAISE);
            shared.trouble.begins(None, format!("no space can be reserved: {error}"));
            tracing::error!(%error, raise, "no space can be reserved for the audit trail; nothing new is sent meanwhile");
        }
        shared.set_room(reserved.is_ok());
    }

    /// Looks around once a second. That makes no prompt writer a slow one, nor a slow one prompt; a stuck disk does.
    fn look_around_in_turn(&mut self, shared: &Shared) {
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
        shared.set_space_left(free >= self.low_water);
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
        shared.may_work();
    }

    /// Whether directory and lock file are those that were opened. Says once that they are not, and that they are again.
    fn look_for_place(&mut self, shared: &Shared) -> bool {
        let lost = match (self.directory.check(), self.directory.leads_to(lock::NAME, self.lock.identity())) {
            (Err(_), _) => Some("the directory was moved, deleted or replaced, or cannot be reached"),
            (Ok(()), Ok(true)) => None,
            (Ok(()), _) => Some("the lock file was moved, deleted or replaced"),
        };
        shared.set_in_place(lost.is_none());
        if lost == self.away {
            return lost.is_none();
        }
        self.away = lost;
        match lost {
            Some(what) => {
                shared.trouble.begins(None, what.to_owned());
                let directory = self.directory.path().display();
                tracing::error!(%directory, "{what}; nothing is sent until it is back");
                shared.metrics.files_lost(false);
                let directory = directory.to_string();
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
        let was_healthy = shared.set_healthy(rescued.is_ok());
        if let Err(error) = rescued
            && was_healthy
        {
            shared.trouble.begins(None, format!("the open segment is lost and cannot be put back: {error}"));
            tracing::error!(%error, "the open segment of the audit trail is lost and cannot be put back yet");
        }
    }

    /// The open segment is not in its place. Copies it back from the open file, so that nothing is lost; if that does not
    /// have all records any more, the next write begins a new one. `pending` is what was written and is not committed.
    fn rescue(&mut self, pending: &[u8]) -> io::Result<()> {
        self.directory.check()?;
        let Some(segment) = &mut self.segment else { return Ok(()) };
        let (file, what) = (segment.name(), segment.mishap(&self.directory)?);
        let is_whole = segment.is_whole(&self.link)?;
        let mut aside = None;
        if is_whole {
            let syncs = (self.durability == Durability::Disk).then_some(&mut self.syncs);
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
        if let Some(segment) = &self.segment {
            self.ledger.leave(segment);
        }
        if let Some(segment) = self.segment.take()
            && self.directory.leads_to(&segment.name(), segment.identity())?
        {
            self.closed.insert(segment.name(), segment.identity());
        }
        Ok(())
    }

    /// Says what happened to files, in log, metrics and trail.
    fn report(&mut self, shared: &Shared) {
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
        // In another directory there are other segments.
        if shared.is_closing() || self.directory.check().is_err() {
            return;
        }
        // A start looks as soon as it may.
        if self.clocks.anchors().is_none() {
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
        match self.directory.remove(&name) {
            Ok(()) => {
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
            Err(error) => tracing::warn!(%error, "an old segment of the audit trail cannot be removed"),
        }
    }

    /// Tries until it is written; gives up only when the trail is closing.
    fn write_persistently(&mut self, batch: &Batch, shared: &Shared) -> bool {
        let mut failed = false;
        loop {
            #[cfg(test)]
            drop(shared.disk.lock());
            let written = self.write(batch);
            shared.count_syncs(&std::mem::take(&mut self.syncs));
            match written {
                Ok(()) => {
                    if failed {
                        tracing::info!("the audit trail can be written again");
                        self.look_for_place(shared);
                    }
                    shared.set_healthy(true);
                    return true;
                }
                Err(error) => {
                    shared.count_error();
                    let is_in_place = self.look_for_place(shared);
                    if !failed {
                        let raise = is_too_large(&error).then_some(limit::RAISE);
                        if is_in_place {
                            shared
                                .trouble
                                .begins(None, format!("the audit trail cannot be written: {error}"));
                        }
                        tracing::error!(%error, raise, "the audit trail cannot be written; nothing is sent meanwhile");
                    }
                    failed = true;
                    shared.set_healthy(false);
                    if shared.wait_for_retry(RETRY) {
                        return self.write(batch).is_ok();
                    }
                }
            }
        }
    }

    /// Writes linked records. When it succeeds they can be read by the segment's name; with `disk` they are on the disk.
    fn write(&mut self, batch: &Batch) -> io::Result<()> {
        if self.try_write(batch)? {
            return Ok(());
        }
        self.rescue(batch.text())?;
        if self.try_write(batch)? {
            Ok(())
        } else {
            Err(io::Error::other("the open segment was moved again"))
        }
    }

    /// Writes once; false if the segment is not in its place then.
    fn try_write(&mut self, batch: &Batch) -> io::Result<bool> {
        let is_full = self.segment.as_ref().is_some_and(|segment| self.is_full(segment));
        match &mut self.segment {
            Some(_) if !is_full || !batch.begins_segment => match self.append_to_segment(batch.text()) {
                Err(error) if is_too_large(&error) => self.go_on_elsewhere(batch, error),
                appended => appended,
            },
            // It can be put back for as long as it is open.
            Some(segment) if !segment.is_in_place() => Ok(false),
            Some(_) => match self.begin_segment(batch) {
                // For a new one there is no space; here some is reserved.
                Err(error) if is_disk_full(&error) => {
                    (self.list_refused, self.is_outgrown) = (Some(Instant::now()), false);
                    self.append_to_segment(batch.text())
                }
                begun => begun.map(|()| true),
            },
            None => self.begin_segment(batch).map(|()| true),
        }
    }

    /// The open segment cannot grow by these records, though there may be space: they begin a new one, if that has space for them.
    /// Whether it has space for more does not matter here: what is queued must be written, and the next [`Self::reserve`] refuses
    /// what is new. `error` is why.
    fn go_on_elsewhere(&mut self, batch: &Batch, error: io::Error) -> io::Result<bool> {
        segment::has_space_for(&self.directory, batch.size() as u64).map_err(|_| error)?;
        match &self.segment {
            Some(segment) if segment.is_in_place() => self.ledger.leave(segment),
            _ => return Ok(false),
        }
        self.begin_segment(batch).map(|()| true)
    }

    fn append_to_segment(&mut self, text: &[u8]) -> io::Result<bool> {
        let Some(segment) = &mut self.segment else { return Ok(false) };
        segment.append(text)?;
        if self.durability == Durability::Disk
            && let Err(error) = self.syncs.sync(&segment.file)
        {
            self.disproven = self.segment.take();
            return Err(error);
        }
        let is_in_place = segment.is_in_place();
        if is_in_place {
            segment.commit();
        }
        Ok(is_in_place)
    }

    /// Begins a segment with these records.
    fn begin_segment(&mut self, batch: &Batch) -> io::Result<()> {
        let segment = self.make_segment(batch.first(), batch.text())?;
        self.list_length = if batch.has_list() { self.list_filled } else { 0 };
        self.lacks_list = !batch.begins_segment;
        (self.list_refused, self.is_outgrown) = (None, false);
        if let Some(full) = self.segment.replace(segment) {
            full.release();
            self.closed.insert(full.name(), full.identity());
        }
        self.is_unanchored = true;
        self.looked = None;
        if let Some(mut disproven) = self.disproven.take() {
            self.mishaps.push(Mishap::Disproven);
            self.ledger.leave(&disproven);
            // If this fails, readers see two copies of the batch and take the new segment's.
            let _ = disproven.cut_back();
            self.closed.insert(disproven.name(), disproven.identity());
        }
        Ok(())
    }

    /// Makes the segment that begins with this record; if that fails, nothing of it is left. What somebody else put in
    /// its place is kept under another name.
    fn make_segment(&mut self, first: u64, text: &[u8]) -> io::Result<Segment> {
        let file = segment_name(first);
        self.directory.check()?;
        if let Some(aside) = self.directory.put_aside(&file)? {
            let (what, aside) = ("a file stood in the place of a new segment", Some(aside));
            let lost = Lost { file: file.clone(), what, is_restored: true, aside, found_as: None };
            self.mishaps.push(Mishap::Lost(lost));
        }
        let made = match self.durability {
            Durability::Kernel => begin(&self.directory, &file, text)?,
            Durability::Disk => self.syncs.begin(&self.directory, &file, text)?,
        };
        let segment = Segment::new(&self.directory, first, made, text.len() as u64)?;
        if segment.is_in_place() && self.directory.check().is_ok() {
            return Ok(segment);
        }
        let _ = self.directory.remove_if(&file, &segment.file);
        Err(io::Error::other("a new segment was moved or replaced at once"))
    }
}

impl Lost {
    /// The value of the event's member, and of the metric's label.
    fn result(&self) -> &'static str {
        if self.is_restored { "restored" } else { "lost" }
    }

    /// What the event says.
    fn details(&self) -> Value {
        let mut details = Map::new();
        details.insert("what".into(), json!(self.what));
        details.insert("file".into(), json!(self.file));
        details.insert("result".into(), json!(self.result()));
        for (name, value) in [("aside", &self.aside), ("found_as", &self.found_as)] {
            if let Some(value) = value {
                details.insert(name.into(), json!(value));
            }
        }
        Value::Object(details)
    }
}

/// What is to be reserved behind what is written.
fn room(shared: &Shared) -> u64 {
    AHEAD + OUTCOME * shared.in_flight()
}

/// Makes a segment; if that fails, nothing of it is left.
fn begin(directory: &Directory, name: &str, text: &[u8]) -> io::Result<File> {
    let file = directory.create(name)?;
    match file.write_all_at(text, 0) {
        Ok(()) => Ok(file),
        Err(error) => {
            directory.remove_if(name, &file)?;
            Err(error)
        }
    }
}

fn is_disk_full(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded) || is_too_large(error)
}

/// It is this file that cannot grow; another one may.
fn is_too_large(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::FileTooLarge
}
