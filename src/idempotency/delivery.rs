//! Whether a caller has learnt that a call succeeded.
//!
//! A success whose caller left before its answer was handed to its connection, or whose answer could not be written, is
//! *undelivered*: to the caller that is doubt, and it will most likely call again. The answer carries a [`Delivery`]
//! to the connection, which settles it. Dropped before that, the success is undelivered.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Map, json};
use uuid::Uuid;

use super::duplicates::{Completion, Doubt, DoubtKind, Duplicate};
use super::{Call, Idempotency, RequestId, now};
use crate::audit::Names;
use crate::audit::unresolved::{DELIVERED, UNDELIVERED};
use crate::keyed_hash::Mark;

/// A success on its way to a caller.
pub struct Delivery {
    table: Arc<Idempotency>,
    mark: Mark,
    /// The call that succeeded, and the mark of its `Idempotency-Key`.
    id: Uuid,
    key: Option<Mark>,
    /// The call that it repeated by force.
    forced: Option<Uuid>,
    /// See [`Duplicate::stands_for_unkeyed`].
    stands_for_unkeyed: bool,
    names: Names,
    step: Step,
}

/// Where a connection keeps the success that its last answer told of, until it is known whether the caller got it.
#[derive(Debug, Default)]
pub struct DeliverySlot(Mutex<Option<Delivery>>);

impl DeliverySlot {
    /// The answer that tells of a success goes to the socket. If the caller `is_there`, it counts as handed over; else
    /// whether it gets it is to be seen.
    pub fn put(&self, mut delivery: Delivery, is_there: bool) {
        if is_there {
            delivery.hand_over();
        }
        *self.lock() = Some(delivery);
    }

    /// Takes it, to settle it.
    pub fn take(&self) -> Option<Delivery> {
        self.lock().take()
    }

    /// Whether there is one.
    pub fn is_full(&self) -> bool {
        self.lock().is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Delivery>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The call's own answer, not handed over yet. Until it is, the call counts as at work.
    OwnAnswer,
    /// Another answer that tells of the success, not handed over yet.
    OtherAnswer,
    HandedOver,
    Settled,
}

impl Delivery {
    /// Of the answer of the call itself.
    pub(super) fn of_own_answer(
        table: &Arc<Idempotency>,
        mark: Mark,
        id: Uuid,
        key: Option<Mark>,
        forced: Option<Uuid>,
        names: Names,
    ) -> Self {
        let stands_for_unkeyed = false; // the table knows
        Self { table: table.clone(), mark, id, key, forced, stands_for_unkeyed, names, step: Step::OwnAnswer }
    }

    /// Of an answer to `caller` that tells of the success of an equal call.
    pub(super) fn of_other_answer(table: &Arc<Idempotency>, mark: Mark, id: Uuid, caller: Call<'_>) -> Self {
        // What else is known of the call, the table tells when the answer is handed over.
        let names = Names { caller: Some(caller.caller.into()), route: Some(caller.route.into()) };
        let (table, key, forced, stands_for_unkeyed) = (table.clone(), None, None, false);
        Self { table, mark, id, key, forced, stands_for_unkeyed, names, step: Step::OtherAnswer }
    }

    /// The answer was handed to a connection whose caller is there.
    pub fn hand_over(&mut self) {
        match self.step {
            Step::OwnAnswer => {
                self.step = Step::HandedOver;
                let ended = self.table.duplicates().end(self.mark, self.id, Completion::Succeeded, now());
                self.stands_for_unkeyed = ended.is_some_and(|call| call.stands_for_unkeyed);
            }
            Step::OtherAnswer => {
                self.step = Step::Settled;
                let told = self.table.duplicates().delivered(self.mark, self.id, now());
                if let Some(Duplicate { key, stands_for_unkeyed, .. }) = told {
                    (self.key, self.stands_for_unkeyed) = (key, stands_for_unkeyed);
                    self.forced = self.table.audit.unresolved().get(self.id).and_then(|call| call.forced);
                    self.step = Step::HandedOver;
                    self.table.audit.event(DELIVERED, Map::from_iter([("id".to_owned(), self.id())]));
                }
            }
            Step::HandedOver | Step::Settled => {}
        }
    }

