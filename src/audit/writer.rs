//! The writer's thread: chains and writes, one write a batch.
//!
//! Space is reserved ahead of what is written, for the outcomes of all that is in flight and some more: once that
//! can't be had, new intents are refused, and what was sent already still gets its outcome on a full disk.
//!
//! Nothing that failed is believed: the segment is cut back to its last good length and the batch is tried
//! again, while intents time out. A stuck disk holds this thread, never a worker. A segment that somebody
//! deleted or cut while it was open is given up for a new one; if the whole directory was replaced, nothing is
//! written, since its lock may be another's.
//!
//! With durability `disk` one batch is one write and one fdatasync: what is queued meanwhile is the next batch.
//! After a failed fdatasync the batch is written again, to a new segment; the old one is cut back to what was
//! proven only when the new one is on the disk, so that a crash in between loses nothing. See [`super::sync`].

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};
use serde_json::{Value, json};

use super::{
    Durability, Options, age,
    batch::Batch,
    chain::{Hash, Keys, Link, segment_path},
    clocks::{self, Clocks},
    queue::{Next, Shared},
    retention::{self, Old},
    sync::Syncs,
};

/// How long a failed write waits.
const RETRY: Duration = Duration::from_millis(100);

/// So much room for text is kept from batch to batch, in bytes; 256 busy connections use a third.
const KEPT_TEXT: usize = 1 << 20;

/// So much space is reserved at once, in bytes: a reservation is a system call of its own.
const AHEAD: u64 = 1 << 20;

/// An outcome takes no more than this, but for one with a long reply or code.
const OUTCOME: u64 = 2 * 1024;

/// How often an old segment is looked for while there is something to write, beside each time that one is begun. One goes at
/// a time.
const LOOK: Duration = Duration::from_secs(60);

/// How often the free space is measured while there is something to write.
const MEASURE: Duration = Duration::from_secs(1);

/// Why a new segment was begun before the old one was full.
#[derive(Clone, Copy)]
enum Mishap {
    /// Somebody deleted the old one or cut it.
    Lost,
    /// An fdatasync of the old one failed.
    Disproven,
}

/// A file of records.
pub(super) struct Segment {
    file: File,
    /// Up to where it is good.
    length: u64,
    /// Up to where it has space on the disk.
    allocated: u64,
}

/// Where the trail stands.
pub(super) struct Writer {
    directory: PathBuf,
    segment_size: u64,
    durability: Durability,
    low_water: u64,
    measured: Option<Instant>,
    /// Records are kept for as long, at least.
    retain: Option<Duration>,
    pub(super) clocks: Arc<Clocks>,
    /// When the last anchor was written, by `CLOCK_BOOTTIME` in milliseconds.
    pub(super) anchored: i64,
    /// When old segments were last looked for.
    looked: Option<Instant>,
    /// To be removed once the record that says so is written.
    old: Option<Old>,
    keys: Arc<Keys>,
    /// Of the last record.
    link: Link,
    /// Where records go.
    segment: Option<Segment>,
    /// The segment whose last fdatasync failed, until its batch is elsewhere.
    disproven: Option<Segment>,
    syncs: Syncs,
    /// What happened to a segment, while no record says so yet.
    mishap: Option<Mishap>,
    /// Held for as long as the trail is written.
    lock: File,
}

impl Writer {
    /// A writer that goes on behind the record of this hash, in the segment if there is one.
    pub(super) fn new(
        options: &Options,
        keys: Arc<Keys>,
        lock: File,
        clocks: Arc<Clocks>,
        hash: Hash,
        segment: Option<Segment>,
    ) -> Self {
        Self {
            directory: options.directory.clone(),
            segment_size: options.segment_size,
            durability: options.durability,
            low_water: options.low_water,
            measured: None,
            retain: options.retain.map(|retain| retain.max(options.window)),
            clocks,
            anchored: clocks::boottime(),
            looked: None,
            old: None,
            keys,
            link: Link::new(hash),
            segment,
            disproven: None,
            syncs: Syncs::default(),
            mishap: None,
            lock,
        }
    }

