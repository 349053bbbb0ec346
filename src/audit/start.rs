//! A start: takes the lock, reads the end of the trail, gives every intent that is open there its outcome.

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
use super::recovery::{Damage, Found};
use super::retention::Place;
use super::segment::Segment;
use super::sync::{UNFINISHED, make_directory, sync_all, write_again};
use super::unresolved::UnresolvedList;
use super::writer::Writer;
use super::{Audit, Handle, Metrics, Options, age, chain, init, limit, lock, loss, recovery, unresolved};
use crate::keyed_hash::Keys;
use crate::model::durability::Durability;

/// Why a trail could not be opened.
#[derive(Debug, Error)]
pub enum StartError {
    /// Another process writes it.
    #[error("audit directory {0}: another process writes here; each gateway needs a directory of its own")]
    Locked(PathBuf),
    /// The directory cannot be used.
    #[error("audit directory {0}: {1}")]
    Directory(PathBuf, io::Error),
    /// The key in the directory cannot be used.
    #[error("audit key {0}")]
    Key(KeyError),
    /// The key of [`Options::key_file`] cannot be used.
    #[error("audit key {0}")]
    KeyFile(KeyError),
    /// The trail is another program's.
    #[error("audit directory {0}: {1}")]
    Newer(PathBuf, Newer),
    /// Something must be there first.
    #[error(transparent)]
    Absent(#[from] Absent),
    /// No segment has room.
    #[error(transparent)]
    Limit(#[from] limit::TooLow),
}

impl From<KeyError> for StartError {
    fn from(error: KeyError) -> Self {
        Self::Key(error)
    }
}

impl Options {
    /// Looks whether a start finds what it needs. Segments whose key is missing are set aside if that loss is accepted;
    /// returns where they are.
    fn look_for_key(&self) -> Result<Option<String>, StartError> {
        match init::check(&self.directory, self.key_file.as_deref(), self.must_exist) {
            Err(Absent::KeyOfSegments { word, .. }) if self.accept_loss.as_ref() == Some(&word) => {
                loss::set_aside(&self.directory).map(Some)
            }
            checked => checked.map(|()| None).map_err(StartError::from),
        }
    }
}

impl Audit {
    /// Opens the trail: takes its lock, recovers what a crash left, starts the writer.
    pub fn start(options: &Options, metrics: Metrics) -> Result<Self, StartError> {
        let fail = |error| start_error(&options.directory, error);
        let aside = options.look_for_key()?;
        make_directory(&options.directory, options.durability).map_err(fail)?;
        let directory = Directory::open(&options.directory).map_err(fail)?;
        lock(&directory)?;
        let keys = match &options.key_file {
            Some(path) => Keys::load(path).map_err(StartError::KeyFile)?,
            None => Keys::load_or_make(&directory)?,
        };
        let locked = lock_file(directory)?;
        if options.durability == Durability::Disk {
            locked.directory.sync().map_err(fail)?; // the key's name, the lock's, and the segments'
        }
        let keys = Arc::new(keys);
        let Recovered { writer, begun, unresolved, damage } =
            recover(options, keys.clone(), locked).map_err(fail)?;
        let shared = Arc::new(Shared::new(options, metrics, begun, unresolved));
        let clocks = writer.clocks.clone();
        clocks.look(&shared);
        if let Some(aside) = aside {
            shared.event(loss::ACCEPTED, json!({ "reason": "the key was missing", "aside": aside }));
        }
        let writing = shared.clone();
        let writer =
            thread::Builder::new().name("audit".into()).spawn(move || writer.run(&writing)).map_err(fail)?;
        Ok(Self(Arc::new(Handle {
            lane: shared.new_lane(None),
            shared,
            keys,
            clocks,
            writer: Arc::new(Mutex::new(Some(writer))),
            intent_deadline: options.intent_deadline,
            begun,
            damage,
            shown: options.shown,
            resolving: Arc::default(),
        })))
    }
}

/// Locks the directory for this process.
pub(super) fn lock(directory: &Directory) -> Result<(), StartError> {
    let path = directory.path();
    match directory.try_lock() {
        Ok(true) => Ok(()),
        Ok(false) => {
            tracing::warn!(directory = %path.display(), "the file system locks no directories; the file `lock` must stay where it is");
            Ok(())
        }
        Err(error) => Err(locked(path, error)),
    }
}

/// A trail that this process has locked.
pub(super) struct Locked {
    pub(super) directory: Directory,
    lock: Lock,
    /// What the lock file says.
    statement: Statement,
}

/// Opens and locks the lock file, or makes it, and reads what it says.
pub(super) fn lock_file(directory: Directory) -> Result<Locked, StartError> {
    let (path, fail) = (directory.path(), |error| StartError::Directory(directory.path().into(), error));
    let opened = Lock::open(&directory).map_err(|error| locked(path, error))?;
    let statement = match &opened {
        Some(lock) => lock.read().map_err(fail)?,
        None if chain::segments(path).map_err(fail)?.is_empty() => Statement::Nothing,
        None => Statement::Missing,
    };
    let make = || Lock::make(&directory, matches!(statement, Statement::Missing));
    let lock = opened.map_or_else(make, Ok).map_err(|error| locked(path, error))?;
    Ok(Locked { directory, lock, statement })
}

fn locked(directory: &Path, error: TryLockError) -> StartError {
    match error {
        TryLockError::WouldBlock => StartError::Locked(directory.into()),
        TryLockError::Error(error) => StartError::Directory(directory.into(), error),
    }
}

/// Looks whether a trail could be opened, were it not locked. Makes and changes nothing, and takes no lock.
pub fn rehearse(options: &Options) -> Result<(), StartError> {
    init::check(&options.directory, options.key_file.as_deref(), options.must_exist)?;
    let fail = |error| start_error(&options.directory, error);
    let of_key = |error| StartError::from(KeyError::File(chain::key_path(&options.directory), error));
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
        Some(path) => Some(Keys::load(path).map_err(StartError::KeyFile)?),
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
    let Some(keys) = keys else { return Ok(()) }; // there are no segments either
    let statement = lock::read(directory.path()).map_err(fail)?;
    let read = || recovery::read_end(directory.path(), &keys, &statement);
    // A gateway that runs may have removed a segment meanwhile.
    let again = |error: io::Error| if error.kind() == io::ErrorKind::NotFound { read() } else { Err(error) };
    let found = read().or_else(again).map_err(fail)?;
    if let Some(name) = found.last.as_ref().and_then(|(path, _)| path.file_name()) {
        is_writable(&name.to_string_lossy(), UNFINISHED).map_err(fail)?;
    }
    look_for_room(options, &directory, &found).map_err(fail)
}

/// A start writes no fewer bytes, beside the list of the unresolved.
const LEAST_START: u64 = 384;

/// Looks whether a start could write what it does: the end of the trail once more, and its own record.
fn look_for_room(options: &Options, directory: &Directory, found: &Found) -> io::Result<()> {
    let bytes = LEAST_START + found.unresolved.size();
    let Some((first, length)) = found.resume().1 else {
        return look_for_space(directory.path(), 1, bytes);
    };
    let name = chain::segment_name(first);
    if options.durability == Durability::Disk && length > limit::of_files() {
        return Err(limit::explain(Errno::FBIG.into(), &name));
    }
    // A crash leaves the space that was reserved behind the records.
    let segment = fs::metadata(directory.path().join(name))?;
    let reserved = (segment.blocks() * 512).saturating_sub(length);
    look_for_space(directory.path(), 0, bytes.saturating_sub(reserved))
}

/// Whether a process holds the lock of a trail, so that its last line may be half-written. Changes nothing
/// in the directory. An older version locks only the file in it.
pub fn is_live(directory: &Path) -> bool {
    let is_locked = |file: io::Result<File>| {
        matches!(file.map(|file| file.try_lock_shared()), Ok(Err(TryLockError::WouldBlock)))
    };
    // No pipe in the place of either may hold the caller.
    let whole =
        OpenOptions::new().read(true).custom_flags(OFlags::DIRECTORY.bits().cast_signed()).open(directory);
    let lock = open_regular(&directory.join(lock::NAME), OpenOptions::new().read(true));
    is_locked(whole) || is_locked(lock)
}

/// What a start found, and who goes on.
pub(super) struct Recovered {
    pub(super) writer: Writer,
    /// The number of the last record that the start wrote.
    pub(super) begun: u64,
    pub(super) unresolved: UnresolvedList,
    pub(super) damage: Arc<[Damage]>,
}

pub(super) fn start_error(directory: &Path, error: io::Error) -> StartError {
    match error.get_ref().and_then(|error| error.downcast_ref::<Newer>()) {
        Some(newer) => StartError::Newer(directory.into(), *newer),
        None => StartError::Directory(directory.into(), error),
    }
}

/// Reads the end of the trail, cuts a torn line off, gives every intent that is open there its outcome, and
/// records all that. One write does it, so that a crash in between leaves either nothing or a torn line for the next
/// start. Returns the number of the last record and what was open, too.
pub(super) fn recover(options: &Options, keys: Arc<Keys>, locked: Locked) -> io::Result<Recovered> {
    locked.directory.remove(UNFINISHED)?;
    let mut resumed = resume(options, &keys, locked)?;
    let Resumed { batch, found, .. } = &mut resumed;
    for id in found.unresolved.close() {
        batch.push(&Entry::Doubt { id });
    }
    let clocks = Arc::new(Clocks::go_on(found, options.window));
    let mut start = clocks.start(found);
    start[unresolved::LIST] = json!(found.unresolved);
    batch.event(age::START, start);
    let begun = batch.last();
    let (unresolved, damage) = (take(&mut found.unresolved), take(&mut found.damage).into());
    let writer = Writer::go_on(options, keys, clocks, resumed, "what the start records")?;
    Ok(Recovered { writer, begun, unresolved, damage })
}

/// What a trail goes on behind.
pub(super) struct Resumed {
    pub(super) directory: Directory,
    pub(super) lock: Lock,
    /// Tells what was found.
    pub(super) batch: Batch,
    pub(super) found: Found,
    pub(super) last: Place,
    pub(super) segment: Option<Segment>,
}

/// Reads the end of the trail, and cuts a torn line off.
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
        let what = "the lock file cannot be read, so that nobody knows whether the end of the trail is here";
        tracing::warn!("{what}");
        batch.event("recovery", json!({ "what": what }));
    }
    for damage in &found.damage {
        tracing::error!(file = damage.file, reason = damage.reason, "the audit trail is damaged");
        batch.event("recovery", damage.details());
    }
    let segment = segment.map(|(first, length)| reopen(options.durability, &directory, first, length));
    if options.durability == Durability::Disk {
        sync_all(&chain::segments(directory.path())?)?;
    }
    let last = Place { seq, hash: found.hash };
    let segment = segment.transpose()?;
    Ok(Resumed { directory, lock, batch, found, last, segment })
}

/// Opens the segment that a writer goes on with. With `disk` all of it is on the disk afterwards.
fn reopen(durability: Durability, directory: &Directory, first: u64, length: u64) -> io::Result<Segment> {
    let file = directory.open_file(&chain::segment_name(first))?;
    if durability == Durability::Disk {
        // Before the segment only appends.
        write_again(&file, length).map_err(|error| limit::explain(error, &chain::segment_name(first)))?;
    }
    Segment::new(directory, first, file, length)
}
