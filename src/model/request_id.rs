//! Request ids: UUIDv7 (RFC 9562), which sort by time. They are unique, but not secret.

use std::cell::RefCell;
use std::fmt;
use std::hash::{BuildHasher, RandomState};

use fastrand::Rng;
use uuid::{Builder, Uuid};

use super::outcome::Outcome;
use crate::clock;

thread_local! {
    // A small generator: a cryptographic one took 300 instructions a request, and an id that can be guessed gives no access.
    /// The random part of ids, seeded for each thread by the system's randomness.
    static RANDOM: RefCell<Rng> = RefCell::new(Rng::with_seed(RandomState::new().hash_one(())));
}

/// The id of a request, a UUIDv7, with its text.
// The text is made once: headers, the audit record and log lines use it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RequestId {
    uuid: Uuid,
    text: [u8; 36],
}

impl RequestId {
    /// Returns a new id with the present time, as the thread's turn sees it.
    #[expect(clippy::new_without_default, reason = "each is another")]
    pub fn new() -> Self {
        let random = RANDOM.with_borrow_mut(|generator| generator.u128(..).to_ne_bytes());
        let [random @ .., _, _, _, _, _, _] = random;
        Builder::from_unix_timestamp_millis(clock::unix_nanos() / 1_000_000, &random).into_uuid().into()
    }

    /// The id in 16 bytes.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// The text, with hyphens and in lower case, as ASCII.
    pub fn as_bytes(&self) -> &[u8; 36] {
        &self.text
    }

    /// The text, with hyphens and in lower case.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.text).unwrap_or_default()
    }
}

impl From<Uuid> for RequestId {
    fn from(uuid: Uuid) -> Self {
        let mut text = [0; 36];
        uuid.hyphenated().encode_lower(&mut text);
        Self { uuid, text }
    }
}

/// The earlier call that a call repeats (by its key) or equals (by its bytes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstCall {
    /// Its request id. Without the text, of which tables with many calls would hold 36 bytes each.
    pub id: Uuid,
    /// Its outcome; [`Outcome::Unknown`] while it is in progress or unresolved.
    pub outcome: Outcome,
}

impl FirstCall {
    /// The request id with its text.
    pub fn request_id(&self) -> RequestId {
        self.id.into()
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