    /// Writes until the trail is closed and everything queued is written.
    pub(super) fn run(mut self, shared: &Shared) {
        let (mut batch, mut due) = (Batch::default(), shared.begin(0));
        loop {
            self.measure(shared);
            self.anchor(shared);
            self.look_for_old(shared);
            // A writer that waits for the disk is never prompt: what is queued meanwhile shares the next fdatasync.
            if self.durability == Durability::Kernel {
                shared.rest(due);
            }
            let next = shared.next_batch(&mut batch);
            due = shared.begin(batch.len());
            match next {
                Next::Write => {}
                Next::Look => {
                    self.reserve(shared, 0);
                    continue;
                }
                Next::End => return self.release(),
            }
            let before = self.link.clone();
            self.link(&mut batch);
            self.reserve(shared, batch.size() as u64);
            if !self.write_persistently(&batch, shared) {
                self.link = before;
                tracing::error!(
                    records = batch.len(),
                    "the audit trail closes with records that could not be written"
                );
                return;
            }
            shared.written(&batch);
            self.reserve(shared, 0); // a new segment has none yet
            self.remove_old(shared);
            batch.shrink_to(KEPT_TEXT);
            if let Some(mishap) = self.mishap.take() {
                let (name, what) = mishap.event();
                tracing::error!("{what}; a new segment is begun");
                shared.event(name, json!({ "what": what }));
            }
        }
    }

    /// Links and writes records, once.
    pub(super) fn append(&mut self, batch: &mut Batch) -> io::Result<()> {
        self.link(batch);
        self.write(batch)
    }

    /// Links each record to the one before.
    fn link(&mut self, batch: &mut Batch) {
        for line in batch.lines_mut() {
            self.link = self.keys.seal(line, &self.link);
        }
    }

    /// Looks whether there is space for refusals. Here, since asking a stuck disk takes for ever.
    fn measure(&mut self, shared: &Shared) {
        if self.measured.is_none_or(|measured| measured.elapsed() >= MEASURE) {
            shared.set_space_left(free_space(&self.directory) >= self.low_water);
            self.measured = Some(Instant::now());
        }
    }

    /// Reserves space for so many bytes, and for the outcomes of all that is in flight; tells whether there is.
    fn reserve(&mut self, shared: &Shared, bytes: u64) {
        let room = AHEAD + OUTCOME * shared.in_flight();
        let reserved = self.segment.as_mut().map_or(Ok(()), |segment| segment.reserve(bytes + room));
        if let Err(error) = &reserved
            && shared.has_room()
        {
            tracing::error!(%error, "no space can be reserved for the audit trail; nothing new is sent meanwhile");
        }
        shared.set_room(reserved.is_ok());
    }

    /// Gives back what was reserved and not needed.
    fn release(&mut self) {
        if let Some(segment) = &self.segment {
            let _ = segment.file.set_len(segment.length);
        }
    }

    /// Queues what ties the times of records to the time that has passed, once an hour.
    fn anchor(&mut self, shared: &Shared) {
        let boottime = clocks::boottime();
        if boottime - self.anchored >= age::EVERY && !shared.is_closing() {
            self.anchored = boottime;
            shared.event(age::CLOCK, Value::Object(self.clocks.members()));
        }
    }

