//! Keyed hashes (HMAC-SHA-256), and bytes as hex: the chain of the trail, digests of bodies, and marks of what is to be recognised.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// A record's hash.
pub type Hash = [u8; 32];

/// The keyed digest of something that is to be recognised, cut to 128 bits.
pub type Mark = [u8; 16];

/// The key of a chain, and those derived from it for digests of bodies and for marks.
pub struct Keys {
    chain: Hmac<Sha256>,
    digest: Hmac<Sha256>,
    mark: Hmac<Sha256>,
}

impl Keys {
    /// The shortest key, in bytes.
    pub const SHORTEST: usize = 32;

    /// From the key of a chain; `None` if it is shorter than [`Keys::SHORTEST`].
    pub fn new(key: &[u8]) -> Option<Self> {
        if key.len() < Self::SHORTEST {
            return None;
        }
        let chain = keyed(key);
        let digest = keyed(&hmac(&chain, |mac| mac.update(b"ccsqm-gateway digest of bodies")));
        let mark = keyed(&hmac(&chain, |mac| mac.update(b"ccsqm-gateway marks")));
        Some(Self { chain, digest, mark })
    }

    /// The keyed digest of a body.
    pub fn digest(&self, body: &[u8]) -> Hash {
        hmac(&self.digest, |mac| mac.update(body))
    }

    /// The mark of some parts, each with its length in front, so that none runs into the next.
    pub fn mark(&self, parts: &[&[u8]]) -> Mark {
        let whole = hmac(&self.mark, |mac| {
            for part in parts {
                mac.update(&(part.len() as u64).to_be_bytes());
                mac.update(part);
            }
        });
        let mut mark = Mark::default();
        mark.copy_from_slice(&whole[..16]);
        mark
    }

    /// The hash of a record behind one of the hash `previous`: `parts` are its bytes before `,"hash":`.
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

/// Never inlined, so that a profile tells hashing from the rest.
#[inline(never)]
fn hmac(key: &Hmac<Sha256>, feed: impl FnOnce(&mut Hmac<Sha256>)) -> Hash {
    let mut mac = key.clone();
    feed(&mut mac);
    mac.finalize().into_bytes().into()
}

/// Bytes from just so many hex digits.
pub fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    if text.len() != 2 * N {
        return None;
    }
    let digit = |byte: u8| u8::try_from(char::from(byte).to_digit(16)?).ok();
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// Lower-case hex of a hash.
pub fn hex(hash: &Hash) -> String {
    String::from_utf8_lossy(&to_hex(hash)).into_owned()
}

/// A hash in lower-case hex.
pub fn to_hex(hash: &Hash) -> [u8; 64] {
    let mut text = [0; 64];
    write_hex(hash, &mut text);
    text
}

/// Appends a mark in lower-case hex.
pub fn push_hex(mark: &Mark, text: &mut Vec<u8>) {
    let mut hex = [0; 32];
    write_hex(mark, &mut hex);
    text.extend_from_slice(&hex);
}

/// A mark in the place of what it hides.
pub fn hidden(mark: Mark) -> String {
    format!("hmac:{:032x}", u128::from_be_bytes(mark))
}

/// Writes bytes in lower-case hex. Without a table, so that many are written at once.
#[inline(always)]
fn write_hex(bytes: &[u8], text: &mut [u8]) {
    let digit = |number: u8| number + b'0' + if number > 9 { b'a' - b'9' - 1 } else { 0 };
    for (pair, byte) in text.chunks_exact_mut(2).zip(bytes) {
        pair[0] = digit(byte >> 4);
        pair[1] = digit(byte & 15);
    }
}
