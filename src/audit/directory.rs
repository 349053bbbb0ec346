//! The audit directory, used through its open handle, and the identity of the files in it.
//!
//! While a file is open, its name can come to lead to another file or to none: somebody moved, deleted or
//! replaced it. No reader finds what is written to such a file. So each file is known by device and inode, too,
//! and a name counts only while it leads to that identity. No symbolic link inside the directory is followed.
//!
//! This module finds out about replaced files. [`super::writer`] decides what to do about them.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::{fs, io};

use rustix::fs::{
    AtFlags, Dir, OFlags, RenameFlags, fstatvfs, renameat, renameat_with, statat, statvfs, unlinkat,
};
use rustix::io::Errno;
use rustix::process::geteuid;

use crate::clock;

/// The identity of a file, independent of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileIdentity {
    device: u64,
    inode: u64,
}

impl FileIdentity {
    /// The identity of the file that this metadata describes.
    pub(super) fn of(found: &Metadata) -> Self {
        Self { device: found.dev(), inode: found.ino() }
    }

    /// The inode number alone, which is all that a directory listing contains.
    pub(super) fn inode(self) -> u64 {
        self.inode
    }
}

/// A file that a name in the directory leads to.
#[derive(Clone, Copy, Debug)]
pub(super) struct FoundFile {
    /// Which file it is.
    pub(super) identity: FileIdentity,
    /// Its length in bytes.
    pub(super) length: u64,
}

/// An open directory.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    handle: File,
    /// Kept open for the checks of each second: opening it again would fail while the process is at its limit
    /// on open files.
    listing: Dir,
    identity: FileIdentity,
}

