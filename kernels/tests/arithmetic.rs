//! Products, attention and norms against plain double precision, and the same bits from every instruction
//! set, batch and number of threads.

use half::{bf16, f16};
use proptest::prelude::*;
use tandem_kernels::KvPages;
use tandem_kernels::cpu::{
    Cpu, Dtype, Epilogue, Heads, Isa, Matrix, MatrixPart, Rows, Span, attention, linear, read_f32, rms_norm,
    store_kv,
};
use tandem_proto::ids::{LayerIdx, PageId};
use tandem_proto::layout::{KvDtype, KvShape};

fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn encode(dtype: Dtype, numbers: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F32 => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::F16 => numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::Bf16 => numbers.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
    }
}

fn rows(count: usize, width: usize, from: &[f32]) -> Rows {
    let mut rows = Rows::default();
    rows.reshape(count, width);
    rows.data_mut().copy_from_slice(from);
    rows
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

fn machines() -> Vec<Cpu> {
    let sets = Isa::available();
    sets.iter().map(|isa| Cpu::with_isa(*isa, 1)).chain([Cpu::new(2)]).collect()
}

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn products(m in 1usize..40, n in 1usize..140, k in 1usize..70, seed: u64, dtype in 0usize..3, bias: bool, add: bool) {
        check_product(m, n, k, seed, DTYPES[dtype], bias, add);
    }

    #[test]
    fn gated_products(m in 1usize..20, n in 1usize..70, k in 1usize..40, seed: u64) {
        let (gate, up) = (numbers(seed, n * k), numbers(seed ^ 1, n * k));
        let x = numbers(seed ^ 2, m * k);
        let (gate_bytes, up_bytes) = (encode(Dtype::F32, &gate), encode(Dtype::F32, &up));
        let part = |data| MatrixPart { data, dtype: Dtype::F32, outputs: n, bias: None };
        let mut first = None;
        for cpu in machines() {
            let matrix = Matrix::pack_gated(&cpu, part(&gate_bytes), part(&up_bytes), k);
            let mut out = Rows::default();
            linear(&cpu, &rows(m, k, &x), &matrix, Epilogue::Store, &mut out);
            for i in 0..m {
                for j in 0..n {
                    let dot = |w: &[f32]| (0..k).map(|c| f64::from(x[i * k + c]) * f64::from(w[j * k + c])).sum::<f64>();
                    let want = dot(&gate) / (1.0 + (-dot(&gate)).exp()) * dot(&up);
                    let got = f64::from(out.row(i)[j]);
                    prop_assert!((got - want).abs() < 1e-4 * (1.0 + want.abs()), "{} {got} {want}", cpu.isa());
                }
            }
            let got = bits(out.data());
            prop_assert_eq!(first.get_or_insert(got.clone()), &got, "{}", cpu.isa());
        }
    }

    #[test]
    fn attention_over_pages(
        spans in prop::collection::vec((0u32..150, 1usize..40), 1..4),
        dim in 1usize..80,
        group in 1usize..5,
        kv_heads in 1usize..4,
        window in prop::option::of(1u32..90),
        page_tokens in prop::sample::select(vec![1u32, 4, 16, 48]),
        dtype in prop::sample::select(vec![KvDtype::F32, KvDtype::F16, KvDtype::Bf16]),
        seed: u64,
    ) {
        let heads = Heads { heads: group * kv_heads, kv_heads, head_dim: dim, scale: 0.3, window };
        check_attention(&heads, &spans, page_tokens, dtype, seed);
    }
}

#[test]
fn wide_products() {
    // More inputs than one pass takes, and more rows than one block.
    for m in [1, 2, 8, 13, 14, 15, 300] {
        check_product(m, 65, 2500, m as u64, Dtype::Bf16, true, true);
    }
}

