//! A model's operations on a real GPU, against plain loops on the CPU. Without a GPU each test says that it was skipped,
//! and passes. `TANDEM_SEED=N` plays other cases, `TANDEM_CASES=N` so many.

use std::sync::Arc;
use tandem_kernels::contract::Random;
use tandem_kernels::cpu::{Dtype, Heads, Span};
use tandem_kernels::cuda::{Compute, KvDevicePages, Source, Turn};
use tandem_memory::cuda::Device;
use tandem_proto::ids::{LayerIdx, PageId, TokenId};
use tandem_proto::layout::{KvDtype, KvShape};

fn below(random: &mut Random, end: usize) -> usize {
    random.below(end as u32) as usize
}

/// Sums of uniform numbers: near enough to a normal distribution.
fn numbers(random: &mut Random, count: usize) -> Vec<f32> {
    let mut unit = || (random.next() >> 40) as f32 / (1 << 23) as f32 - 1.0;
    (0..count).map(|_| unit() + unit() + unit()).collect()
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

fn rounded(dtype: Dtype, x: f32) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => half::f16::from_f32(x).to_f32(),
        Dtype::Bf16 => half::bf16::from_f32(x).to_f32(),
    }
}

fn bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Sequences over pages in random order, of which some tokens lie there already.
#[derive(Debug)]
struct Case {
    dtype: Dtype,
    shape: KvShape,
    heads: Heads,
    normed: bool,
    /// Tokens in pages, and new ones.
    sequences: Vec<(usize, usize)>,
}

impl Case {
    fn draw(random: &mut Random, index: usize) -> Case {
        let (dtype, kv_dtype) = [
            (Dtype::Bf16, KvDtype::Bf16),
            (Dtype::F16, KvDtype::F16),
            (Dtype::F32, KvDtype::F32),
            (Dtype::Bf16, KvDtype::Bf16),
        ][index % 4];
        let head_dim = random.one(&[64, 128, 128, 64, 80, 36, 256]);
        let (group, kv_heads) = (random.one(&[1, 2, 4, 7, 8, 20]), 1 + below(random, 3));
        let page_tokens = random.one(&[16, 16, 32, 48, 5]);
        let window = [None, None, Some(1 + below(random, 200) as u32)][below(random, 3)];
        let alone = below(random, 3) == 0;
        let mut sequence = || {
            let before = [0, below(random, 40), below(random, 700)][below(random, 3)];
            (
                before,
                if alone { 1 } else { [1, 1 + below(random, 20), 1 + below(random, 300)][below(random, 3)] },
            )
        };
        let sequences = (0..1 + index % 5).map(|_| sequence()).collect();
        Case {
            dtype,
            shape: KvShape {
                layers: 2,
                kv_heads: kv_heads as u32,
                head_dim: head_dim as u32,
                page_tokens,
                chunk_tokens: page_tokens,
                dtype: kv_dtype,
            },
            heads: Heads {
                heads: group * kv_heads,
                kv_heads,
                head_dim,
                scale: 1.0 / (head_dim as f32).sqrt(),
                window,
            },
            normed: below(random, 3) == 0,
            sequences,
        }
    }
}

/// What the reference turns queries and keys by.
struct Turned {
    frequencies: Vec<f32>,
    norms: Option<(Vec<f32>, Vec<f32>)>,
}

impl Turned {
    fn apply(&self, head: &[f32], position: usize, norm: Option<&Vec<f32>>) -> Vec<f64> {
        let mut x: Vec<f64> = head.iter().map(|x| f64::from(*x)).collect();
        if let Some(weight) = norm {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            let scale = 1.0 / (mean + 1e-5).sqrt();
            x.iter_mut().zip(weight).for_each(|(x, w)| *x *= scale * f64::from(*w));
        }
        let half = x.len() / 2;
        for i in 0..half {
            let angle = f64::from(position as f32 * self.frequencies[i]);
            let (a, b) = (x[i], x[half + i]);
            (x[i], x[half + i]) = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin());
        }
        x
    }
}

