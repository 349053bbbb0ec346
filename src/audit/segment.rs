//! The open segment: appends, and is sure of nothing that is not to be found by its name.
//!
//! Records are written at the end of the file (`O_APPEND`), so that of a file that was cut shorter the length tells it
//! after the next write, too. One look at the name after each write tells the rest: it must lead to this very file.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::{fs, io};

use rustix::fs::{FallocateFlags, OFlags, fallocate, fcntl_setfl};
use rustix::io::Errno;

use super::chain::{Link, segment_name};
use super::directory::{Directory, Identity};
use super::limit;
use super::sync::{Syncs, UNFINISHED};

/// So much space is reserved at once, in bytes: a reservation is a system call of its own.
pub(super) const AHEAD: u64 = 1 << 20;

/// So much of a segment is copied at once, in bytes.
const BLOCK: usize = 1 << 20;

/// A file of records.
pub(super) struct Segment {
    pub(super) file: File,
    /// The number of its first record, which is in its name.
    pub(super) first: u64,
    path: PathBuf,
    identity: Identity,
    /// Up to where its records are committed.
    pub(super) length: u64,
    /// Up to where it is written.
    written: u64,
    /// A write failed, so that there may be a part of it.
    is_torn: bool,
    /// Up to where it has space on the disk.
    allocated: u64,
}

impl Segment {
    /// A file of a directory that is good up to here.
    pub(super) fn new(directory: &Directory, first: u64, file: File, length: u64) -> io::Result<Self> {
        fcntl_setfl(&file, OFlags::APPEND)?;
        Ok(Self {
            identity: Identity::of(&file.metadata()?),
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

    pub(super) fn identity(&self) -> Identity {
        self.identity
    }

    /// Makes sure that so many bytes more fit. A file system that reserves nothing has room until it has none.
    pub(super) fn reserve(&mut self, bytes: u64) -> io::Result<()> {
        let needed = self.length + bytes;
        if needed <= self.allocated {
            return Ok(());
        }
        let limit = within_limit(needed)?;
        let end = limit.min(needed + AHEAD);
        let is_reserved = allocate(&self.file, self.length, end - self.length)?;
        self.allocated = if is_reserved { end } else { limit };
        Ok(())
    }

    /// Gives back what was reserved and not needed.
    pub(super) fn release(&self) {
        if self.is_at_least(self.length) {
            let _ = self.file.set_len(self.length);
        }
    }

    /// Writes behind what is committed; on failure nothing new is left there. What an earlier try has written stays.
    pub(super) fn append(&mut self, text: &[u8]) -> io::Result<()> {
        if self.written > self.length {
            return Ok(());
        }
        if self.is_torn {
            self.cut_back()?;
        }
        if let Err(error) = self.file.write_all_at(text, self.length) {
            self.is_torn = true;
            self.cut_back()?;
            return Err(error);
        }
        self.written = self.length + text.len() as u64;
        Ok(())
    }

    /// Reads a part of what is committed.
    pub(super) fn read(&self, range: Range<u64>) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap_or_default()];
        self.file.read_exact_at(&mut bytes, range.start)?;
        Ok(bytes)
    }

    /// Takes off what is not committed. A file that was cut shorter does not become longer again.
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

    /// Whether its name leads to it, and it has just what was written. One system call.
    pub(super) fn is_in_place(&self) -> bool {
        let found = fs::symlink_metadata(&self.path);
        found.is_ok_and(|found| Identity::of(&found) == self.identity && found.len() == self.written)
    }

    /// What was written is committed.
    pub(super) fn commit(&mut self) {
        self.length = self.written;
    }

    /// Why it is not in its place.
    pub(super) fn mishap(&self, directory: &Directory) -> io::Result<&'static str> {
        Ok(match directory.find(&self.name())? {
            None => "the open segment was moved or deleted",
            Some(found) if found.identity != self.identity => {
                "another file took the place of the open segment"
            }
            Some(found) if found.length < self.written => "the open segment was cut shorter",
            Some(_) => "somebody else wrote to the open segment",
        })
    }

    /// Whether all that is committed is in the open file: it ends with the last record.
    pub(super) fn is_whole(&self, last: &Link) -> io::Result<bool> {
        let mut end = vec![0; Link::END.min(usize::try_from(self.length).unwrap_or(usize::MAX))];
        let begin = self.length - end.len() as u64;
        match self.file.read_exact_at(&mut end, begin) {
            Ok(()) => Ok(end.is_empty() || last.ends(&end)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Takes the text of an uncommitted write off a file that was cut before it.
    pub(super) fn take_back(&self, text: &[u8]) -> io::Result<()> {
        let Some(begin) = self.file.metadata()?.len().checked_sub(text.len() as u64) else { return Ok(()) };
        if text.is_empty() {
            return Ok(());
        }
        let mut end = vec![0; text.len()];
        self.file.read_exact_at(&mut end, begin)?;
        if end == text { self.file.set_len(begin) } else { Ok(()) }
    }

    /// Copies what is committed to a new file of the same name. What stands at the name is kept under another one,
    /// which is returned. With `syncs` the copy is on the disk before it gets the name, and the name is afterwards.
    pub(super) fn copy_back(
        &self,
        directory: &Directory,
        mut syncs: Option<&mut Syncs>,
    ) -> io::Result<(Self, Option<String>)> {
        directory.remove(UNFINISHED)?;
        let copy = directory.create(UNFINISHED)?;
        self.copy_to(&copy).inspect_err(|_| {
            let _ = directory.remove(UNFINISHED); // it may have taken the last of the space
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
        // On a full disk it fails at once, and not with each try anew when the disk is full again.
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

/// Looks whether there is space for a file of so many bytes. None is left.
pub(super) fn has_space_for(directory: &Directory, bytes: u64) -> io::Result<()> {
    within_limit(bytes)?;
    directory.remove(UNFINISHED)?;
    let probe = directory.create(UNFINISHED)?;
    let reserved = allocate(&probe, 0, bytes);
    directory.remove(UNFINISHED)?;
    reserved.map(drop)
}

/// The limit on the size of files, which a file of so many bytes must keep: the kernel reserves space beyond it, and then refuses
/// to write there.
fn within_limit(bytes: u64) -> io::Result<u64> {
    let limit = limit::of_files();
    if bytes > limit { Err(Errno::FBIG.into()) } else { Ok(limit) }
}

/// Reserves space for bytes of a file, without making it longer. False if the file system reserves nothing.
fn allocate(file: &File, from: u64, bytes: u64) -> io::Result<bool> {
    match fallocate(file, FallocateFlags::KEEP_SIZE, from, bytes) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
