//! The last trouble of one part of the gateway, as `/status` tells it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use serde::Serialize;

use crate::model::cause::Cause;

/// Something that went wrong.
#[derive(Clone, Debug, Serialize)]
pub struct Trouble {
    /// The word for it, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
    /// The full text, of the last time.
    pub detail: String,
    /// When it began (RFC 3339).
    pub since: String,
    /// When it was over; absent while it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub over: Option<String>,
}

/// The last one.
#[derive(Debug, Default)]
pub struct LastTrouble(Mutex<Option<Trouble>>);

impl LastTrouble {
    /// It goes wrong. What went wrong before for the same cause, or with the same text where there is no cause, goes on.
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

    /// It works again, or does still.
    pub fn ends(&self) {
        if let Some(last) = &mut *self.lock() {
            last.over.get_or_insert_with(now);
        }
    }

    /// What went wrong last, if anything did.
    pub fn get(&self) -> Option<Trouble> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Trouble>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Now, to the second.
fn now() -> String {
    Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_keeps_its_beginning_while_it_goes_on() {
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
