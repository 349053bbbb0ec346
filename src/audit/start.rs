//! Start of the trail with crash recovery: takes the lock, reads the end of the trail, and gives every intent
//! without an outcome the outcome `unknown`.
//!
//! Guarantees: at most one process writes a trail. What recovery finds is written as one batch before the first
//! request is served. With durability `disk`, everything that the new process relies on is on the disk before
//! that.
//!
//! Only the end of the trail is read: see [`super::recovery`]. [`dry_run`] makes the same checks for `check`
//! and changes nothing.

use std::fs::{File, OpenOptions, TryLockError};
use std::mem::take;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::{fs, io, thread};

use rustix::fs::OFlags;
use rustix::io::Errno;
use serde_json::json;
use thiserror::Error;

use super::age::Newer;
use super::batch::Batch;
use super::chain::KeyError;
use super::clocks::Clocks;
use super::directory::{Directory, look_for_space, open_regular};
use super::entry::Entry;
use super::init::Absent;
use super::lock::{Lock, Statement};
use super::queue::Shared;
use super::recovery::{Damage, TrailState};
use super::retention::ChainPosition;
use super::segment::Segment;
use super::sync::{UNFINISHED, flush_all, make_directory, write_again};
use super::unresolved_calls::UnresolvedList;
use super::writer::Writer;
use super::{
    Audit, AuditMetrics, Handle, Options, age, chain, init, limit, lock, loss, recovery, unresolved_calls,
};
use crate::keyed_hash::Keys;
use crate::model::durability::Durability;