fn check_product(m: usize, n: usize, k: usize, seed: u64, dtype: Dtype, bias: bool, add: bool) {
    let weights = encode(dtype, &numbers(seed, n * k));
    let biases = encode(Dtype::F32, &numbers(seed ^ 1, n));
    let (x, before) = (numbers(seed ^ 2, m * k), numbers(seed ^ 3, m * n));
    // Two parts with a seam somewhere inside a panel.
    let seam = n / 3;
    let cut = |data: &[u8], size: usize, from: usize, to: usize| data[from * size..to * size].to_vec();
    let parts = [(0, seam), (seam, n)].map(|(from, to)| {
        let size = dtype.size_bytes();
        (cut(&weights, size * k, from, to), cut(&biases, 4, from, to), to - from)
    });
    let mut first: Option<Vec<u32>> = None;
    for cpu in machines() {
        let parts: Vec<MatrixPart<'_>> = parts
            .iter()
            .map(|(data, b, outputs)| MatrixPart {
                data,
                dtype,
                outputs: *outputs,
                bias: bias.then_some((b.as_slice(), Dtype::F32)),
            })
            .collect();
        let matrix = Matrix::pack(&cpu, &parts, k);
        let mut unpacked = vec![0.0; k];
        matrix.unpack_row(n - 1, &mut unpacked);
        assert!((0..k).all(|c| unpacked[c] == read_f32(dtype, &weights, (n - 1) * k + c)));
        let epilogue = if add { Epilogue::Add } else { Epilogue::Store };
        let mut out = rows(m, n, &before);
        linear(&cpu, &rows(m, k, &x), &matrix, epilogue, &mut out);
        for i in 0..m {
            let mut alone = rows(1, n, &before[i * n..(i + 1) * n]);
            linear(&cpu, &rows(1, k, &x[i * k..(i + 1) * k]), &matrix, epilogue, &mut alone);
            assert_eq!(bits(alone.data()), bits(out.row(i)), "{} row {i} alone", cpu.isa());
            for j in 0..n {
                let dot =
                    |c: usize| f64::from(x[i * k + c]) * f64::from(read_f32(dtype, &weights, j * k + c));
                let mut want: f64 = (0..k).map(dot).sum();
                if bias {
                    want += f64::from(read_f32(Dtype::F32, &biases, j));
                }
                if add {
                    want += f64::from(before[i * n + j]);
                }
                let got = f64::from(out.row(i)[j]);
                assert!(
                    (got - want).abs() < 1e-4 * (k as f64).sqrt(),
                    "{} at {i}, {j}: {got} for {want}",
                    cpu.isa()
                );
            }
        }
        let got = bits(out.data());
        assert_eq!(first.get_or_insert(got.clone()), &got, "{}", cpu.isa());
    }
}

fn check_attention(heads: &Heads, spans: &[(u32, usize)], page_tokens: u32, dtype: KvDtype, seed: u64) {
    let lengths: Vec<usize> = spans.iter().map(|(start, tokens)| *start as usize + tokens).collect();
    let shape = KvShape {
        layers: 2,
        kv_heads: heads.kv_heads as u32,
        head_dim: heads.head_dim as u32,
        page_tokens,
        chunk_tokens: page_tokens,
        dtype,
    };
    let width = heads.qkv_width();
    // All tokens of all sequences, of which a step computes the last ones.
    let all: Vec<Vec<f32>> =
        lengths.iter().enumerate().map(|(i, len)| numbers(seed ^ i as u64, len * width)).collect();
    let mut first: Option<Vec<u32>> = None;
    for cpu in machines() {
        let (mut kv, tables) = pages_of_nan(shape, &lengths);
        for ((all, table), (start, _)) in all.iter().zip(&tables).zip(spans) {
            let past = Span { row: 0, tokens: *start as usize, start: 0, pages: table };
            let qkv = rows(past.tokens, width, &all[..past.tokens * width]);
            store_kv(&cpu, heads, LayerIdx(1), &qkv, &[past], &mut kv);
        }
        let mut new = Vec::new();
        let mut step = Vec::new();
        for ((all, table), (start, tokens)) in all.iter().zip(&tables).zip(spans) {
            step.push(Span { row: new.len() / width, tokens: *tokens, start: *start, pages: table });
            new.extend_from_slice(&all[*start as usize * width..]);
        }
        let qkv = rows(new.len() / width, width, &new);
        store_kv(&cpu, heads, LayerIdx(1), &qkv, &step, &mut kv);
        let mut out = Rows::default();
        attention(&cpu, heads, LayerIdx(1), &qkv, &step, &kv, &mut out);
        for (span, all) in step.iter().zip(&all) {
            for t in 0..span.tokens {
                let want = attend_plainly(heads, all, span.start as usize + t, dtype);
                for (got, want) in out.row(span.row + t).iter().zip(&want) {
                    assert!((f64::from(*got) - want).abs() < 2e-5, "{}: {got} for {want}", cpu.isa());
                }
            }
            // The last token alone, as in decode.
            let last = span.tokens - 1;
            let one = Span { row: 0, tokens: 1, start: span.start + last as u32, pages: span.pages };
            let mut alone = Rows::default();
            let qkv = rows(1, width, qkv.row(span.row + last));
            attention(&cpu, heads, LayerIdx(1), &qkv, &[one], &kv, &mut alone);
            assert_eq!(bits(alone.data()), bits(out.row(span.row + last)), "{} alone", cpu.isa());
        }
        let got = bits(out.data());
        assert_eq!(first.get_or_insert(got.clone()), &got, "{}", cpu.isa());
    }
}

