//! What one process computes by itself, and whether a cluster's answers are that: to the last bit of every log
//! probability.

use crate::processes::Cluster;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tandem_engine::single::{GenRequest, GenResult, SingleProcess};
use tandem_engine::{CpuEngine, Engine, LoadOptions};
use tandem_kernels::KvPages;
use tandem_proto::ids::{ChoiceIdx, TokenId};
use tandem_proto::wire::SamplingParams;

const ANSWER_TOKENS: u32 = 12;
/// Tokens of a chunk.
const CHUNK: u64 = 256;

/// As many prompts, of 1 to `longest` tokens, evenly spread, of arbitrary tokens; some begin like others.
#[must_use]
pub fn prompts(count: usize, longest: usize) -> Vec<Vec<TokenId>> {
    let mut state = 0x1234_5678_9abc_def0u64;
    let mut draw = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut prompts: Vec<Vec<TokenId>> = Vec::new();
    for n in 0..count {
        let len = 1 + n * (longest - 1) / (count - 1);
        let mut prompt = if n % 4 == 3 { prompts[draw(n as u64) as usize].clone() } else { Vec::new() };
        prompt.truncate(len);
        while prompt.len() < len {
            prompt.push(TokenId(draw(4090) as u32 + 6));
        }
        prompts.push(prompt);
    }
    prompts
}

/// The cluster's answers, in the prompts' order. Its model is to be served as `tiny`.
///
/// # Panics
/// When a prompt is not answered.
#[must_use]
pub fn ask(cluster: &Cluster, prompts: &[Vec<TokenId>], concurrent: usize) -> Vec<Value> {
    let answers: Vec<Mutex<Option<Value>>> = prompts.iter().map(|_| Mutex::new(None)).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..concurrent {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(prompt) = prompts.get(at) else { return };
                    *answers[at].lock().expect("one writer") = Some(answer(cluster, prompt));
                }
            });
        }
    });
    let answered = |answer: Mutex<Option<Value>>| answer.into_inner().expect("one writer");
    answers.into_iter().map(|answer| answered(answer).expect("every prompt was answered")).collect()
}

fn answer(cluster: &Cluster, prompt: &[TokenId]) -> Value {
    let body = json!({
        "model": "tiny",
        "prompt": prompt.iter().map(|token| token.0).collect::<Vec<_>>(),
        "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": true, "logprobs": 2,
    });
    let (status, answer) = cluster.post("/v1/completions", &body.to_string());
    assert_eq!(status, 200, "{answer}");
    serde_json::from_str(&answer).expect("the answer is JSON")
}

/// Compares each answer with what one process computes for its prompt.
///
/// # Panics
/// When they differ.
pub fn assert_computes_the_same(model: &Path, prompts: &[Vec<TokenId>], answers: &[Value]) {
    let text = tandem_text::TextModel::load(model).expect("the model's tokenizer loads");
    assert_eq!(prompts.len(), answers.len());
    for (at, (expected, answer)) in computed(model, prompts).iter().zip(answers).enumerate() {
        let tokens: Vec<_> = expected.tokens.iter().map(|sampled| sampled.token).collect();
        let bits: Vec<_> =
            expected.tokens.iter().filter_map(|s| s.logprobs.as_ref()).map(|l| l.chosen.to_bits()).collect();
        let len = prompts[at].len();
        assert_eq!(bits.len(), ANSWER_TOKENS as usize);
        assert_eq!(chosen(answer), bits, "prompt {at} of {len} tokens: log probabilities");
        let said = answer["choices"][0]["text"].as_str().expect("a text");
        let expected = text.tokenizer.decode(&tokens, true).expect("its own tokens");
        assert_eq!(said, expected, "prompt {at} of {len} tokens");
        assert_eq!(answer["usage"]["prompt_tokens"], len);
    }
}