#[test]
fn attention_agrees_with_plain_loops() {
    let Some(device) = Device::open_or_skip(0) else { return };
    let (seed, cases) = (number("TANDEM_SEED", 1), number("TANDEM_CASES", 120));
    let mut random = Random(seed);
    let mut worst: Vec<(String, f64)> = Vec::new();
    let mut wrong = Vec::new();
    for index in 0..cases as usize {
        let case = Case::draw(&mut random, index);
        let error = check(&device, &case, &mut random);
        let flash = matches!(case.heads.head_dim, 64 | 128) && case.shape.page_tokens.is_multiple_of(16);
        let kind = format!("{:?} {}", case.dtype, if flash { case.heads.head_dim } else { 0 });
        let allowed = match case.dtype {
            Dtype::F32 => 2e-5,
            Dtype::F16 => 2e-3,
            Dtype::Bf16 => 1.2e-2,
        };
        if !matches!(error, Ok(error) if error <= allowed) {
            println!("case {index}: {error:?} of {allowed}: {case:?}");
            wrong.push(index);
        }
        let error = error.unwrap_or(f64::INFINITY);
        match worst.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, most)) => *most = most.max(error),
            None => worst.push((kind, error)),
        }
    }
    println!(
        "seed {seed}, {cases} cases; relative errors of a row at most (0: heads of other sizes): {worst:?}"
    );
    assert!(wrong.is_empty(), "seed {seed}: cases {wrong:?}");
}