impl Directory {
    /// Opens a directory. The path itself may be a symbolic link. Fails if it leads to anything but a
    /// directory.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY.bits().cast_signed();
        let handle = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let identity = FileIdentity::of(&handle.metadata()?);
        let listing = Dir::read_from(&handle)?;
        Ok(Self { path: path.to_owned(), handle, listing, identity })
    }

    /// The path by which the directory was opened.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Locks the directory for this process; returns false if the file system cannot lock directories.
    // The lock is on the directory and not on a file in it: when somebody removed the lock file, a second
    // gateway could lock a new one and write the same segment.
    pub(super) fn try_lock(&self) -> Result<bool, TryLockError> {
        match self.handle.try_lock() {
            Err(TryLockError::Error(error)) if cannot_lock(&error) => Ok(false),
            locked => locked.map(|()| true),
        }
    }

    /// Fails unless the path still leads to this directory.
    // Records that go to a directory that was moved away are not found by the next start.
    pub(super) fn check(&self) -> io::Result<()> {
        let found = fs::metadata(&self.path)?;
        if FileIdentity::of(&found) == self.identity { Ok(()) } else { Err(replaced()) }
    }

    /// Makes a new file of mode 0600, opened for reading and writing. Fails if the name is taken, or if the
    /// path no longer leads to this directory.
    // The file is opened by its path and not relative to the handle, so that permissions and mounts on the way
    // apply. Afterwards the name is checked through the handle: the path may lead to another directory by now.
    pub(super) fn create(&self, name: &str) -> io::Result<File> {
        let path = self.path.join(name);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        if self.leads_to(name, FileIdentity::of(&file.metadata()?))? {
            return Ok(file);
        }
        let _ = fs::remove_file(path);
        Err(replaced())
    }

    /// Opens an existing regular file for reading and writing. Fails if the path no longer leads to this
    /// directory.
    pub(super) fn open_file(&self, name: &str) -> io::Result<File> {
        let file = open_regular(&self.path.join(name), OpenOptions::new().read(true).write(true))?;
        if self.leads_to(name, FileIdentity::of(&file.metadata()?))? { Ok(file) } else { Err(replaced()) }
    }

    /// Returns the file that a name leads to; `None` if there is none. A symbolic link is found as itself.
    pub(super) fn find(&self, name: &str) -> io::Result<Option<FoundFile>> {
        match statat(&self.handle, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => {
                let identity = FileIdentity { device: stat.st_dev, inode: stat.st_ino };
                Ok(Some(FoundFile { identity, length: u64::try_from(stat.st_size).unwrap_or(0) }))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether a name leads to this file.
    pub(super) fn leads_to(&self, name: &str, file: FileIdentity) -> io::Result<bool> {
        Ok(self.find(name)?.is_some_and(|found| found.identity == file))
    }

    /// Returns all names of the directory with their inode numbers.
    // One listing a second for all closed segments is cheaper than a `stat` of each: there may be hundreds.
    pub(super) fn names(&mut self) -> io::Result<HashMap<Vec<u8>, u64>> {
        self.listing.rewind();
        let entries = self.listing.by_ref();
        entries
            .map(|entry| entry.map(|entry| (entry.file_name().to_bytes().to_vec(), entry.ino())))
            .collect::<Result<_, _>>()
            .map_err(Into::into)
    }

    /// Renames a file. Fails with `AlreadyExists` if something has the new name.
    pub(super) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        match renameat_with(&self.handle, from, &self.handle, to, RenameFlags::NOREPLACE) {
            // Not every file system supports `RENAME_NOREPLACE`. The check before a plain rename leaves a short
            // race, which is accepted there.
            Err(Errno::INVAL | Errno::NOSYS) if self.find(to)?.is_none() => {
                renameat(&self.handle, from, &self.handle, to)?;
            }
            Err(Errno::INVAL | Errno::NOSYS) => return Err(Errno::EXIST.into()),
            renamed => renamed?,
        }
        Ok(())
    }

    /// Removes a file; succeeds if there is none.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.handle, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR) => Err(folder_in_place(name)),
            Err(error) => Err(error.into()),
        }
    }

    /// Fails where [`Directory::remove`] would fail because a directory has the name. Changes nothing.
    pub(super) fn check_removable(&self, name: &str) -> io::Result<()> {
        let found = fs::symlink_metadata(self.path.join(name));
        if found.is_ok_and(|found| found.is_dir()) { Err(folder_in_place(name)) } else { Ok(()) }
    }

    /// Removes a name if it leads to this file, and succeeds without doing anything if it does not.
    pub(super) fn remove_if(&self, name: &str, file: &File) -> io::Result<()> {
        let is_its = self.leads_to(name, FileIdentity::of(&file.metadata()?))?;
        if is_its { self.remove(name) } else { Ok(()) }
    }

    /// Frees a name: what has it is renamed to a name that no reader takes for a segment. Returns the new name,
    /// or `None` if nothing had the name.
    // A foreign file is kept and not deleted: it may be the only copy of somebody's data.
    pub(super) fn put_aside(&self, name: &str) -> io::Result<Option<String>> {
        if self.find(name)?.is_none() {
            return Ok(None);
        }
        let aside = aside(name);
        self.rename(name, &aside)?;
        Ok(Some(aside))
    }

    /// Renames a file to a name that may be taken; what had that name is put aside. Returns the new name of
    /// what was put aside.
    // By exchange, where the file system can do that: the name of the segment then leads to a file at every
    // moment, so no reader misses it.
    pub(super) fn replace(&self, from: &str, to: &str) -> io::Result<Option<String>> {
        if self.find(to)?.is_none() {
            return self.rename(from, to).map(|()| None);
        }
        match renameat_with(&self.handle, from, &self.handle, to, RenameFlags::EXCHANGE) {
            Ok(()) => {
                let aside = aside(to);
                self.rename(from, &aside)?;
                Ok(Some(aside))
            }
            Err(Errno::INVAL | Errno::NOSYS) => {
                let aside = self.put_aside(to)?;
                self.rename(from, to)?;
                Ok(aside)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the names in the directory are on the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.handle.sync_all()
    }

    /// Returns the free space of the file system for unprivileged processes, in bytes; 0 if it is not known.
    pub(super) fn free_space(&self) -> u64 {
        fstatvfs(&self.handle).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

/// Opens a regular file. Fails for a symbolic link, and for a pipe or a device without blocking.
pub(super) fn open_regular(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    // `O_NONBLOCK`: opening a pipe that nobody writes to would block the caller forever. It has no effect on
    // regular files.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    match options.custom_flags(flags).open(path) {
        Ok(file) if file.metadata()?.is_file() => Ok(file),
        Err(error) if error.raw_os_error() != Some(Errno::LOOP.raw_os_error()) => Err(error),
        _ => {
            let name = path.file_name().unwrap_or(OsStr::new("it"));
            let name = String::from_utf8_lossy(name.as_bytes());
            Err(io::Error::other(format!("{name} is no regular file")))
        }
    }
}

/// Fails with `ENOSPC` if the file system of a folder has no space for `files` small files and `bytes` more. A
/// file system that does not report its size, such as a tmpfs without a bound, has space.
pub(super) fn look_for_space(folder: &Path, files: u64, bytes: u64) -> io::Result<()> {
    let Ok(stat) = statvfs(folder) else { return Ok(()) };
    // `f_bavail` lacks the blocks that ext4 reserves for root. Root may use them, so a start as root succeeds
    // there.
    let free = if geteuid().is_root() { stat.f_bfree } else { stat.f_bavail };
    // Each small file takes at least one block.
    let has_space = free.checked_sub(files).is_some_and(|free| free.saturating_mul(stat.f_frsize) >= bytes);
    if has_space || stat.f_blocks == 0 { Ok(()) } else { Err(Errno::NOSPC.into()) }
}

fn folder_in_place(name: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::IsADirectory,
        format!("a directory is in the place of the file {name}: remove it"),
    )
}

fn aside(name: &str) -> String {
    format!("{name}.foreign-{}", clock::unix_nanos())
}

/// Whether this error means that the file system does not support locks on directories, as NFS and some others.
fn cannot_lock(error: &io::Error) -> bool {
    let errors = [Errno::BADF, Errno::OPNOTSUPP, Errno::NOLCK, Errno::NOSYS, Errno::INVAL];
    errors.iter().any(|known| error.raw_os_error() == Some(known.raw_os_error()))
}

fn replaced() -> io::Error {
    io::Error::other("the directory was moved or replaced")
}
