//! What a step is, whichever engine computes it, and which steps are refused.

use crate::backend::Span;
use crate::{EngineError, MAX_STEP_TOKENS, ModelInfo, Sequence};
use tandem_kernels::Paged;
use tandem_proto::ids::{PageId, TokenId};

/// What a step computes.
pub(crate) struct Step<'a> {
    /// New tokens of all sequences, one sequence after the other.
    pub(crate) tokens: Vec<TokenId>,
    /// The sequences.
    pub(crate) spans: Vec<Span<'a>>,
    /// Which sequences want the logits of their last token.
    pub(crate) wanted: Vec<usize>,
}

impl<'a> Step<'a> {
    pub(crate) fn of(batch: &[Sequence<'a>]) -> Step<'a> {
        let mut step =
            Step { tokens: Vec::new(), spans: Vec::with_capacity(batch.len()), wanted: Vec::new() };
        for (index, s) in batch.iter().enumerate() {
            let (row, tokens) = (step.tokens.len(), s.tokens.len());
            step.spans.push(Span { row, tokens, start: s.start, pages: s.pages });
            step.tokens.extend_from_slice(s.tokens);
            if s.logits {
                step.wanted.push(index);
            }
        }
        step
    }

    /// The sequences whose last rows alone go on after the last layer's keys and values; none if all rows do.
    pub(crate) fn chosen(&self) -> &[usize] {
        if self.wanted.len() == self.tokens.len() { &[] } else { &self.wanted }
    }
}

/// Refuses a step that the model or the pages do not fit.
pub(crate) fn check(info: &ModelInfo, batch: &[Sequence<'_>], kv: &impl Paged) -> Result<(), EngineError> {
    let ModelInfo { vocab_size, max_positions, kv: shape, .. } = *info;
    if *kv.shape() != shape {
        return Err(EngineError::WrongPages);
    }
    let tokens = batch.iter().map(|s| s.tokens.len()).sum();
    if tokens > MAX_STEP_TOKENS {
        return Err(EngineError::StepTooLarge { tokens });
    }
    let mut written: Vec<PageId> = Vec::new();
    for (sequence, s) in batch.iter().enumerate() {
        if s.tokens.is_empty() {
            return Err(EngineError::NoTokens { sequence });
        }
        if let Some(token) = s.tokens.iter().find(|t| t.0 >= vocab_size) {
            return Err(EngineError::NoSuchToken { sequence, token: *token, vocab_size });
        }
        let end = u64::from(s.start) + s.tokens.len() as u64;
        if end > u64::from(max_positions) {
            return Err(EngineError::TooLong { sequence, end, max_positions });
        }
        let end = end as u32;
        let needed = shape.pages(end);
        let Some(pages) = s.pages.get(..needed as usize) else {
            return Err(EngineError::PageTable { sequence, pages: s.pages.len(), needed, end });
        };
        if let Some(page) = pages.iter().find(|p| p.0 >= kv.pages()) {
            return Err(EngineError::NoSuchPage { sequence, page: *page, pages: kv.pages() });
        }
        written.extend_from_slice(&pages[(s.start / shape.page_tokens) as usize..]);
    }
    written.sort_unstable();
    match written.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(EngineError::PageShared { page: pair[0] }),
        None => Ok(()),
    }
}
