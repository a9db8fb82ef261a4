//! Logits and greedy continuations against those that Hugging Face transformers computed in f32.

mod models;

use tandem_engine::Engine;
use tandem_engine::single::SingleProcess;
use tandem_kernels::KvPages;
use tandem_proto::ids::TokenId;

fn check(name: &str) {
    let Some(dir) = models::find(name) else { return };
    let cases = models::golden(&dir);
    assert!(!cases.is_empty());
    let mut engine = models::load(&dir);
    let mut worst = 0.0f64;
    for case in &cases {
        let tokens = models::tokens(&case["input_ids"]);
        let logits = models::last_logits(&mut engine, &tokens, usize::MAX);
        for pair in case["top20"].as_array().unwrap() {
            let (token, want) = (pair[0].as_u64().unwrap() as usize, pair[1].as_f64().unwrap());
            let difference = (f64::from(logits[token]) - want).abs();
            assert!(difference <= 2e-3, "{name} {}: token {token} differs by {difference}", case["name"]);
            worst = worst.max(difference);
        }
    }
    println!("{name}: logits differ by {worst:.2e} at most");

    let eos = engine.info().eos.clone();
    let kv = KvPages::new(engine.info().kv, 1000).unwrap();
    let mut single = SingleProcess::new(engine, kv, 256);
    let requests = models::greedy(&cases, &eos);
    let results = single.generate(&requests).unwrap();
    for (case, result) in cases.iter().zip(results) {
        let got: Vec<TokenId> = result.tokens.iter().map(|s| s.token).collect();
        let want = models::tokens(&case["greedy_ids"]);
        assert_eq!(got, want, "{name} {}", case["name"]);
    }
}

#[test]
fn tiny_agrees_with_transformers() {
    check("tiny");
}

#[test]
fn small_agrees_with_transformers() {
    check("small");
}
