//! The models that tests run.
#![allow(dead_code, unreachable_pub)] // Each test binary uses a part.

use serde_json::Value;
use std::path::{Path, PathBuf};
use tandem_engine::single::GenRequest;
use tandem_engine::{CpuEngine, Engine, LoadOptions, Progress, Sequence};
use tandem_kernels::KvPages;
use tandem_proto::ids::{ChoiceIdx, LayerIdx, PageId, TokenId};
use tandem_proto::layout::KvShape;
use tandem_proto::wire::SamplingParams;

/// The folder of model `name`: in the repository, in `TANDEM_MODELS_DIR`, or in `shared/models` beside the
/// repository. None, with a note, where it is nowhere.
pub fn find(name: &str) -> Option<PathBuf> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let named = std::env::var_os("TANDEM_MODELS_DIR").map(PathBuf::from);
    let places = [Some(repository.join("models")), named, Some(repository.join("../shared/models"))];
    let found = places
        .into_iter()
        .flatten()
        .map(|place| place.join(name))
        .find(|dir| dir.join("config.json").is_file());
    if found.is_none() {
        eprintln!("skipped: model {name} is not here; name its parent folder in TANDEM_MODELS_DIR");
    }
    found
}

pub fn load(dir: &Path) -> CpuEngine {
    load_with(dir, LoadOptions { threads: 2, ..LoadOptions::default() })
}

pub fn load_with(dir: &Path, options: LoadOptions) -> CpuEngine {
    CpuEngine::load(dir, options).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

/// The cases of a folder's `golden.json`.
pub fn golden(dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("golden.json")).expect("golden.json");
    let json: Value = serde_json::from_str(&text).expect("golden.json is JSON");
    json["cases"].as_array().expect("cases").clone()
}

pub fn tokens(value: &Value) -> Vec<TokenId> {
    value.as_array().expect("tokens").iter().map(|id| TokenId(id.as_u64().expect("a token") as u32)).collect()
}

/// A table of `count` pages in no particular order, from a pool of `pool`.
pub fn pages(pool: u32, first: u32, count: u32) -> Vec<PageId> {
    // 7919 is prime, so the order goes through the whole pool.
    (first..first + count).map(|i| PageId((u64::from(i) * 7919 % u64::from(pool)) as u32)).collect()
}

/// The greedy continuations of golden cases, as long as they are there.
pub fn greedy(cases: &[Value], stop: &[TokenId]) -> Vec<GenRequest> {
    let request = |case: &Value| GenRequest {
        prompt: tokens(&case["input_ids"]),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        choice: ChoiceIdx(0),
        max_tokens: case["greedy_ids"].as_array().expect("tokens").len() as u32,
        stop_tokens: stop.to_vec(),
    };
    cases.iter().map(request).collect()
}

/// The logits after the last of `tokens`, computed in steps of `chunk` tokens.
pub fn last_logits(engine: &mut CpuEngine, tokens: &[TokenId], chunk: usize) -> Vec<f32> {
    let kv = |shape, pages| KvPages::new(shape, pages).expect("pages");
    last_logits_of(engine, kv, tokens, chunk)
}

/// As [`last_logits`], in pages of the engine's kind.
pub fn last_logits_of<E: Engine>(
    engine: &mut E,
    pool: impl FnOnce(KvShape, u32) -> E::Pages,
    tokens: &[TokenId],
    chunk: usize,
) -> Vec<f32> {
    let needed = engine.info().kv.pages(tokens.len() as u32);
    let mut kv = pool(engine.info().kv, needed + 13);
    let table = pages(needed + 13, 5, needed);
    let mut last = Vec::new();
    let mut start = 0;
    for part in tokens.chunks(chunk) {
        let end = start + part.len();
        let sequence =
            Sequence { tokens: part, start: start as u32, pages: &table, logits: end == tokens.len() };
        let mut layers = Vec::new();
        let mut tell = |progress, _: &mut E::Pages| {
            if let Progress::Layer(layer) = progress {
                layers.push(layer);
            }
        };
        let logits = engine.step(&[sequence], &mut kv, &mut tell).expect("a step");
        assert_eq!(layers, (0..engine.info().kv.layers).map(LayerIdx).collect::<Vec<_>>());
        last = logits.rows().flatten().copied().collect();
        start = end;
    }
    last
}