/// Why a trail could not be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Another process writes the trail.
    #[error("audit directory {0}: another process writes here; each gateway needs a directory of its own")]
    Locked(PathBuf),
    /// The directory, or a file in it other than the key, cannot be used.
    #[error("audit directory {0}: {1}")]
    Directory(PathBuf, io::Error),
    /// The key in the directory cannot be used.
    #[error("audit key {0}")]
    Key(KeyError),
    /// The key of [`Options::key_file`] cannot be used.
    #[error("audit key {0}")]
    KeyFile(KeyError),
    /// A newer version of the gateway wrote the trail.
    #[error("audit directory {0}: {1}")]
    Newer(PathBuf, Newer),
    /// The directory or the key is missing, or every user can change it.
    #[error(transparent)]
    Absent(#[from] Absent),
    /// The limit on file sizes is too low for a segment.
    #[error(transparent)]
    Limit(#[from] limit::TooLow),
}

impl From<KeyError> for OpenError {
    fn from(error: KeyError) -> Self {
        Self::Key(error)
    }
}

impl Options {
    /// Checks that the directory and the key exist if they must. Segments whose key is missing are set aside if
    /// the options accept that loss; returns the name of the directory in which they are now.
    fn look_for_key(&self) -> Result<Option<String>, OpenError> {
        match init::check(&self.directory, self.key_file.as_deref(), self.must_exist) {
            Err(Absent::KeyOfSegments { word, .. }) if self.accept_loss.as_ref() == Some(&word) => {
                loss::set_aside(&self.directory).map(Some)
            }
            checked => checked.map(|()| None).map_err(OpenError::from),
        }
    }
}

impl Audit {
    /// Opens the trail: takes its lock, recovers what a crash left, and starts the writer's thread.
    ///
    /// Fails with [`OpenError`]. A failed start may leave the directory, the key and the lock file behind, but
    /// no record. Blocks on disk I/O.
    pub fn start(options: &Options, metrics: AuditMetrics) -> Result<Self, OpenError> {
        let fail = |error| open_error(&options.directory, error);
        let aside = options.look_for_key()?;
        make_directory(&options.directory, options.durability).map_err(fail)?;
        let directory = Directory::open(&options.directory).map_err(fail)?;
        // The lock comes before the key: of two gateways that start in a new directory, only one may make a
        // key.
        lock(&directory)?;
        let keys = match &options.key_file {
            Some(path) => Keys::load(path).map_err(OpenError::KeyFile)?,
            None => Keys::load_or_make(&directory)?,
        };
        let locked = lock_file(directory)?;
        // One fsync of the directory makes the names of the key, of the lock file and of all segments durable.
        if options.durability == Durability::Disk {
            locked.directory.sync().map_err(fail)?;
        }
        let keys = Arc::new(keys);
        let Recovered { writer, begun, unresolved, damage } =
            recover(options, keys.clone(), locked).map_err(fail)?;
        let shared = Arc::new(Shared::new(options, metrics, begun, unresolved));
        let clocks = writer.clocks.clone();
        // A clock that is doubtful from the start is reported directly after the event `start`, before any
        // request.
        clocks.update(&shared);
        if let Some(aside) = aside {
            shared.event(loss::ACCEPTED, json!({ "reason": "the key was missing", "aside": aside }));
        }
        let writing = shared.clone();
        let writer =
            thread::Builder::new().name("audit".into()).spawn(move || writer.run(&writing)).map_err(fail)?;
        Ok(Self(Arc::new(Handle {
            waiters: shared.new_waiters(None),
            shared,
            keys,
            clocks,
            writer: Arc::new(Mutex::new(Some(writer))),
            intent_deadline: options.intent_deadline,
            begun,
            damage,
            redactions: options.redactions,
            resolving: Arc::default(),
        })))
    }
}

/// Locks the directory for this process. Fails with [`OpenError::Locked`] if another process holds the lock.
pub(super) fn lock(directory: &Directory) -> Result<(), OpenError> {
    let path = directory.path();
    match directory.try_lock() {
        Ok(true) => Ok(()),
        // Not an error: the lock on the file `lock` still keeps a second gateway out, as long as nobody
        // replaces that file.
        Ok(false) => {
            tracing::warn!(
                directory = %path.display(),
                "the file system does not support locks on directories; do not move or delete the file `lock`"
            );
            Ok(())
        }
        Err(error) => Err(locked(path, error)),
    }
}

/// A directory and lock file that this process has locked.
pub(super) struct Locked {
    pub(super) directory: Directory,
    lock: Lock,
    /// What the lock file states about the trail.
    statement: Statement,
}

/// Opens and locks the lock file, or makes it, and reads its statement. Call [`lock()`] first.
pub(super) fn lock_file(directory: Directory) -> Result<Locked, OpenError> {
    let (path, fail) = (directory.path(), |error| OpenError::Directory(directory.path().into(), error));
    let opened = Lock::open(&directory).map_err(|error| locked(path, error))?;
    let statement = match &opened {
        Some(lock) => lock.read().map_err(fail)?,
        // No lock file in a new directory is normal. Beside segments it means that the file was removed, and
        // with it the only evidence of missing records at the end.
        None if chain::segments(path).map_err(fail)?.is_empty() => Statement::Nothing,
        None => Statement::Missing,
    };
    let make = || Lock::make(&directory, matches!(statement, Statement::Missing));
    let lock = opened.map_or_else(make, Ok).map_err(|error| locked(path, error))?;
    Ok(Locked { directory, lock, statement })
}

fn locked(directory: &Path, error: TryLockError) -> OpenError {
    match error {
        TryLockError::WouldBlock => OpenError::Locked(directory.into()),
        TryLockError::Error(error) => OpenError::Directory(directory.into(), error),
    }
}

/// Checks whether [`Audit::start`] would succeed if no other process held the lock. Changes nothing and takes
/// no lock, so it can run beside a gateway.
///
/// Fails with the error that the start would have, named at the same file.
// `check` must return 0 exactly if `serve` would start. A full volume, a directory in the place of a file, and
// a segment above the limit on file sizes were missed before. So every file that a start makes or opens is
// checked here, also where there is no key yet. A running gateway may remove a segment between the listing and
// the reading, so the end is read twice if need be.
pub fn dry_run(options: &Options) -> Result<(), OpenError> {
    init::check(&options.directory, options.key_file.as_deref(), options.must_exist)?;
    let fail = |error| open_error(&options.directory, error);
    let of_key = |error| OpenError::from(KeyError::File(chain::key_path(&options.directory), error));
    let directory = match Directory::open(&options.directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let path = std::path::absolute(&options.directory).map_err(fail)?;
            let folder = path.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
            return match options.key_file {
                Some(_) => look_for_space(folder, 1, 0).map_err(fail),
                None => look_for_space(folder, 2, 0).map_err(of_key),
            };
        }
        opened => opened.map_err(fail)?,
    };
    let keys = match &options.key_file {
        Some(path) => Some(Keys::load(path).map_err(OpenError::KeyFile)?),
        None if directory.find(chain::KEY).map_err(fail)?.is_some() => {
            Some(Keys::load_own(&options.directory)?)
        }
        None => {
            directory.check_removable(chain::UNFINISHED_KEY).map_err(of_key)?;
            look_for_space(&options.directory, 2, 0).map_err(of_key)?;
            None
        }
    };
    let is_writable = |name: &str, unfinished: &str| match directory.open_file(name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => directory.check_removable(unfinished),
        opened => opened.map(drop),
    };
    is_writable(lock::NAME, lock::UNFINISHED).map_err(fail)?;
    directory.check_removable(UNFINISHED).map_err(fail)?;
    // Without a key there are no segments either: `init::check` refuses those.
    let Some(keys) = keys else { return Ok(()) };
    let statement = lock::read(directory.path()).map_err(fail)?;
    let read = || recovery::read_end(directory.path(), &keys, &statement);
    let again = |error: io::Error| if error.kind() == io::ErrorKind::NotFound { read() } else { Err(error) };
    let found = read().or_else(again).map_err(fail)?;
    if let Some(name) = found.last.as_ref().and_then(|(path, _)| path.file_name()) {
        is_writable(&name.to_string_lossy(), UNFINISHED).map_err(fail)?;
    }
    look_for_room(options, &directory, &found).map_err(fail)
}

