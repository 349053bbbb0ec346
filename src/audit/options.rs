//! The options of a trail: where it is, and how it is written and kept.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::audit::retention::Early;
use crate::config::RefusalBudget;
use crate::model::audit_fields::REDACTABLE;
use crate::model::durability::Durability;
use crate::model::redaction::Redaction;

/// The hour for which budgets of refusals are given.
pub const HOUR: Duration = Duration::from_secs(60 * 60);

/// Where a trail is, and how it is written and kept. Made from the section `[audit]` of the configuration.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory of the segments.
    pub directory: PathBuf,
    /// Whether directory and key must exist. If so, a start does not create them: see [`super::init`].
    // Without this, a volume that was not mounted would look like an empty trail, and used idempotency keys like new
    // ones.
    pub must_exist: bool,
    /// When a record counts as committed.
    pub durability: Durability,
    /// The length in bytes at which a segment is full and a new one begins.
    pub segment_size: u64,
    /// The file of the chain's key. `None`: a key is kept in the directory.
    pub key_file: Option<PathBuf>,
    /// How many records may wait to be written, places for outcomes included.
    pub queue: usize,
    /// How long an intent may take to be committed. After that the call is refused.
    pub intent_deadline: Duration,
    /// The redaction of operator, peer, caller_id and traceparent, in the order of [`REDACTABLE`].
    pub redactions: [Redaction; REDACTABLE.len()],
    /// The least time for which records are kept; `None`: for ever.
    pub retain: Option<Duration>,
    /// From which size on segments are removed before `retain` has passed; `None`: never.
    pub early: Option<Early>,
    /// How many bytes of refusals are recorded in an hour.
    pub refusals: RefusalBudget,
    /// The length of that hour: [`HOUR`], except in tests.
    pub hour: Duration,
    /// The idempotency window. No record within it is removed, and a start that finds no record within it takes the
    /// clock for doubtful.
    pub window: Duration,
    /// The free space in bytes below which refusals are only counted: a stranger must not be able to fill the disk.
    pub low_water: u64,
    /// The word for a loss that the operator accepts: see [`super::loss`].
    pub accept_loss: Option<String>,
}

impl Options {
    /// The options for appending to a trail that no process writes.
    // Durable, since the command tells a person that the record is written. No new segment, unless the last one is
    // damaged: a new file would belong to the user who runs the command.
    pub(super) fn to_append(directory: &Path) -> Self {
        Self {
            directory: directory.into(),
            must_exist: true,
            durability: Durability::Disk,
            segment_size: u64::MAX,
            key_file: None,
            queue: 0,
            intent_deadline: Duration::ZERO,
            redactions: Default::default(),
            retain: None,
            early: None,
            refusals: RefusalBudget::default(),
            hour: HOUR,
            window: Duration::ZERO,
            low_water: 0,
            accept_loss: None,
        }
    }
}

#[cfg(any(test, fuzzing))]
impl Options {
    /// The options for tests: one segment, a short queue, nothing redacted or removed.
    // Durability `kernel`, since hundreds of tests would wait for fdatasync. Five seconds for an intent, so that a
    // busy machine refuses none.
    pub(crate) fn small(directory: &Path) -> Self {
        Self {
            must_exist: false,
            durability: Durability::Kernel,
            segment_size: 1 << 30,
            queue: 64,
            intent_deadline: Duration::from_secs(5),
            ..Self::to_append(directory)
        }
    }
}
