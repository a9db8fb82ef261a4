//! The fingerprint of a model: equal on two nodes exactly when they compute the same KV.

use crate::config::Config;
use crate::weights::Weights;
use tandem_proto::keys::Fingerprint;
use tandem_proto::layout::{KvDtype, PACKED_LAYOUT_VERSION};

/// Counts changes of the arithmetic that change bits of KV.
const ARITHMETIC_VERSION: u32 = 1;
/// Tensors of up to this size in all are hashed whole, at some 2 GB/s a thread.
const WHOLE_BYTES: u64 = 4 << 30;
/// Of larger models, so much at the start of every stretch of `STRIDE_BYTES` of each tensor is hashed.
const SAMPLE_BYTES: usize = 64 << 10;
const STRIDE_BYTES: usize = 4 << 20;

/// Hashes the weights that the model uses, its configuration, the KV's dtype and the packed layout.
///
/// Of models beyond 4 GiB a sixty-fourth part of each tensor is hashed, at fixed places: fine-tuning changes
/// every tensor, so it shows; a single number changed by hand may not.
pub(crate) fn fingerprint(config: &Config, weights: &Weights, kv: KvDtype) -> Fingerprint {
    let mut hasher = blake3::Hasher::new_derive_key("tandem model fingerprint v1");
    let mut text = |text: String| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    text(format!("layout {PACKED_LAYOUT_VERSION} arithmetic {ARITHMETIC_VERSION} kv {kv:?}"));
    text(format!("{config:?}"));
    let total: u64 = weights.used().map(|(.., data)| data.len() as u64).sum();
    for (name, dtype, shape, data) in weights.used() {
        let header = format!("{name} {dtype:?} {shape:?}");
        hasher.update(&(header.len() as u64).to_le_bytes());
        hasher.update(header.as_bytes());
        if total <= WHOLE_BYTES {
            hasher.update(data);
        } else {
            for stretch in data.chunks(STRIDE_BYTES) {
                hasher.update(&stretch[..stretch.len().min(SAMPLE_BYTES)]);
            }
        }
    }
    Fingerprint(*hasher.finalize().as_bytes())
}
