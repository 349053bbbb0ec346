//! Keyed hashes (HMAC-SHA-256) and hex: for the hash chain of the trail, for digests of bodies, and for
//! fingerprints by which calls and values are recognised.
//!
//! Without the key neither a chain can be continued nor a guessed value be confirmed by its digest. Where the
//! key is stored, and how a record is linked, is the business of [`crate::audit::chain`].

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// The hash of a record, or the digest of a body.
pub type Hash = [u8; 32];

/// A keyed fingerprint: 128 bits of an HMAC. It recognises equal values without revealing them.
pub type KeyedFingerprint = [u8; 16];

/// The key of a chain, and the keys derived from it for digests of bodies and for fingerprints.
// Three keys, so that a digest can never be taken for the hash of a record, whatever a caller sends as its
// body.
pub struct Keys {
    chain: Hmac<Sha256>,
    digest: Hmac<Sha256>,
    fingerprint_key: Hmac<Sha256>,
}

impl Keys {
    /// The length of the shortest key, in bytes.
    pub const SHORTEST: usize = 32;

    /// Derives the keys from the key of a chain; `None` if it is shorter than [`Keys::SHORTEST`].
    pub fn new(key: &[u8]) -> Option<Self> {
        if key.len() < Self::SHORTEST {
            return None;
        }
        let chain = keyed(key);
        let digest = keyed(&hmac(&chain, |mac| mac.update(b"ccsqm-gateway digest of bodies")));
        // The label stays, whatever fingerprints are called: another one would forget all keys of a trail.
        let fingerprint_key = keyed(&hmac(&chain, |mac| mac.update(b"ccsqm-gateway marks")));
        Some(Self { chain, digest, fingerprint_key })
    }

    /// Returns the keyed digest of a body.
    pub fn digest(&self, body: &[u8]) -> Hash {
        hmac(&self.digest, |mac| mac.update(body))
    }

    /// Returns the fingerprint of some parts. Each is hashed with its length, so that moving bytes from one
    /// part to the next changes the result.
    pub fn fingerprint(&self, parts: &[&[u8]]) -> KeyedFingerprint {
        let whole = hmac(&self.fingerprint_key, |mac| {
            for part in parts {
                mac.update(&(part.len() as u64).to_be_bytes());
                mac.update(part);
            }
        });
        let mut fingerprint = KeyedFingerprint::default();
        fingerprint.copy_from_slice(&whole[..16]);
        fingerprint
    }

    /// Returns the hash of a record that follows one with the hash `previous`. `parts` are its bytes before
    /// `,"hash":`.
    pub fn hash(&self, previous: &Hash, parts: &[&[u8]]) -> Hash {
        hmac(&self.chain, |mac| {
            mac.update(previous);
            parts.iter().for_each(|part| mac.update(part));
        })
    }
}

#[expect(clippy::expect_used, reason = "HMAC takes keys of any length")]
fn keyed(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("any length")
}

// Not inlined, so that a profile shows hashing apart from the rest.
#[inline(never)]
fn hmac(key: &Hmac<Sha256>, feed: impl FnOnce(&mut Hmac<Sha256>)) -> Hash {
    // The clone contains the key already hashed into the state, which saves two blocks of SHA-256 for each
    // HMAC.
    let mut mac = key.clone();
    feed(&mut mac);
    mac.finalize().into_bytes().into()
}

/// Parses exactly `2 * N` hex digits of either case; `None` for anything else.
pub fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    if text.len() != 2 * N {
        return None;
    }
    // Digit by digit: `u8::from_str_radix` would accept "+f" for two digits.
    let digit = |byte: u8| u8::try_from(char::from(byte).to_digit(16)?).ok();
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// Returns a hash in lower-case hex.
pub fn hex(hash: &Hash) -> String {
    String::from_utf8_lossy(&to_hex(hash)).into_owned()
}

/// Returns a hash in lower-case hex, without allocating.
pub fn to_hex(hash: &Hash) -> [u8; 64] {
    let mut text = [0; 64];
    write_hex(hash, &mut text);
    text
}

/// Appends a fingerprint in lower-case hex.
pub fn push_hex(fingerprint: &KeyedFingerprint, text: &mut Vec<u8>) {
    let mut hex = [0; 32];
    write_hex(fingerprint, &mut hex);
    text.extend_from_slice(&hex);
}

/// The text that replaces a hidden value: its fingerprint with the prefix `hmac:`.
pub fn hidden(fingerprint: KeyedFingerprint) -> String {
    format!("hmac:{:032x}", u128::from_be_bytes(fingerprint))
}

/// Writes bytes in lower-case hex. `text` must have twice the length of `bytes`.
// Arithmetic and no table: the compiler then writes many digits in one instruction.
#[inline(always)]
fn write_hex(bytes: &[u8], text: &mut [u8]) {
    let digit = |number: u8| number + b'0' + if number > 9 { b'a' - b'9' - 1 } else { 0 };
    for (pair, byte) in text.chunks_exact_mut(2).zip(bytes) {
        pair[0] = digit(byte >> 4);
        pair[1] = digit(byte & 15);
    }
}