/// A lower bound, in bytes, of what a start writes in addition to the list of unresolved calls.
const LEAST_START: u64 = 384;

/// Fails if a start could not write its own record, or, with durability `disk`, could not write the last
/// segment again.
fn look_for_room(options: &Options, directory: &Directory, found: &TrailState) -> io::Result<()> {
    let bytes = LEAST_START + found.unresolved.size();
    let Some((first, length)) = found.resume().1 else {
        return look_for_space(directory.path(), 1, bytes);
    };
    let name = chain::segment_name(first);
    if options.durability == Durability::Disk && length > limit::of_files() {
        return Err(limit::explain(Errno::FBIG.into(), &name));
    }
    // After a crash the file still has the space that the writer reserved behind its records. A start uses that
    // first, so it may succeed on a full disk.
    let segment = fs::metadata(directory.path().join(name))?;
    // `st_blocks` counts units of 512 bytes, whatever the block size of the file system (stat(2)).
    let reserved = (segment.blocks() * 512).saturating_sub(length);
    look_for_space(directory.path(), 0, bytes.saturating_sub(reserved))
}

/// Whether a process holds the lock of a trail. Its last line may be incomplete then. Changes nothing in the
/// directory.
// Both locks are tried: older versions lock only the file.
pub fn is_live(directory: &Path) -> bool {
    let is_locked = |file: io::Result<File>| {
        matches!(file.map(|file| file.try_lock_shared()), Ok(Err(TryLockError::WouldBlock)))
    };
    // `O_DIRECTORY` here and `open_regular` below: opening a pipe in the place of either would block until
    // somebody writes to it.
    let whole =
        OpenOptions::new().read(true).custom_flags(OFlags::DIRECTORY.bits().cast_signed()).open(directory);
    let lock = open_regular(&directory.join(lock::NAME), OpenOptions::new().read(true));
    is_locked(whole) || is_locked(lock)
}

/// The result of recovery.
pub(super) struct Recovered {
    /// The writer, which has written what recovery found.
    pub(super) writer: Writer,
    /// The number of the last record that the start wrote.
    pub(super) begun: u64,
    /// The calls that were unresolved before the start, and those that this start resolved to `unknown`.
    pub(super) unresolved: UnresolvedList,
    /// What is missing at the end of the trail.
    pub(super) damage: Arc<[Damage]>,
}

/// Turns an error of reading or writing the trail into an [`OpenError`].
pub(super) fn open_error(directory: &Path, error: io::Error) -> OpenError {
    match error.get_ref().and_then(|error| error.downcast_ref::<Newer>()) {
        Some(newer) => OpenError::Newer(directory.into(), *newer),
        None => OpenError::Directory(directory.into(), error),
    }
}

