//! Status of hot reloads: what came of changes of the files that are read again while the gateway runs
//! (configuration, secrets, certificates).
//!
//! Metrics and `/status` show whether what is in the files is in use, and since when; the log reports each change
//! once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use serde_json::{Map, Value, json};

use crate::registry::Registry;
use crate::trouble::LastTrouble;

/// Everything that is read again, by name. Clones share their content.
#[derive(Clone, Debug)]
pub struct Changes {
    successful: Family<WhatLabel, Gauge>,
    succeeded: Family<WhatLabel, Gauge>,
    all: Arc<Mutex<BTreeMap<String, Change>>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
/// The label `what` of both metrics.
struct WhatLabel {
    what: String,
}

/// One thing that is read again. Clones share their content.
#[derive(Clone, Debug)]
pub struct Change {
    successful: Gauge,
    succeeded: Gauge,
    last: Arc<LastTrouble>,
}

impl Changes {
    /// Registers the metrics, without any series yet.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        Self {
            successful: registry.metric(
                "config_last_reload_successful",
                "Whether the content of the files, as last read, is in use.",
            ),
            succeeded: registry.metric(
                "config_last_reload_success_timestamp_seconds",
                "When the content of the files was last accepted: at the start, after a change or after an error, as \
                 Unix time.",
            ),
            all: Arc::default(),
        }
    }

    /// Adds something that was read at the start and will be read again. It counts as accepted now. A second one of
    /// the same name replaces the first in `/status`.
    pub fn of(&self, what: impl Into<String>) -> Change {
        let what = what.into();
        let label = WhatLabel { what: what.clone() };
        let change = Change {
            successful: self.successful.get_or_create_owned(&label),
            succeeded: self.succeeded.get_or_create_owned(&label),
            last: Arc::default(),
        };
        change.accepted();
        self.lock().insert(what, change.clone());
        change
    }

    /// Returns for each thing whether it is in use, and its last error, for `/status`.
    pub fn status(&self) -> Map<String, Value> {
        // Both come from one reading of the last error, so that they cannot contradict each other.
        let as_json = |change: &Change| {
            let last = change.last.get();
            json!({ "successful": last.as_ref().is_none_or(|last| last.over.is_some()), "last_error": last })
        };
        self.lock().iter().map(|(what, change)| (what.clone(), as_json(change))).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Change>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Change {
    /// Reports that what is in the files is in use. Ends the last error.
    pub fn accepted(&self) {
        self.successful.set(1);
        self.succeeded.set(Timestamp::now().as_second());
        self.last.ends();
    }

    /// Reports that what is in the files cannot be used, so that what was read before stays in use. With the same
    /// reason again, only the gauge is set again.
    pub fn refused(&self, reason: &str) {
        self.successful.set(0);
        self.last.begins(None, reason.to_owned());
    }
}