    /// The answer was handed over and could not be written.
    pub fn fail(mut self) {
        if self.step == Step::HandedOver {
            self.step = Step::Settled;
            let doubt = Doubt { kind: DoubtKind::Undelivered, since: now() };
            let Self { id, key, stands_for_unkeyed, .. } = self;
            let call = Duplicate { id, key, caller: self.table.hash_of(self.caller()), stands_for_unkeyed };
            self.table.duplicates().doubt(self.mark, call, doubt);
            self.record();
        }
    }

    /// Puts it on record that the caller does not know, for the next start.
    fn record(&self) {
        let print = self.table.mark_of(self.caller(), self.mark);
        let hex = |mark: Mark| format!("{:032x}", u128::from_be_bytes(mark));
        let mut details = Map::from_iter([("id".to_owned(), self.id())]);
        details.insert("caller".into(), json!(self.names.caller.as_deref()));
        details.insert("route".into(), json!(self.names.route.as_deref()));
        details.insert("print".into(), json!(hex(print)));
        if let Some(key) = self.key {
            details.insert("key".into(), json!(hex(key)));
        }
        if let Some(forced) = self.forced {
            details.insert("forced".into(), json!(forced));
        }
        self.table.audit.event(UNDELIVERED, details);
    }

    fn id(&self) -> serde_json::Value {
        RequestId::from(self.id).as_str().into()
    }

    fn caller(&self) -> &str {
        self.names.caller.as_deref().unwrap_or_default()
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if self.step == Step::OwnAnswer {
            let undelivered = Completion::Doubt(DoubtKind::Undelivered);
            self.table.duplicates().end(self.mark, self.id, undelivered, now());
            self.record();
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Delivery({})", self.id)
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use serde_json::Value;
    use tempfile::TempDir;

    use super::*;
    use crate::audit::chain::segments;
    use crate::idempotency::rebuild::tests::{start, table};

    /// A replay tells of a success with a key; it is handed over and cannot be written.
    #[test]
    fn undelivered_replay_names_the_key_of_its_call_and_what_that_repeats() {
        let folder = TempDir::new().unwrap();
        let forced = RequestId::from(Uuid::from_u128(3));
        let details =
            json!({ "id": RequestId::from(Uuid::from_u128(1)).as_str(), "forced": forced.as_str() });
        let audit = start(folder.path());
        audit.event(UNDELIVERED, details.as_object().unwrap().clone());
        audit.close();
        drop(audit);
        let audit = start(folder.path());
        let table = table(&audit);
        let (mark, id, key) = ([1; 16], Uuid::from_u128(1), Some([7; 16]));
        let (_, known) = table.compared_of("qa-console", mark, id, key);
        let doubt = Doubt { kind: DoubtKind::Undelivered, since: now() };
        table.duplicates().doubt(mark, known, doubt);
        let (operator, digest) = (HeaderValue::from_static("1"), audit.keys().digest(b"body"));
        let caller = Call {
            caller: "qa-console",
            is_alone: true,
            max_keys: None,
            route: "appointQualityTask",
            operator: &operator,
            digest: &digest,
            id: Uuid::from_u128(2),
        };
        let mut delivery = Delivery::of_other_answer(&table, mark, id, caller);
        delivery.hand_over();
        delivery.fail();
        audit.close();
        let trail = std::fs::read_to_string(&segments(folder.path()).unwrap()[0]).unwrap();
        let mut events = trail.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let last = events.rfind(|event| event["event"] == UNDELIVERED).unwrap();
        assert_eq!(
            (&last["id"], &last["key"], &last["forced"]),
            (&RequestId::from(id).as_str().into(), &"07".repeat(16).into(), &forced.as_str().into())
        );
    }
}