/// Compares what each answer says of its prompt with all that can be reused: every chunk but the last token's. Returns how
/// many tokens were in `tier`.
///
/// # Panics
/// When something was computed again.
#[must_use]
pub fn assert_all_reused(prompts: &[Vec<TokenId>], answers: &[Value], tier: &str) -> u64 {
    let count = |value: &Value| value.as_u64().expect("a count");
    let reused = prompts.iter().zip(answers).map(|(prompt, answer)| {
        let details = &answer["usage"]["prompt_tokens_details"];
        let split = details["tandem"].as_object().expect("the split by tier");
        let all = count(&details["cached_tokens"]);
        assert_eq!(all, split.values().map(count).sum::<u64>(), "{details}");
        assert_eq!(all, (prompt.len() as u64 - 1) / CHUNK * CHUNK, "a prompt of {}: {details}", prompt.len());
        count(&split[tier])
    });
    reused.sum()
}

/// How far log probabilities of another engine, in the same precision, may be from the CPU's.
const NEARLY: f32 = 2e-3;

/// Compares each answer with what one process computes for its prompt on the CPU, where another engine computed it, which
/// adds up in another order: greedy texts are equal wherever no choice was as close as rounding.
///
/// # Panics
/// When they differ, or when choices were so close that little was compared.
pub fn assert_computes_nearly_the_same(model: &Path, prompts: &[Vec<TokenId>], answers: &[Value]) {
    let text = tandem_text::TextModel::load(model).expect("the model's tokenizer loads");
    assert_eq!(prompts.len(), answers.len());
    let (mut equal, mut close, mut worst) = (0, 0, 0.0f32);
    for (at, (expected, answer)) in computed(model, prompts).iter().zip(answers).enumerate() {
        let len = prompts[at].len();
        let logprobs = expected.tokens.iter().map(|s| s.logprobs.as_ref().expect("they were asked for"));
        let margins: Vec<f32> = logprobs.clone().map(|l| l.top[0].1 - l.top[1].1).collect();
        // What follows a close choice may be another text altogether.
        let sure = margins.iter().position(|margin| *margin < 2.0 * NEARLY).unwrap_or(margins.len());
        for (token, (want, have)) in logprobs.zip(chosen(answer)).enumerate().take(sure) {
            let off = (want.chosen - f32::from_bits(have)).abs();
            worst = worst.max(off);
            assert!(
                off <= NEARLY,
                "prompt {at} of {len} tokens: token {token}'s log probability is off by {off}"
            );
        }
        if sure < margins.len() {
            close += 1;
            continue;
        }
        let tokens: Vec<_> = expected.tokens.iter().map(|sampled| sampled.token).collect();
        let expected = text.tokenizer.decode(&tokens, true).expect("its own tokens");
        assert_eq!(answer["choices"][0]["text"], expected, "prompt {at} of {len} tokens");
        equal += 1;
    }
    println!(
        "{equal} texts equal, {close} with a choice too close to compare; log probabilities off by {worst:.1e} at most"
    );
    assert!(equal * 10 >= prompts.len() * 8, "only {equal} texts were compared");
}

fn computed(model: &Path, prompts: &[Vec<TokenId>]) -> Vec<GenResult> {
    let engine = CpuEngine::load(model, LoadOptions::default()).expect("the model loads");
    let kv = KvPages::new(engine.info().kv, 8192).expect("room for the KV");
    let mut single = SingleProcess::new(engine, kv, 512);
    let requests: Vec<_> = prompts
        .iter()
        .map(|prompt| GenRequest {
            prompt: prompt.clone(),
            sampling: SamplingParams { temperature: 0.0, top_logprobs: Some(2), ..SamplingParams::default() },
            choice: ChoiceIdx(0),
            max_tokens: ANSWER_TOKENS,
            stop_tokens: Vec::new(),
        })
        .collect();
    single.generate(&requests).expect("it generates")
}

/// The log probabilities of the chosen tokens, as bits.
fn chosen(answer: &Value) -> Vec<u32> {
    let logprobs =
        answer["choices"][0]["logprobs"]["token_logprobs"].as_array().expect("they were asked for");
    logprobs.iter().map(|value| (value.as_f64().expect("a number") as f32).to_bits()).collect()
}