/// Pages full of NaN, handed out from the end, so that a touch of what was not written shows.
fn pages_of_nan(shape: KvShape, lengths: &[usize]) -> (KvPages, Vec<Vec<PageId>>) {
    let counts: Vec<u32> = lengths.iter().map(|len| shape.pages(*len as u32)).collect();
    let total: u32 = counts.iter().sum();
    let mut kv = KvPages::new(shape, total).unwrap();
    for layer in 0..shape.layers {
        for page in 0..total {
            for part in 0..2 * shape.kv_heads {
                kv.head_mut(LayerIdx(layer), PageId(page), part / 2, part % 2 == 1).fill(0xff);
            }
        }
    }
    let mut free = (0..total).rev().map(PageId);
    let tables = counts.iter().map(|count| free.by_ref().take(*count as usize).collect()).collect();
    (kv, tables)
}

fn attend_plainly(heads: &Heads, qkv: &[f32], position: usize, dtype: KvDtype) -> Vec<f64> {
    let (dim, width) = (heads.head_dim, heads.qkv_width());
    let stored = |x: f32| match dtype {
        KvDtype::F32 => f64::from(x),
        KvDtype::F16 => f16::from_f32(x).to_f64(),
        KvDtype::Bf16 => bf16::from_f32(x).to_f64(),
    };
    let from = heads.window.map_or(0, |w| (position + 1).saturating_sub(w as usize));
    let mut out = Vec::new();
    for head in 0..heads.heads {
        let kv_head = head / (heads.heads / heads.kv_heads);
        let q = &qkv[position * width + head * dim..][..dim];
        let part = |at: usize, kind: usize| {
            &qkv[at * width + (heads.heads + kind * heads.kv_heads + kv_head) * dim..][..dim]
        };
        let scores: Vec<f64> = (from..=position)
            .map(|at| {
                let dot: f64 = q.iter().zip(part(at, 0)).map(|(q, k)| f64::from(*q) * stored(*k)).sum();
                dot * f64::from(heads.scale)
            })
            .collect();
        let peak = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - peak).exp()).collect();
        let total: f64 = weights.iter().sum();
        for d in 0..dim {
            let sum: f64 = weights.iter().enumerate().map(|(i, w)| w * stored(part(from + i, 1)[d])).sum();
            out.push(sum / total);
        }
    }
    out
}

#[test]
fn norms() {
    for width in [1, 15, 16, 64, 333] {
        let (x, weight) = (numbers(width as u64, 3 * width), numbers(7, width));
        let mut first: Option<Vec<u32>> = None;
        for cpu in machines() {
            let mut out = Rows::default();
            rms_norm(&cpu, &rows(3, width, &x), &weight, 1e-5, &mut out);
            for i in 0..3 {
                let row = &x[i * width..(i + 1) * width];
                let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
                for j in 0..width {
                    let want = f64::from(row[j]) / (mean + 1e-5).sqrt() * f64::from(weight[j]);
                    assert!((f64::from(out.row(i)[j]) - want).abs() < 1e-5 * (1.0 + want.abs()));
                }
            }
            let got = bits(out.data());
            assert_eq!(first.get_or_insert(got.clone()), &got, "{}", cpu.isa());
        }
    }
}
