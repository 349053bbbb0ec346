//! Durability `disk`: what it takes until a record outlives the machine, and what is believed of a disk.
//!
//! A record is on the disk once fdatasync has returned after its write, and the directory's fsync after its
//! segment got a name. A failed fdatasync says nothing about what was written before: the kernel may have
//! dropped those pages, believes them clean, and reports the error only once. So the next good fdatasync of the
//! same file proves nothing; only what is written again does.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::directory::{Directory, open_regular};

use crate::model::durability::Durability;

/// The name of a segment until it is whole and on the disk.
pub(super) const UNFINISHED: &str = "segment.new";

/// Counts of fdatasync since they were last taken.
#[derive(Debug, Default)]
pub(super) struct Syncs {
    pub(super) good: u64,
    pub(super) failed: u64,
    pub(super) took: Duration,
}

impl Syncs {
    /// Waits until a file's bytes are on the disk.
    pub(super) fn sync(&mut self, file: &File) -> io::Result<()> {
        let begun = Instant::now();
        let synced = file.sync_data();
        self.took += begun.elapsed();
        match synced {
            Ok(()) => self.good += 1,
            Err(_) => self.failed += 1,
        }
        synced
    }

    /// Makes a segment that has its name only when its first batch is on the disk; when this returns, the name
    /// is, too. So neither a crash nor a fault leaves a segment of that name with less.
    pub(super) fn begin(&mut self, directory: &Directory, name: &str, text: &[u8]) -> io::Result<File> {
        directory.remove(UNFINISHED)?;
        let file = directory.create(UNFINISHED)?;
        let named = self.named(directory, name, &file, text);
        if named.is_err() {
            // The next try is a new file: nothing of this one is proven.
            let _ = directory.remove(UNFINISHED);
            let _ = directory.remove_if(name, &file);
        }
        named.map(|()| file)
    }

    fn named(&mut self, directory: &Directory, name: &str, file: &File, text: &[u8]) -> io::Result<()> {
        file.write_all_at(text, 0)?;
        self.sync(file)?;
        directory.rename(UNFINISHED, name)?;
        directory.sync()
    }
}

/// Waits until the names in a directory are on the disk.
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Waits until files are on the disk that may have been written with durability `kernel`.
pub(super) fn sync_all(paths: &[PathBuf]) -> io::Result<()> {
    paths.iter().try_for_each(|path| open_regular(path, OpenOptions::new().read(true))?.sync_data())
}

/// Makes a directory, only for this user; with `disk` its name is on the disk afterwards.
pub(super) fn make_directory(path: &Path, durability: Durability) -> io::Result<()> {
    let known = path.ancestors().find(|folder| folder.exists()).map(Path::to_owned);
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    let is_new = known.as_deref() != Some(path);
    if durability == Durability::Disk && is_new {
        for made in path.ancestors().take_while(|folder| Some(*folder) != known.as_deref()) {
            sync_directory(folder(made))?;
        }
    }
    Ok(())
}

/// Writes a file's first bytes once more in their place, and waits until they are on the disk. Whoever wrote
/// them may have been killed after a failed fdatasync: then the kernel believes pages clean that the disk does
/// not have.
pub(super) fn write_again(file: &File, length: u64) -> io::Result<()> {
    let mut bytes = vec![0; 1 << 20];
    let mut offset = 0;
    while offset < length {
        let part = usize::try_from(length - offset).map_or(bytes.len(), |left| left.min(bytes.len()));
        file.read_exact_at(&mut bytes[..part], offset)?;
        file.write_all_at(&bytes[..part], offset)?;
        offset += part as u64;
    }
    file.sync_data()
}

/// The directory of a file.
fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
