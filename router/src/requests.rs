//! One request's life: what the nodes send is put together into the text of each completion.
//!
//! Pure: messages in through `handle_*`, pieces out through [`Life::poll_piece`]. First tokens come from the
//! prefill node, the others from the decode node over another connection, so they may overtake the first;
//! both carry their index, which is all that order rests on.

use crate::openai::ApiError;
use crate::openai::logprobs::TokenLogprobs;
use crate::openai::params::Params;
use crate::openai::usage::Usage;
use std::collections::VecDeque;
use std::sync::Arc;
use tandem_proto::ids::TokenId;
use tandem_proto::wire::{
    CachedTokens, Finish, FirstTokens, Generation, MAX_PROMPT_TOKENS, MAX_TOKEN_LIST, Sampled,
    SamplingParams, Tokens,
};
use tandem_text::{Detokenizer, StopStrings, TextModel, TokenizerError};

/// A prompt and what to do with it, checked against model and cluster.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The prompt.
    pub prompt: Vec<TokenId>,
    /// What the nodes are told.
    pub generation: Generation,
    /// Strings that end a completion; only the router knows them.
    pub stop: Vec<String>,
    /// The stop string that was found is part of the text.
    pub include_stop: bool,
    /// Special tokens leave no text.
    pub skip_special_tokens: bool,
}

impl Plan {
    /// Puts a request, the model's defaults and the cluster's limits together. `param` is the field that the
    /// prompt came from, `max_len` the longest sequence that every node holds, `seed` is used when the
    /// request has none.
    ///
    /// # Errors
    /// When the prompt is empty, or does not fit together with its completion.
    pub fn new(
        model: &TextModel,
        params: &Params,
        prompt: Vec<TokenId>,
        param: &str,
        max_len: u32,
        seed: u64,
    ) -> Result<Plan, ApiError> {
        let defaults = &model.defaults;
        if prompt.is_empty() {
            return Err(ApiError::field(
                param,
                format!("'{param}' has no tokens; there must be at least one."),
            ));
        }
        if prompt.len() >= max_len as usize || prompt.len() > MAX_PROMPT_TOKENS {
            return Err(ApiError::context_length(param, max_len, prompt.len(), params.max_tokens));
        }
        let room = max_len - prompt.len() as u32;
        if params.max_tokens.is_some_and(|max| max > room) {
            return Err(ApiError::context_length(param, max_len, prompt.len(), params.max_tokens));
        }
        let max_tokens =
            params.max_tokens.unwrap_or_else(|| defaults.max_new_tokens.unwrap_or(room).clamp(1, room));
        let mut stop_tokens = params.stop_token_ids.clone();
        if !params.ignore_eos {
            stop_tokens.extend(&defaults.end_tokens);
        }
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        stop_tokens.truncate(MAX_TOKEN_LIST);
        let sampling = SamplingParams {
            temperature: params.temperature.or(defaults.temperature).unwrap_or(1.0),
            top_p: params.top_p.or(defaults.top_p).unwrap_or(1.0),
            top_k: params.top_k.or(defaults.top_k).unwrap_or(0),
            min_p: params.min_p.or(defaults.min_p).unwrap_or(0.0),
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            repetition_penalty: params.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
            logit_bias: params.logit_bias.clone(),
            seed: params.seed.unwrap_or(seed),
            top_logprobs: params.top_logprobs,
        };
        Ok(Plan {
            prompt,
            generation: Generation { sampling, choices: params.n, max_tokens, stop_tokens },
            stop: params.stop.clone(),
            include_stop: params.include_stop,
            skip_special_tokens: params.skip_special_tokens,
        })
    }
}

/// The tokens of a prompt's `text`, unless it is so long that tokenizing it is not worth the time.
///
/// # Errors
/// When the text cannot fit, or cannot be tokenized.
pub fn tokenize(
    model: &TextModel,
    text: &str,
    add_special_tokens: bool,
    param: &str,
    max_len: u32,
) -> Result<Vec<TokenId>, ApiError> {
    let least = model.tokenizer.least_tokens(text);
    if least >= max_len as usize {
        return Err(ApiError::context_length(param, max_len, least, None));
    }
    let tokens = model.tokenizer.encode(text, add_special_tokens);
    tokens.map_err(|error| ApiError::field(param, error.to_string()))
}

