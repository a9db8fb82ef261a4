//! Every family and every way of stretching RoPE against Hugging Face transformers, on small models with
//! random weights in f32, f16 and bf16. `fixtures/make.py` made them.

mod folders;
mod models;

use tandem_engine::Engine;
use tandem_engine::single::SingleProcess;
use tandem_kernels::KvPages;
use tandem_proto::ids::TokenId;

#[test]
fn all_agree_with_transformers() {
    let mut seen = 0;
    for entry in std::fs::read_dir(folders::fixtures()).unwrap() {
        let dir = entry.unwrap().path();
        if dir.join("golden.json").is_file() {
            check(&dir);
            seen += 1;
        }
    }
    assert!(seen >= 9, "{seen} fixtures");
}

fn check(dir: &std::path::Path) {
    let name = dir.file_name().unwrap().to_string_lossy().into_owned();
    let mut engine = models::load(dir);
    let cases = models::golden(dir);
    let mut worst = 0.0f64;
    for case in &cases {
        let tokens = models::tokens(&case["input_ids"]);
        let want = case["logits_last"].as_array().unwrap();
        assert_eq!(want.len(), engine.info().vocab_size as usize);
        for chunk in [usize::MAX, 5] {
            let logits = models::last_logits(&mut engine, &tokens, chunk);
            for (token, (got, want)) in logits.iter().zip(want).enumerate() {
                let difference = (f64::from(*got) - want.as_f64().unwrap()).abs();
                assert!(
                    difference <= 2e-4,
                    "{name}: {} tokens, logit {token} differs by {difference}",
                    tokens.len()
                );
                worst = worst.max(difference);
            }
        }
    }
    println!("{name}: logits differ by {worst:.1e} at most");
    let requests = models::greedy(&cases, &[]);
    let kv = KvPages::new(engine.info().kv, 40).unwrap();
    let results = SingleProcess::new(engine, kv, 32).generate(&requests).unwrap();
    for (case, result) in cases.iter().zip(results) {
        let got: Vec<TokenId> = result.tokens.iter().map(|s| s.token).collect();
        assert_eq!(got, models::tokens(&case["greedy_ids"]), "{name}");
    }
}
