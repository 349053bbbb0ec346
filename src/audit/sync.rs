//! Durability `disk`: what it takes until a record is durable, and what is trusted of a disk.
//!
//! A record is durable once fdatasync has returned after its write, and, if its segment is new, once fsync of the
//! directory has returned after the segment got its name.
//!
//! A failed fdatasync says nothing about what was written before: the kernel may have dropped those pages, takes them
//! for clean, and reports the error only once. The next successful fdatasync of the same file therefore proves
//! nothing; only writing the bytes again does. A disk that lies about its write cache is not detected.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::directory::{Directory, open_regular};

use crate::model::durability::Durability;

/// The name of a segment until it is complete and durable.
pub(super) const UNFINISHED: &str = "segment.new";

/// Counts of fdatasync since they were last taken, and the time spent in it.
#[derive(Debug, Default)]
pub(super) struct Syncs {
    pub(super) good: u64,
    pub(super) failed: u64,
    pub(super) took: Duration,
}

impl Syncs {
    /// Waits until a file's bytes are durable.
    // fdatasync, not fsync: it writes the new length, too, and spares the times of the file.
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

    /// Creates a segment and writes its first batch. The segment gets its name only after the batch is durable; when
    /// this returns, the name is durable, too. A crash or an error therefore leaves no segment of that name with less
    /// than the batch.
    pub(super) fn begin(&mut self, directory: &Directory, name: &str, text: &[u8]) -> io::Result<File> {
        directory.remove(UNFINISHED)?;
        let file = directory.create(UNFINISHED)?;
        let named = self.named(directory, name, &file, text);
        if named.is_err() {
            // The next try uses a new file: after a failed fdatasync nothing in this one is proven.
            let _ = directory.remove(UNFINISHED);
            let _ = directory.remove_if(name, &file);
        }
        named.map(|()| file)
    }

    /// Writes, syncs, renames and syncs the directory, in this order.
    // A name that is durable before the bytes would, after a crash, lead to a segment without its records.
    fn named(&mut self, directory: &Directory, name: &str, file: &File, text: &[u8]) -> io::Result<()> {
        file.write_all_at(text, 0)?;
        self.sync(file)?;
        directory.rename(UNFINISHED, name)?;
        directory.sync()
    }
}

/// Waits until the names in a directory are durable.
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Waits until these files are durable. They may have been written with durability `kernel`.
pub(super) fn flush_all(paths: &[PathBuf]) -> io::Result<()> {
    paths.iter().try_for_each(|path| open_regular(path, OpenOptions::new().read(true))?.sync_data())
}

/// Creates a directory and its missing parents, accessible only to this user. With durability `disk` their names are
/// durable when this returns.
pub(super) fn make_directory(path: &Path, durability: Durability) -> io::Result<()> {
    let known = path.ancestors().find(|folder| folder.exists()).map(Path::to_owned);
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    let is_new = known.as_deref() != Some(path);
    if durability == Durability::Disk && is_new {
        // Each new directory is a name in its parent, and each of these names must survive, or the whole trail is
        // gone after a crash.
        for made in path.ancestors().take_while(|folder| Some(*folder) != known.as_deref()) {
            sync_directory(folder(made))?;
        }
    }
    Ok(())
}

/// Writes the first `length` bytes of a file once more in their place, and waits until they are durable.
// The process that wrote them may have been killed after a failed fdatasync. The kernel then takes pages for clean
// that the disk does not have, and fdatasync alone would not write them.
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

/// The parent directory of a path; `.` for a bare name.
fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
