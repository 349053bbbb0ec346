//! Appends to a trail while no gateway writes it: for the commands `audit accept-clock`, `audit accept-loss`
//! and `audit resolve`.
//!
//! Each function takes the lock of the trail for as long as it runs, so that no gateway can start meanwhile.
//! Like a start it first records what is torn or missing at the end. The records are on the disk when a
//! function returns, whatever durability the gateway uses.

use std::io;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use super::batch::Batch;
use super::clocks::Clocks;
use super::directory::Directory;
use super::recovery::TrailState;
use super::start::{OpenError, lock, lock_file, open_error, resume};
use super::writer::Writer;
use super::{Options, age, chain, init, lock, loss};
use crate::keyed_hash::Keys;

/// Accepts the wall clock for a trail that no gateway writes: see [`super::Audit::accept_clock`]. Returns the
/// number of the event, which is on the disk then.
///
/// Fails with [`OpenError::Locked`] while a gateway writes the trail.
pub fn accept_clock(directory: &Path, keys: Keys) -> Result<u64, OpenError> {
    check_trail(directory)?;
    append_event(directory, keys.into(), age::ACCEPTED, |clocks| clocks.accepted().into())
}

/// Accepts the loss of a part of a trail that no gateway writes: see [`loss`]. Returns the number of the event,
/// which is on the disk then, or `None` if nothing is lost and nothing was removed.
///
/// Fails with [`OpenError::Locked`] while a gateway writes the trail.
pub fn accept_loss(directory: &Path, keys: Keys) -> Result<Option<u64>, OpenError> {
    check_trail(directory)?;
    let keys = Arc::new(keys);
    // Missing records at the end become an event only when a writer continues the trail. This empty append
    // records them first, so that the acceptance covers them, as it does when a gateway has started before.
    append(directory, keys.clone(), |_, _, _| Ok::<_, OpenError>(()))?;
    let loss = loss::find(directory, &keys).map_err(|error| open_error(directory, error))?;
    loss.map(|loss| append_event(directory, keys, loss::ACCEPTED, |_| loss.details().into())).transpose()
}

/// Sets aside the segments whose key is missing, and begins a new trail with a new key, whose first record says
/// so. Returns the name of the directory to which the segments were moved.
///
/// Fails if another process has locked the directory, or if a file cannot be moved or written.
pub fn accept_lost_key(directory: &Path) -> Result<String, OpenError> {
    let aside = loss::set_aside(directory)?;
    init::init(directory, None)?;
    let details = json!({ "reason": "the key was missing", "aside": aside });
    append_event(directory, Keys::load_own(directory)?.into(), loss::ACCEPTED, |_| details)?;
    Ok(aside)
}

/// Fails with `NotFound` if there is no segment.
// Otherwise a mistyped path would become a new trail.
pub(super) fn check_trail(directory: &Path) -> Result<(), OpenError> {
    let fail = |error| open_error(directory, error);
    if chain::segments(directory).map_err(fail)?.is_empty() {
        return Err(fail(io::Error::new(io::ErrorKind::NotFound, "there is no audit trail")));
    }
    Ok(())
}

/// Appends one event. `details` returns its members, which must be a JSON object. Returns the number of the
/// event.
fn append_event(
    directory: &Path,
    keys: Arc<Keys>,
    name: &'static str,
    details: impl FnOnce(&Clocks) -> Value,
) -> Result<u64, OpenError> {
    let append = append(directory, keys, |batch, _, clocks| {
        batch.event(name, details(clocks));
        Ok::<_, OpenError>(())
    });
    append.map(|((), seq)| seq)
}

/// Appends to a trail under its lock: first the records about what reading its end found, then those that
/// `fill` adds. Returns the result of `fill` and the number of the last record.
///
/// Fails if the lock is taken, if the trail cannot be read or written, or if `fill` fails. What reading found
/// is recorded even if `fill` fails.
pub(super) fn append<T, E: From<OpenError>>(
    directory: &Path,
    keys: Arc<Keys>,
    fill: impl FnOnce(&mut Batch, &TrailState, &Clocks) -> Result<T, E>,
) -> Result<(T, u64), E> {
    let fail = |error| open_error(directory, error);
    let opened = Directory::open(directory).map_err(fail)?;
    lock(&opened)?;
    let (locked, options) = (lock_file(opened)?, Options::to_append(directory));
    let mut resumed = resume(&options, &keys, locked).map_err(fail)?;
    let clocks = Arc::new(Clocks::go_on(&resumed.found, options.window));
    let filled = fill(&mut resumed.batch, &resumed.found, &clocks);
    let last = resumed.batch.last();
    // Nothing to record means that nothing is written at all, so asking twice does not make the trail grow.
    if !resumed.batch.is_empty() {
        let writer = Writer::go_on(&options, keys, clocks, resumed, "what is to be recorded");
        let mut writer = writer.map_err(fail)?;
        // A root shell runs this command, the gateway runs as another user. It could not open its own trail any
        // more if root owned these files.
        give_to_owner(directory).map_err(fail)?;
        writer.close();
    }
    Ok((filled?, last))
}

/// Gives the newest segment and the lock file to the owner of the directory.
fn give_to_owner(directory: &Path) -> io::Result<()> {
    let owner = std::fs::metadata(directory)?;
    for path in chain::segments(directory)?.pop().into_iter().chain([directory.join(lock::NAME)]) {
        if std::fs::metadata(&path)?.uid() != owner.uid() {
            chown(&path, Some(owner.uid()), Some(owner.gid()))?;
        }
    }
    Ok(())
}