/// The largest error of a row, by its length.
fn check(device: &Arc<Device>, case: &Case, random: &mut Random) -> Result<f64, String> {
    let Case { dtype, shape, heads, .. } = case;
    let (dim, width, layer) = (heads.head_dim, heads.qkv_width(), LayerIdx(1));
    let page_tokens = shape.page_tokens as usize;
    let turned = Turned {
        frequencies: (0..dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / dim as f32)).collect(),
        norms: case.normed.then(|| (numbers(random, dim), numbers(random, dim))),
    };
    let mut compute = Compute::open(device, *dtype).map_err(|error| error.to_string())?;
    let mut vector =
        |numbers: &[f32]| compute.numbers(&[Source::Stored(&bytes(numbers), Dtype::F32)], Dtype::F32);
    let frequencies = vector(&turned.frequencies);
    let norms = turned.norms.as_ref().map(|(query, key)| (vector(query), vector(key)));
    let turn = Turn {
        frequencies: &frequencies,
        scale: 1.0,
        norms: norms.as_ref().map(|(query, key)| (query, key, 1e-5)),
    };

    let needed: Vec<usize> =
        case.sequences.iter().map(|(before, new)| (before + new).div_ceil(page_tokens)).collect();
    let pool = needed.iter().sum::<usize>() + 3;
    let mut ids: Vec<PageId> = (0..pool as u32).map(PageId).collect();
    for i in (1..pool).rev() {
        ids.swap(i, below(random, i + 1));
    }
    let mut free = ids.as_slice();
    let tables: Vec<&[PageId]> =
        needed.iter().map(|count| free.split_off(..*count).expect("pages")).collect();
    let kv = KvDevicePages::new(device, *shape, pool as u32).map_err(|error| error.to_string())?;
    let qkv: Vec<Vec<f32>> = case
        .sequences
        .iter()
        .map(|(before, new)| {
            numbers(random, (before + new) * width).into_iter().map(|x| rounded(*dtype, x)).collect()
        })
        .collect();

    // What is there already, then what is new, with a row that only fills the batch where all are single tokens.
    let mut got = Vec::new();
    for new in [false, true] {
        let (mut rows, mut spans, mut count) = (Vec::new(), Vec::new(), 0);
        for ((before, tokens), (numbers, pages)) in case.sequences.iter().zip(qkv.iter().zip(&tables)) {
            let (start, tokens) = if new { (*before, *tokens) } else { (0, *before) };
            if tokens > 0 {
                spans.push(Span { row: count, tokens, start: start as u32, pages });
                rows.extend_from_slice(&numbers[start * width..(start + tokens) * width]);
                count += tokens;
            }
        }
        if spans.is_empty() {
            continue;
        }
        if new && spans.iter().all(|span| span.tokens == 1) {
            spans.push(Span { row: count, tokens: 1, start: 0, pages: &[] });
            rows.extend(vec![f32::NAN; width]);
            count += 1;
        }
        compute.begin(&vec![TokenId(0); count], &spans, page_tokens, &[]);
        let mut rows = compute.rows(&rows, width, *dtype);
        compute.turn_and_store(heads, &turn, layer, &mut rows, &kv);
        if new {
            let mut out = tandem_kernels::cuda::Rows::default();
            compute.attention(heads, layer, &rows, &kv, &mut out);
            got = compute.read(&out);
        } else {
            compute.read(&rows);
        }
        if let Some(error) = compute.failure() {
            return Err(error.to_string());
        }
    }

    let mut worst = 0.0f64;
    let mut got = got.chunks_exact(dim);
    for ((before, new), numbers) in case.sequences.iter().zip(&qkv) {
        let norm = |query: bool| turned.norms.as_ref().map(|(q, k)| if query { q } else { k });
        let head = |position: usize, index: usize| &numbers[position * width + index * dim..][..dim];
        // Queries are turned in place and keys stored, so both are rounded.
        let round = |x: Vec<f64>| -> Vec<f64> {
            x.into_iter().map(|x| f64::from(rounded(*dtype, x as f32))).collect()
        };
        let keys: Vec<Vec<f64>> = (0..(before + new) * heads.kv_heads)
            .map(|i| {
                let (position, kv_head) = (i / heads.kv_heads, i % heads.kv_heads);
                round(turned.apply(head(position, heads.heads + kv_head), position, norm(false)))
            })
            .collect();
        for position in *before..before + new {
            for index in 0..heads.heads {
                let kv_head = index / (heads.heads / heads.kv_heads);
                let query = round(turned.apply(head(position, index), position, norm(true)));
                let first = heads.window.map_or(0, |window| (position + 1).saturating_sub(window as usize));
                let scores: Vec<f64> = (first..=position)
                    .map(|at| {
                        let key = &keys[at * heads.kv_heads + kv_head];
                        query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>() * f64::from(heads.scale)
                    })
                    .collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let mut want = vec![0.0f64; dim];
                let mut total = 0.0;
                for (at, score) in (first..).zip(&scores) {
                    let weight = (score - most).exp();
                    total += weight;
                    let value = head(at, heads.heads + heads.kv_heads + kv_head);
                    want.iter_mut().zip(value).for_each(|(w, v)| *w += weight * f64::from(*v));
                }
                let row = got.next().ok_or("too few rows")?;
                let (mut difference, mut length) = (0.0, 0.0);
                for (want, got) in want.iter().zip(row) {
                    difference += (want / total - f64::from(*got)).powi(2);
                    length += (want / total).powi(2);
                }
                let error = (difference / length).sqrt();
                worst = worst.max(if error.is_nan() { f64::INFINITY } else { error });
            }
        }
    }
    Ok(worst)
}

