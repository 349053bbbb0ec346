//! The lock file: keeps gateways of older versions out, and states what a start must find.
//!
//! The lock that counts is on the directory itself. This file is locked, too, since older versions know no other
//! lock, and some file systems cannot lock directories.
//!
//! Its text, one line of JSON, names the newest segment and a committed record: of a running gateway one that is
//! about a second old, of a stopped one the last. The chain cannot show that records are missing at its end. A trail
//! that lacks what the lock file names was cut, moved or replaced.
//!
//! The file is written in its place, at a fixed length and by one write, so that its inode stays and a reader never
//! finds half of a longer text. An older version leaves it empty; it then states nothing.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::chain::{MAX_SEQ, first_seq, segment_name};
use super::directory::{Directory, FileIdentity, open_regular};
use super::retention::ChainPosition;

use crate::keyed_hash::{hex, parse_hex};

/// The name of the lock file.
pub(super) const NAME: &str = "lock";

/// The name of a new lock file until it is complete.
pub(super) const UNFINISHED: &str = "lock.new";

/// The length of the file in bytes. The text is padded with blanks.
const LENGTH: usize = 256;

/// The text of a lock file that was created although segments existed.
const WAS_MISSING: &str = r#"{"missing":true}"#;

/// What a lock file states.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Statement {
    /// There is no lock file, or there was none beside the segments when this one was created.
    Missing,
    /// It is empty: an older version created it, or nothing was recorded yet.
    Nothing,
    /// Its text is damaged.
    Unreadable,
    /// What the trail had when it was written.
    Of(ClosingStatement),
}

/// What a trail must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ClosingStatement {
    /// The number of the newest segment's first record.
    pub(super) newest: u64,
    /// A committed record, in that segment or the last one before it.
    pub(super) last: ChainPosition,
    /// Whether the gateway was stopped in order, so that no record follows.
    pub(super) is_stopped: bool,
}

/// The form in the file.
#[derive(Serialize, Deserialize)]
struct Text {
    newest: String,
    seq: u64,
    hash: String,
    stopped: bool,
}

/// The open and locked file.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    identity: FileIdentity,
    /// What it states, if this process wrote that.
    stated: Option<ClosingStatement>,
    /// The newest segment that this process tried to state.
    // Set even if the write fails. Otherwise each batch would try again. The check once a second does so.
    newest: Option<u64>,
}

impl Lock {
    /// Opens and locks the lock file; `None` if there is none. Fails if another process has locked it.
    pub(super) fn open(directory: &Directory) -> Result<Option<Self>, TryLockError> {
        match directory.open_file(NAME) {
            Ok(file) => Self::locked(file).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(TryLockError::Error(error)),
        }
    }

    /// Creates and locks the lock file. With `has_segments` it says that it was missing, until something else is
    /// stated.
    // A crash before the next statement must not hide that the lock file was gone: newer segments may have gone with
    // it.
    pub(super) fn make(directory: &Directory, has_segments: bool) -> Result<Self, TryLockError> {
        let file = (|| {
            directory.remove(UNFINISHED)?;
            let file = directory.create(UNFINISHED)?;
            if has_segments {
                file.write_all_at(&padded(WAS_MISSING), 0)?;
            }
            Ok(file)
        })();
        // Locked before it gets its name, so that no other process can open an unlocked one.
        let lock = Self::locked(file.map_err(TryLockError::Error)?)?;
        directory.rename(UNFINISHED, NAME).map_err(TryLockError::Error)?;
        Ok(lock)
    }

    fn locked(file: File) -> Result<Self, TryLockError> {
        file.try_lock()?;
        let identity = FileIdentity::of(&file.metadata().map_err(TryLockError::Error)?);
        Ok(Self { file, identity, stated: None, newest: None })
    }

    pub(super) fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// The newest segment that this process tried to state.
    pub(super) fn newest(&self) -> Option<u64> {
        self.newest
    }

    /// Reads what it states.
    pub(super) fn read(&self) -> io::Result<Statement> {
        Ok(parse(&read_text(&self.file)?))
    }

    /// Writes what the trail has now, unless it says so already. With `is_durable` it is durable when this returns.
    pub(super) fn state(&mut self, stated: &ClosingStatement, is_durable: bool) -> io::Result<()> {
        if self.stated.as_ref() == Some(stated) {
            return Ok(());
        }
        // What a failed write leaves in the file is not known.
        (self.stated, self.newest) = (None, Some(stated.newest));
        let text = Text {
            newest: segment_name(stated.newest),
            seq: stated.last.seq,
            hash: hex(&stated.last.hash),
            stopped: stated.is_stopped,
        };
        self.file.write_all_at(&padded(&serde_json::to_string(&text)?), 0)?;
        if is_durable {
            self.file.sync_all()?;
        }
        self.stated = Some(stated.clone());
        Ok(())
    }
}

/// Reads what the lock file of a directory states, without a lock. A gateway may be writing it.
pub(super) fn read(directory: &Path) -> io::Result<Statement> {
    let file = match open_regular(&directory.join(NAME), OpenOptions::new().read(true)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Statement::Missing),
        opened => opened?,
    };
    // A read during a write may return parts of two statements. Two equal reads in a row are one statement.
    let (mut bytes, mut again) = (Vec::new(), read_text(&file)?);
    while bytes != again {
        bytes = std::mem::replace(&mut again, read_text(&file)?);
    }
    Ok(parse(&bytes))
}

/// Reads the text; a file that is too long is cut one byte beyond the length, which makes it unreadable.
fn read_text(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; LENGTH + 1];
    let mut length = 0;
    while length < bytes.len() {
        match file.read_at(&mut bytes[length..], length as u64)? {
            0 => break,
            read => length += read,
        }
    }
    bytes.truncate(length);
    Ok(bytes)
}

fn parse(bytes: &[u8]) -> Statement {
    if bytes.is_empty() {
        return Statement::Nothing;
    }
    if bytes == padded(WAS_MISSING) {
        return Statement::Missing;
    }
    stated(bytes).map_or(Statement::Unreadable, Statement::Of)
}

fn stated(bytes: &[u8]) -> Option<ClosingStatement> {
    if bytes.len() != LENGTH {
        return None;
    }
    let Text { newest, seq, hash, stopped } = serde_json::from_slice(bytes).ok()?;
    let first = first_seq(Path::new(&newest));
    // The name must be exactly as the gateway writes it, and no number may overflow: anybody who can write the
    // directory can write this text.
    let is_sound = newest == segment_name(first) && (1..MAX_SEQ).contains(&first) && seq < MAX_SEQ;
    let last = ChainPosition { seq, hash: parse_hex(&hash)? };
    is_sound.then_some(ClosingStatement { newest: first, last, is_stopped: stopped })
}

fn padded(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(LENGTH - 1, b' ');
    bytes.push(b'\n');
    bytes
}
