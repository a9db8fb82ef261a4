//! The rates of single kernels beside the bound of the cores: products by rows, and attention.
//!
//! `cargo run --release -p tandem-kernels --example rates -- [THREADS [ISA [attention]]]`

use std::time::{Duration, Instant};
use tandem_kernels::KvPages;
use tandem_kernels::cpu::{
    Cpu, Dtype, Epilogue, Heads, Isa, Matrix, MatrixPart, Rows, Span, attention, linear,
};
use tandem_proto::ids::{LayerIdx, PageId};
use tandem_proto::layout::{KvDtype, KvShape};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(Ok(1), |t| t.parse())?;
    let isa = arguments.next().map_or(Ok(Isa::detect()), |name| Isa::named(&name))?;
    let cpu = Cpu::with_isa(isa, threads);
    let peak = cpu.peak_gflops(Duration::from_millis(300));
    println!("{isa}, {threads} threads: peak {peak:.0} GFLOP/s");
    if arguments.next().as_deref() == Some("attention") {
        return attention_rates(&cpu);
    }
    for (inputs, outputs) in [(512, 1024), (512, 2560), (1280, 512)] {
        // So many copies that weights come from memory or the last cache, as those of a model do.
        let bytes = vec![0x3c; inputs * outputs * 2];
        let part = MatrixPart { data: &bytes, dtype: Dtype::Bf16, outputs, bias: None };
        let copies: Vec<Matrix> = (0..20).map(|_| Matrix::pack(&cpu, &[part], inputs)).collect();
        for rows in [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 14, 16, 28, 64, 128, 512, 2000] {
            let mut x = Rows::default();
            x.reshape(rows, inputs);
            let mut out = Rows::default();
            let seconds =
                fastest(|| copies.iter().for_each(|w| linear(&cpu, &x, w, Epilogue::Store, &mut out)));
            let seconds = seconds / copies.len() as f64;
            let gflops = 2.0 * (rows * inputs * outputs) as f64 / seconds / 1e9;
            let gbytes = (inputs * outputs * 2) as f64 / seconds / 1e9;
            let micros = seconds * 1e6;
            println!(
                "{rows:>4} x {inputs} x {outputs}: {micros:>8.1} us, {gflops:>6.1} GFLOP/s, weights {gbytes:>5.1} GB/s"
            );
        }
    }
    attention_rates(&cpu)
}

fn attention_rates(cpu: &Cpu) -> Result<(), Box<dyn std::error::Error>> {
    let heads = Heads { heads: 8, kv_heads: 4, head_dim: 64, scale: 0.125, window: None };
    let shape = KvShape {
        layers: 10,
        kv_heads: 4,
        head_dim: 64,
        page_tokens: 16,
        chunk_tokens: 256,
        dtype: KvDtype::F32,
    };
    let pages = 8 * 160;
    let mut kv = KvPages::new(shape, pages)?;
    for layer in 0..shape.layers {
        for page in 0..pages {
            (0..8)
                .for_each(|part| kv.head_mut(LayerIdx(layer), PageId(page), part / 2, part % 2 == 1).fill(0));
        }
    }
    // 797 is prime to the number of pages, so the tables go through the pool in no order.
    let tables: Vec<Vec<PageId>> =
        (0..8).map(|s| (0..160).map(|i| PageId((s * 160 + i) * 797 % pages)).collect()).collect();
    for (streams, start, tokens) in
        [(1, 0, 512), (1, 0, 2000), (1, 512, 1), (8, 512, 1), (1, 2000, 1), (8, 2000, 1)]
    {
        let mut qkv = Rows::default();
        qkv.reshape(streams * tokens, heads.qkv_width());
        let spans: Vec<Span<'_>> =
            (0..streams).map(|s| Span { row: s * tokens, tokens, start, pages: &tables[s] }).collect();
        let mut out = Rows::default();
        let mut layer = 0;
        let seconds = fastest(|| {
            layer = (layer + 1) % shape.layers;
            attention(cpu, &heads, LayerIdx(layer), &qkv, &spans, &kv, &mut out);
        });
        let pairs = (start as usize * tokens + tokens * (tokens + 1) / 2) * streams;
        let gflops = (pairs * heads.heads * heads.head_dim * 4) as f64 / seconds / 1e9;
        let gbytes = (streams * (start as usize + tokens) * shape.layer_token_bytes()) as f64 / seconds / 1e9;
        println!(
            "attention of {streams} x {tokens} at {start}: {:.1} us, {gflops:.1} GFLOP/s, KV once {gbytes:.1} GB/s",
            seconds * 1e6
        );
    }
    Ok(())
}

/// Seconds of the fastest run: what the kernel takes when nothing else runs.
fn fastest(mut run: impl FnMut()) -> f64 {
    let mut times = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(150) || times.len() < 5 {
        let start = Instant::now();
        run();
        times.push(start.elapsed().as_secs_f64());
    }
    times.into_iter().fold(f64::INFINITY, f64::min)
}
