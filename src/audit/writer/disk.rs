//! Durable writes: one write per batch, into the open segment or a new one, retried until it succeeds.
//!
//! A write that failed is never trusted: the segment is cut back to its committed length and the batch is written
//! again, while intents time out. A batch is committed only if its segment's name still leads to the file that was
//! written.
//!
//! With durability `disk` a batch is one write and one fdatasync; records that are queued meanwhile form the next
//! batch (group commit). After a failed fdatasync the batch is written again, to a new segment. The old segment is
//! cut back only when the new one is durable, so that a crash in between loses nothing. See [`crate::audit::sync`]
//! for why.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::lost_files::{Lost, Mishap};
use super::space::is_too_large;
use super::{Batch, Directory, Durability, Segment, Shared, Writer, limit};
use crate::audit::chain::segment_name;
use crate::audit::segment;

/// How long the writer waits between two tries.
// Short against the deadline of an intent, so that a fault that is over at once refuses few or none.
const RETRY: Duration = Duration::from_millis(100);

impl Writer {
    /// Writes a batch, again and again until it succeeds. Returns false if it fails while the trail is closing.
    pub(super) fn write_persistently(&mut self, batch: &Batch, shared: &Shared) -> bool {
        let mut failed = false;
        loop {
            // A test holds this lock while its disk is to hang.
            #[cfg(test)]
            drop(shared.disk.lock());
            let written = self.write(batch);
            shared.metrics.synced(&std::mem::take(&mut self.syncs));
            let Err(error) = written else {
                if failed {
                    tracing::info!("the audit trail can be written again");
                    self.look_for_place(shared);
                }
                shared.writable.replace(true);
                return true;
            };
            shared.metrics.errors.inc();
            // A directory that is gone is the better explanation than the error of the write; it then reports itself.
            let is_in_place = self.look_for_place(shared);
            // Once for all tries, or a disk that is full for an hour would fill the log.
            if !failed {
                let raise = is_too_large(&error).then_some(limit::RAISE);
                if is_in_place {
                    shared.trouble.begins(None, format!("the audit trail cannot be written: {error}"));
                }
                tracing::error!(
                    %error, raise,
                    "the audit trail cannot be written; no call is sent until it can"
                );
            }
            failed = true;
            shared.writable.replace(false);
            // One last try, since a stop must end. What is then not written is missing from the trail, and the
            // process says so.
            if shared.wait_for_retry(RETRY) {
                return self.write(batch).is_ok();
            }
        }
    }

    /// Writes linked records. If it succeeds, they can be read by the segment's name, and with durability `disk` they
    /// are durable.
    pub(super) fn write(&mut self, batch: &Batch) -> io::Result<()> {
        if self.try_write(batch)? {
            return Ok(());
        }
        // The segment was moved or changed during the write. After the rescue the batch is written once more; if the
        // segment is moved again, this is an error like any other.
        self.rescue(batch.text())?;
        if self.try_write(batch)? {
            return Ok(());
        }
        Err(io::Error::other("the open segment was moved again"))
    }

    /// Writes once. Returns false if the open segment is not in its place afterwards.
    fn try_write(&mut self, batch: &Batch) -> io::Result<bool> {
        let is_full = self.segment.as_ref().is_some_and(|segment| self.is_full(segment));
        match &mut self.segment {
            Some(_) if !is_full || !batch.begins_segment => match self.append_to_segment(batch.text()) {
                Err(error) if is_too_large(&error) => self.go_on_elsewhere(batch, error),
                appended => appended,
            },
            // Before the segment is left for a new one: it can be copied back only while it is open.
            Some(segment) if !segment.is_in_place() => Ok(false),
            Some(_) => match self.begin_segment(batch) {
                // There is no space for a new segment, but space is reserved in this one, for just that case.
                Err(error) if is_disk_full(&error) => {
                    (self.list_refused, self.is_outgrown) = (Some(Instant::now()), false);
                    self.append_to_segment(batch.text())
                }
                begun => begun.map(|()| true),
            },
            None => self.begin_segment(batch).map(|()| true),
        }
    }

