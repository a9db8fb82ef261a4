//! Steps that cannot be: each is refused with its reason, and leaves the pages alone.

mod models;

use tandem_engine::single::{GenRequest, SingleError, SingleProcess};
use tandem_engine::{Engine, EngineError, MAX_STEP_TOKENS, Sequence};
use tandem_kernels::KvPages;
use tandem_proto::ids::{ChoiceIdx, PageId, TokenId};
use tandem_proto::layout::KvShape;
use tandem_proto::wire::{Finish, SamplingParams};

#[test]
fn bad_steps_are_refused() {
    let mut engine = models::load(&models::find("tiny").expect("models/tiny"));
    let shape = engine.info().kv;
    let mut kv = KvPages::new(shape, 8).unwrap();
    let table: Vec<PageId> = (0..8).map(PageId).collect();
    let tokens = vec![TokenId(7); MAX_STEP_TOKENS + 1];
    let good = Sequence { tokens: &tokens[..20], start: 0, pages: &table[..2], logits: true };
    let outside = [PageId(0), PageId(8)];
    let repeated = [PageId(3), PageId(3)];
    let unknown = [TokenId(5), TokenId(4096)];

    let mut check = |batch: &[Sequence<'_>], expected: EngineError| {
        let mut layers = 0;
        let refused = engine.step(batch, &mut kv, &mut |_, _| layers += 1);
        assert_eq!(refused.err(), Some(expected));
        assert_eq!(layers, 0);
    };
    check(&[good, Sequence { tokens: &[], ..good }], EngineError::NoTokens { sequence: 1 });
    let token = TokenId(4096);
    check(
        &[Sequence { tokens: &unknown, ..good }],
        EngineError::NoSuchToken { sequence: 0, token, vocab_size: 4096 },
    );
    check(
        &[Sequence { tokens: &tokens[..33], ..good }],
        EngineError::PageTable { sequence: 0, pages: 2, needed: 3, end: 33 },
    );
    check(
        &[Sequence { start: 8190, ..good }],
        EngineError::TooLong { sequence: 0, end: 8210, max_positions: 8192 },
    );
    check(
        &[Sequence { start: u32::MAX, ..good }],
        EngineError::TooLong { sequence: 0, end: u64::from(u32::MAX) + 20, max_positions: 8192 },
    );
    check(
        &[Sequence { pages: &outside, ..good }],
        EngineError::NoSuchPage { sequence: 0, page: PageId(8), pages: 8 },
    );
    check(&[Sequence { pages: &repeated, ..good }], EngineError::PageShared { page: PageId(3) });
    check(&[good, good], EngineError::PageShared { page: PageId(0) });
    check(&[Sequence { tokens: &tokens, ..good }], EngineError::StepTooLarge { tokens: MAX_STEP_TOKENS + 1 });
    let mut other = KvPages::new(KvShape { page_tokens: 32, ..shape }, 8).unwrap();
    let refused = engine.step(&[good], &mut other, &mut |_, _| ());
    assert_eq!(refused.err(), Some(EngineError::WrongPages));

    // Shared pages that are only read are fine, and so is an empty step.
    assert_eq!(engine.step(&[], &mut kv, &mut |_, _| ()).unwrap().rows().len(), 0);
    engine.step(&[Sequence { tokens: &tokens[..16], ..good }], &mut kv, &mut |_, _| ()).unwrap();
    let (left, right) = ([PageId(0), PageId(1)], [PageId(0), PageId(2)]);
    let next = |pages| Sequence { tokens: &tokens[..1], start: 16, pages, logits: true };
    let logits = engine.step(&[next(&left), next(&right)], &mut kv, &mut |_, _| ()).unwrap();
    let rows: Vec<&[f32]> = logits.rows().collect();
    assert_eq!(rows[0], rows[1]);
}

fn request(prompt: Vec<TokenId>, max_tokens: u32) -> GenRequest {
    let sampling = SamplingParams { temperature: 0.8, seed: 3, ..SamplingParams::default() };
    GenRequest { prompt, sampling, choice: ChoiceIdx(0), max_tokens, stop_tokens: vec![TokenId(1)] }
}

/// More requests than the pool holds at once give what each gives alone, and every page comes back.
#[test]
fn requests_wait_for_pages() {
    let engine = models::load(&models::find("tiny").expect("models/tiny"));
    let kv = KvPages::new(engine.info().kv, 20).unwrap();
    let mut single = SingleProcess::new(engine, kv, 64);
    let requests: Vec<GenRequest> = (1..20u32)
        .map(|i| request((0..i * 7).map(|t| TokenId(6 + t * i % 900)).collect(), 5 + i % 13))
        .collect();
    let together = single.generate(&requests).unwrap();
    for (request, result) in requests.iter().zip(&together) {
        let alone = single.generate(std::slice::from_ref(request)).unwrap();
        assert_eq!(alone[0], *result);
        match result.finish {
            Finish::Stop => assert_eq!(result.tokens.last().map(|s| s.token), Some(TokenId(1))),
            Finish::Length => assert_eq!(result.tokens.len(), request.max_tokens as usize),
        }
    }
    let refused = |single: &mut SingleProcess<_>, r: GenRequest| {
        matches!(single.generate(&[r]), Err(SingleError::Request { request: 0, .. }))
    };
    assert!(refused(&mut single, request(Vec::new(), 5)));
    assert!(refused(&mut single, request(vec![TokenId(9)], 0)));
    assert!(refused(&mut single, request(vec![TokenId(9); 400], 1)));
    assert!(single.generate(&[request(vec![TokenId(5000)], 1)]).is_err());
    // 320 tokens fill the pool; they fit only if all pages came back.
    single.generate(&[request(vec![TokenId(9); 320], 1)]).unwrap();
}