/// Why a completion ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FinishReason {
    /// A stop token or a stop string.
    Stop,
    /// No room for more tokens.
    Length,
}

impl FinishReason {
    /// OpenAI's word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

/// What is new in one completion.
#[derive(Clone, PartialEq, Debug)]
pub struct Piece {
    /// Which completion.
    pub choice: u32,
    /// New text: whole characters, and no part of a stop string.
    pub text: String,
    /// Of the tokens since the last piece, when asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Set in the completion's last piece.
    pub finish: Option<FinishReason>,
}

/// A node said something that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Tokens are missing.
    #[error("choice {choice} has {have} tokens, and the next ones start at {start}")]
    Gap {
        /// Which choice.
        choice: u32,
        /// Tokens that came.
        have: u32,
        /// Where the next ones start.
        start: u32,
    },
    /// There is no such choice.
    #[error("tokens for choice {choice} of {choices}")]
    Choice {
        /// Which choice.
        choice: u32,
        /// How many there are.
        choices: usize,
    },
    /// Not one first token for each choice.
    #[error("{got} first tokens for {choices} choices")]
    FirstTokens {
        /// How many came.
        got: usize,
        /// How many choices there are.
        choices: usize,
    },
    /// The model's vocabulary ends before this token.
    #[error("token {token} is beyond the vocabulary of {vocab_size}; do the nodes serve another model?")]
    Vocabulary {
        /// The token.
        token: TokenId,
        /// The vocabulary's size.
        vocab_size: u32,
    },
    /// More tokens than were asked for.
    #[error("choice {choice} has more than the {max_tokens} tokens asked for")]
    TooMany {
        /// Which choice.
        choice: u32,
        /// Tokens asked for.
        max_tokens: u32,
    },
    /// Tokens cannot be turned into text.
    #[error(transparent)]
    Text(#[from] TokenizerError),
}

/// The life of one attempt at a plan. A retry starts a new one.
#[derive(Debug)]
pub struct Life {
    model: Arc<TextModel>,
    plan: Arc<Plan>,
    choices: Vec<Choice>,
    /// Prompt tokens that were not computed; known once the first tokens are here.
    cached: Option<CachedTokens>,
    /// Tokens that overtook the first ones, which they follow without a gap.
    early: Vec<Tokens>,
    ready: VecDeque<Piece>,
}

#[derive(Debug)]
struct Choice {
    /// Index of the next token.
    next: u32,
    detokenizer: Detokenizer,
    stop: StopStrings,
    /// Of tokens whose text is held back.
    logprobs: Vec<TokenLogprobs>,
    finish: Option<FinishReason>,
    /// A node knows that it ended.
    ended_by_node: bool,
}

impl Life {
    /// Starts the life of an attempt at `plan`.
    #[must_use]
    pub fn new(model: Arc<TextModel>, plan: Arc<Plan>) -> Life {
        let choice = |_| Choice {
            next: 0,
            detokenizer: Detokenizer::new(plan.skip_special_tokens),
            stop: StopStrings::new(&plan.stop, plan.include_stop),
            logprobs: Vec::new(),
            finish: None,
            ended_by_node: false,
        };
        let choices = (0..plan.generation.choices).map(choice).collect();
        Life { model, plan, choices, cached: None, early: Vec::new(), ready: VecDeque::new() }
    }

    /// Takes the first token of every choice.
    ///
    /// # Errors
    /// When the node said something that cannot be.
    pub fn handle_first(&mut self, first: FirstTokens) -> Result<(), Fault> {
        if first.tokens.len() != self.choices.len() {
            return Err(Fault::FirstTokens { got: first.tokens.len(), choices: self.choices.len() });
        }
        if self.cached.replace(first.cached).is_some() {
            return Ok(());
        }
        for (index, token) in first.tokens.into_iter().enumerate() {
            self.accept(index, 0, vec![token], None)?;
        }
        for tokens in std::mem::take(&mut self.early) {
            self.handle_tokens(tokens)?;
        }
        Ok(())
    }

