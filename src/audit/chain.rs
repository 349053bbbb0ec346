//! The hash chain: each record ends with an HMAC over the previous record's hash and its own bytes.
//!
//! The chain shows which record was changed, removed, inserted or moved. It does not show that records are missing at
//! the end, and it proves nothing against an attacker who has the key. The file also has the key file, and the names
//! and lines of segments.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::{fs, io};

use rustix::rand::{GetRandomFlags, getrandom};
use thiserror::Error;

use super::directory::{Directory, open_regular};
use crate::files;
use crate::keyed_hash::{Hash, Keys, hex, parse_hex, to_hex};

const PREV: &[u8] = b",\"prev\":\"";
const HASH: &[u8] = b",\"hash\":\"";

/// The end of a record that is not linked yet. [`Keys::seal`] overwrites the zeros with hex digits.
// Of the final length, so that the writer links a record where it is and nothing has to be moved.
pub const OPEN_LINKS: &[u8] = concat!(
    ",\"prev\":\"0000000000000000000000000000000000000000000000000000000000000000\"",
    ",\"hash\":\"0000000000000000000000000000000000000000000000000000000000000000\"}\n"
)
.as_bytes();

/// An upper bound on record numbers.
// A damaged line can state any number. Recovery that went on from the highest one would overflow.
pub(super) const MAX_SEQ: u64 = 1 << 60;

/// The read buffer for a segment, in bytes.
const BLOCK: usize = 64 * 1024;

/// The hash of a record, also in hex.
// Both forms are kept, since the hex is needed in the record's own line and in the next one.
#[derive(Clone, Debug)]
pub struct Link {
    hash: Hash,
    hex: [u8; 64],
}

impl Link {
    /// Returns the link of a hash.
    pub fn new(hash: Hash) -> Self {
        Self { hash, hex: to_hex(&hash) }
    }

    /// The number of bytes at a record's end that [`Link::ends`] needs.
    pub const END: usize = HASH.len() + 64 + b"\"}\n".len();

    /// Whether these bytes end with the record that has this link.
    pub fn ends(&self, bytes: &[u8]) -> bool {
        let hash = bytes.strip_suffix(b"\"}\n").and_then(|bytes| bytes.strip_suffix(&self.hex));
        hash.is_some_and(|bytes| bytes.ends_with(HASH))
    }

    /// The record's hash.
    pub fn hash(&self) -> Hash {
        self.hash
    }
}

/// Why a key cannot be used.
#[derive(Debug, Error)]
pub enum KeyError {
    /// The file could not be read or created.
    #[error("{0}: {1}")]
    File(PathBuf, io::Error),
    /// The file has fewer than 32 bytes.
    #[error("{0}: a key needs at least 32 bytes")]
    Short(PathBuf),
}

impl Keys {
    /// Reads a key file, following symbolic links. A pipe in its place does not block. Fails if the file cannot be
    /// read or is shorter than 32 bytes.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        Self::from_bytes(path, files::read(path))
    }

    /// Reads the key file that is in an audit directory. Fails as [`Keys::load`] does, and also on a symbolic link.
    // The gateway makes this file itself, so that a link in its place is foreign.
    pub fn load_own(directory: &Path) -> Result<Self, KeyError> {
        let (path, mut bytes) = (key_path(directory), Vec::new());
        let read = open_regular(&path, OpenOptions::new().read(true))
            .and_then(|mut file| file.read_to_end(&mut bytes));
        Self::from_bytes(&path, read.map(|_| bytes))
    }

    fn from_bytes(path: &Path, bytes: io::Result<Vec<u8>>) -> Result<Self, KeyError> {
        let bytes = bytes.map_err(|error| KeyError::File(path.into(), error))?;
        Self::new(&bytes).ok_or_else(|| KeyError::Short(path.into()))
    }

    /// Reads the key file of a directory, or makes one with a random key if there is none.
    pub(super) fn load_or_make(directory: &Directory) -> Result<Self, KeyError> {
        let fail = |error| KeyError::File(key_path(directory.path()), error);
        if directory.find(KEY).map_err(fail)?.is_none() {
            make(directory).map_err(fail)?;
        }
        Self::load_own(directory.path())
    }

    /// Links a record that ends with [`OPEN_LINKS`] to the record before it. Returns the record's own link.
    ///
    /// # Panics
    ///
    /// If the line is shorter than [`OPEN_LINKS`].
    pub fn seal(&self, line: &mut [u8], previous: &Link) -> Link {
        let (members, links) = line.split_at_mut(line.len() - OPEN_LINKS.len());
        let (prev, hash) = links.split_at_mut(PREV.len() + 64 + 1);
        prev[PREV.len()..][..64].copy_from_slice(&previous.hex);
        // The hash covers `prev`, too, so that a line can be checked by itself, with the previous hash that it names.
        let link = Link::new(self.hash(&previous.hash, &[members, prev]));
        hash[HASH.len()..][..64].copy_from_slice(&link.hex);
        link
    }

    /// Checks a line, without its newline, against the hash of the record before it. Returns the line's own hash.
    /// Fails with a text for people if the line has no hash, or another one.
    pub fn check(&self, line: &[u8], previous: &Hash) -> Result<Hash, &'static str> {
        let (bytes, stated) = split(line).ok_or("the record has no hash")?;
        let hash = self.hash(previous, &[bytes]);
        if hex(&hash).as_bytes() == stated {
            Ok(hash)
        } else {
            Err("the hash does not match: the record was changed, or one before it was removed")
        }
    }

    /// Whether this key wrote a line, whatever record is really before it.
    pub(super) fn has_written(&self, line: &[u8]) -> bool {
        let previous = split(line).and_then(|(bytes, _)| {
            let (rest, digits) = bytes.strip_suffix(b"\"")?.split_last_chunk::<64>()?;
            rest.ends_with(PREV).then(|| parse_hex(std::str::from_utf8(digits).ok()?))?
        });
        previous.is_some_and(|previous| self.check(line, &previous).is_ok())
    }
}

