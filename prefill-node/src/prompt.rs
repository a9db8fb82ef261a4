//! A prompt as the node holds it.

use tandem_proto::ids::{NodeId, RequestId, Time, TokenId};
use tandem_proto::keys::ChunkKey;
use tandem_proto::wire::{Destination, Generation, Submit};

/// What is to be computed, for whom, and until when.
#[derive(Debug)]
pub(crate) struct Prompt {
    pub(crate) request: RequestId,
    pub(crate) router: NodeId,
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) generation: Generation,
    pub(crate) decode: Option<Destination>,
    pub(crate) salt: Vec<u8>,
    /// When the handoff must be complete.
    pub(crate) deadline: Time,
    /// Of its whole chunks. The node knows them once it has accepted the prompt.
    pub(crate) keys: Vec<ChunkKey>,
    /// Chunks of it are on their way from slower tiers. Until then it waits for them.
    pub(crate) awaits: Option<Time>,
}

impl Prompt {
    pub(crate) fn new(submit: Submit, router: NodeId, now: Time) -> Prompt {
        Prompt {
            request: submit.request,
            router,
            tokens: submit.prompt,
            generation: submit.generation,
            decode: submit.decode,
            salt: submit.salt,
            deadline: now.after_us(u64::from(submit.handoff_timeout_ms) * 1000),
            keys: Vec::new(),
            awaits: None,
        }
    }

    /// The chunks that need not be computed. The last token always is: its logits choose the first one.
    pub(crate) fn reusable(&self, chunk_tokens: u32) -> &[ChunkKey] {
        &self.keys[..((self.tokens.len() as u32 - 1) / chunk_tokens) as usize]
    }
}
