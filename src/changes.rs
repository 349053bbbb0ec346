//! What came of changes of the files that are read again while the gateway runs: configuration, secrets, certificates.
//!
//! The log tells each once; metrics and `/status` tell how things stand, and since when.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use serde_json::{Map, Value, json};

use crate::registry::Registry;
use crate::trouble::LastTrouble;

/// All that is read again, by name.
#[derive(Clone, Debug)]
pub struct Changes {
    successful: Family<WhatLabel, Gauge>,
    succeeded: Family<WhatLabel, Gauge>,
    all: Arc<Mutex<BTreeMap<String, Change>>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WhatLabel {
    what: String,
}

/// One thing that is read again. Clones share what is known of it.
#[derive(Clone, Debug)]
pub struct Change {
    successful: Gauge,
    succeeded: Gauge,
    last: Arc<LastTrouble>,
}

impl Changes {
    /// Registers the metrics.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        Self {
            successful: registry.metric(
                "config_last_reload_successful",
                "Whether what lies in the files is in use, as far as it could be read when it was last looked at.",
            ),
            succeeded: registry.metric(
                "config_last_reload_success_timestamp_seconds",
                "When that was last found, at the start or behind a change or an error, since 1970.",
            ),
            all: Arc::default(),
        }
    }

    /// Something that was read at the start and will be read again.
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

    /// For `/status`: of each whether it is in use, and the last error.
    pub fn status(&self) -> Map<String, Value> {
        let told = |change: &Change| {
            let last = change.last.get();
            json!({ "successful": last.as_ref().is_none_or(|last| last.over.is_some()), "last_error": last })
        };
        self.lock().iter().map(|(what, change)| (what.clone(), told(change))).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Change>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Change {
    /// What lies in the files is in use.
    pub fn accepted(&self) {
        self.successful.set(1);
        self.succeeded.set(Timestamp::now().as_second());
        self.last.ends();
    }

    /// It cannot be used, and what was read before stays in use. The same reason again changes nothing.
    pub fn refused(&self, reason: &str) {
        self.successful.set(0);
        self.last.begins(None, reason.to_owned());
    }
}
