//! From logits to a token.
//!
//! Everything is a function of the request's parameters, the tokens so far and the token's index, so a node
//! that takes a completion over goes on exactly where the other stopped. Rules apply in this order: logit
//! bias, repetition, presence and frequency penalties, temperature, min-p, top-k, top-p.

use std::collections::{HashMap, HashSet};
use tandem_proto::ids::{ChoiceIdx, TokenId};
use tandem_proto::wire::{Logprobs, MAX_TOP_LOGPROBS, Sampled, SamplingParams};

/// Below this, logits over temperature leave the range in which differences mean anything: greedy.
const LEAST_TEMPERATURE: f32 = 1e-5;

/// Why no token can be chosen.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum SamplingError {
    /// A parameter is out of bounds.
    #[error("{name} is {value}, must be {allowed}")]
    Parameter {
        /// The parameter.
        name: &'static str,
        /// What it holds.
        value: String,
        /// What it may hold.
        allowed: &'static str,
    },
    /// The model gave something that is not a number.
    #[error("the logit of token {token} is {value}")]
    BadLogit {
        /// The token.
        token: TokenId,
        /// The logit.
        value: f32,
    },
    /// No token is left to choose from.
    #[error("no token has a finite logit")]
    NothingLeft,
}

/// Chooses the tokens of one completion.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    choice: ChoiceIdx,
    /// Tokens of the prompt; empty when nothing depends on them.
    prompt: HashSet<TokenId>,
    /// How often each token was generated; empty when nothing depends on it.
    generated: HashMap<TokenId, u32>,
}

impl Sampler {
    /// A sampler for completion `choice` of a prompt.
    ///
    /// # Errors
    /// When a parameter is out of bounds.
    pub fn new(
        params: &SamplingParams,
        choice: ChoiceIdx,
        prompt: &[TokenId],
    ) -> Result<Sampler, SamplingError> {
        check(params)?;
        let prompt =
            if params.repetition_penalty == 1.0 { HashSet::new() } else { prompt.iter().copied().collect() };
        Ok(Sampler { params: params.clone(), choice, prompt, generated: HashMap::new() })
    }

    /// Notes a token that another node generated. [`Sampler::sample`] notes its own.
    pub fn observe(&mut self, token: TokenId) {
        if self.has_penalties() {
            *self.generated.entry(token).or_default() += 1;
        }
    }

    /// Chooses the token with index `index` of the completion. Changes `logits`.
    ///
    /// # Errors
    /// When a logit is NaN or infinite, or none is left.
    pub fn sample(&mut self, logits: &mut [f32], index: u32) -> Result<Sampled, SamplingError> {
        let bad = |x: &f32| x.is_nan() || *x == f32::INFINITY;
        if let Some(token) = logits.iter().position(bad) {
            return Err(SamplingError::BadLogit { token: TokenId(token as u32), value: logits[token] });
        }
        let raw = self.params.top_logprobs.map(|count| RawLogprobs::new(logits, count));
        self.adjust(logits);
        let token = if self.params.temperature < LEAST_TEMPERATURE {
            most_likely(logits)?
        } else {
            self.draw(logits, index)?
        };
        self.observe(token);
        Ok(Sampled { token, logprobs: raw.map(|raw| raw.finish(token)) })
    }

    fn has_penalties(&self) -> bool {
        let p = &self.params;
        p.repetition_penalty != 1.0 || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0
    }

    /// Bias and penalties.
    fn adjust(&self, logits: &mut [f32]) {
        let p = &self.params;
        for (token, bias) in &p.logit_bias {
            if let Some(logit) = logits.get_mut(token.0 as usize) {
                *logit += bias;
            }
        }
        if p.repetition_penalty != 1.0 {
            let new = self.generated.keys().filter(|token| !self.prompt.contains(token));
            for token in self.prompt.iter().chain(new) {
                if let Some(logit) = logits.get_mut(token.0 as usize) {
                    *logit = if *logit > 0.0 {
                        *logit / p.repetition_penalty
                    } else {
                        *logit * p.repetition_penalty
                    };
                }
            }
        }
        for (token, count) in &self.generated {
            if let Some(logit) = logits.get_mut(token.0 as usize) {
                *logit -= p.frequency_penalty * *count as f32 + p.presence_penalty;
            }
        }
    }

