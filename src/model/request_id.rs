//! The ids of requests.

use std::cell::RefCell;
use std::fmt;
use std::hash::{BuildHasher, RandomState};

use fastrand::Rng;
use uuid::{Builder, Uuid};

use super::outcome::Outcome;
use crate::clock;

thread_local! {
    /// Seeded by the system's randomness: ids must differ, and nobody need be unable to guess them.
    static RANDOM: RefCell<Rng> = RefCell::new(Rng::with_seed(RandomState::new().hash_one(())));
}

/// A request's id: a UUIDv7, and its text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RequestId {
    uuid: Uuid,
    text: [u8; 36],
}

impl RequestId {
    /// A new one, of this moment.
    #[expect(clippy::new_without_default, reason = "each is another")]
    pub fn new() -> Self {
        let random = RANDOM.with_borrow_mut(|generator| generator.u128(..).to_ne_bytes());
        let [random @ .., _, _, _, _, _, _] = random;
        Builder::from_unix_timestamp_millis(clock::unix_nanos() / 1_000_000, &random).into_uuid().into()
    }

    /// The same in 16 bytes.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Its text, as bytes of ASCII.
    pub fn as_bytes(&self) -> &[u8; 36] {
        &self.text
    }

    /// Its text.
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

/// An earlier call that a call repeats or equals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstCall {
    /// Its request id, without the text.
    pub id: Uuid,
    /// What became of it: `unknown` while it is at work or in doubt.
    pub outcome: Outcome,
}

impl FirstCall {
    /// Its request id.
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