    /// Takes tokens of one choice; those that came before are dropped.
    ///
    /// # Errors
    /// When the node said something that cannot be.
    pub fn handle_tokens(&mut self, tokens: Tokens) -> Result<(), Fault> {
        let choices = self.choices.len();
        let index = tokens.choice.0 as usize;
        let Some(choice) = self.choices.get(index) else {
            return Err(Fault::Choice { choice: tokens.choice.0, choices });
        };
        // Only the first token may come later than what follows it.
        if choice.next == 0 && tokens.start > 0 && self.cached.is_none() {
            let of_choice = self.early.iter().filter(|early| early.choice == tokens.choice);
            let have = of_choice.map(|early| early.start + early.tokens.len() as u32).max().unwrap_or(1);
            if tokens.start > have {
                return Err(Fault::Gap { choice: tokens.choice.0, have: have - 1, start: tokens.start });
            }
            // What repeats is dropped, so this holds no more than was asked for.
            let is_new = tokens.start as usize + tokens.tokens.len() > have as usize;
            let is_last = tokens.finish.is_some();
            let knows_last =
                self.early.iter().any(|early| early.choice == tokens.choice && early.finish.is_some());
            if is_new || (is_last && !knows_last) {
                self.check_count(index, tokens.start, tokens.tokens.len())?;
                self.early.push(tokens);
            }
            return Ok(());
        }
        self.accept(index, tokens.start, tokens.tokens, tokens.finish)
    }

    /// The next piece for the client.
    pub fn poll_piece(&mut self) -> Option<Piece> {
        self.ready.pop_front()
    }

    /// Whether first tokens are here.
    #[must_use]
    pub fn has_first(&self) -> bool {
        self.cached.is_some()
    }

    /// Whether every completion ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.choices.iter().all(|choice| choice.finish.is_some())
    }

    /// Whether nodes may still work on it, and have to be told that it is over.
    #[must_use]
    pub fn must_cancel(&self) -> bool {
        // With a single token there is no decode node, and the prefill node is done.
        self.plan.generation.max_tokens > 1 && !self.choices.iter().all(|choice| choice.ended_by_node)
    }

    /// Tokens so far.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let completion = self.choices.iter().map(|choice| choice.next).fold(0, u32::saturating_add);
        Usage::new(self.plan.prompt.len() as u32, completion, self.cached.unwrap_or_default())
    }

    fn check_count(&self, index: usize, start: u32, count: usize) -> Result<(), Fault> {
        let max_tokens = self.plan.generation.max_tokens;
        if start as usize + count > max_tokens as usize {
            return Err(Fault::TooMany { choice: index as u32, max_tokens });
        }
        Ok(())
    }

    fn accept(
        &mut self,
        index: usize,
        start: u32,
        tokens: Vec<Sampled>,
        finish: Option<Finish>,
    ) -> Result<(), Fault> {
        self.check_count(index, start, tokens.len())?;
        let tokenizer = &self.model.tokenizer;
        let generation = &self.plan.generation;
        let choice = &mut self.choices[index];
        choice.ended_by_node |= finish.is_some();
        if choice.finish.is_some() {
            return Ok(());
        }
        if start > choice.next {
            return Err(Fault::Gap { choice: index as u32, have: choice.next, start });
        }
        let known = (choice.next - start) as usize;
        let mut text = String::new();
        let mut ended = None;
        for sampled in tokens.into_iter().skip(known) {
            if sampled.token.0 >= self.model.vocab_size {
                return Err(Fault::Vocabulary { token: sampled.token, vocab_size: self.model.vocab_size });
            }
            choice.next += 1;
            if generation.stop_tokens.contains(&sampled.token) {
                ended = Some(FinishReason::Stop);
                break;
            }
            let piece = choice.detokenizer.push(tokenizer, sampled.token)?;
            if let Some(logprobs) = &sampled.logprobs {
                choice.logprobs.push(TokenLogprobs::new(tokenizer, sampled.token, logprobs));
            }
            let found = choice.stop.push(&piece);
            text.push_str(&found.text);
            if found.stopped.is_some() {
                choice.finish = Some(FinishReason::Stop);
                break;
            }
        }
        if choice.finish.is_none() {
            let full = choice.next >= generation.max_tokens;
            ended = ended.or(finish.map(FinishReason::from)).or(full.then_some(FinishReason::Length));
            if let Some(reason) = ended {
                let found = choice.stop.push(&choice.detokenizer.finish(tokenizer)?);
                text.push_str(&found.text);
                choice.finish = Some(if found.stopped.is_some() { FinishReason::Stop } else { reason });
                if found.stopped.is_none() {
                    text.push_str(&choice.stop.finish());
                }
            }
        }
        if !text.is_empty() || choice.finish.is_some() {
            let logprobs = std::mem::take(&mut choice.logprobs);
            self.ready.push_back(Piece { choice: index as u32, text, logprobs, finish: choice.finish });
        }
        Ok(())
    }
}

