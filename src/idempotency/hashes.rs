//! The keyed hashes by which calls are found again: fingerprint, call hash and key hash.
//!
//! The tables hold hashes instead of texts, so that an entry has a fixed size. Each hash is computed with a secret key and
//! covers the route. Key hash and call hash cover the caller, too, so that no caller meets an entry of another one.

use std::hash::BuildHasher;
use std::sync::atomic::Ordering;

use uuid::Uuid;

use super::duplicates::Duplicate;
use super::refusal::Refused;
use super::{Call, Idempotency};
use crate::config::WithoutKey;
use crate::keyed_hash::KeyedFingerprint;

impl Idempotency {
    /// Returns the key hash of a key. Fails until the rebuild is over.
    pub(super) fn key_hash(&self, call: Call<'_>, key: &[u8]) -> Result<KeyedFingerprint, Refused> {
        // A key that is not found may be in the part of the trail that is not read yet.
        if !self.is_rebuilt.load(Ordering::Acquire) {
            return Err(Refused::Rebuilding);
        }
        // Caller and route belong to the hash: no caller can claim, block or replay a key of another one.
        Ok(self.hash_keys.fingerprint(&[b"key", call.caller.as_bytes(), call.route.as_bytes(), key]))
    }

    /// The fingerprint of a call: equal for equal bodies, operators and routes. Written to the trail.
    pub(super) fn print(&self, call: Call<'_>) -> KeyedFingerprint {
        self.hash_keys.fingerprint(&[b"print", call.digest, call.operator.as_bytes(), call.route.as_bytes()])
    }

    /// Returns the call hash of a call and its entry for the table of equal calls. `None` if `without_key` compares no calls.
    ///
    /// Fails if a key is required and there is none, and under `block` until the rebuild is over.
    pub(super) fn compared(
        &self,
        call: Call<'_>,
        print: KeyedFingerprint,
        key: Option<KeyedFingerprint>,
    ) -> Result<Option<(KeyedFingerprint, Duplicate)>, Refused> {
        match self.without_key {
            WithoutKey::RequireKey if key.is_none() => Err(Refused::NoKey),
            // Under `block` a success refuses an equal call, and only the rebuild reads the successes of earlier processes. A
            // call that was let through before the end of the rebuild could repeat one of them.
            WithoutKey::Block if !self.is_rebuilt.load(Ordering::Acquire) => Err(Refused::Rebuilding),
            WithoutKey::RequireKey | WithoutKey::Off => Ok(None),
            WithoutKey::Guard | WithoutKey::Block | WithoutKey::Warn => {
                Ok(Some(self.compared_of(call.caller, print, call.id, key)))
            }
        }
    }

    /// Returns the call hash: the fingerprint combined with the caller. For memory only, never for the trail: the hash of
    /// the caller has another seed in each process.
    pub(super) fn call_hash_of(&self, caller: &str, print: KeyedFingerprint) -> KeyedFingerprint {
        salted(print, self.hasher.hash_one(caller))
    }

    pub(super) fn compared_of(
        &self,
        caller: &str,
        print: KeyedFingerprint,
        id: Uuid,
        key: Option<KeyedFingerprint>,
    ) -> (KeyedFingerprint, Duplicate) {
        // Hashed once for both uses, since every call comes here.
        let hash = self.hasher.hash_one(caller);
        (salted(print, hash), Duplicate { id, key, caller: half(hash), replaces_unkeyed: false })
    }

    /// The hash under which a caller's share of the tables is counted.
    pub(super) fn hash_of(&self, caller: &str) -> u32 {
        half(self.hasher.hash_one(caller))
    }
}

/// A fingerprint with its caller's hash mixed in, so that equal calls of two callers differ.
fn salted(print: KeyedFingerprint, caller: u64) -> KeyedFingerprint {
    // In whole words instead of byte by byte, since every call comes here.
    let caller = u128::from(caller);
    (u128::from_ne_bytes(print) ^ (caller << 64 | caller)).to_ne_bytes()
}

// Half is enough: callers whose hashes collide share one share of a table. Which calls are equal does not depend on it.
#[expect(clippy::cast_possible_truncation, reason = "half of a hash")]
fn half(hash: u64) -> u32 {
    hash as u32
}
