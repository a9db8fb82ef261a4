//! A prompt as the node holds it.

use tandem_proto::ids::{NodeId, RequestId, Time, TokenId};
use tandem_proto::wire::{Destination, Generation, Submit};

/// What is to be computed, for whom, and until when.
#[derive(Debug)]
pub struct Prompt {
    pub request: RequestId,
    pub router: NodeId,
    pub tokens: Vec<TokenId>,
    pub generation: Generation,
    pub decode: Option<Destination>,
    pub salt: Vec<u8>,
    /// When the handoff must be complete.
    pub deadline: Time,
}

impl Prompt {
    pub fn new(submit: Submit, router: NodeId, now: Time) -> Prompt {
        Prompt {
            request: submit.request,
            router,
            tokens: submit.prompt,
            generation: submit.generation,
            decode: submit.decode,
            salt: submit.salt,
            deadline: now.after_us(u64::from(submit.handoff_timeout_ms) * 1000),
        }
    }
}
