//! Chunk keys: the names under which KV is the same bytes on every node and after every restart.

use crate::ids::TokenId;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What a chunk's bytes depend on besides tokens: weights, configuration, KV dtype, RoPE, quantization and
/// the packed layout's version. Made by the engine that loads the model.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(pub [u8; 32]);

/// The key of a chunk: a hash over the fingerprint, the tenant's salt and every token up to the chunk's end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ChunkKey(pub [u8; 32]);

fn hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|b| write!(f, "{b:02x}"))
}
impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}
impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0[..6], f)
    }
}
impl fmt::Display for ChunkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}
impl fmt::Debug for ChunkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0[..6], f)
    }
}

/// The keys of the full chunks of `tokens`, in order. A partial last chunk has none.
///
/// Each key hashes the key before it with its own tokens, so equal keys mean equal prefixes.
#[must_use]
pub fn chunk_keys(
    fingerprint: Fingerprint,
    salt: &[u8],
    chunk_tokens: u32,
    tokens: &[TokenId],
) -> Vec<ChunkKey> {
    let mut root = blake3::Hasher::new_derive_key("tandem chunk key v1");
    root.update(&fingerprint.0);
    root.update(&(salt.len() as u64).to_le_bytes());
    root.update(salt);
    root.update(&chunk_tokens.to_le_bytes());
    let mut parent = *root.finalize().as_bytes();
    tokens
        .chunks_exact(chunk_tokens.max(1) as usize)
        .map(|chunk| {
            let mut hasher = blake3::Hasher::new_keyed(&parent);
            for token in chunk {
                hasher.update(&token.0.to_le_bytes());
            }
            parent = *hasher.finalize().as_bytes();
            ChunkKey(parent)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(salt: &[u8], tokens: &[u32]) -> Vec<ChunkKey> {
        let tokens: Vec<_> = tokens.iter().copied().map(TokenId).collect();
        chunk_keys(Fingerprint([1; 32]), salt, 2, &tokens)
    }

    #[test]
    fn a_key_names_its_whole_prefix() {
        let a = keys(b"", &[1, 2, 3, 4, 5]);
        assert_eq!(a.len(), 2);
        assert_eq!(a[..1], keys(b"", &[1, 2, 9, 9])[..1]);
        assert_ne!(a[1], keys(b"", &[9, 2, 3, 4])[1]);
        assert_ne!(a[0], keys(b"tenant", &[1, 2])[0]);
        let other = chunk_keys(Fingerprint([2; 32]), b"", 2, &[TokenId(1), TokenId(2)]);
        assert_ne!(a[0], other[0]);
    }
}