    /// Looks for a segment that is to go, and queues the record that says so.
    fn look_for_old(&mut self, shared: &Shared) {
        let Some(retain) = self.retain.filter(|_| self.looked.is_none_or(|looked| looked.elapsed() >= LOOK))
        else {
            return;
        };
        if shared.is_closing() {
            return;
        }
        self.looked = Some(Instant::now());
        self.clocks.look(shared);
        let Some(anchors) = self.clocks.anchors().filter(|_| self.clocks.doubt().is_none()) else { return };
        let ages = self.clocks.ages();
        let is_old = |seq, time| ages.clone().at(seq, anchors).age(time) > retain;
        match retention::oldest(&self.directory, is_old) {
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
        match fs::remove_file(&old.path) {
            Ok(()) => shared.metrics.removed.inc(),
            Err(error) => tracing::warn!(%error, "an old segment of the audit trail cannot be removed"),
        }
    }

    /// Tries until it is written; gives up only when the trail is closing.
    fn write_persistently(&mut self, batch: &Batch, shared: &Shared) -> bool {
        let mut failed = false;
        loop {
            let written = self.write(batch);
            shared.count_syncs(&std::mem::take(&mut self.syncs));
            match written {
                Ok(()) => {
                    if failed {
                        tracing::info!("the audit trail can be written again");
                    }
                    shared.set_healthy(true);
                    return true;
                }
                Err(error) => {
                    shared.count_error();
                    if !failed {
                        tracing::error!(%error, "the audit trail cannot be written; nothing is sent meanwhile");
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

    /// Writes linked records; with `disk` they are on the disk then.
    fn write(&mut self, batch: &Batch) -> io::Result<()> {
        if let Some(segment) = &self.segment
            && !segment.is_whole()?
        {
            self.mishap = Some(Mishap::Lost);
            self.segment = None;
        }
        match &mut self.segment {
            Some(segment) if segment.length < self.segment_size => self.append_to_segment(batch.text()),
            Some(_) => match self.begin_segment(batch) {
                // For a new one there is no space; here some is reserved.
                Err(error) if is_full(&error) => self.append_to_segment(batch.text()),
                begun => begun,
            },
            None => self.begin_segment(batch),
        }
    }

    fn append_to_segment(&mut self, text: &[u8]) -> io::Result<()> {
        let Some(segment) = &mut self.segment else { return Ok(()) };
        append(&segment.file, text, segment.length)?;
        if self.durability == Durability::Disk
            && let Err(error) = self.syncs.sync(&segment.file)
        {
            self.disproven = self.segment.take();
            return Err(error);
        }
        segment.length += text.len() as u64;
        Ok(())
    }

    /// Begins a segment with these records.
    fn begin_segment(&mut self, batch: &Batch) -> io::Result<()> {
        let text = batch.text();
        let path = free_place(&self.directory, batch.first(), &self.lock)?;
        let file = match self.durability {
            Durability::Kernel => begin(&path, text)?,
            Durability::Disk => self.syncs.begin(&path, text)?,
        };
        self.release();
        self.segment = Some(Segment::new(file, text.len() as u64));
        self.looked = None;
        if let Some(disproven) = self.disproven.take() {
            self.mishap = Some(Mishap::Disproven);
            // If this fails, readers see two copies of the batch and take the new segment's.
            let _ = disproven.file.set_len(disproven.length);
        }
        Ok(())
    }
}

impl Mishap {
    /// The event's name, and what it says.
    fn event(self) -> (&'static str, &'static str) {
        match self {
            Self::Lost => ("gap", "a segment was deleted or cut while it was written"),
            Self::Disproven => ("recovery", "an fdatasync failed; its records were written again"),
        }
    }
}

impl Segment {
    /// A file that is good up to here.
    pub(super) fn new(file: File, length: u64) -> Self {
        Self { file, length, allocated: length }
    }

    /// Makes sure that so many bytes more fit. A file system that reserves nothing has room until it has none.
    fn reserve(&mut self, bytes: u64) -> io::Result<()> {
        let needed = self.length + bytes;
        if needed <= self.allocated {
            return Ok(());
        }
        let more = needed + AHEAD - self.length;
        match fallocate(&self.file, FallocateFlags::KEEP_SIZE, self.length, more) {
            Ok(()) => self.allocated = needed + AHEAD,
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => self.allocated = u64::MAX,
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Whether it still has its name and all that was written. What goes into a deleted file is lost in silence.
    fn is_whole(&self) -> io::Result<bool> {
        let found = self.file.metadata()?;
        Ok(found.nlink() > 0 && found.len() >= self.length)
    }
}

/// Writes behind what is good; on failure nothing new is left there.
fn append(file: &File, text: &[u8], length: u64) -> io::Result<()> {
    if let Err(error) = file.write_all_at(text, length) {
        file.set_len(length)?;
        return Err(error);
    }
    Ok(())
}

/// The path of a new segment, which is named after the first record in it.
fn free_place(directory: &Path, first: u64, lock: &File) -> io::Result<PathBuf> {
    let identity = |found: fs::Metadata| (found.dev(), found.ino());
    if identity(fs::metadata(directory.join("lock"))?) != identity(lock.metadata()?) {
        return Err(io::Error::other("the directory was replaced; the gateway must be restarted"));
    }
    let path = segment_path(directory, first);
    match fs::metadata(&path) {
        Ok(found) if found.len() > 0 => {
            Err(io::Error::new(io::ErrorKind::AlreadyExists, "the next segment is there already"))
        }
        _ => Ok(path),
    }
}

/// Begins a segment; if that fails, nothing of it is left. One that is there already, empty, stays.
fn begin(path: &Path, text: &[u8]) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).mode(0o600);
    let (file, is_new) = match options.clone().create_new(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => (options.open(path)?, false),
        made => (made?, true),
    };
    let written = append(&file, text, 0);
    if written.is_err() && is_new {
        fs::remove_file(path)?;
    }
    written.map(|()| file)
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Bytes that this process may still write.
fn free_space(directory: &Path) -> u64 {
    rustix::fs::statvfs(directory).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
}
