//! The engine on a GPU: time to the first token and between tokens, each beside its bound, and where the time goes.

use std::sync::Arc;
use std::time::Instant;
use tandem_engine::{CudaEngine, CudaOptions, Engine, LoadFormat, Progress, Sequence};
use tandem_kernels::cpu::{Dtype, Epilogue};
use tandem_kernels::cuda::{Compute, KvDevicePages, Rows, Source, Work};
use tandem_memory::cuda::{Device, DeviceRegion};
use tandem_proto::ids::{PageId, TokenId};
use tandem_proto::layout::KvDtype;

/// Tokens of a prefill step at most.
const STEP: usize = 8192;
const PROMPTS: [usize; 4] = [512, 2048, 8192, 32_768];
const BATCHES: [usize; 5] = [1, 8, 16, 32, 128];
/// Tokens of each sequence before decoding.
const CONTEXT: usize = 1024;
/// Runs of which the median counts, after one that does not.
const RUNS: usize = 5;
const DECODE_STEPS: usize = 24;

type Failure = Box<dyn std::error::Error>;

/// The shape of Llama 3 8B.
pub(crate) const SHAPE_8B: &str = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": false}"#;

/// What the GPU can do at most, as it was measured here.
struct Limits {
    flops: f64,
    /// Read and written.
    bytes: f64,
}

impl Limits {
    fn measure(device: &Arc<Device>) -> Result<Limits, Failure> {
        let len = 2 << 30;
        let (from, to) = (DeviceRegion::take(device, len)?, DeviceRegion::take(device, len)?);
        let stream = device.stream()?;
        let copy = || -> Result<f64, Failure> {
            let start = Instant::now();
            for _ in 0..8 {
                from.extent(0..len)?.copy_to(&stream, &to.extent(0..len)?)?;
            }
            stream.synchronize()?;
            Ok(start.elapsed().as_secs_f64() / 8.0)
        };
        copy()?;
        let bytes = 2.0 * len as f64 / copy()?;
        let side = 8192;
        let mut compute = Compute::open(device, Dtype::Bf16)?;
        let dummy = |count| Source::Dummy { count, around: 0.0, width: 0.02 };
        let weight = compute.matrix(&[(dummy(side * side), None)], side, false);
        let numbers: Vec<f32> = (0..side * side).map(|i| ((i * 7919) % 1009) as f32 / 500.0 - 1.0).collect();
        let x = compute.rows(&numbers, side, Dtype::Bf16);
        let mut out = Rows::default();
        for _ in 0..3 {
            compute.linear(&x, &weight, Epilogue::Store, &mut out);
        }
        compute.time(true);
        for _ in 0..20 {
            compute.linear(&x, &weight, Epilogue::Store, &mut out);
        }
        let ms: f64 = compute.times()?.iter().map(|(_, ms, _)| ms).sum();
        if let Some(failure) = compute.failure() {
            return Err(failure.into());
        }
        Ok(Limits { flops: 20.0 * 2.0 * (side as f64).powi(3) / ms * 1e3, bytes })
    }
}

struct Bench {
    engine: CudaEngine,
    kv: KvDevicePages,
    table: Vec<PageId>,
    heads_flops: f64,
    output_parameters: f64,
}

pub(crate) fn run(dir: &std::path::Path, format: LoadFormat, ordinal: usize) -> Result<(), Failure> {
    let device = Device::open(ordinal)?;
    let limits = Limits::measure(&device)?;
    println!(
        "{device:?}: bf16 products of 8192 {:.0} TFLOP/s, copies {:.2} TB/s read and written",
        limits.flops / 1e12,
        limits.bytes / 1e12
    );
    let begun = Instant::now();
    let options = CudaOptions { dtype: Some(KvDtype::Bf16), format, ..CudaOptions::default() };
    let engine = CudaEngine::load(dir, options, &device)?;
    let info = engine.info().clone();
    println!(
        "{}: {:.2} billion numbers, loaded in {:.1} s",
        info.name,
        info.parameters as f64 / 1e9,
        begun.elapsed().as_secs_f64()
    );
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("config.json"))?)?;
    let count = |field: &str| config[field].as_f64().unwrap_or(0.0);
    let limit = info.max_positions as usize;
    let longest = PROMPTS.into_iter().filter(|len| *len <= limit).max().unwrap_or(limit);
    let room = longest.max(BATCHES[BATCHES.len() - 1] * (CONTEXT + DECODE_STEPS + 40));
    let pages = info.kv.pages(room as u32);
    let kv = KvDevicePages::new(&device, info.kv, pages)?;
    // 7919 is prime, so pages come in an order that is none.
    let table = (0..pages).map(|i| PageId((u64::from(i) * 7919 % u64::from(pages)) as u32)).collect();
    let mut bench = Bench {
        engine,
        kv,
        table,
        heads_flops: 4.0 * count("num_attention_heads") * f64::from(info.kv.head_dim * info.kv.layers),
        output_parameters: count("vocab_size") * count("hidden_size"),
    };
    for len in PROMPTS.into_iter().filter(|len| *len <= limit) {
        bench.prompt(len, &limits)?;
    }
    for batch in BATCHES {
        bench.decode(batch, &limits)?;
    }
    Ok(())
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

impl Bench {
    fn tokens(&self, len: usize) -> Vec<TokenId> {
        let vocab_size = u64::from(self.engine.info().vocab_size);
        (0..len as u64).map(|i| TokenId(((i * 7 + i * i % 101) % vocab_size) as u32)).collect()
    }

