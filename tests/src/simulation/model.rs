//! A model whose KV is a chain of hashes and whose next token depends on every byte of it.

use super::kernels::SimPages;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tandem_engine::{Engine, EngineError, Logits, ModelInfo, Progress, Sequence};
use tandem_kernels::KvPages;
use tandem_proto::ids::{LayerIdx, PageId, TokenId};
use tandem_proto::keys::Fingerprint;
use tandem_proto::layout::{KvDtype, KvShape};

/// Tokens of the model's vocabulary.
pub(super) const VOCAB: u32 = 61;

/// Small enough that thousands of runs take seconds; every dimension is more than one.
pub(super) const SHAPE: KvShape =
    KvShape { layers: 3, kv_heads: 2, head_dim: 2, page_tokens: 4, chunk_tokens: 8, dtype: KvDtype::F32 };

pub(super) const FINGERPRINT: Fingerprint = Fingerprint([7; 32]);

const ROW_BYTES: usize = 8;

fn mix(a: u64, b: u64) -> u64 {
    let mut z = (a ^ b.rotate_left(32)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// One row of KV at the position whose chain is `chain`.
fn row(chain: u64, layer: u32, head: u32, value: bool) -> [u8; ROW_BYTES] {
    mix(chain, u64::from(layer) << 2 | u64::from(head) << 1 | u64::from(value)).to_le_bytes()
}

/// Visits the rows of one position in a fixed order.
fn rows() -> impl Iterator<Item = (u32, u32, bool)> {
    (0..SHAPE.layers).flat_map(|layer| {
        (0..SHAPE.kv_heads).flat_map(move |head| [false, true].map(move |value| (layer, head, value)))
    })
}

fn next_token(digest: u64) -> TokenId {
    TokenId((mix(digest, 7) % u64::from(VOCAB)) as u32)
}

/// What the model says after `prompt`, computed without any KV.
pub(super) fn expected(prompt: &[TokenId], count: usize) -> Vec<TokenId> {
    let (mut before, mut digest) = (0, 0);
    let mut take = |token: TokenId| {
        let chain = chain(before, token);
        for (layer, head, value) in rows() {
            digest = mix(digest, u64::from_le_bytes(row(chain, layer, head, value)));
        }
        before = u64::from_le_bytes(row(chain, 0, 0, false));
        next_token(digest)
    };
    let mut next = prompt.iter().fold(TokenId(0), |_, token| take(*token));
    let mut tokens = Vec::with_capacity(count);
    for _ in 0..count {
        tokens.push(next);
        next = take(next);
    }
    tokens
}

/// The chain at a position, from the first row of the position before and the token: so wrong KV anywhere
/// makes wrong KV everywhere after it.
fn chain(before: u64, token: TokenId) -> u64 {
    mix(before, u64::from(token.0) + 1)
}

/// The model as an engine over paged KV.
pub(super) struct ChainEngine {
    info: ModelInfo,
    /// Tokens that it and others computed.
    computed: Arc<AtomicU64>,
}

impl ChainEngine {
    pub(super) fn new(max_positions: u32, computed: Arc<AtomicU64>) -> ChainEngine {
        ChainEngine {
            computed,
            info: ModelInfo {
                name: "chain".into(),
                architecture: "chain".into(),
                vocab_size: VOCAB,
                max_positions,
                kv: SHAPE,
                fingerprint: FINGERPRINT,
                eos: Vec::new(),
                bos: None,
                parameters: 0,
                layer_parameters: 0,
            },
        }
    }
}

fn place(pages: &[PageId], position: u32) -> (PageId, std::ops::Range<usize>) {
    let at = (position % SHAPE.page_tokens) as usize * ROW_BYTES;
    (pages[(position / SHAPE.page_tokens) as usize], at..at + ROW_BYTES)
}

fn read(kv: &KvPages, pages: &[PageId], position: u32, (layer, head, value): (u32, u32, bool)) -> u64 {
    let (page, at) = place(pages, position);
    u64::from_le_bytes(kv.head(LayerIdx(layer), page, head, value)[at].try_into().expect("a row"))
}

impl Engine for ChainEngine {
    type Pages = SimPages;

    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn step(
        &mut self,
        batch: &[Sequence<'_>],
        kv: &mut SimPages,
        progress: &mut dyn FnMut(Progress, &mut SimPages),
    ) -> Result<Logits, EngineError> {
        let tokens: usize = batch.iter().map(|sequence| sequence.tokens.len()).sum();
        self.computed.fetch_add(tokens as u64, Ordering::Relaxed);
        let before_step = kv.lock();
        let chains: Vec<Vec<u64>> = batch
            .iter()
            .map(|sequence| {
                let mut before = match sequence.start.checked_sub(1) {
                    Some(position) => read(&before_step, sequence.pages, position, (0, 0, false)),
                    None => 0,
                };
                let chain_on = |token: &TokenId| {
                    let chain = chain(before, *token);
                    before = u64::from_le_bytes(row(chain, 0, 0, false));
                    chain
                };
                sequence.tokens.iter().map(chain_on).collect()
            })
            .collect();
        drop(before_step);
        for layer in 0..SHAPE.layers {
            let mut pages = kv.lock();
            for (sequence, chains) in batch.iter().zip(&chains) {
                for (position, chain) in (sequence.start..).zip(chains) {
                    let (page, at) = place(sequence.pages, position);
                    for (_, head, value) in rows().filter(|(of, ..)| *of == layer) {
                        let bytes = row(*chain, layer, head, value);
                        pages.head_mut(LayerIdx(layer), page, head, value)[at.clone()]
                            .copy_from_slice(&bytes);
                    }
                }
            }
            drop(pages);
            progress(Progress::Layer(LayerIdx(layer)), kv);
        }
        progress(Progress::Waiting, kv);
        let pages = kv.lock();
        let logits: Vec<f32> = batch
            .iter()
            .filter(|sequence| sequence.logits)
            .flat_map(|sequence| {
                let end = sequence.start + sequence.tokens.len() as u32;
                let digest = (0..end)
                    .flat_map(|position| rows().map(move |place| (position, place)))
                    .fold(0, |digest, (position, place)| {
                        mix(digest, read(&pages, sequence.pages, position, place))
                    });
                let mut logits = vec![0.0; VOCAB as usize];
                logits[next_token(digest).0 as usize] = 1.0;
                logits
            })
            .collect();
        Ok(Logits::new(logits, VOCAB as usize))
    }
}