    fn draw(&self, logits: &[f32], index: u32) -> Result<TokenId, SamplingError> {
        let p = &self.params;
        let peak = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if peak == f32::NEG_INFINITY {
            return Err(SamplingError::NothingLeft);
        }
        // Relative to the peak, so that the most likely token weighs 1.
        let weight = |logit: f32| ((f64::from(logit) - f64::from(peak)) / f64::from(p.temperature)).exp();
        let mut kept: Vec<(u32, f64)> = Vec::with_capacity(logits.len());
        for (token, logit) in logits.iter().enumerate() {
            let weight = weight(*logit);
            if weight > 0.0 && weight >= f64::from(p.min_p) {
                kept.push((token as u32, weight));
            }
        }
        let likelier = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let k = p.top_k as usize;
        if k > 0 && k < kept.len() {
            kept.select_nth_unstable_by(k - 1, likelier);
            kept.truncate(k);
            // Drawing goes through the tokens in order, which selecting does not keep.
            kept.sort_unstable_by_key(|(token, _)| *token);
        }
        if p.top_p < 1.0 {
            kept.sort_unstable_by(likelier);
            let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
            let mut sum = 0.0;
            let enough = kept.iter().position(|(_, weight)| {
                sum += weight;
                sum >= f64::from(p.top_p) * total
            });
            kept.truncate(enough.map_or(kept.len(), |last| last + 1));
        }
        let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
        let mut left = uniform(p.seed, self.choice, index) * total;
        let drawn = kept.iter().find(|(_, weight)| {
            left -= weight;
            left < 0.0
        });
        // Rounding may leave a little when all are gone through.
        let (token, _) = drawn.or(kept.last()).ok_or(SamplingError::NothingLeft)?;
        Ok(TokenId(*token))
    }
}

/// The bounds of every parameter.
fn check(p: &SamplingParams) -> Result<(), SamplingError> {
    let top = p.top_logprobs.map_or(0, usize::from);
    let rules = [
        ("temperature", p.temperature, (0.0..=100.0).contains(&p.temperature), "from 0 to 100"),
        ("top_p", p.top_p, p.top_p > 0.0 && p.top_p <= 1.0, "above 0, at most 1"),
        ("min_p", p.min_p, (0.0..=1.0).contains(&p.min_p), "from 0 to 1"),
        ("presence_penalty", p.presence_penalty, p.presence_penalty.abs() <= 100.0, "from -100 to 100"),
        ("frequency_penalty", p.frequency_penalty, p.frequency_penalty.abs() <= 100.0, "from -100 to 100"),
        (
            "repetition_penalty",
            p.repetition_penalty,
            (0.01..=100.0).contains(&p.repetition_penalty),
            "from 0.01 to 100",
        ),
        ("top_logprobs", top as f32, top <= MAX_TOP_LOGPROBS, "at most 20"),
    ];
    let bias = p.logit_bias.iter().find(|(_, bias)| !bias.is_finite());
    let bias = bias.map(|(_, bias)| ("logit_bias", *bias, false, "finite"));
    match rules.into_iter().chain(bias).find(|(_, _, fine, _)| !fine) {
        Some((name, value, _, allowed)) => {
            Err(SamplingError::Parameter { name, value: value.to_string(), allowed })
        }
        None => Ok(()),
    }
}

/// The token with the greatest logit, the first of equals.
fn most_likely(logits: &[f32]) -> Result<TokenId, SamplingError> {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, logit) in logits.iter().enumerate() {
        if *logit > best.1 {
            best = (token, *logit);
        }
    }
    if best.1 == f32::NEG_INFINITY { Err(SamplingError::NothingLeft) } else { Ok(TokenId(best.0 as u32)) }
}

/// Log probabilities before any rule changed the logits.
struct RawLogprobs {
    logits: Vec<f32>,
    /// What a logit exceeds its log probability by.
    offset: f64,
    top: Vec<(TokenId, f32)>,
}

impl RawLogprobs {
    fn new(logits: &[f32], count: u8) -> RawLogprobs {
        let peak = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let total: f64 = logits.iter().map(|x| (f64::from(*x) - peak).exp()).sum();
        let offset = peak + total.ln();
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let likelier = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let count = usize::from(count).min(order.len());
        if count > 0 && count < order.len() {
            order.select_nth_unstable_by(count - 1, likelier);
        }
        order.truncate(count);
        order.sort_unstable_by(likelier);
        let top =
            order.iter().map(|t| (TokenId(*t), (f64::from(logits[*t as usize]) - offset) as f32)).collect();
        RawLogprobs { logits: logits.to_vec(), offset, top }
    }

    fn finish(self, chosen: TokenId) -> Logprobs {
        let chosen = f64::from(self.logits[chosen.0 as usize]) - self.offset;
        Logprobs { chosen: chosen as f32, top: self.top }
    }
}

