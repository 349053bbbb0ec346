//! Delivery of a success: whether its caller got the answer.
//!
//! A success is *undelivered* if its caller disconnected before the answer was handed to its connection, or if the answer could
//! not be written. The caller cannot distinguish such a success from a call that was lost, and will most likely call again. That
//! second call must not be sent. The answer carries a [`Delivery`] to the connection, which settles it. If the delivery of the
//! call's own answer is dropped before that, the success is undelivered.
//!
//! That a caller has read the answer cannot be known: it counts as delivered once it was handed to a connection whose
//! caller is there.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Map, json};
use uuid::Uuid;

use super::duplicates::{Completion, Duplicate, InDoubt, InDoubtKind};
use super::{Call, Idempotency, RequestId, now};
use crate::audit::Names;
use crate::audit::unresolved_calls::{DELIVERED, UNDELIVERED};
use crate::keyed_hash::KeyedFingerprint;

/// A success on its way to a caller. Dropping the one of a call's own answer makes the success undelivered; dropping that of any
/// other answer changes nothing.
pub struct Delivery {
    table: Arc<Idempotency>,
    call_hash: KeyedFingerprint,
    /// The call that succeeded.
    id: Uuid,
    /// The key hash of its `Idempotency-Key`.
    key: Option<KeyedFingerprint>,
    /// The call that the succeeded call repeated by force.
    forced: Option<Uuid>,
    /// See [`Duplicate::replaces_unkeyed`].
    replaces_unkeyed: bool,
    names: Names,
    step: Step,
}

/// The success that a connection's last answer reported, until it is known whether the caller got it.
#[derive(Debug, Default)]
pub struct PendingDelivery(Mutex<Option<Delivery>>);

impl PendingDelivery {
    /// Stores the delivery of an answer that is written to the socket now. `is_there`: the caller is still connected, so that
    /// the answer counts as handed over. Otherwise the connection settles the delivery, by what the caller does next.
    pub fn put(&self, mut delivery: Delivery, is_there: bool) {
        // For a caller that has closed its side the answer is sent, but does not count yet: it may have given up.
        if is_there {
            delivery.hand_over();
        }
        *self.lock() = Some(delivery);
    }

    /// Takes the delivery out, to settle it.
    pub fn take(&self) -> Option<Delivery> {
        self.lock().take()
    }

    /// Whether a delivery is waiting.
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
    /// Another answer that reports the success, not handed over yet.
    OtherAnswer,
    HandedOver,
    Settled,
}

impl Delivery {
    /// The delivery of a call's own answer.
    pub(super) fn of_own_answer(
        table: &Arc<Idempotency>,
        call_hash: KeyedFingerprint,
        id: Uuid,
        key: Option<KeyedFingerprint>,
        forced: Option<Uuid>,
        names: Names,
    ) -> Self {
        // `hand_over` learns it from the table.
        let replaces_unkeyed = false;
        Self {
            table: table.clone(),
            call_hash,
            id,
            key,
            forced,
            replaces_unkeyed,
            names,
            step: Step::OwnAnswer,
        }
    }

    /// The delivery of another answer that reports the success of the call `id`: a replay, or the refusal of an equal call.
    /// `caller` is the call that gets this answer.
    pub(super) fn of_other_answer(
        table: &Arc<Idempotency>,
        call_hash: KeyedFingerprint,
        id: Uuid,
        caller: Call<'_>,
    ) -> Self {
        // Caller and route are the same for equal calls. `hand_over` learns the rest from the table.
        let names = Names { caller: Some(caller.caller.into()), route: Some(caller.route.into()) };
        let (table, key, forced, replaces_unkeyed) = (table.clone(), None, None, false);
        Self { table, call_hash, id, key, forced, replaces_unkeyed, names, step: Step::OtherAnswer }
    }

    /// Marks the answer as handed to a connection whose caller is there. If it reports an undelivered success, that ends the
    /// doubt, and the trail records it. [`Self::fail`] can still take this back.
    pub fn hand_over(&mut self) {
        match self.step {
            Step::OwnAnswer => {
                self.step = Step::HandedOver;
                let ended =
                    self.table.duplicates().end(self.call_hash, self.id, Completion::Succeeded, now());
                self.replaces_unkeyed = ended.is_some_and(|call| call.replaces_unkeyed);
            }
            Step::OtherAnswer => {
                // Settled, if the success is not an undelivered one: then there is nothing that a failed write could undo.
                self.step = Step::Settled;
                let delivered = self.table.duplicates().delivered(self.call_hash, self.id, now());
                if let Some(Duplicate { key, replaces_unkeyed, .. }) = delivered {
                    (self.key, self.replaces_unkeyed) = (key, replaces_unkeyed);
                    self.forced = self.table.audit.unresolved().get(self.id).and_then(|call| call.forced);
                    self.step = Step::HandedOver;
                    self.table.audit.event(DELIVERED, Map::from_iter([("id".to_owned(), self.id())]));
                }
            }
            Step::HandedOver | Step::Settled => {}
        }
    }

    /// Makes the success undelivered, and records that in the trail: an answer that was handed over could not be written, or the
    /// caller reset the connection right after it. An answer that was not handed over is treated as dropped.
    pub fn fail(mut self) {
        if self.step == Step::HandedOver {
            self.step = Step::Settled;
            let doubt = InDoubt { kind: InDoubtKind::Undelivered, since: now() };
            let Self { id, key, replaces_unkeyed, .. } = self;
            let call = Duplicate { id, key, caller: self.table.hash_of(self.caller()), replaces_unkeyed };
            self.table.duplicates().put_in_doubt(self.call_hash, call, doubt);
            self.record();
        }
    }

    /// Records in the trail that the success is undelivered, so that equal calls are refused after a restart as well.
    fn record(&self) {
        // The call hash is the fingerprint XOR the caller's hash. Mixed in once more, the hash cancels out, and what remains is the
        // fingerprint that the intent has.
        let print = self.table.call_hash_of(self.caller(), self.call_hash);
        let hex = |hash: KeyedFingerprint| format!("{:032x}", u128::from_be_bytes(hash));
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

// A connection that ends drops its `PendingDelivery`, and hyper drops the future of a request whose caller is gone. Both are
// noticed by this drop only.
impl Drop for Delivery {
    fn drop(&mut self) {
        if self.step == Step::OwnAnswer {
            let undelivered = Completion::InDoubt(InDoubtKind::Undelivered);
            self.table.duplicates().end(self.call_hash, self.id, undelivered, now());
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

    /// A replay of a success with a key is handed over, and then cannot be written. The second record of the success must name
    /// what the first one did, or a restart would compare it as another call.
    #[test]
    fn undelivered_replay_records_the_key_and_the_forced_call() {
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
        let (call_hash, id, key) = ([1; 16], Uuid::from_u128(1), Some([7; 16]));
        let (_, known) = table.compared_of("qa-console", call_hash, id, key);
        let doubt = InDoubt { kind: InDoubtKind::Undelivered, since: now() };
        table.duplicates().put_in_doubt(call_hash, known, doubt);
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
        let mut delivery = Delivery::of_other_answer(&table, call_hash, id, caller);
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