/// Splits a line into the bytes before `,"hash":` and the stated hash in hex.
fn split(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let start = line.len().checked_sub(HASH.len() + 64 + 2)?;
    let (bytes, tail) = line.split_at(start);
    let stated = tail.strip_prefix(HASH)?.strip_suffix(b"\"}")?;
    Some((bytes, stated))
}

/// The hash that a line states, unchecked; `None` if it does not end as records do.
pub fn stated(line: &[u8]) -> Option<Hash> {
    let (_, stated) = split(line)?;
    parse_hex(std::str::from_utf8(stated).ok()?)
}

/// The number that a line states. Only the gateway's own spelling counts.
// Not with a JSON parser: this is also asked of lines that are damaged further on.
pub(super) fn number_of(line: &[u8]) -> Option<u64> {
    let rest = line.strip_prefix(b"{\"seq\":")?;
    let end = rest.iter().position(|byte| !byte.is_ascii_digit())?;
    std::str::from_utf8(&rest[..end]).ok()?.parse().ok()
}

/// The name of the key file in an audit directory.
pub(super) const KEY: &str = "audit.key";
/// The name of that file until it is complete.
pub(super) const UNFINISHED_KEY: &str = "audit.key.new";

/// The path of the key file in an audit directory.
pub fn key_path(directory: &Path) -> PathBuf {
    directory.join(KEY)
}

fn make(directory: &Directory) -> io::Result<()> {
    let mut key = [0; 32];
    // From the kernel directly: the generator of a library first spends some 30 ms on gathering entropy of its own.
    let length = getrandom(&mut key, GetRandomFlags::empty())?;
    if length != key.len() {
        return Err(io::Error::other("too little randomness"));
    }
    directory.remove(UNFINISHED_KEY)?;
    let mut file = directory.create(UNFINISHED_KEY)?;
    file.write_all(&key)?;
    // Before it gets its name. A crash must not leave a short key under the name of the key file: the next start
    // would refuse it.
    file.sync_all()?;
    directory.rename(UNFINISHED_KEY, KEY)
}

/// The name of the segment whose first record has this number. Names sort in the order of the trail.
pub(super) fn segment_name(first: u64) -> String {
    format!("audit-{first:020}.jsonl")
}

/// The path of the segment whose first record has this number.
#[cfg(test)]
pub(super) fn segment_path(directory: &Path, first: u64) -> PathBuf {
    directory.join(segment_name(first))
}

/// The number in a segment's name; 0 if the name is not a segment's.
pub fn first_seq(segment: &Path) -> u64 {
    let name = segment.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
    name.strip_prefix("audit-").and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Lists the segments of a directory, oldest first. Fails if the directory cannot be read.
// Only exact names: a copy such as `audit-1.jsonl` or `audit-….jsonl.1` beside the segment would be read as a part of
// the trail.
pub fn segments(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut segments = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let first = first_seq(&path);
        if first > 0 && path.ends_with(segment_name(first)) {
            segments.push(path);
        }
    }
    segments.sort();
    Ok(segments)
}

/// A line of a segment.
pub struct SegmentLine<'a> {
    /// The bytes without the newline.
    pub bytes: &'a [u8],
    /// The line's number in the file, from 1.
    pub number: usize,
    /// The offset in the file at which it begins, in bytes.
    pub offset: u64,
    /// Whether it ends with a newline. After a crash the last line may not.
    pub whole: bool,
}

/// Reads a segment line by line. Only one line is in memory at a time.
pub struct Lines {
    reader: BufReader<File>,
    bytes: Vec<u8>,
    number: usize,
    offset: u64,
}

impl Lines {
    /// Opens a segment. Fails if it is not a regular file; symbolic links are not followed.
    pub fn open(path: &Path) -> io::Result<Self> {
        let reader = BufReader::with_capacity(BLOCK, open_regular(path, OpenOptions::new().read(true))?);
        Ok(Self { reader, bytes: Vec::new(), number: 0, offset: 0 })
    }

    /// Reads the next line; `None` at the end of the file. Fails if the file cannot be read.
    pub fn read(&mut self) -> io::Result<Option<SegmentLine<'_>>> {
        self.offset += self.bytes.len() as u64;
        self.bytes.clear();
        if self.reader.read_until(b'\n', &mut self.bytes)? == 0 {
            return Ok(None);
        }
        self.number += 1;
        let bytes = self.bytes.strip_suffix(b"\n");
        let line = SegmentLine {
            bytes: bytes.unwrap_or(&self.bytes),
            number: self.number,
            offset: self.offset,
            whole: bytes.is_some(),
        };
        Ok(Some(line))
    }
}
