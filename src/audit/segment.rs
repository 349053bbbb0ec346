//! The open segment: an append-only file that is trusted only while its name leads to it.
//!
//! Each write is followed by one look at the name (`lstat`): it must lead to this file, and the file must have the
//! length that was written. Records are appended with `O_APPEND`, so that a file that was cut shorter has the wrong
//! length after the next write, too.
//!
//! This module does not decide when a segment begins or what happens to a lost one: see `writer`.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::{fs, io};

use rustix::fs::{FallocateFlags, OFlags, fallocate, fcntl_setfl};
use rustix::io::Errno;

use super::chain::{Link, segment_name};
use super::directory::{Directory, FileIdentity};
use super::limit;
use super::sync::{Syncs, UNFINISHED};

/// The space that is reserved at once, in bytes.
// A reservation is a system call. With this much, one serves about a thousand calls.
pub(super) const AHEAD: u64 = 1 << 20;

/// The length of a block when a segment is copied, in bytes.
const BLOCK: usize = 1 << 20;

/// A file of records that is open for appending.
pub(super) struct Segment {
    pub(super) file: File,
    /// The number of its first record, which its name contains.
    pub(super) first: u64,
    path: PathBuf,
    identity: FileIdentity,
    /// The length of its committed records, in bytes.
    pub(super) length: u64,
    /// The length of what was written, committed or not, in bytes.
    written: u64,
    /// Whether a write failed and may have left a part of a batch.
    is_torn: bool,
    /// The length for which the disk has space, in bytes.
    allocated: u64,
}

impl Segment {
    /// Takes a file of a directory as the segment that begins with the record `first`. Its first `length` bytes are
    /// committed.
    pub(super) fn new(directory: &Directory, first: u64, file: File, length: u64) -> io::Result<Self> {
        // Set only here, since recovery writes the last segment once more in its place, which `O_APPEND` would turn
        // into a copy at the end.
        fcntl_setfl(&file, OFlags::APPEND)?;
        Ok(Self {
            identity: FileIdentity::of(&file.metadata()?),
            path: directory.path().join(segment_name(first)),
            file,
            first,
            length,
            written: length,
            is_torn: false,
            allocated: length,
        })
    }

    pub(super) fn name(&self) -> String {
        segment_name(self.first)
    }

    pub(super) fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// Reserves space for `bytes` bytes after the committed records. Fails if the disk or the limit on file sizes has
    /// no room for them. A file system that cannot reserve counts as having room.
    pub(super) fn reserve(&mut self, bytes: u64) -> io::Result<()> {
        let needed = self.length + bytes;
        if needed <= self.allocated {
            return Ok(());
        }
        let limit = within_limit(needed)?;
        // Never beyond the limit, where reserved space could not be written to.
        let end = limit.min(needed + AHEAD);
        let is_reserved = allocate(&self.file, self.length, end - self.length)?;
        // If nothing can be reserved, asking again for each batch would be a system call for nothing.
        self.allocated = if is_reserved { end } else { limit };
        Ok(())
    }

    /// Releases the space that was reserved and not used.
    pub(super) fn release(&self) {
        // `set_len` also makes a file longer. A file that was cut shorter must not be filled up with zeros.
        if self.is_at_least(self.length) {
            let _ = self.file.set_len(self.length);
        }
    }

    /// Writes after the committed records. If that fails, nothing of the text is left. If an earlier try has written
    /// a text that is not committed yet, does nothing.
    pub(super) fn append(&mut self, text: &[u8]) -> io::Result<()> {
        // The same batch is tried again after a look at the name failed. Written once more, it would be there twice.
        if self.written > self.length {
            return Ok(());
        }
        if self.is_torn {
            self.cut_back()?;
        }
        // On Linux `O_APPEND` wins over the offset (pwrite(2), BUGS). This is wanted: in a file that was cut shorter
        // the text goes to the real end, and the length then shows the cut. By its offset it would leave a hole and
        // the right length.
        if let Err(error) = self.file.write_all_at(text, self.length) {
            self.is_torn = true;
            self.cut_back()?;
            return Err(error);
        }
        self.written = self.length + text.len() as u64;
        Ok(())
    }

