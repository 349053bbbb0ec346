//! The file `lock`: keeps gateways of older versions out, and says what a start must find.
//!
//! The lock that counts is on the directory itself. This file is locked, too, since older versions know no other. Its
//! text, one line of JSON, names the newest segment and a record that was committed: of a running gateway one that is
//! about a second old, of one that was stopped the last. A trail that lacks them was cut, moved or replaced. It is
//! written in its place, at one length and by one write, so that its inode stays. An older version leaves it empty:
//! then it says nothing.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::chain::{MAX_SEQ, first_seq, segment_name};
use super::directory::{Directory, Identity, open_regular};
use super::retention::Place;

use crate::keyed_hash::{hex, parse_hex};

/// Its name.
pub(super) const NAME: &str = "lock";

/// Its name until it is complete.
pub(super) const UNFINISHED: &str = "lock.new";

/// Its length, in bytes; the text is filled up with blanks.
const LENGTH: usize = 256;

/// The text of a file that was made for segments that had none.
const WAS_MISSING: &str = r#"{"missing":true}"#;

/// What a lock file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Statement {
    /// There is no file.
    Missing,
    /// It is empty: an older version made it, or nothing was recorded yet.
    Nothing,
    /// It was torn or changed.
    Unreadable,
    /// What the trail had when it was written.
    Of(Stated),
}

/// What a trail has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stated {
    /// The number in the name of the newest segment.
    pub(super) newest: u64,
    /// A record in it, or the one before it.
    pub(super) last: Place,
    /// The gateway was stopped in order, so that nothing was written since.
    pub(super) is_stopped: bool,
}

/// The text.
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
    identity: Identity,
    /// What it says, if this process wrote it.
    stated: Option<Stated>,
    /// The newest segment that this process tried to write into it.
    newest: Option<u64>,
}

impl Lock {
    /// Opens and locks the file that is there; nothing if there is none.
    pub(super) fn open(directory: &Directory) -> Result<Option<Self>, TryLockError> {
        match directory.open_file(NAME) {
            Ok(file) => Self::locked(file).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(TryLockError::Error(error)),
        }
    }

    /// Makes the file. If there are segments without one, it says so until the next statement: a crash in between must
    /// not hide that.
    pub(super) fn make(directory: &Directory, has_segments: bool) -> Result<Self, TryLockError> {
        let file = (|| {
            directory.remove(UNFINISHED)?;
            let file = directory.create(UNFINISHED)?;
            if has_segments {
                file.write_all_at(&padded(WAS_MISSING), 0)?;
            }
            Ok(file)
        })();
        let lock = Self::locked(file.map_err(TryLockError::Error)?)?;
        directory.rename(UNFINISHED, NAME).map_err(TryLockError::Error)?;
        Ok(lock)
    }

    fn locked(file: File) -> Result<Self, TryLockError> {
        file.try_lock()?;
        let identity = Identity::of(&file.metadata().map_err(TryLockError::Error)?);
        Ok(Self { file, identity, stated: None, newest: None })
    }

    pub(super) fn identity(&self) -> Identity {
        self.identity
    }

    /// The newest segment that it was told of.
    pub(super) fn newest(&self) -> Option<u64> {
        self.newest
    }

    /// What it says.
    pub(super) fn read(&self) -> io::Result<Statement> {
        Ok(parse(&read_text(&self.file)?))
    }

    /// Writes what the trail has now, unless it says so already; with `is_durable` it is on the disk afterwards.
    pub(super) fn state(&mut self, stated: &Stated, is_durable: bool) -> io::Result<()> {
        if self.stated.as_ref() == Some(stated) {
            return Ok(());
        }
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

/// What the lock file of a directory says, while a gateway may write it.
pub(super) fn read(directory: &Path) -> io::Result<Statement> {
    let file = match open_regular(&directory.join(NAME), OpenOptions::new().read(true)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Statement::Missing),
        opened => opened?,
    };
    // What was read during a write may be of two statements.
    let (mut bytes, mut again) = (Vec::new(), read_text(&file)?);
    while bytes != again {
        bytes = std::mem::replace(&mut again, read_text(&file)?);
    }
    Ok(parse(&bytes))
}

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

fn stated(bytes: &[u8]) -> Option<Stated> {
    if bytes.len() != LENGTH {
        return None;
    }
    let Text { newest, seq, hash, stopped } = serde_json::from_slice(bytes).ok()?;
    let first = first_seq(Path::new(&newest));
    let is_sound = newest == segment_name(first) && (1..MAX_SEQ).contains(&first) && seq < MAX_SEQ;
    let last = Place { seq, hash: parse_hex(&hash)? };
    is_sound.then_some(Stated { newest: first, last, is_stopped: stopped })
}

fn padded(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(LENGTH - 1, b' ');
    bytes.push(b'\n');
    bytes
}