    /// Begins a segment with records that do not fit into the open one because of the limit on file sizes. Returns
    /// `error`, the reason, if there is no space for them in a new file.
    // Space for more than these records is not required: what is queued must be written, and the next `reserve`
    // refuses new intents if there is no more.
    fn go_on_elsewhere(&mut self, batch: &Batch, error: io::Error) -> io::Result<bool> {
        segment::has_space_for(&self.directory, batch.size() as u64).map_err(|_| error)?;
        match &self.segment {
            Some(segment) if segment.is_in_place() => self.ledger.leave(segment),
            _ => return Ok(false),
        }
        self.begin_segment(batch).map(|()| true)
    }

    /// Appends to the open segment. Returns whether the segment is in its place afterwards, and commits if it is.
    fn append_to_segment(&mut self, text: &[u8]) -> io::Result<bool> {
        let Some(segment) = &mut self.segment else { return Ok(false) };
        segment.append(text)?;
        if self.options.durability == Durability::Disk
            && let Err(error) = self.syncs.sync(&segment.file)
        {
            // Not one more byte goes into this file: the kernel may have dropped the pages and believes them clean,
            // so that a later fdatasync would succeed without them.
            self.disproven = self.segment.take();
            return Err(error);
        }
        // After the write, not before: a file that is moved in between would take the batch along, unnoticed.
        let is_in_place = segment.is_in_place();
        if is_in_place {
            segment.commit();
        }
        Ok(is_in_place)
    }

    /// Begins a segment with these records, and closes the one before it.
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
        // Only now that the new segment is durable. Cut back earlier, a crash would lose records of which the disk
        // may have had some.
        if let Some(mut disproven) = self.disproven.take() {
            self.mishaps.push(Mishap::Disproven);
            self.ledger.leave(&disproven);
            // An error is ignored: readers then find the batch twice and take the copy in the new segment.
            let _ = disproven.cut_back();
            self.closed.insert(disproven.name(), disproven.identity());
        }
        Ok(())
    }

    /// Creates the segment that begins with the record `first` and writes `text` to it. If that fails, nothing of it
    /// is left. A foreign file in its place is kept under another name.
    fn make_segment(&mut self, first: u64, text: &[u8]) -> io::Result<Segment> {
        let file = segment_name(first);
        // A directory that took the place of ours is another trail: it has neither our segments nor our lock.
        self.directory.check()?;
        if let Some(aside) = self.directory.put_aside(&file)? {
            let (what, aside) = ("a file with the name of a new segment already existed", Some(aside));
            let lost = Lost { file: file.clone(), what, is_restored: true, aside, found_as: None };
            self.mishaps.push(Mishap::Lost(lost));
        }
        let made = match self.options.durability {
            Durability::Kernel => begin(&self.directory, &file, text)?,
            Durability::Disk => self.syncs.begin(&self.directory, &file, text)?,
        };
        let segment = Segment::new(&self.directory, first, made, text.len() as u64)?;
        if segment.is_in_place() && self.directory.check().is_ok() {
            return Ok(segment);
        }
        // Only if the name still leads to our file: a foreign file is not ours to remove.
        let _ = self.directory.remove_if(&file, &segment.file);
        Err(io::Error::other("a new segment was moved or replaced at once"))
    }
}

/// Creates a segment and writes its first batch. If that fails, nothing of it is left.
fn begin(directory: &Directory, name: &str, text: &[u8]) -> io::Result<File> {
    let file = directory.create(name)?;
    if let Err(error) = file.write_all_at(text, 0) {
        directory.remove_if(name, &file)?;
        return Err(error);
    }
    Ok(file)
}

/// Whether an error means that there is no space, be it of the disk, of a quota, or under the limit on file sizes.
fn is_disk_full(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded) || is_too_large(error)
}
