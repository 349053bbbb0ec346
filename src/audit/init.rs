//! Checks of the audit directory before a start, and `audit init`, which makes the directory and its key once.
//!
//! With `must_exist`, a start fails if the directory or the key is missing. Without it they are made. A gateway
//! that makes them hides that the real ones were lost: a volume that is not mounted, or a path that was
//! changed. It has then forgotten the keys of the idempotency window, and would send those calls again.
//!
//! Segments without their key are refused in both cases, unless the configuration names a key file: see
//! [`super::loss`].

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{fs, io};

use thiserror::Error;

use super::chain::{key_path, segments};
use super::directory::Directory;
use super::loss::word_without_key;
use super::start::{OpenError, lock, lock_file};
use super::sync::make_directory;

use crate::keyed_hash::Keys;
use crate::model::durability::Durability;

/// What a start lacks: files that must exist, and that only the gateway may change.
#[derive(Debug, Error)]
pub enum Absent {
    /// Every user can change the directory or the key: path and mode. Whoever can do that can make the gateway
    /// forget or forge calls.
    #[error("every user can change {0} (mode {1:04o}), so no record could be trusted: chmod o-w {0}")]
    Privacy(String, u32),
    /// The directory is missing and must exist: its path, and the arguments for `audit init`.
    #[error(
        "{0} is missing, and must_exist is set: mount or restore it; for a new trail, run `ccsqm-gateway audit init {1}` \
         once"
    )]
    Directory(PathBuf, String),
    /// The key is missing and must exist: its path, and the arguments for `audit init`.
    #[error(
        "{0} is missing, and must_exist is set: restore it; for a new trail, run `ccsqm-gateway audit init {1}` once"
    )]
    Key(PathBuf, String),
    /// Segments exist whose key is missing.
    #[error(
        "{key} is missing, and there are segments that were written with it: restore it. Without it no record can be \
         verified, and every Idempotency-Key of the window counts as new, so that tasks may be assigned twice. To accept \
         that: `ccsqm-gateway audit accept-loss {}`, or `serve --accept-loss={word}`",
        .key.parent().unwrap_or(.key).display()
    )]
    KeyOfSegments {
        /// The path of the missing key.
        key: PathBuf,
        /// The word for `serve --accept-loss`, which stands for this loss only.
        word: String,
    },
}

/// Checks whether a start would find the directory and the key that it needs. `key_file` is the key of the
/// configuration, `None` the one in the directory. Changes nothing.
///
/// What cannot be read for another reason passes: the start itself reports that with the exact error.
pub fn check(directory: &Path, key_file: Option<&Path>, must_exist: bool) -> Result<(), Absent> {
    let arguments = || match key_file {
        Some(key) => format!("{} --key-file {}", directory.display(), key.display()),
        None => directory.display().to_string(),
    };
    // `metadata` follows links: the directory may be a symbolic link, and one that leads nowhere is a missing
    // directory.
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
    // The key in the directory is checked without following a link: `Keys::load_own` refuses links, and reports
    // that.
    if key_file.is_some() || !is_absent(&fs::symlink_metadata(&key)) {
        return Ok(());
    }
    if let Some(segments) = segments(directory).ok().filter(|segments| !segments.is_empty()) {
        return Err(Absent::KeyOfSegments { key, word: word_without_key(&segments) });
    }
    if must_exist { Err(Absent::Key(key, arguments())) } else { Ok(()) }
}

/// Fails with [`Absent::Privacy`] if every user can change this. For a symbolic link `found` describes its
/// target.
// Only "others" count. Group permissions are often set by Kubernetes (`fsGroup`), so they are a note of `check`
// and not a refusal.
pub(crate) fn refuse_open(path: &Path, found: &Metadata) -> Result<(), Absent> {
    let is_open = crate::files::is_open_to_all(found);
    if is_open { Err(Absent::Privacy(path.display().to_string(), found.mode() & 0o7777)) } else { Ok(()) }
}

fn is_absent(found: &io::Result<Metadata>) -> bool {
    found.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Makes a directory for a new trail, mode 0700, and its key, mode 0600. Both are on the disk afterwards.
/// Returns false and changes nothing if both exist. With `key_file` no key is made.
///
/// Fails for a directory that holds segments without their key, for a key that cannot be used, and if another
/// process has locked the directory.
pub fn init(directory: &Path, key_file: Option<&Path>) -> Result<bool, OpenError> {
    check(directory, key_file, false)?;
    let is_there = check(directory, key_file, true).is_ok();
    // A key that exists must be usable before anything is made: otherwise the command would report success for
    // a trail that no start can open.
    if let Some(key) = key_file {
        Keys::load(key).map_err(OpenError::KeyFile)?;
    } else if is_there {
        Keys::load_own(directory)?;
    }
    if is_there {
        return Ok(false);
    }
    let fail = |error| OpenError::Directory(directory.into(), error);
    make_directory(directory, Durability::Disk).map_err(fail)?;
    let directory = Directory::open(directory).map_err(fail)?;
    lock(&directory)?;
    if key_file.is_none() {
        Keys::load_or_make(&directory)?;
    }
    lock_file(directory)?.directory.sync().map_err(fail)?;
    Ok(true)
}
