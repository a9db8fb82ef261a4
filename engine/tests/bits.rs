//! The same bits however a sequence is computed: in chunks, in company, on other threads or instruction
//! sets, from KV that was packed and scattered.

mod models;

use std::path::PathBuf;
use tandem_engine::{CpuEngine, Engine, Isa, LoadOptions, Progress, Sequence};
use tandem_kernels::{KvPages, pack_layer, scatter_layer};
use tandem_proto::ids::{ChunkIdx, LayerIdx, PageId, TokenId};
use tandem_proto::layout::KvDtype;

fn tiny() -> PathBuf {
    models::find("tiny").expect("models/tiny is part of the repository")
}

fn prompt(seed: u32, len: usize) -> Vec<TokenId> {
    (0..len as u32)
        .map(|i| TokenId((i.wrapping_mul(2_654_435_761).wrapping_add(seed * 97) >> 7) % 4096))
        .collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    assert!(!logits.is_empty());
    logits.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn chunks_change_nothing() {
    for kv_dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16] {
        let mut engine =
            models::load_with(&tiny(), LoadOptions { kv_dtype, threads: 2, ..LoadOptions::default() });
        let tokens = prompt(1, 700);
        let whole = bits(&models::last_logits(&mut engine, &tokens, usize::MAX));
        for chunk in [1, 7, 16, 100, 512] {
            let chunked = bits(&models::last_logits(&mut engine, &tokens, chunk));
            assert!(chunked == whole, "chunks of {chunk} with KV as {kv_dtype:?}");
        }
    }
}

#[test]
fn threads_change_nothing() {
    let tokens = prompt(2, 400);
    let logits = |threads| {
        let mut engine = models::load_with(&tiny(), LoadOptions { threads, ..LoadOptions::default() });
        bits(&models::last_logits(&mut engine, &tokens, 256))
    };
    let one = logits(1);
    assert!(logits(2) == one);
    assert!(logits(3) == one);
}

#[test]
fn instruction_sets_change_nothing() {
    let tokens = prompt(3, 150);
    let mut first = None;
    for isa in Isa::available() {
        let mut engine =
            models::load_with(&tiny(), LoadOptions { isa, threads: 2, ..LoadOptions::default() });
        let logits = bits(&models::last_logits(&mut engine, &tokens, 128));
        assert!(*first.get_or_insert(logits.clone()) == logits, "{isa}");
    }
}

/// A sequence in the middle of eight others, which decode, start or go on, gets what it gets alone.
#[test]
fn company_changes_nothing() {
    let mut engine = models::load(&tiny());
    let shape = engine.info().kv;
    let lengths = [1usize, 3, 16, 40, 64, 200, 65, 130, 333];
    let prompts: Vec<Vec<TokenId>> =
        lengths.iter().enumerate().map(|(i, len)| prompt(i as u32, *len)).collect();
    let alone: Vec<Vec<u32>> =
        prompts.iter().map(|p| bits(&models::last_logits(&mut engine, p, 512))).collect();

    let counts: Vec<u32> = lengths.iter().map(|len| shape.pages(*len as u32)).collect();
    let pool = counts.iter().sum::<u32>() + 1;
    let mut kv = KvPages::new(shape, pool).unwrap();
    let mut first = 0;
    let tables: Vec<Vec<PageId>> = counts
        .iter()
        .map(|count| {
            first += count;
            models::pages(pool, first - count, *count)
        })
        .collect();
    // How much of each is computed before the step that is looked at.
    let before: Vec<usize> =
        lengths.iter().enumerate().map(|(i, len)| [0, len - 1, len / 2][i % 3]).collect();
    for ((prompt, table), before) in prompts.iter().zip(&tables).zip(&before) {
        if *before > 0 {
            let past = Sequence { tokens: &prompt[..*before], start: 0, pages: table, logits: false };
            let logits = engine.step(&[past], &mut kv, &mut |_, _| ()).unwrap();
            assert_eq!(logits.rows().len(), 0);
        }
    }
    let batch: Vec<Sequence<'_>> = prompts
        .iter()
        .zip(&tables)
        .zip(&before)
        .map(|((prompt, table), before)| Sequence {
            tokens: &prompt[*before..],
            start: *before as u32,
            pages: table,
            logits: true,
        })
        .collect();
    let mut layers = Vec::new();
    let logits = engine.step(&batch, &mut kv, &mut |progress, _| layers.push(progress)).unwrap();
    assert_eq!(layers, (0..shape.layers).map(|layer| Progress::Layer(LayerIdx(layer))).collect::<Vec<_>>());
    for (index, (row, alone)) in logits.rows().zip(&alone).enumerate() {
        assert!(bits(row) == *alone, "sequence {index}");
    }
}

/// KV that went from one node's pages, packed in chunks as each layer was done, to another's.
#[test]
fn a_handoff_changes_nothing() {
    let (mut prefill, mut decode) = (models::load(&tiny()), models::load(&tiny()));
    assert_eq!(prefill.info().fingerprint, decode.info().fingerprint);
    let shape = prefill.info().kv;
    let tokens = prompt(9, 600);
    let (prefix, last) = tokens.split_at(tokens.len() - 1);
    let whole = bits(&models::last_logits(&mut prefill, &tokens, 512));

    let count = shape.pages(tokens.len() as u32);
    let (from, to) = (models::pages(61, 3, count), models::pages(97, 11, count));
    let (mut source, mut target) = (KvPages::new(shape, 61).unwrap(), KvPages::new(shape, 97).unwrap());
    let len = prefix.len() as u32;
    let sequence = Sequence { tokens: prefix, start: 0, pages: &from, logits: false };
    let mut sent = Vec::new();
    let mut pack = |progress, kv: &mut KvPages| {
        let Progress::Layer(layer) = progress else { unreachable!("a CPU waits for nothing") };
        for chunk in (0..shape.chunks(len)).map(ChunkIdx) {
            let span = shape.chunk_span(chunk, len);
            let mut packed = vec![0; (span.end - span.start) as usize * shape.layer_token_bytes()];
            let pages = &from[shape.chunk_pages(chunk, len)];
            let digest = pack_layer(kv, layer, pages, span.end - span.start, &mut packed).unwrap();
            sent.push((layer, chunk, packed, digest));
        }
    };
    prefill.step(&[sequence], &mut source, &mut pack).unwrap();
    for (layer, chunk, packed, digest) in sent {
        let span = shape.chunk_span(chunk, len);
        let pages = &to[shape.chunk_pages(chunk, len)];
        let landed = scatter_layer(&mut target, layer, pages, span.end - span.start, &packed).unwrap();
        assert_eq!(landed, digest);
    }
    let sequence = Sequence { tokens: last, start: len, pages: &to, logits: true };
    let logits = decode.step(&[sequence], &mut target, &mut |_, _| ()).unwrap();
    assert!(bits(logits.rows().next().unwrap()) == whole);
}

#[test]
fn fingerprints_tell_kv_apart() {
    let load = |kv_dtype| {
        CpuEngine::load(&tiny(), LoadOptions { kv_dtype, threads: 1, ..Default::default() }).unwrap()
    };
    let (a, b, c) = (load(KvDtype::F32), load(KvDtype::F32), load(KvDtype::F16));
    assert_eq!(a.info().fingerprint, b.info().fingerprint);
    assert_ne!(a.info().fingerprint, c.info().fingerprint);
}