impl From<Finish> for FinishReason {
    fn from(finish: Finish) -> FinishReason {
        match finish {
            Finish::Stop => FinishReason::Stop,
            Finish::Length => FinishReason::Length,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::completions::CompletionRequest;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use std::path::Path;
    use std::sync::LazyLock;
    use tandem_proto::ids::{ChoiceIdx, RequestId};

    static TINY: LazyLock<Arc<TextModel>> = LazyLock::new(|| {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny");
        Arc::new(TextModel::load(&dir).unwrap())
    });

    fn plan(fields: Value) -> Result<Plan, ApiError> {
        let mut body = json!({"model": "tiny", "prompt": "Hello"});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let request = CompletionRequest::read(&body, TINY.vocab_size)?;
        let prompt = TINY.tokenizer.encode("Hello", true).unwrap();
        Plan::new(&TINY, &request.params, prompt, "prompt", 100, 7)
    }

    fn life(fields: Value) -> Life {
        Life::new(TINY.clone(), Arc::new(plan(fields).unwrap()))
    }

    fn ids(text: &str) -> Vec<TokenId> {
        TINY.tokenizer.encode(text, false).unwrap()
    }

    fn sampled(tokens: &[TokenId]) -> Vec<Sampled> {
        tokens.iter().map(|token| Sampled { token: *token, logprobs: None }).collect()
    }

    fn first(tokens: &[TokenId]) -> FirstTokens {
        let cached = CachedTokens { pages: 2, host: 1, ..CachedTokens::default() };
        FirstTokens { request: RequestId(1), tokens: sampled(tokens), cached }
    }

    fn next(choice: u32, start: u32, tokens: &[TokenId], finish: Option<Finish>) -> Tokens {
        Tokens { request: RequestId(1), choice: ChoiceIdx(choice), start, tokens: sampled(tokens), finish }
    }

    /// The text of each choice and why it ended.
    fn collect(life: &mut Life) -> Vec<(String, Option<FinishReason>)> {
        let mut all = vec![(String::new(), None); life.choices.len()];
        while let Some(piece) = life.poll_piece() {
            let (text, finish) = &mut all[piece.choice as usize];
            assert!(finish.is_none(), "a piece after the last one");
            text.push_str(&piece.text);
            *finish = piece.finish;
        }
        all
    }

    const EOT: TokenId = TokenId(1);

    #[test]
    fn first_and_further_tokens_make_one_text() {
        let answer = [ids("The lamp is teal."), vec![EOT]].concat();
        let mut life = life(json!({}));
        life.handle_first(first(&answer[..1])).unwrap();
        assert!(!collect(&mut life)[0].0.is_empty(), "the first token shows at once");
        life.handle_tokens(next(0, 1, &answer[1..3], None)).unwrap();
        life.handle_tokens(next(0, 3, &answer[3..], Some(Finish::Stop))).unwrap();
        let (rest, finish) = collect(&mut life).remove(0);
        assert!("The lamp is teal.".ends_with(&rest));
        assert_eq!(finish, Some(FinishReason::Stop));
        assert!(life.is_over() && !life.must_cancel());
        let usage = life.usage();
        assert_eq!(usage.completion_tokens as usize, answer.len());
        assert_eq!(usage.prompt_tokens_details.cached_tokens, 3);
    }

    #[test]
    fn order_between_nodes_and_repeats_do_not_matter() {
        let answer = [ids("one two three four"), vec![EOT]].concat();
        let messages = |life: &mut Life, order: &[usize]| {
            for message in order {
                match message {
                    0 => life.handle_first(first(&answer[..1])),
                    1 => life.handle_tokens(next(0, 1, &answer[1..3], None)),
                    2 => life.handle_tokens(next(0, 2, &answer[2..], Some(Finish::Stop))),
                    3 => life.handle_tokens(next(0, 0, &answer, Some(Finish::Stop))),
                    _ => life.handle_tokens(next(0, answer.len() as u32, &[], Some(Finish::Stop))),
                }
                .unwrap();
            }
        };
        for order in
            [&[0, 1, 2][..], &[1, 2, 0], &[1, 0, 2], &[1, 1, 0, 1, 2, 2], &[3, 0], &[0, 3, 1], &[1, 2, 4, 0]]
        {
            let mut life = life(json!({}));
            messages(&mut life, order);
            assert_eq!(
                collect(&mut life),
                [("one two three four".into(), Some(FinishReason::Stop))],
                "{order:?}"
            );
            assert_eq!(life.usage().completion_tokens as usize, answer.len());
        }
    }

    #[test]
    fn faults_are_told() {
        let some = ids("one two three");
        let check = |expected: &str, handle: &dyn Fn(&mut Life) -> Result<(), Fault>| {
            let mut life = life(json!({"n": 2, "max_tokens": 5}));
            let text = handle(&mut life).unwrap_err().to_string();
            assert!(text.contains(expected), "{text:?}");
        };
        check("next ones start at 2", &|life| life.handle_tokens(next(0, 2, &some[..1], None)));
        check("has 1 tokens, and the next ones start at 3", &|life| {
            life.handle_first(first(&some[..2]))?;
            life.handle_tokens(next(1, 3, &some[..1], None))
        });
        check("choice 2 of 2", &|life| life.handle_tokens(next(2, 1, &some[..1], None)));
        check("1 first tokens for 2", &|life| life.handle_first(first(&some[..1])));
        check("beyond the vocabulary", &|life| life.handle_first(first(&[TokenId(9999), EOT])));
        check("more than the 5 tokens", &|life| life.handle_tokens(next(0, 0, &[some[0]; 6], None)));
        check("more than the 5 tokens", &|life| life.handle_tokens(next(0, 1, &[some[0]; 5], None)));
    }

    #[test]
    fn stop_strings_cross_tokens_and_end_the_nodes_work() {
        let answer = ids("alpha beta\n\ngamma");
        let mut life = life(json!({"stop": ["a\n\ng"]}));
        life.handle_first(first(&answer[..1])).unwrap();
        life.handle_tokens(next(0, 1, &answer[1..], None)).unwrap();
        assert_eq!(collect(&mut life), [("alpha bet".into(), Some(FinishReason::Stop))]);
        assert!(life.is_over() && life.must_cancel());
        life.handle_tokens(next(0, answer.len() as u32, &answer, None)).unwrap();
        assert_eq!(life.poll_piece(), None);
    }

    #[test]
    fn what_was_held_back_shows_when_nothing_follows() {
        let answer = ids("no END");
        let mut life = life(json!({"stop": "ENDING", "max_tokens": answer.len()}));
        life.handle_first(first(&answer[..1])).unwrap();
        life.handle_tokens(next(0, 1, &answer[1..], Some(Finish::Length))).unwrap();
        assert_eq!(collect(&mut life), [("no END".into(), Some(FinishReason::Length))]);
    }

    #[test]
    fn choices_may_end_with_their_first_token() {
        let word = ids("word");
        let mut all = life(json!({"n": 2}));
        all.handle_first(first(&[EOT, EOT])).unwrap();
        assert!(all.is_over() && all.must_cancel());

        let mut one = life(json!({"n": 2}));
        one.handle_first(first(&[EOT, word[0]])).unwrap();
        assert!(!one.is_over());
        one.handle_tokens(next(0, 1, &[], Some(Finish::Stop))).unwrap();
        one.handle_tokens(next(1, 1, &[EOT], Some(Finish::Stop))).unwrap();
        assert!(one.is_over() && !one.must_cancel());

        let mut single = life(json!({"max_tokens": 1}));
        single.handle_first(first(&word[..1])).unwrap();
        assert_eq!(collect(&mut single)[0].1, Some(FinishReason::Length));
        assert!(single.is_over() && !single.must_cancel());
    }

    #[test]
    fn end_tokens_can_be_ignored_and_added() {
        let ignoring = plan(json!({"ignore_eos": true})).unwrap();
        assert!(ignoring.generation.stop_tokens.is_empty());
        let added = plan(json!({"stop_token_ids": [9, 1, 9]})).unwrap();
        assert_eq!(added.generation.stop_tokens, [EOT, TokenId(9)]);
    }

    #[test]
    fn a_plan_fits_the_context() {
        let prompt = ids("Hello").len() as u32;
        assert_eq!(plan(json!({})).unwrap().generation.max_tokens, 100 - prompt);
        assert_eq!(plan(json!({"max_tokens": 100 - prompt})).unwrap().generation.max_tokens, 100 - prompt);
        let error = plan(json!({"max_tokens": 100})).unwrap_err();
        assert_eq!((error.status, error.code), (400, Some("context_length_exceeded")));
        assert!(error.message.contains("maximum context length is 100 tokens"), "{error}");
        let far = tokenize(&TINY, &" ".repeat(1 << 20), false, "prompt", 100).unwrap_err();
        assert_eq!((far.code, far.param.as_deref()), (Some("context_length_exceeded"), Some("prompt")));
        assert_eq!(tokenize(&TINY, "Hello", false, "prompt", 100).unwrap(), ids("Hello"));
        assert_eq!(plan(json!({})).unwrap().generation.sampling.seed, 7);
        assert_eq!(plan(json!({"seed": 5})).unwrap().generation.sampling.seed, 5);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// However the answer is cut up, repeated and overtaken by its own first token.
        #[test]
        fn any_delivery_makes_the_same_text(
            cuts in prop::collection::vec((0usize..20, 0usize..20), 0..12),
            first_at in 0usize..12,
            stop in prop::option::of("[a-z ]{1,3}"),
        ) {
            let answer = [ids("the quick brown fox, é🦀漢 jumps over"), vec![EOT]].concat();
            let whole = TINY.tokenizer.decode(&answer, true).unwrap();
            let mut life = life(json!({"stop": stop}));
            let mut have = 1;
            let mut order: Vec<Option<(usize, usize)>> = Vec::new();
            for (back, len) in cuts {
                // Starts at or before what is there already, as an honest node's messages do.
                let start = have - back.min(have - 1);
                let end = (start + len).min(answer.len());
                have = have.max(end);
                order.push(Some((start, end)));
            }
            order.push(Some((have, answer.len())));
            order.insert(first_at.min(order.len()), None);
            for message in order {
                match message {
                    None => life.handle_first(first(&answer[..1])).unwrap(),
                    Some((start, end)) => {
                        let finish = (end == answer.len()).then_some(Finish::Stop);
                        life.handle_tokens(next(0, start as u32, &answer[start..end], finish)).unwrap();
                    }
                }
            }
            let cut = stop.and_then(|stop| whole.find(&stop)).unwrap_or(whole.len());
            prop_assert!(life.is_over());
            prop_assert_eq!(collect(&mut life), [(whole[..cut].to_owned(), Some(FinishReason::Stop))]);
        }
    }
}