    /// Reads a range of the committed bytes.
    pub(super) fn read(&self, range: Range<u64>) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap_or_default()];
        self.file.read_exact_at(&mut bytes, range.start)?;
        Ok(bytes)
    }

    /// Removes what is not committed. A file that was cut shorter does not become longer again.
    pub(super) fn cut_back(&mut self) -> io::Result<()> {
        if self.is_at_least(self.length + 1) {
            self.file.set_len(self.length)?;
        }
        (self.is_torn, self.written) = (false, self.length);
        Ok(())
    }

    fn is_at_least(&self, length: u64) -> bool {
        self.file.metadata().is_ok_and(|found| found.len() >= length)
    }

    /// Whether its name leads to this file, and the file has exactly the length that was written. One system call.
    pub(super) fn is_in_place(&self) -> bool {
        let found = fs::symlink_metadata(&self.path);
        found.is_ok_and(|found| FileIdentity::of(&found) == self.identity && found.len() == self.written)
    }

    /// Marks what was written as committed.
    pub(super) fn commit(&mut self) {
        self.length = self.written;
    }

    /// The reason why it is not in its place, for the log and the trail.
    pub(super) fn mishap(&self, directory: &Directory) -> io::Result<&'static str> {
        Ok(match directory.find(&self.name())? {
            None => "the open segment was moved or deleted",
            Some(found) if found.identity != self.identity => "the open segment was replaced by another file",
            Some(found) if found.length < self.written => "the open segment was cut shorter",
            Some(_) => "another process wrote to the open segment",
        })
    }

    /// Whether the open file still has all committed records: `last`, the link of the last one, is at their end.
    pub(super) fn is_whole(&self, last: &Link) -> io::Result<bool> {
        let mut end = vec![0; Link::END.min(usize::try_from(self.length).unwrap_or(usize::MAX))];
        let begin = self.length - end.len() as u64;
        // A few bytes are enough: a cut has removed the last hash. Changes before it are for `audit verify` to find.
        match self.file.read_exact_at(&mut end, begin) {
            Ok(()) => Ok(end.is_empty() || last.ends(&end)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Removes `text`, an uncommitted write, from the end of a file that was cut before that write.
    pub(super) fn take_back(&self, text: &[u8]) -> io::Result<()> {
        let Some(begin) = self.file.metadata()?.len().checked_sub(text.len() as u64) else { return Ok(()) };
        if text.is_empty() {
            return Ok(());
        }
        let mut end = vec![0; text.len()];
        self.file.read_exact_at(&mut end, begin)?;
        // Another process may have written after it. Its bytes stay.
        if end == text { self.file.set_len(begin) } else { Ok(()) }
    }

    /// Copies the committed records to a new file of the same name, and returns it. A file that has that name now is
    /// kept under another one, which is returned, too. With `syncs`, the copy is durable before it gets the name, and
    /// so is the name when this returns.
    pub(super) fn copy_back(
        &self,
        directory: &Directory,
        mut syncs: Option<&mut Syncs>,
    ) -> io::Result<(Self, Option<String>)> {
        directory.remove(UNFINISHED)?;
        let copy = directory.create(UNFINISHED)?;
        self.copy_to(&copy).inspect_err(|_| {
            // The unfinished copy may have taken the last of the space, which outcomes need.
            let _ = directory.remove(UNFINISHED);
        })?;
        if let Some(syncs) = syncs.as_deref_mut() {
            syncs.sync(&copy)?;
        }
        let aside = directory.replace(UNFINISHED, &self.name())?;
        if syncs.is_some() {
            directory.sync()?;
        }
        Ok((Self::new(directory, self.first, copy, self.length)?, aside))
    }

    fn copy_to(&self, copy: &File) -> io::Result<()> {
        // On a full disk this fails at once. Without it each retry would fill the disk and then fail.
        if self.length > 0 {
            allocate(copy, 0, self.length)?;
        }
        let mut bytes = vec![0; BLOCK];
        let mut offset = 0;
        while offset < self.length {
            let part = usize::try_from(self.length - offset).map_or(BLOCK, |left| left.min(BLOCK));
            self.file.read_exact_at(&mut bytes[..part], offset)?;
            copy.write_all_at(&bytes[..part], offset)?;
            offset += part as u64;
        }
        Ok(())
    }
}

/// Checks that there is space for a new file of `bytes` bytes, by reserving it in a temporary file that is removed
/// again.
// The free space of the file system is not enough to know: a quota may be lower, and the limit on file sizes, too.
pub(super) fn has_space_for(directory: &Directory, bytes: u64) -> io::Result<()> {
    within_limit(bytes)?;
    directory.remove(UNFINISHED)?;
    let probe = directory.create(UNFINISHED)?;
    let reserved = allocate(&probe, 0, bytes);
    directory.remove(UNFINISHED)?;
    reserved.map(drop)
}

/// Returns the limit on the size of files. Fails with `EFBIG` if a file of `bytes` bytes would be beyond it.
// The kernel reserves space beyond the limit (`FALLOC_FL_KEEP_SIZE` does not make the file longer) and then refuses
// to write there.
fn within_limit(bytes: u64) -> io::Result<u64> {
    let limit = limit::of_files();
    if bytes > limit { Err(Errno::FBIG.into()) } else { Ok(limit) }
}

/// Reserves space for a range of a file without making it longer. Returns false if the file system cannot reserve.
fn allocate(file: &File, from: u64, bytes: u64) -> io::Result<bool> {
    match fallocate(file, FallocateFlags::KEEP_SIZE, from, bytes) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
