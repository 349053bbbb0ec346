//! Where and how a trail is kept.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::audit::retention::Early;
use crate::config::RefusalBudget;
use crate::model::audit_fields::SHOWN;
use crate::model::durability::Durability;
use crate::model::redaction::Shown;

/// How long the hour lasts that budgets of refusals are for.
pub const HOUR: Duration = Duration::from_secs(60 * 60);

/// Where and how a trail is kept.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory of the segments.
    pub directory: PathBuf,
    /// Directory and key must be there: see [`super::init`].
    pub must_exist: bool,
    /// When a record is safe.
    pub durability: Durability,
    /// Bytes after which a new segment begins.
    pub segment_size: u64,
    /// The chain's key; without one, a key is made in the directory.
    pub key_file: Option<PathBuf>,
    /// How many records may wait to be written.
    pub queue: usize,
    /// An intent that is not safe by then is refused.
    pub intent_deadline: Duration,
    /// How operator, peer, caller_id and traceparent are written: [`SHOWN`].
    pub shown: [Shown; SHOWN.len()],
    /// How long records are kept, at least; `None`: for ever.
    pub retain: Option<Duration>,
    /// From which size on segments go before that; `None`: from none.
    pub early: Option<Early>,
    /// How many bytes refusals may take an hour.
    pub refusals: RefusalBudget,
    /// How long that hour lasts: [`HOUR`], but in tests.
    pub hour: Duration,
    /// The idempotency window: a trail without a record in it makes the clock doubtful, and no younger record is removed.
    pub window: Duration,
    /// Below this much free space, in bytes, refusals are no longer recorded: no stranger may fill the disk.
    pub low_water: u64,
    /// The word of a loss that the operator accepts: see [`super::loss`].
    pub accept_loss: Option<String>,
}

impl Options {
    /// To append to a trail that nobody writes. No new segment is begun there, unless the last one is damaged: it would belong to
    /// whoever appends.
    pub(super) fn to_append(directory: &Path) -> Self {
        Self {
            directory: directory.into(),
            must_exist: true,
            durability: Durability::Disk,
            segment_size: u64::MAX,
            key_file: None,
            queue: 0,
            intent_deadline: Duration::ZERO,
            shown: Default::default(),
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
    /// For tests: one segment, a short queue, nothing hidden or removed.
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
