//! How fast the engine is on this machine: prefill and decode in tokens a second, and the arithmetic rate
//! beside what the cores can do at most.
//!
//! `cargo run --release -p tandem-engine --example speed -- MODEL_DIR [THREADS [ISA [f32|f16|bf16]]]`: the last is how keys and
//! values are stored.
//!
//! With feature `cuda`: `... --features cuda --example speed -- MODEL_DIR --device cuda:N`, or `--shape 8b` instead of a
//! model, for made up weights in the shape of Llama 3 8B.

#[cfg(feature = "cuda")]
mod gpu;

use std::path::PathBuf;
use std::time::{Duration, Instant};
#[cfg(feature = "cuda")]
use tandem_engine::LoadFormat;
use tandem_engine::{CpuEngine, Engine, Isa, LoadOptions, Sequence};
use tandem_kernels::KvPages;
use tandem_kernels::cpu::Cpu;
use tandem_proto::ids::{PageId, TokenId};
use tandem_proto::layout::KvDtype;

/// Tokens of each sequence before decoding.
const CONTEXT: u32 = 512;
/// Each figure is the median of runs within so much time.
const TIME: Duration = Duration::from_secs(3);

const USAGE: &str = "usage: speed MODEL_DIR [THREADS [ISA [f32|f16|bf16]]], or speed (MODEL_DIR | --shape 8b) --device cuda:N";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    #[cfg(feature = "cuda")]
    if let Some(at) = arguments.iter().position(|argument| argument == "--device") {
        let ordinal = arguments.get(at + 1).and_then(|device| device.strip_prefix("cuda:")).ok_or(USAGE)?;
        let ordinal = ordinal.parse()?;
        return match arguments[..at].iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["--shape", "8b"] => {
                let dir = std::env::temp_dir().join(format!("tandem-8b-{}", std::process::id()));
                std::fs::create_dir_all(&dir)?;
                std::fs::write(dir.join("config.json"), gpu::SHAPE_8B)?;
                let done = gpu::run(&dir, LoadFormat::Dummy, ordinal);
                std::fs::remove_dir_all(&dir)?;
                done
            }
            [dir] => gpu::run(dir.as_ref(), LoadFormat::Files, ordinal),
            _ => Err(USAGE.into()),
        };
    }
    let mut arguments = arguments.into_iter();
    let dir = PathBuf::from(arguments.next().ok_or(USAGE)?);
    let mut options = LoadOptions::default();
    if let Some(threads) = arguments.next() {
        options.threads = threads.parse()?;
    }
    if let Some(isa) = arguments.next() {
        options.isa = Isa::named(&isa)?;
    }
    if let Some(stored) = arguments.next() {
        options.kv_dtype = match stored.as_str() {
            "f32" => KvDtype::F32,
            "f16" => KvDtype::F16,
            "bf16" => KvDtype::Bf16,
            other => {
                return Err(format!("keys and values are stored as f32, f16 or bf16, not {other}").into());
            }
        };
    }
    let mut engine = CpuEngine::load(&dir, options)?;
    let peak = Cpu::with_isa(options.isa, options.threads).peak_gflops(TIME / 6);
    println!(
        "{} on {} threads, {}: peak {peak:.0} GFLOP/s",
        engine.info().name,
        options.threads,
        options.isa
    );

    let mut bench = Bench::new(&engine)?;
    for tokens in [512, 2000] {
        let seconds = bench.prefill(&mut engine, tokens);
        // Two operations for each weight of the layers, as any engine counts them, whatever is left out.
        let gflops = 2.0 * engine.info().layer_parameters as f64 * f64::from(tokens) / seconds / 1e9;
        println!(
            "prefill {tokens:>5}: {:>8.0} tokens/s, {:>7.1} ms, {gflops:.0} GFLOP/s in products ({:.0}% of peak)",
            f64::from(tokens) / seconds,
            seconds * 1e3,
            gflops / peak * 100.0,
        );
    }
    let mut alone = 0.0;
    for streams in [1, 2, 4, 8, 16] {
        let seconds = bench.decode(&mut engine, streams);
        let rate = f64::from(streams) / seconds;
        if streams == 1 {
            alone = rate;
        }
        println!(
            "decode {streams:>2} streams at {CONTEXT}: {rate:>7.0} tokens/s, {:.2} ms a step, {:.2} of one stream",
            seconds * 1e3,
            rate / alone
        );
    }
    Ok(())
}

struct Bench {
    kv: KvPages,
    table: Vec<PageId>,
    vocab_size: u32,
}

impl Bench {
    fn new(engine: &CpuEngine) -> Result<Bench, Box<dyn std::error::Error>> {
        let info = engine.info();
        let pages = info.kv.pages(16 * (CONTEXT + 512)).max(info.kv.pages(2000));
        let table = (0..pages).rev().map(PageId).collect();
        Ok(Bench { kv: KvPages::new(info.kv, pages)?, table, vocab_size: info.vocab_size })
    }

    fn tokens(&self, count: u32) -> Vec<TokenId> {
        (0..count).map(|i| TokenId((i * 7 + i * i % 101) % self.vocab_size)).collect()
    }

    /// Seconds of a prompt in one step.
    fn prefill(&mut self, engine: &mut CpuEngine, count: u32) -> f64 {
        let tokens = self.tokens(count);
        median(|| {
            let sequence = Sequence { tokens: &tokens, start: 0, pages: &self.table, logits: true };
            engine.step(&[sequence], &mut self.kv, &mut |_, _| ()).expect("a step");
        })
    }

    /// Seconds of a step that decodes one token of each of `streams` sequences.
    fn decode(&mut self, engine: &mut CpuEngine, streams: u32) -> f64 {
        let tokens = self.tokens(CONTEXT);
        let each = self.table.len() / 16;
        let tables: Vec<&[PageId]> = self.table.chunks(each).take(streams as usize).collect();
        for table in &tables {
            let sequence = Sequence { tokens: &tokens, start: 0, pages: table, logits: false };
            engine.step(&[sequence], &mut self.kv, &mut |_, _| ()).expect("a step");
        }
        median(|| {
            let batch: Vec<Sequence<'_>> = tables
                .iter()
                .map(|pages| Sequence { tokens: &tokens[..1], start: CONTEXT, pages, logits: true })
                .collect();
            engine.step(&batch, &mut self.kv, &mut |_, _| ()).expect("a step");
        })
    }
}

/// Seconds of the median run.
fn median(mut run: impl FnMut()) -> f64 {
    run();
    let begun = Instant::now();
    let mut times = Vec::new();
    while begun.elapsed() < TIME {
        let start = Instant::now();
        run();
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