/// Norms, gated products, biases and products added to a residual, of odd sizes and of those for which there is a kernel
/// for few rows: up to 8, and up to 16.
#[test]
fn rows_agree_with_plain_loops() {
    let Some(device) = Device::open_or_skip(0) else { return };
    let mut random = Random(number("TANDEM_SEED", 1));
    let mut wrong = Vec::new();
    for (index, (rows, width, outputs)) in [
        (1, 64, 40),
        (3, 70, 24),
        (37, 256, 136),
        (130, 96, 1000),
        (5, 4096, 512),
        (9, 96, 64),
        (16, 1024, 1504),
    ]
    .into_iter()
    .enumerate()
    {
        for (dtype, allowed) in [(Dtype::F32, 2e-5), (Dtype::F16, 2e-3), (Dtype::Bf16, 1.2e-2)] {
            let mut compute = Compute::open(&device, dtype).unwrap();
            let x = numbers(&mut random, rows * width);
            let weight = numbers(&mut random, width);
            let gate: Vec<f32> =
                numbers(&mut random, 2 * outputs * width).iter().map(|x| rounded(dtype, x / 16.0)).collect();
            let bias = numbers(&mut random, outputs);
            let down: Vec<f32> =
                numbers(&mut random, width * outputs).iter().map(|x| rounded(dtype, x / 16.0)).collect();
            let shift = numbers(&mut random, width);
            let norm = compute.numbers(&[Source::Stored(&bytes(&weight), Dtype::F32)], Dtype::F32);
            let (gates, ups) = gate.split_at(outputs * width);
            let matrix = compute.matrix(
                &[
                    (
                        Source::Stored(&bytes(gates), Dtype::F32),
                        Some(Source::Stored(&bytes(&bias), Dtype::F32)),
                    ),
                    (Source::Stored(&bytes(ups), Dtype::F32), None),
                ],
                width,
                true,
            );
            let added =
                (Source::Stored(&bytes(&down), Dtype::F32), Some(Source::Stored(&bytes(&shift), Dtype::F32)));
            let down_matrix = compute.matrix(&[added], outputs, false);
            let mut normed = Default::default();
            let mut out = Default::default();
            let mut residual = compute.rows(&x, width, Dtype::F32);
            compute.rms_norm(&residual, &norm, 1e-5, &mut normed);
            compute.linear(&normed, &matrix, tandem_kernels::cpu::Epilogue::Store, &mut out);
            let got = compute.read(&out);
            compute.linear(&out, &down_matrix, tandem_kernels::cpu::Epilogue::Add, &mut residual);
            let sums = compute.read(&residual);
            if let Some(error) = compute.failure() {
                println!("case {index} {dtype:?}: {error}");
                wrong.push(index);
                continue;
            }
            let (mut difference, mut length) = (0.0, 0.0);
            for (row, got) in x.chunks_exact(width).zip(got.chunks_exact(outputs)) {
                let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
                let scale = 1.0 / (mean + 1e-5).sqrt();
                let normed: Vec<f64> = (row.iter().zip(&weight))
                    .map(|(x, w)| f64::from(rounded(dtype, (f64::from(*x) * scale * f64::from(*w)) as f32)))
                    .collect();
                let product = |weights: &[f32]| -> f64 {
                    weights.iter().zip(&normed).map(|(w, x)| f64::from(*w) * x).sum()
                };
                for (at, got) in got.iter().enumerate() {
                    let gate = product(&gates[at * width..][..width]) + f64::from(bias[at]);
                    let want = gate / (1.0 + (-gate).exp()) * product(&ups[at * width..][..width]);
                    difference += (want - f64::from(*got)).powi(2);
                    length += want.powi(2);
                }
            }
            let error = (difference / length).sqrt();
            let (mut difference, mut length) = (0.0, 0.0);
            for ((row, x), sums) in
                got.chunks_exact(outputs).zip(x.chunks_exact(width)).zip(sums.chunks_exact(width))
            {
                for (at, sum) in sums.iter().enumerate() {
                    let product: f64 = (down[at * outputs..][..outputs].iter().zip(row))
                        .map(|(w, x)| f64::from(*w) * f64::from(*x))
                        .sum();
                    let want = f64::from(x[at]) + product + f64::from(shift[at]);
                    difference += (want - f64::from(*sum)).powi(2);
                    length += want.powi(2);
                }
            }
            // What is multiplied is known exactly here, and the sum is in single precision.
            let added = (difference / length).sqrt();
            println!(
                "{rows} x {width} to {outputs}, {dtype:?}: relative error {error:.1e}, added to a residual {added:.1e}"
            );
            if !(error <= allowed && added <= 5e-5) {
                wrong.push(index);
            }
        }
    }
    assert!(wrong.is_empty(), "cases {wrong:?}");
}