    fn prefill(&mut self, tokens: &[TokenId]) -> Result<f64, Failure> {
        let start = Instant::now();
        for (index, part) in tokens.chunks(STEP).enumerate() {
            let first = index * STEP;
            let logits = first + part.len() == tokens.len();
            let sequence = Sequence { tokens: part, start: first as u32, pages: &self.table, logits };
            self.engine.step(&[sequence], &mut self.kv, &mut |_, _| ())?;
        }
        Ok(start.elapsed().as_secs_f64())
    }

    fn prompt(&mut self, len: usize, limits: &Limits) -> Result<(), Failure> {
        let tokens = self.tokens(len);
        self.prefill(&tokens)?;
        let runs = if len > STEP { 3 } else { RUNS };
        let seconds = median((0..runs).map(|_| self.prefill(&tokens)).collect::<Result<_, _>>()?);
        let n = len as f64;
        let attention = self.heads_flops * n * n / 2.0;
        let products = 2.0 * (self.engine.info().layer_parameters as f64 * n + self.output_parameters);
        let bound = (attention + products) / limits.flops;
        println!(
            "TTFT {len:>6}: {:>8.2} ms, bound {:>8.2} ms ({:.0}%)",
            seconds * 1e3,
            bound * 1e3,
            bound / seconds * 100.0
        );
        self.engine.time(true);
        self.prefill(&tokens)?;
        self.split(|(work, [outputs, inputs])| match work {
            "product" => 2.0 * n * (outputs * inputs) as f64,
            "output" => 2.0 * (outputs * inputs) as f64,
            "prefill attention" => attention,
            _ => 0.0,
        })
    }

    fn decode(&mut self, batch: usize, limits: &Limits) -> Result<(), Failure> {
        let tokens = self.tokens(CONTEXT);
        let each = self.engine.info().kv.pages((CONTEXT + DECODE_STEPS + 40) as u32) as usize;
        let tables: Vec<Vec<PageId>> = self.table.chunks(each).take(batch).map(<[_]>::to_vec).collect();
        for some in tables.chunks(STEP / CONTEXT) {
            let batch: Vec<Sequence<'_>> = (some.iter())
                .map(|pages| Sequence { tokens: &tokens, start: 0, pages, logits: false })
                .collect();
            self.engine.step(&batch, &mut self.kv, &mut |_, _| ())?;
        }
        let mut queued = Vec::new();
        let mut step = |bench: &mut Bench, index: usize| -> Result<f64, Failure> {
            let batch: Vec<Sequence<'_>> = (tables.iter())
                .map(|pages| Sequence {
                    tokens: &tokens[index..=index],
                    start: (CONTEXT + index) as u32,
                    pages,
                    logits: true,
                })
                .collect();
            let start = Instant::now();
            let (mut first, mut last) = (None, 0.0);
            bench.engine.step(&batch, &mut bench.kv, &mut |progress, _| {
                if progress == Progress::Waiting {
                    last = start.elapsed().as_secs_f64();
                    first.get_or_insert(last);
                }
            })?;
            queued.push((first.unwrap_or(0.0), last));
            Ok(start.elapsed().as_secs_f64())
        };
        for index in 0..6 {
            step(self, index)?;
        }
        let times = (6..6 + DECODE_STEPS).map(|index| step(self, index)).collect::<Result<Vec<_>, _>>()?;
        self.engine.time(true);
        step(self, 6 + DECODE_STEPS)?;
        self.engine.times()?;
        step(self, 7 + DECODE_STEPS)?;
        let seconds = median(times);
        let (first, last) = queued.split_off(6).into_iter().take(DECODE_STEPS).unzip();
        let info = self.engine.info();
        let weights = 2.0 * (info.layer_parameters as f64 + self.output_parameters);
        let kv = (batch * (CONTEXT + 6 + DECODE_STEPS / 2) * info.kv.token_bytes()) as f64;
        let bound = (weights + kv) / limits.bytes;
        println!(
            "ITL, {batch:>3} at {CONTEXT}: {:>6.2} ms, bound {:>6.2} ms ({:.0}%); queued after {:.2} ms, computed after {:.2} ms",
            seconds * 1e3,
            bound * 1e3,
            bound / seconds * 100.0,
            median(first) * 1e3,
            median(last) * 1e3,
        );
        self.split(|(work, [outputs, inputs])| match work {
            "product" | "output" => 2.0 * (outputs * inputs) as f64,
            "decode attention" => kv,
            _ => 0.0,
        })
    }

    /// Prints where the time of the steps since `time(true)` went, with the rate at which each kind of work did what it
    /// had to, and has no more steps timed.
    fn split(&mut self, amount: impl Fn(Work) -> f64) -> Result<(), Failure> {
        let mut times = self.engine.times()?;
        self.engine.time(false);
        times.sort_by(|(_, a, _), (_, b, _)| b.total_cmp(a));
        let layers = f64::from(self.engine.info().kv.layers);
        for (work, ms, count) in times {
            // Products of one shape are in every layer; steps share the rows out.
            let whole = if work.0 == "product" { layers } else { 1.0 };
            let rate = amount(work) * whole / ms / 1e9;
            let (name, [outputs, inputs]) = work;
            let shape = if outputs > 0 { format!(" {inputs} to {outputs}") } else { String::new() };
            let rate = if rate > 0.0 { format!(", {rate:>7.2} T/s") } else { String::new() };
            println!("    {:<32} {ms:>9.3} ms, {count:>5} times{rate}", format!("{name}{shape}"));
        }
        Ok(())
    }
}