/// Reads the end of the trail, cuts off a torn line, gives every intent without an outcome the outcome
/// `unknown`, and records all of that with the event `start`.
// One write holds all of it, so that a crash in between leaves either nothing or a torn line for the next
// start.
pub(super) fn recover(options: &Options, keys: Arc<Keys>, locked: Locked) -> io::Result<Recovered> {
    locked.directory.remove(UNFINISHED)?;
    let mut resumed = resume(options, &keys, locked)?;
    let Resumed { batch, found, .. } = &mut resumed;
    for id in found.unresolved.close() {
        batch.push(&Entry::UnknownOutcome { id });
    }
    // The list goes into `start` after `close`, so that the next start and every reader finds the calls of
    // unknown outcome there and need not read further back.
    let clocks = Arc::new(Clocks::go_on(found, options.window));
    let mut start = clocks.start(found);
    start[unresolved_calls::LIST] = json!(found.unresolved);
    batch.event(age::START, start);
    let begun = batch.last();
    let (unresolved, damage) = (take(&mut found.unresolved), take(&mut found.damage).into());
    let writer = Writer::go_on(options, keys, clocks, resumed, "what the start records")?;
    Ok(Recovered { writer, begun, unresolved, damage })
}

/// The end of a trail from which a writer continues.
pub(super) struct Resumed {
    pub(super) directory: Directory,
    pub(super) lock: Lock,
    /// The records about what was found, not written yet.
    pub(super) batch: Batch,
    pub(super) found: TrailState,
    /// The place of the last record.
    pub(super) last: ChainPosition,
    /// The segment to append to; `None` if the next batch begins a new one.
    pub(super) segment: Option<Segment>,
}

/// Reads the end of the trail, cuts off a torn line, and opens the segment that a writer continues. With
/// durability `disk`, all segments are on the disk when this returns.
pub(super) fn resume(options: &Options, keys: &Keys, locked: Locked) -> io::Result<Resumed> {
    let Locked { directory, lock, statement } = locked;
    let found = recovery::read_end(directory.path(), keys, &statement)?;
    let (seq, segment) = found.resume();
    let mut batch = Batch::behind(seq);
    if let Some((path, offset, length)) = &found.torn {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        directory.open_file(&name)?.set_len(*offset)?;
        batch.event("recovery", json!({ "what": "torn line cut off", "bytes": length }));
    }
    if found.is_lock_unreadable {
        let what = "the lock file cannot be read, so a missing end of the trail would not be noticed";
        tracing::warn!("{what}");
        batch.event("recovery", json!({ "what": what }));
    }
    for damage in &found.damage {
        tracing::error!(file = damage.file, reason = damage.reason, "the audit trail is damaged");
        batch.event("recovery", damage.details());
    }
    let segment = segment.map(|(first, length)| reopen(options.durability, &directory, first, length));
    if options.durability == Durability::Disk {
        // A run with durability `kernel` may have left segments of which only the kernel's cache has the last
        // bytes. Records of this run must not be durable while earlier ones are not.
        flush_all(&chain::segments(directory.path())?)?;
    }
    let last = ChainPosition { seq, hash: found.hash };
    let segment = segment.transpose()?;
    Ok(Resumed { directory, lock, batch, found, last, segment })
}

/// Opens the segment that a writer continues. With durability `disk`, all of it is on the disk afterwards.
fn reopen(durability: Durability, directory: &Directory, first: u64, length: u64) -> io::Result<Segment> {
    let file = directory.open_file(&chain::segment_name(first))?;
    if durability == Durability::Disk {
        // This must come before `Segment::new`, which sets `O_APPEND`: with that flag Linux appends whatever
        // offset is given (pwrite(2), BUGS). The bytes are written again because the last process may have died
        // after a failed fdatasync, and then the kernel takes pages for clean that the disk does not have.
        write_again(&file, length).map_err(|error| limit::explain(error, &chain::segment_name(first)))?;
    }
    Segment::new(directory, first, file, length)
}
