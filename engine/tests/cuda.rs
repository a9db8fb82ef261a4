//! The engine on a real GPU, against transformers and against the engine on the CPU. Without a GPU each test says that it
//! was skipped, and passes.

mod folders;
mod models;

use safetensors::tensor::{Dtype, TensorView};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tandem_engine::single::SingleProcess;
use tandem_engine::{CpuEngine, CudaEngine, CudaOptions, Engine, LoadOptions, Sequence};
use tandem_kernels::cuda::KvDevicePages;
use tandem_memory::cuda::Device;
use tandem_proto::ids::{PageId, TokenId};
use tandem_proto::layout::KvDtype;

const FIXTURES: [&str; 9] = [
    "llama-bias",
    "llama-linear",
    "llama-yarn",
    "llama2",
    "llama3-rope",
    "mistral-window",
    "qwen2",
    "qwen2-window",
    "qwen3-sharded",
];

/// The folder of a fixture: in the repository, or among the models that a binary was brought with.
fn fixture(name: &str) -> PathBuf {
    let here = folders::fixtures().join(name);
    if here.is_dir() { here } else { models::find(name).expect("a fixture") }
}

fn load(dir: &Path, device: &Arc<Device>, options: CudaOptions) -> CudaEngine {
    CudaEngine::load(dir, options, device).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

fn f32_options() -> CudaOptions {
    CudaOptions { dtype: Some(KvDtype::F32), ..CudaOptions::default() }
}

/// As [`models::last_logits`].
fn last_logits(engine: &mut CudaEngine, device: &Arc<Device>, tokens: &[TokenId], chunk: usize) -> Vec<f32> {
    let kv = |shape, pages| KvDevicePages::new(device, shape, pages).expect("pages");
    models::last_logits_of(engine, kv, tokens, chunk)
}

/// How far apart vectors are, by their length.
fn apart(have: &[f32], want: &[f32]) -> f64 {
    assert_eq!(have.len(), want.len());
    let square = |x: f64| x * x;
    let difference: f64 = have.iter().zip(want).map(|(h, w)| square(f64::from(h - w))).sum();
    let length: f64 = want.iter().map(|w| square(f64::from(*w))).sum();
    let apart = (difference / length).sqrt();
    if apart.is_nan() { f64::INFINITY } else { apart }
}

fn prompt(seed: u32, len: usize, vocab_size: u32) -> Vec<TokenId> {
    (0..len as u32)
        .map(|i| TokenId((i.wrapping_mul(2_654_435_761).wrapping_add(seed * 97) >> 7) % vocab_size))
        .collect()
}

/// Logits and greedy continuations in single precision, against transformers.
fn golden(name: &str) {
    let (Some(device), Some(dir)) = (Device::open_or_skip(0), models::find(name)) else { return };
    let cases = models::golden(&dir);
    let mut engine = load(&dir, &device, f32_options());
    let mut worst = 0.0f64;
    for case in &cases {
        let tokens = models::tokens(&case["input_ids"]);
        for chunk in [usize::MAX, 100] {
            let logits = last_logits(&mut engine, &device, &tokens, chunk);
            for pair in case["top20"].as_array().unwrap() {
                let (token, want) = (pair[0].as_u64().unwrap() as usize, pair[1].as_f64().unwrap());
                let difference = (f64::from(logits[token]) - want).abs();
                worst = worst.max(if difference.is_nan() { f64::INFINITY } else { difference });
            }
        }
    }
    println!("{name}: logits differ by {worst:.2e} at most");
    let eos = engine.info().eos.clone();
    let kv = KvDevicePages::new(&device, engine.info().kv, 1000).unwrap();
    let mut single = SingleProcess::new(engine, kv, 256);
    let requests = models::greedy(&cases, &eos);
    let results = single.generate(&requests).unwrap();
    let differ: Vec<String> = cases
        .iter()
        .zip(results)
        .filter(|(case, result)| {
            let got: Vec<TokenId> = result.tokens.iter().map(|s| s.token).collect();
            got != models::tokens(&case["greedy_ids"])
        })
        .map(|(case, _)| case["name"].to_string())
        .collect();
    println!("{name}: {} of {} greedy continuations differ: {differ:?}", differ.len(), cases.len());
    assert!(worst <= 2e-3, "{name}: logits differ by {worst}");
    assert!(differ.is_empty());
}

#[test]
fn tiny_agrees_with_transformers() {
    golden("tiny");
}

#[test]
fn small_agrees_with_transformers() {
    golden("small");
}

#[test]
fn every_family_agrees_with_transformers() {
    let Some(device) = Device::open_or_skip(0) else { return };
    let mut wrong = Vec::new();
    for name in FIXTURES {
        let dir = fixture(name);
        let mut engine = load(&dir, &device, f32_options());
        let mut worst = 0.0f64;
        for case in &models::golden(&dir) {
            let tokens = models::tokens(&case["input_ids"]);
            for chunk in [usize::MAX, 5] {
                let logits = last_logits(&mut engine, &device, &tokens, chunk);
                for (got, want) in logits.iter().zip(case["logits_last"].as_array().unwrap()) {
                    let difference = (f64::from(*got) - want.as_f64().unwrap()).abs();
                    worst = worst.max(if difference.is_nan() { f64::INFINITY } else { difference });
                }
            }
        }
        println!("{name}: logits differ by {worst:.1e} at most");
        if worst > 5e-4 {
            wrong.push(name);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// A copy of a model whose weights are stored in half as many bits.
fn halved(dir: &Path, to: Dtype) -> PathBuf {
    let name = format!("{}-{to:?}-{}", dir.file_name().unwrap().to_string_lossy(), std::process::id());
    let folder = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&folder).unwrap();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        if file.ends_with(".json") {
            std::fs::write(folder.join(file), std::fs::read(&path).unwrap()).unwrap();
        } else if file.ends_with(".safetensors") {
            let bytes = std::fs::read(&path).unwrap();
            let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let converted: Vec<(String, Vec<usize>, Vec<u8>)> = (tensors.iter())
                .map(|(name, view)| {
                    let numbers: Vec<f32> = match view.dtype() {
                        Dtype::F32 => {
                            view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
                        }
                        Dtype::F16 => view
                            .data()
                            .as_chunks::<2>()
                            .0
                            .iter()
                            .map(|b| half::f16::from_le_bytes(*b).to_f32())
                            .collect(),
                        _ => view
                            .data()
                            .as_chunks::<2>()
                            .0
                            .iter()
                            .map(|b| half::bf16::from_le_bytes(*b).to_f32())
                            .collect(),
                    };
                    let bytes = numbers.into_iter().flat_map(|x| match to {
                        Dtype::F16 => half::f16::from_f32(x).to_le_bytes(),
                        _ => half::bf16::from_f32(x).to_le_bytes(),
                    });
                    (name.to_owned(), view.shape().to_vec(), bytes.collect())
                })
                .collect();
            let views = (converted.iter())
                .map(|(name, shape, data)| (name, TensorView::new(to, shape.clone(), data).unwrap()));
            safetensors::serialize_to_file(views, None, &folder.join(file)).unwrap();
        }
    }
    folder
}

/// How far logits in half precision are from those of the CPU, which computes in single precision from the same
/// weights, for the worst of some prompts.
fn half_precision(dir: &Path, device: &Arc<Device>, stored: Dtype, dtype: KvDtype) -> f64 {
    let folder = halved(dir, stored);
    let options = CudaOptions { dtype: Some(dtype), ..CudaOptions::default() };
    let mut engine = load(&folder, device, options);
    let cpu = LoadOptions { kv_dtype: dtype, ..LoadOptions::default() };
    let mut reference = CpuEngine::load(&folder, cpu).unwrap();
    let vocab_size = engine.info().vocab_size;
    let longest = if vocab_size > 1000 { 600 } else { 60 };
    let mut worst = 0.0f64;
    for (seed, len) in [(1, 1), (2, 17), (3, longest)] {
        let tokens = prompt(seed, len, vocab_size);
        let want = models::last_logits(&mut reference, &tokens, usize::MAX);
        for chunk in [usize::MAX, 33] {
            worst = worst.max(apart(&last_logits(&mut engine, device, &tokens, chunk), &want));
        }
    }
    std::fs::remove_dir_all(&folder).unwrap();
    worst
}

/// A trained model is held to 2e-2 in bf16, and everything to 5e-3 in f16.
///
/// The fixtures' weights are random, so each layer amplifies the rounding of activations: bf16, whose mantissa is eight
/// times as coarse, takes them 1.3e-2 to 4e-2 away. That is the format and not the code, which is the same for both
/// formats, since f16 is within 4e-3. So there bf16 is held to what f16 gave: eight times that is due, and 4.6 to 16
/// times was seen, since the worst of a few prompts varies.
#[test]
fn half_precision_agrees_with_the_cpu() {
    let Some(device) = Device::open_or_skip(0) else { return };
    let trained = [Some(models::find("tiny").expect("models/tiny")), models::find("small")];
    let trained = trained.into_iter().flatten().map(|dir| (dir, true));
    let mut wrong = Vec::new();
    for (dir, trained) in trained.chain(FIXTURES.map(|name| (fixture(name), false))) {
        let f16 = half_precision(&dir, &device, Dtype::F16, KvDtype::F16);
        let bf16 = half_precision(&dir, &device, Dtype::BF16, KvDtype::Bf16);
        let allowed = if trained { 2e-2 } else { (20.0 * f16).min(5e-2) };
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        println!(
            "{name}: logits are {f16:.1e} of their length apart in f16, {bf16:.1e} in bf16 ({allowed:.1e} allowed)"
        );
        if f16 > 5e-3 || bf16 > allowed {
            wrong.push(name);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// Decode steps of growing batches, recorded as graphs and not, prefill between them.
#[test]
fn graphs_change_nothing() {
    let Some(device) = Device::open_or_skip(0) else { return };
    let dir = models::find("tiny").expect("models/tiny");
    let run = |graphs: bool| {
        let options = CudaOptions { dtype: Some(KvDtype::Bf16), graphs, ..CudaOptions::default() };
        let mut engine = load(&dir, &device, options);
        let shape = engine.info().kv;
        let mut kv = KvDevicePages::new(&device, shape, 16 * 40).unwrap();
        let tables: Vec<Vec<PageId>> = (0..40).map(|i| models::pages(16 * 40, i * 16, 16)).collect();
        let mut rows = Vec::new();
        for (round, count) in
            [1usize, 3, 3, 3, 40, 40, 40, 11, 11, 11, 3, 2, 2, 2, 1, 1].into_iter().enumerate()
        {
            for _ in 0..3 {
                let tokens = prompt(round as u32, 60, 4096);
                let prompts: Vec<Sequence<'_>> = (tables.iter().take(count).enumerate())
                    .map(|(i, pages)| Sequence { tokens: &tokens[..20 + i], start: 0, pages, logits: false })
                    .collect();
                engine.step(&prompts, &mut kv, &mut |_, _| ()).unwrap();
                let batch: Vec<Sequence<'_>> = (tables.iter().take(count).enumerate())
                    .map(|(i, pages)| Sequence {
                        tokens: &tokens[20 + i % 40..21 + i % 40],
                        start: 20 + i as u32,
                        pages,
                        logits: true,
                    })
                    .collect();
                let logits = engine.step(&batch, &mut kv, &mut |_, _| ()).unwrap();
                assert_eq!(logits.rows().len(), count);
                rows.extend(logits.rows().map(<[f32]>::to_vec));
            }
        }
        rows
    };
    let (plain, graphs) = (run(false), run(true));
    let worst = plain.iter().zip(&graphs).map(|(p, g)| apart(g, p)).fold(0.0, f64::max);
    println!("graphs: logits are {worst:.1e} of their length apart");
    // Batches are filled up, so products may be summed in another order.
    assert!(worst < 2e-2);
}

#[test]
fn bad_steps_are_refused() {
    let Some(device) = Device::open_or_skip(0) else { return };
    let mut engine = load(&models::find("tiny").expect("models/tiny"), &device, f32_options());
    let mut kv = KvDevicePages::new(&device, engine.info().kv, 4).unwrap();
    let outside = [PageId(9)];
    let bad = Sequence { tokens: &[TokenId(3)], start: 0, pages: &outside, logits: true };
    engine.step(&[bad], &mut kv, &mut |_, _| ()).unwrap_err();
    assert_eq!(engine.step(&[], &mut kv, &mut |_, _| ()).unwrap().rows().len(), 0);
}
