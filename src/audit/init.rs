//! The directory before there is a trail in it: what a start must find, and `audit init`, which makes it once.
//!
//! A directory that is made when it is missing hides that one was lost: a volume that is not mounted, a path that was
//! changed. Keys of the window are forgotten then, and sent again. With `must_exist` such a start is refused.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{fs, io};

use thiserror::Error;

use super::chain::{key_path, segments};
use super::directory::Directory;
use super::loss::word_without_key;
use super::start::{StartError, lock, lock_file};
use super::sync::make_directory;

use crate::keyed_hash::Keys;
use crate::model::durability::Durability;

/// What a start lacks: what must be there, and be the gateway's alone to change.
#[derive(Debug, Error)]
pub enum Absent {
    /// A directory, or a key, that others cannot change: whoever can, can make the gateway forget or forge calls.
    #[error("every user can change {0} (mode {1:04o}), so that no record could be believed: chmod o-w {0}")]
    Privacy(String, u32),
    /// The directory, which must exist.
    #[error(
        "{0} is missing, and must_exist is set: mount or restore it; for a new trail, `ccsqm-gateway audit init {1}` makes it once"
    )]
    Directory(PathBuf, String),
    /// The key, which must exist.
    #[error(
        "{0} is missing, and must_exist is set: restore it; for a new trail, `ccsqm-gateway audit init {1}` makes it once"
    )]
    Key(PathBuf, String),
    /// The key of segments that are there.
    #[error(
        "{key} is missing, and there are segments that were written with it: restore it. Without it no record can be \
         verified, and every Idempotency-Key of the window counts as new, so that tasks may be assigned twice. To accept \
         that: `ccsqm-gateway audit accept-loss {}`, or `serve --accept-loss={word}`",
        .key.parent().unwrap_or(.key).display()
    )]
    KeyOfSegments {
        /// Where it should be.
        key: PathBuf,
        /// What `serve --accept-loss` must say.
        word: String,
    },
}

/// Looks whether a start would find what it needs. `key_file` is the key of the configuration, `None` the one in the
/// directory. Makes nothing. What cannot be looked at is told by who uses it.
pub fn check(directory: &Path, key_file: Option<&Path>, must_exist: bool) -> Result<(), Absent> {
    let arguments = || match key_file {
        Some(key) => format!("{} --key-file {}", directory.display(), key.display()),
        None => directory.display().to_string(),
    };
    // It may be a symbolic link, even one that leads nowhere.
    let found = fs::metadata(directory);
    if let Ok(found) = &found {
        refuse_open(directory, found)?;
    }
    if is_absent(&found) {
        return if must_exist { Err(Absent::Directory(directory.into(), arguments())) } else { Ok(()) };
    }
    let key = key_path(directory);
    let key_in_use = fs::metadata(key_file.unwrap_or(&key));
    if let Ok(found) = &key_in_use {
        refuse_open(key_file.unwrap_or(&key), found)?;
    }
    if key_file.is_some() || !is_absent(&fs::symlink_metadata(&key)) {
        return Ok(());
    }
    if let Some(segments) = segments(directory).ok().filter(|segments| !segments.is_empty()) {
        return Err(Absent::KeyOfSegments { key, word: word_without_key(&segments) });
    }
    if must_exist { Err(Absent::Key(key, arguments())) } else { Ok(()) }
}

/// Refuses what every user can change. For a symbolic link its target counts.
pub(crate) fn refuse_open(path: &Path, found: &Metadata) -> Result<(), Absent> {
    let is_open = crate::files::is_open_to_all(found);
    if is_open { Err(Absent::Privacy(path.display().to_string(), found.mode() & 0o7777)) } else { Ok(()) }
}

fn is_absent(found: &io::Result<Metadata>) -> bool {
    found.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Makes a directory for a new trail, mode 0700, and its key, mode 0600; both are on the disk then. Returns false, and
/// changes nothing, if both are there. With a key file of its own no key is made. A directory that holds segments
/// without their key is refused.
pub fn init(directory: &Path, key_file: Option<&Path>) -> Result<bool, StartError> {
    check(directory, key_file, false)?;
    let is_there = check(directory, key_file, true).is_ok();
    if let Some(key) = key_file {
        Keys::load(key).map_err(StartError::KeyFile)?;
    } else if is_there {
        Keys::load_own(directory)?;
    }
    if is_there {
        return Ok(false);
    }
    let fail = |error| StartError::Directory(directory.into(), error);
    make_directory(directory, Durability::Disk).map_err(fail)?;
    let directory = Directory::open(directory).map_err(fail)?;
    lock(&directory)?;
    if key_file.is_none() {
        Keys::load_or_make(&directory)?;
    }
    lock_file(directory)?.directory.sync().map_err(fail)?;
    Ok(true)
}
