//! One completion of a request while it is generated.

use tandem_engine::sampling::{Sampler, SamplingError};
use tandem_proto::ids::{ChoiceIdx, PageId, RequestId, TokenId};
use tandem_proto::wire::{Finish, Generation, Sampled, Tokens};

/// A completion: its page table, what it has generated, and what of that the router has not been told.
pub(crate) struct Completion {
    pub(crate) choice: ChoiceIdx,
    pub(crate) pages: Vec<PageId>,
    sampler: Sampler,
    /// The token to compute next; it has no KV yet.
    last: TokenId,
    /// Where `last` stands in the sequence.
    position: u32,
    generated: u32,
    max_tokens: u32,
    stop_tokens: Vec<TokenId>,
    /// Tokens before this were told to the router.
    told: u32,
    untold: Vec<Sampled>,
    finish: Option<Finish>,
}

impl Completion {
    /// Goes on from the first token, which the prefill node chose.
    pub(crate) fn start(
        choice: ChoiceIdx,
        prompt: &[TokenId],
        generation: &Generation,
        max_tokens: u32,
        pages: Vec<PageId>,
        first: Sampled,
    ) -> Result<Completion, SamplingError> {
        let mut completion = Completion {
            choice,
            pages,
            sampler: Sampler::new(&generation.sampling, choice, prompt)?,
            last: first.token,
            position: prompt.len() as u32 - 1,
            generated: 0,
            max_tokens,
            stop_tokens: generation.stop_tokens.clone(),
            told: 0,
            untold: Vec::new(),
            finish: None,
        };
        completion.sampler.observe(first.token);
        completion.take(first);
        Ok(completion)
    }

    /// The token to compute, and its position.
    pub(crate) fn next(&self) -> (&TokenId, u32) {
        (&self.last, self.position)
    }

    /// Chooses the next token from the logits of the last.
    pub(crate) fn choose(&mut self, logits: &mut [f32]) -> Result<(), SamplingError> {
        let sampled = self.sampler.sample(logits, self.generated)?;
        self.take(sampled);
        Ok(())
    }

    /// Whether the last token is out.
    pub(crate) fn is_finished(&self) -> bool {
        self.finish.is_some()
    }

    /// What the router has not been told; `told` confirms it.
    pub(crate) fn news(&self, request: RequestId) -> Option<Tokens> {
        (!self.untold.is_empty()).then(|| Tokens {
            request,
            choice: self.choice,
            start: self.told,
            tokens: self.untold.clone(),
            finish: self.finish,
        })
    }

    /// The router was told all there was.
    pub(crate) fn told(&mut self) {
        self.told += self.untold.len() as u32;
        self.untold.clear();
    }

    fn take(&mut self, sampled: Sampled) {
        self.last = sampled.token;
        self.position += 1;
        self.generated += 1;
        self.finish = if self.stop_tokens.contains(&sampled.token) {
            Some(Finish::Stop)
        } else if self.generated >= self.max_tokens {
            Some(Finish::Length)
        } else {
            None
        };
        self.untold.push(sampled);
    }
}
