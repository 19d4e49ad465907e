//! Digests: 128 bits where they are cache keys, SHA-256 in hex where people and other tools compare them.
//!
//! Cache keys have 128 bits because a 64-bit hash could collide among millions of texts and return another item's vector.

use sha2::{Digest as _, Sha256};
use std::{
    fmt,
    hash::{Hash, Hasher},
    marker::PhantomData,
};

/// 128 bits that identify a `T`: an item text, an encoder, a tower. Digests of different things are different types, so that
/// one cannot be looked up in place of another. Displayed as 32 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Digest<T> {
    bytes: [u8; 16],
    identified: PhantomData<T>,
}

impl<T> Digest<T> {
    /// The size of every digest in bytes.
    pub const N_BYTES: usize = 16;

    /// Wraps bytes that come from a hash function or a file.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Digest { bytes, identified: PhantomData }
    }

    /// The first 128 bits of the hash of everything `hasher` was given.
    pub fn from_blake3(hasher: &blake3::Hasher) -> Self {
        let mut bytes = [0; 16];
        hasher.finalize_xof().fill(&mut bytes);
        Digest::from_bytes(bytes)
    }

    /// The first 128 bits of the hash of everything `hasher` was given.
    pub fn from_sha256(hasher: Sha256) -> Self {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hasher.finalize()[..16]);
        Digest::from_bytes(bytes)
    }

    /// The bytes, in the order of the hex digits.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.bytes
    }
}

impl<T> Hash for Digest<T> {
    /// Half of a digest is as good a hash as all of it, and one word is hashed faster than 16 bytes.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let [low, ..] = self.bytes.as_chunks().0 else { return };
        state.write_u64(u64::from_le_bytes(*low));
    }
}

impl<T> fmt::Display for Digest<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.bytes))
    }
}

impl<T> fmt::Debug for Digest<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Formats bytes as lower-case hex, as `sha256sum` prints them.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 0xf)]));
    }
    text
}

/// The SHA-256 of `bytes`, in hex.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Anything;

    #[test]
    fn a_digest_is_displayed_as_its_bytes_in_hex() {
        let mut bytes = [0; 16];
        bytes[0] = 0x0f;
        bytes[15] = 0xa0;
        let digest = Digest::<Anything>::from_bytes(bytes);
        assert_eq!(digest.to_string(), "0f0000000000000000000000000000a0");
        assert_eq!(format!("{digest:?}"), digest.to_string());
        assert_eq!(digest.as_bytes(), &bytes);
    }

    #[test]
    fn sha256_equals_what_sha256sum_prints() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_hex(b"abc"), expected);
    }
}
