//! The writer's thread: chains and writes, one write a batch.
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

use serde_json::json;

use super::{
    Durability, Options,
    batch::Batch,
    chain::{Hash, Keys, Link, segment_path},
    queue::{Next, Shared},
    sync::Syncs,
};

/// How long a failed write waits.
const RETRY: Duration = Duration::from_millis(100);

/// So much room for text is kept from batch to batch, in bytes.
const KEPT_TEXT: usize = 256 * 1024;

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

/// Where the trail stands.
pub(super) struct Writer {
    directory: PathBuf,
    segment_size: u64,
    durability: Durability,
    low_water: u64,
    measured: Option<Instant>,
    keys: Arc<Keys>,
    /// Of the last record.
    link: Link,
    /// Where records go, and up to where that file is good.
    segment: Option<(File, u64)>,
    /// The segment whose last fdatasync failed, and up to where it is good; until its batch is elsewhere.
    disproven: Option<(File, u64)>,
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
        hash: Hash,
        segment: Option<(File, u64)>,
    ) -> Self {
        Self {
            directory: options.directory.clone(),
            segment_size: options.segment_size,
            durability: options.durability,
            low_water: options.low_water,
            measured: None,
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
        let (mut batch, mut text) = (Batch::default(), Vec::new());
        loop {
            self.measure(shared);
            match shared.next_batch(&mut batch) {
                Next::Write => {}
                Next::Look => continue,
                Next::End => return,
            }
            let before = self.link.clone();
            self.link(&batch, &mut text);
            if !self.write_persistently(&text, batch.first(), shared) {
                self.link = before;
                tracing::error!(
                    records = batch.len(),
                    "the audit trail closes with records that could not be written"
                );
                return;
            }
            shared.written(&batch, text.len());
            batch.shrink_to(KEPT_TEXT);
            if let Some(mishap) = self.mishap.take() {
                let (name, what) = mishap.event();
                tracing::error!("{what}; a new segment is begun");
                shared.event(name, json!({ "what": what }));
            }
        }
    }

    /// Links and writes records, once.
    pub(super) fn append(&mut self, batch: &Batch) -> io::Result<()> {
        let mut text = Vec::new();
        self.link(batch, &mut text);
        self.write(&text, batch.first())
    }

    /// The records' text, each linked to the one before.
    fn link(&mut self, batch: &Batch, text: &mut Vec<u8>) {
        text.clear();
        text.shrink_to(KEPT_TEXT);
        for line in batch.lines() {
            self.link = self.keys.seal(line, text, &self.link);
        }
    }

    /// Looks whether there is space for refusals. Here, since asking a stuck disk takes for ever.
    fn measure(&mut self, shared: &Shared) {
        if self.measured.is_none_or(|measured| measured.elapsed() >= MEASURE) {
            shared.set_space_left(free_space(&self.directory) >= self.low_water);
            self.measured = Some(Instant::now());
        }
    }

    /// Tries until it is written; gives up only when the trail is closing.
    fn write_persistently(&mut self, text: &[u8], first: u64, shared: &Shared) -> bool {
        let mut failed = false;
        loop {
            let written = self.write(text, first);
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
                        return self.write(text, first).is_ok();
                    }
                }
            }
        }
    }

    /// Writes records of which `first` is the first one's number; with `disk` they are on the disk then.
    fn write(&mut self, text: &[u8], first: u64) -> io::Result<()> {
        if let Some((file, length)) = &self.segment {
            if !is_whole(file, *length)? {
                self.mishap = Some(Mishap::Lost);
                self.segment = None;
            } else if *length >= self.segment_size {
                self.segment = None;
            }
        }
        match self.durability {
            Durability::Kernel => self.write_to_kernel(text, first),
            Durability::Disk => self.write_to_disk(text, first),
        }
    }

    fn write_to_kernel(&mut self, text: &[u8], first: u64) -> io::Result<()> {
        let (file, length) = match &mut self.segment {
            Some(segment) => segment,
            empty => empty.insert((begin(&free_place(&self.directory, first, &self.lock)?)?, 0)),
        };
        append(file, text, *length)?;
        *length += text.len() as u64;
        Ok(())
    }

    fn write_to_disk(&mut self, text: &[u8], first: u64) -> io::Result<()> {
        let Some((file, length)) = &mut self.segment else { return self.begin_on_disk(text, first) };
        append(file, text, *length)?;
        if let Err(error) = self.syncs.sync(file) {
            self.disproven = self.segment.take();
            return Err(error);
        }
        *length += text.len() as u64;
        Ok(())
    }

    fn begin_on_disk(&mut self, text: &[u8], first: u64) -> io::Result<()> {
        let path = free_place(&self.directory, first, &self.lock)?;
        self.segment = Some((self.syncs.begin(&path, text)?, text.len() as u64));
        if let Some((file, good)) = self.disproven.take() {
            self.mishap = Some(Mishap::Disproven);
            // If this fails, readers see two copies of the batch and take the new segment's.
            let _ = file.set_len(good);
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

/// Writes behind what is good; on failure nothing new is left there.
fn append(file: &File, text: &[u8], length: u64) -> io::Result<()> {
    if let Err(error) = file.write_all_at(text, length) {
        file.set_len(length)?;
        return Err(error);
    }
    Ok(())
}

/// Whether an open segment still has its name and all that was written. What goes into a deleted file is lost
/// in silence.
fn is_whole(file: &File, length: u64) -> io::Result<bool> {
    let found = file.metadata()?;
    Ok(found.nlink() > 0 && found.len() >= length)
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

/// Begins a segment, empty.
fn begin(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Bytes that this process may still write.
fn free_space(directory: &Path) -> u64 {
    rustix::fs::statvfs(directory).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
}
