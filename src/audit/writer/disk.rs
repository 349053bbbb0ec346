//! The writes: one a batch, into the open segment or a new one.
//!
//! Nothing that failed is believed: the segment is cut back to its last good length and the batch is tried again, while intents
//! time out. A batch is committed only when its segment's name still leads to the file that it was written to.
//!
//! With durability `disk` one batch is one write and one fdatasync: what is queued meanwhile is the next batch. After a failed
//! fdatasync the batch is written again, to a new segment; the old one is cut back to what was proven only when the new one is on
//! the disk, so that a crash in between loses nothing. See [`crate::audit::sync`].

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::lost_files::{Lost, Mishap};
use super::space::is_too_large;
use super::{Batch, Directory, Durability, Segment, Shared, Writer, limit};
use crate::audit::chain::segment_name;
use crate::audit::segment;

/// How long a failed write waits.
const RETRY: Duration = Duration::from_millis(100);

impl Writer {
    /// Tries until it is written; gives up only when the trail is closing.
    pub(super) fn write_persistently(&mut self, batch: &Batch, shared: &Shared) -> bool {
        let mut failed = false;
        loop {
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
            let is_in_place = self.look_for_place(shared);
            if !failed {
                let raise = is_too_large(&error).then_some(limit::RAISE);
                if is_in_place {
                    shared.trouble.begins(None, format!("the audit trail cannot be written: {error}"));
                }
                tracing::error!(%error, raise, "the audit trail cannot be written; nothing is sent meanwhile");
            }
            failed = true;
            shared.writable.replace(false);
            if shared.wait_for_retry(RETRY) {
                return self.write(batch).is_ok();
            }
        }
    }

    /// Writes linked records. When it succeeds they can be read by the segment's name; with `disk` they are on the disk.
    pub(super) fn write(&mut self, batch: &Batch) -> io::Result<()> {
        if self.try_write(batch)? {
            return Ok(());
        }
        self.rescue(batch.text())?;
        if self.try_write(batch)? {
            return Ok(());
        }
        Err(io::Error::other("the open segment was moved again"))
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
        if self.options.durability == Durability::Disk
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
        let made = match self.options.durability {
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

/// Makes a segment; if that fails, nothing of it is left.
fn begin(directory: &Directory, name: &str, text: &[u8]) -> io::Result<File> {
    let file = directory.create(name)?;
    if let Err(error) = file.write_all_at(text, 0) {
        directory.remove_if(name, &file)?;
        return Err(error);
    }
    Ok(file)
}

fn is_disk_full(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded) || is_too_large(error)
}