/// A number from 0 to below 1 that depends on its arguments alone.
fn uniform(seed: u64, choice: ChoiceIdx, index: u32) -> f64 {
    let place = (u64::from(choice.0) << 32) | u64::from(index);
    let bits = mix(mix(seed ^ 0x6a09_e667_f3bc_c908).wrapping_add(mix(place)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// The finaliser of SplitMix64.
fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(params: &SamplingParams, logits: &[f32], count: u32) -> Vec<u32> {
        let mut sampler = Sampler::new(params, ChoiceIdx(0), &[]).unwrap();
        (0..count).map(|i| sampler.sample(&mut logits.to_vec(), i).unwrap().token.0).collect()
    }

    fn set(tokens: &[u32]) -> Vec<u32> {
        let mut tokens = tokens.to_vec();
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -1.0];

    #[test]
    fn greedy_takes_the_first_of_equals() {
        let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        assert_eq!(drawn(&params, &LOGITS, 3), [1, 1, 1]);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let params = SamplingParams { seed: 5, ..SamplingParams::default() };
        let count = 40_000;
        let tokens = drawn(&params, &LOGITS, count);
        let total: f64 = LOGITS.iter().map(|x| f64::from(*x).exp()).sum();
        for (token, logit) in LOGITS.iter().enumerate() {
            let share = tokens.iter().filter(|t| **t == token as u32).count() as f64 / f64::from(count);
            let want = f64::from(*logit).exp() / total;
            assert!((share - want).abs() < 0.01, "token {token}: {share} for {want}");
        }
    }

    #[test]
    fn rules_keep_what_they_should() {
        let kept = |params: SamplingParams| set(&drawn(&params, &LOGITS, 2000));
        let base = SamplingParams::default();
        assert_eq!(kept(SamplingParams { top_k: 1, ..base.clone() }), [1]);
        assert_eq!(kept(SamplingParams { top_k: 3, ..base.clone() }), [1, 2, 3]);
        assert_eq!(kept(SamplingParams { top_p: 0.1, ..base.clone() }), [1]);
        assert_eq!(kept(SamplingParams { top_p: 0.75, ..base.clone() }), [1, 3]);
        assert_eq!(kept(SamplingParams { min_p: 0.3, ..base.clone() }), [1, 2, 3]);
        let bias = vec![(TokenId(1), -100.0), (TokenId(3), -100.0)];
        assert_eq!(kept(SamplingParams { logit_bias: bias, top_k: 1, ..base }), [2]);
    }

    #[test]
    fn any_node_goes_on_where_another_stopped() {
        let params =
            SamplingParams { seed: 9, frequency_penalty: 0.5, repetition_penalty: 1.2, ..Default::default() };
        let all = drawn(&params, &LOGITS, 20);
        let mut later = Sampler::new(&params, ChoiceIdx(0), &[]).unwrap();
        all[..7].iter().for_each(|token| later.observe(TokenId(*token)));
        for (index, want) in all.iter().enumerate().skip(7) {
            assert_eq!(later.sample(&mut LOGITS.to_vec(), index as u32).unwrap().token.0, *want);
        }
        let mut other = Sampler::new(&params, ChoiceIdx(1), &[]).unwrap();
        let tokens: Vec<u32> =
            (0..20).map(|i| other.sample(&mut LOGITS.to_vec(), i).unwrap().token.0).collect();
        assert_ne!(tokens, all);
    }

    #[test]
    fn penalties_push_tokens_down() {
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let presence = SamplingParams { presence_penalty: 1.5, ..greedy.clone() };
        assert_eq!(drawn(&presence, &LOGITS, 4), [1, 3, 2, 1]);
        let frequency = SamplingParams { frequency_penalty: 0.75, ..greedy.clone() };
        assert_eq!(drawn(&frequency, &LOGITS, 5), [1, 3, 1, 3, 2]);
        let repetition = SamplingParams { repetition_penalty: 2.0, ..greedy };
        let mut sampler = Sampler::new(&repetition, ChoiceIdx(0), &[TokenId(1)]).unwrap();
        assert_eq!(sampler.sample(&mut LOGITS.to_vec(), 0).unwrap().token, TokenId(3));
        assert_eq!(sampler.sample(&mut LOGITS.to_vec(), 1).unwrap().token, TokenId(2));
    }

    #[test]
    fn logprobs_are_of_the_raw_logits() {
        let bias = vec![(TokenId(4), 50.0)];
        let params = SamplingParams {
            temperature: 0.0,
            logit_bias: bias,
            top_logprobs: Some(2),
            ..Default::default()
        };
        let mut sampler = Sampler::new(&params, ChoiceIdx(0), &[]).unwrap();
        let sampled = sampler.sample(&mut LOGITS.to_vec(), 0).unwrap();
        assert_eq!(sampled.token, TokenId(4));
        let logprobs = sampled.logprobs.unwrap();
        let total: f32 = LOGITS.iter().map(|x| x.exp()).sum();
        assert!((logprobs.chosen - (-1.0 - total.ln())).abs() < 1e-5);
        assert_eq!(logprobs.top.iter().map(|(t, _)| t.0).collect::<Vec<_>>(), [1, 3]);
        assert!((logprobs.top[0].1 - (3.0 - total.ln())).abs() < 1e-5);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let new = |params: SamplingParams| Sampler::new(&params, ChoiceIdx(0), &[]);
        assert!(new(SamplingParams { temperature: -1.0, ..Default::default() }).is_err());
        assert!(new(SamplingParams { temperature: f32::NAN, ..Default::default() }).is_err());
        assert!(new(SamplingParams { top_p: 0.0, ..Default::default() }).is_err());
        assert!(new(SamplingParams { repetition_penalty: 0.0, ..Default::default() }).is_err());
        assert!(new(SamplingParams { top_logprobs: Some(21), ..Default::default() }).is_err());
        let mut sampler = new(SamplingParams::default()).unwrap();
        let nan = sampler.sample(&mut [0.0, f32::NAN], 0);
        assert!(matches!(nan, Err(SamplingError::BadLogit { token: TokenId(1), .. })));
        assert_eq!(sampler.sample(&mut [f32::NEG_INFINITY; 3], 0), Err(SamplingError::NothingLeft));
    }
}
