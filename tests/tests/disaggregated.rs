//! The main job on real processes: what comes back over HTTP, after the KV travelled from a prefill process to
//! a decode process, is what one process computes by itself, to the last bit of every log probability.

use serde_json::{Value, json};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tandem_engine::single::{GenRequest, GenResult, SingleProcess};
use tandem_engine::{CpuEngine, LoadOptions};
use tandem_proto::ids::{ChoiceIdx, TokenId};
use tandem_proto::wire::SamplingParams;
use tandem_tests::processes::{Cluster, ClusterOptions, model};

const PROMPTS: usize = 200;
const CONCURRENT: usize = 32;
const MAX_PROMPT: u64 = 4000;

/// Prompts of 1 to 4,000 tokens, evenly spread, of arbitrary tokens; some begin like others.
fn prompts() -> Vec<Vec<TokenId>> {
    let mut state = 0x1234_5678_9abc_def0u64;
    let mut draw = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut prompts: Vec<Vec<TokenId>> = Vec::new();
    for n in 0..PROMPTS as u64 {
        let len = (1 + n * (MAX_PROMPT - 1) / (PROMPTS as u64 - 1)) as usize;
        let mut prompt = if n % 4 == 3 { prompts[draw(n) as usize].clone() } else { Vec::new() };
        prompt.truncate(len);
        while prompt.len() < len {
            prompt.push(TokenId(draw(4090) as u32 + 6));
        }
        prompts.push(prompt);
    }
    prompts
}

fn reference(prompts: &[Vec<TokenId>]) -> Vec<GenResult> {
    let dir = model("tiny").expect("the project's own model");
    let engine = CpuEngine::load(&dir, LoadOptions::default()).expect("the project's own model loads");
    let mut single = SingleProcess::new(engine, 8192, 512).expect("room for the KV");
    let requests: Vec<_> = prompts
        .iter()
        .map(|prompt| GenRequest {
            prompt: prompt.clone(),
            sampling: SamplingParams { temperature: 0.0, top_logprobs: Some(2), ..SamplingParams::default() },
            choice: ChoiceIdx(0),
            max_tokens: 12,
            stop_tokens: Vec::new(),
        })
        .collect();
    single.generate(&requests).expect("the reference generates")
}

fn ask(cluster: &Cluster, prompt: &[TokenId]) -> Value {
    let body = json!({
        "model": "tiny",
        "prompt": prompt.iter().map(|token| token.0).collect::<Vec<_>>(),
        "max_tokens": 12, "temperature": 0, "ignore_eos": true, "logprobs": 2,
    });
    let (status, answer) = cluster.post("/v1/completions", &body.to_string());
    assert_eq!(status, 200, "{answer}");
    serde_json::from_str(&answer).expect("the answer is JSON")
}

/// The log probabilities of the chosen tokens, as bits.
fn chosen(answer: &Value) -> Vec<u32> {
    let logprobs =
        answer["choices"][0]["logprobs"]["token_logprobs"].as_array().expect("they were asked for");
    logprobs.iter().map(|value| (value.as_f64().expect("a number") as f32).to_bits()).collect()
}

#[test]
fn two_hundred_prompts_are_what_one_process_computes() {
    let mut options = ClusterOptions::new(&model("tiny").expect("the project's own model"));
    (options.prefill, options.decode) = (2, 2);
    // Five processes and this one share the machine's cores: silence of a second is no sign of death here.
    options.node_flags = vec!["--peer-timeout".into(), "10s".into()];
    options.router_flags = options.node_flags.clone();
    options.router_flags.extend(["--served-model-name".into(), "tiny".into()]);
    let mut cluster = Cluster::start(&options);
    let prompts = prompts();
    let answers: Vec<Mutex<Option<Value>>> = prompts.iter().map(|_| Mutex::new(None)).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..CONCURRENT {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(prompt) = prompts.get(at) else { return };
                    *answers[at].lock().expect("one writer") = Some(ask(&cluster, prompt));
                }
            });
        }
    });
    let text = tandem_text::TextModel::load(&options.model).expect("the model's tokenizer loads");
    let mut reused = 0;
    for (at, (expected, answer)) in reference(&prompts).iter().zip(answers).enumerate() {
        let answer = answer.into_inner().expect("one writer").expect("every prompt was answered");
        let tokens: Vec<_> = expected.tokens.iter().map(|sampled| sampled.token).collect();
        let bits: Vec<_> =
            expected.tokens.iter().filter_map(|s| s.logprobs.as_ref()).map(|l| l.chosen.to_bits()).collect();
        assert_eq!(chosen(&answer), bits, "prompt {at} of {} tokens: log probabilities", prompts[at].len());
        let said = answer["choices"][0]["text"].as_str().expect("a text");
        assert_eq!(
            said,
            text.tokenizer.decode(&tokens, true).expect("its own tokens"),
            "prompt {at} of {} tokens",
            prompts[at].len()
        );
        assert_eq!(answer["usage"]["prompt_tokens"], prompts[at].len());
        reused += answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a count");
    }
    println!("{PROMPTS} prompts equal; {reused} prompt tokens were reused");
    cluster.wait("not everything was freed", |cluster| {
        (cluster.metric("tandem_router_requests_running")? == 0.0).then_some(())
    });
}
