//! The last failure of one part of the gateway, as `/status` shows it.
//!
//! It has one beginning for as long as the same thing goes wrong, so that an operator sees since when. It keeps
//! no history: logs do.

use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use serde::Serialize;

use crate::model::cause::Cause;

/// A failure, past or present.
#[derive(Clone, Debug, Serialize)]
pub struct Trouble {
    /// The cause, for a failure that has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
    /// The full text, as of the last time.
    pub detail: String,
    /// When it began (RFC 3339, seconds).
    pub since: String,
    /// When it ended (RFC 3339, seconds); absent while it goes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub over: Option<String>,
}

/// The last failure of one part.
#[derive(Debug, Default)]
pub struct LastTrouble(Mutex<Option<Trouble>>);

impl LastTrouble {
    /// Notes a failure. It continues the last one if that has not ended and has the same cause or, without a
    /// cause, the same text.
    // The text may differ each time for one cause, such as by an address. Compared by text, `since` would
    // always be now.
    pub fn begins(&self, cause: Option<Cause>, detail: String) {
        let mut last = self.lock();
        let goes_on = |last: &&mut Trouble| {
            last.over.is_none() && last.cause == cause && (cause.is_some() || last.detail == detail)
        };
        match last.as_mut().filter(goes_on) {
            Some(last) => last.detail = detail,
            None => *last = Some(Trouble { cause, detail, since: now(), over: None }),
        }
    }

    /// Notes success: the last failure has ended, unless it had ended before.
    pub fn ends(&self) {
        if let Some(last) = &mut *self.lock() {
            last.over.get_or_insert_with(now);
        }
    }

    /// Returns the last failure, if there was any.
    pub fn get(&self) -> Option<Trouble> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Trouble>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The present time, to the second.
fn now() -> String {
    Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ongoing_trouble_keeps_its_start_time() {
        let last = LastTrouble::default();
        let begins = |cause, detail: &str| {
            last.begins(cause, detail.into());
            last.0
                .lock()
                .unwrap()
                .as_mut()
                .map(|last| std::mem::replace(&mut last.since, "seen".into()))
                .unwrap()
        };
        assert_ne!(begins(Some(Cause::Dns), "a"), "seen");
        assert_eq!(begins(Some(Cause::Dns), "b"), "seen", "the same cause");
        assert_eq!(last.get().unwrap().detail, "b");
        assert_ne!(begins(Some(Cause::Reset), "b"), "seen");
        last.ends();
        assert!(last.get().unwrap().over.is_some());
        assert_ne!(begins(Some(Cause::Reset), "b"), "seen", "it was over");
        assert_ne!(begins(None, "c"), "seen");
        assert_eq!(begins(None, "c"), "seen");
        assert_ne!(begins(None, "d"), "seen");
    }
}
