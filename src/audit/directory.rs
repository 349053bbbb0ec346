//! The audit directory by its open handle, and the identity of its files.
//!
//! A name can lead to another file, or to none, while the file is open: somebody moved, deleted or replaced it. What
//! goes into such a file is lost to every reader. So each file is known by device and inode, too, and a name counts
//! only while it leads to that identity. No symbolic link in the directory is followed.

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

/// Which file it is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    pub(super) fn of(found: &Metadata) -> Self {
        Self { device: found.dev(), inode: found.ino() }
    }

    /// The inode alone, as a directory listing tells it.
    pub(super) fn inode(self) -> u64 {
        self.inode
    }
}

/// What a name in the directory leads to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) identity: Identity,
    /// In bytes.
    pub(super) length: u64,
}

/// An open directory.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    handle: File,
    /// Kept open, so that the limit on open files does not matter.
    listing: Dir,
    identity: Identity,
}

impl Directory {
    /// Opens a directory. Its own name may be a symbolic link.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY.bits().cast_signed();
        let handle = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let identity = Identity::of(&handle.metadata()?);
        let listing = Dir::read_from(&handle)?;
        Ok(Self { path: path.to_owned(), handle, listing, identity })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Locks the directory itself for this process, which no removal of a file in it undoes. False where the file
    /// system cannot lock directories.
    pub(super) fn try_lock(&self) -> Result<bool, TryLockError> {
        match self.handle.try_lock() {
            Err(TryLockError::Error(error)) if cannot_lock(&error) => Ok(false),
            locked => locked.map(|()| true),
        }
    }

    /// Fails unless the path still leads to this directory.
    pub(super) fn check(&self) -> io::Result<()> {
        let found = fs::metadata(&self.path)?;
        if Identity::of(&found) == self.identity { Ok(()) } else { Err(replaced()) }
    }

    /// Makes a file for reading and writing, only for this user. It is opened by its path, so that what forbids that
    /// is obeyed; but it must lie in this directory.
    pub(super) fn create(&self, name: &str) -> io::Result<File> {
        let path = self.path.join(name);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        if self.leads_to(name, Identity::of(&file.metadata()?))? {
            return Ok(file);
        }
        let _ = fs::remove_file(path);
        Err(replaced())
    }

    /// Opens a file that is there, for reading and writing.
    pub(super) fn open_file(&self, name: &str) -> io::Result<File> {
        let file = open_regular(&self.path.join(name), OpenOptions::new().read(true).write(true))?;
        if self.leads_to(name, Identity::of(&file.metadata()?))? { Ok(file) } else { Err(replaced()) }
    }

    /// What a name leads to; nothing if there is none.
    pub(super) fn find(&self, name: &str) -> io::Result<Option<Found>> {
        match statat(&self.handle, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => {
                let identity = Identity { device: stat.st_dev, inode: stat.st_ino };
                Ok(Some(Found { identity, length: u64::try_from(stat.st_size).unwrap_or(0) }))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether a name leads to this file.
    pub(super) fn leads_to(&self, name: &str, file: Identity) -> io::Result<bool> {
        Ok(self.find(name)?.is_some_and(|found| found.identity == file))
    }

    /// All names with their inodes.
    pub(super) fn names(&mut self) -> io::Result<HashMap<Vec<u8>, u64>> {
        self.listing.rewind();
        let entries = self.listing.by_ref();
        entries
            .map(|entry| entry.map(|entry| (entry.file_name().to_bytes().to_vec(), entry.ino())))
            .collect::<Result<_, _>>()
            .map_err(Into::into)
    }

    /// Gives a file another name, at which nothing may stand.
    pub(super) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        match renameat_with(&self.handle, from, &self.handle, to, RenameFlags::NOREPLACE) {
            // Not every file system knows how to replace nothing.
            Err(Errno::INVAL | Errno::NOSYS) if self.find(to)?.is_none() => {
                renameat(&self.handle, from, &self.handle, to)?;
            }
            Err(Errno::INVAL | Errno::NOSYS) => return Err(Errno::EXIST.into()),
            renamed => renamed?,
        }
        Ok(())
    }

    /// Removes a file, if it is there.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.handle, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR) => Err(folder_in_place(name)),
            Err(error) => Err(error.into()),
        }
    }

    /// Fails where [`Directory::remove`] would because a directory has the name.
    pub(super) fn check_removable(&self, name: &str) -> io::Result<()> {
        let found = fs::symlink_metadata(self.path.join(name));
        if found.is_ok_and(|found| found.is_dir()) { Err(folder_in_place(name)) } else { Ok(()) }
    }

    /// Removes a name, if it leads to this file.
    pub(super) fn remove_if(&self, name: &str, file: &File) -> io::Result<()> {
        let is_its = self.leads_to(name, Identity::of(&file.metadata()?))?;
        if is_its { self.remove(name) } else { Ok(()) }
    }

    /// Frees a name: whatever stands there is renamed, to what no reader takes for a segment. Returns its new name;
    /// nothing if nothing was there.
    pub(super) fn put_aside(&self, name: &str) -> io::Result<Option<String>> {
        if self.find(name)?.is_none() {
            return Ok(None);
        }
        let aside = aside(name);
        self.rename(name, &aside)?;
        Ok(Some(aside))
    }

    /// Renames a file to a name at which something may stand, which is put aside. The name never leads nowhere, where the
    /// file system can exchange names. Returns the new name of what stood there.
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

    /// Waits until the names are on the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.handle.sync_all()
    }

    /// Bytes that this process may still write.
    pub(super) fn free_space(&self) -> u64 {
        fstatvfs(&self.handle).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

/// Opens a regular file, neither through a symbolic link nor so that a pipe could hold the caller.
pub(super) fn open_regular(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
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

/// Fails if the file system of a folder has no space for so many small files, and so many bytes beside them. One that does not
/// tell its size, such as a tmpfs without a bound, has space.
pub(super) fn look_for_space(folder: &Path, files: u64, bytes: u64) -> io::Result<()> {
    let Ok(stat) = statvfs(folder) else { return Ok(()) };
    // ext4 keeps some back for root.
    let free = if geteuid().is_root() { stat.f_bfree } else { stat.f_bavail };
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

/// NFS and some others lock no directories.
fn cannot_lock(error: &io::Error) -> bool {
    let errors = [Errno::BADF, Errno::OPNOTSUPP, Errno::NOLCK, Errno::NOSYS, Errno::INVAL];
    errors.iter().any(|known| error.raw_os_error() == Some(known.raw_os_error()))
}

fn replaced() -> io::Error {
    io::Error::other("the directory was moved or replaced")
}
